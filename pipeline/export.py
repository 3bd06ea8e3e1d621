"""Export: the merged model as GGUF files for llama.cpp, each with its size and what it lost.

    aletheia export gguf --profile tiny        make setup-llamacpp, once, before it

Writes `checkpoints/EXP-…/gguf/{f16,q8_0,q4_k_m}.gguf`, as `export_config.formats` says; the link is `<name>-gguf`. Kept
under another name until all of them are whole. Checked: that llama.cpp splits text as the model's tokenizer does, and
that the files carry its chat template and stop at its end-of-turn. Measured, on rows that training held out: perplexity,
KL from the merged model and how often both put the same token first, each with its interval over rows.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from pipeline.chat import PROBES, Chat, Contract
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.encoded import Encoded
from pipeline.errors import StageFailed, UserError
from pipeline.merging.shards import size
from pipeline.model import Base, find_base, load_model
from pipeline.progress import say
from pipeline.records import find
from pipeline.records.find import artifacts
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take
from pipeline.to_gguf.llamacpp import LlamaCpp, Reader, check_metadata, compute_threads
from pipeline.to_gguf.loss import check_conversion, measure, table, widest
from pipeline.training_data import PARTS, recorded
from pipeline.workspace import Workspace

FOLDER = "gguf"
# Of llama.cpp's pre-tokenizers one of each kind, the plainest first.
PRE_TOKENIZERS = (
    "gpt-2", "llama-bpe", "qwen2", "deepseek-coder", "deepseek-llm", "deepseek-v3", "gpt-4o", "tekken", "starcoder",
    "falcon", "qwen35", "bloom", "viking", "chatglm-bpe", "glm4", "seed-coder", "bailingmoe", "kimi-k2", "superbpe",
)  # fmt: skip
TEXTS = (
    "", " ", "a", " a", "Hello, world!", "  two  spaces  ", "\ttabs\t\tand\n\n\nlines\n", "line\r\nline\r\n\r\n",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n", "SELECT count(*) FROM t WHERE a >= 10 AND b != 'x';",
    "I'm, you're, he'll, we've, they'd, it's; I'M, YOU'RE", "1 12 123 1234 12345 3.14159 0x1F 1_000_000 2026-11-20",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE", "a.b.c(d)[e]{f}<g>&h|i^j~k%l$m#n@o!p?q;r:s,t",
    "==== ---- //// **** ...... ((((", "naïve façade, Straße, Ærøskøbing, ſ", "你好，世界。1234", "Привет, мир! Ещё",
    "🚀 🙂‍↕️ 👩‍👩‍👧 x²", "non\u00a0breaking\u2003space\u200b", "https://example.org/a?b=c&d=%20#e", "e\u0301 ﬁ ½ Ⅳ",
)  # fmt: skip


@dataclass
class Export:
    name: ClassVar[str] = "export"

    job: Job
    llama: LlamaCpp
    base: Base
    chat: Chat
    source: Source
    vocabulary: int
    rows: list[Encoded]
    measured_on: str
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        llama = LlamaCpp.required()
        source = take(job, ["merge"], "model")
        base = find_base(job.workspace, job.profile)
        from transformers import AutoConfig, AutoTokenizer

        name = job.workspace.shown(source.output)
        chat = Chat(AutoTokenizer.from_pretrained(source.output, trust_remote_code=base.trust_remote_code), name)
        if Contract.load(source.output) != chat.contract:
            raise UserError("its chat template is not the one it was trained with", where=name)
        if not isinstance(chat.tokenizer.chat_template, str):
            raise UserError("has several chat templates, and a GGUF file carries one", where=name)
        config = AutoConfig.from_pretrained(source.output, trust_remote_code=base.trust_remote_code)
        architecture = (config.architectures or ["?"])[0]
        if not llama.converts(architecture):
            raise UserError(f"llama.cpp's converter does not know {architecture}", where=name)
        needed, free = 2 * _stored(source), shutil.disk_usage(source.output).free
        if free < needed:
            raise UserError(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free", where=name)
        rows, measured_on = _rows(job, source, chat)
        vocabulary = config.get_text_config().vocab_size
        return cls(job, llama, base, chat, source, vocabulary, rows, measured_on, [source.input])

    @property
    def formats(self) -> list[str]:
        return list(self.job.config.export_config.formats)

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("model", f"{self.source.file.id}, {_stored(self.source) / 1e9:.2f} GB"),
            ("formats", ", ".join(self.formats)),
            ("measured on", f"{len(self.rows)} {self.measured_on}"),
        ]

    def run(self, record: Record) -> None:
        record.facts.lineage.base = self.base.identity()
        record.facts.data = {"contract": self.chat.contract.sha256, "template": self.chat.contract.facts()}
        folder, partial = record.output / FOLDER, record.output / f"{FOLDER}.partial"
        for left in (folder, partial):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        with TemporaryDirectory() as outside:
            self._export(record, as_listed(self.source, record.workspace, Path(outside)), folder, partial)

    def _export(self, record: Record, merged: Path, folder: Path, partial: Path) -> None:
        whole = partial / "f16.gguf"
        tokenizer = self._convert(merged, whole)
        files = {kind: partial / f"{kind}.gguf" for kind in dict.fromkeys(["f16", *self.formats])}
        notes = {kind: self._quantise(whole, file, kind) for kind, file in files.items() if file != whole}
        model = load_model(merged, widest(self.base, size(merged)))
        losses = measure(model, self.rows, self.llama, files)
        check_conversion(losses["f16"])
        results = {kind: loss.figures(losses["model"]) for kind, loss in losses.items()}
        found = {kind: {"bytes": file.stat().st_size} | notes.get(kind, {}) for kind, file in files.items()}
        if "f16" not in self.formats:
            whole.unlink()
        self.chat.contract.save(partial)
        partial.rename(folder)

        of_model = {"computed_in": str(model.dtype).removeprefix("torch."), "device": self.base.device}
        record.facts.results = {
            "tokenizer": tokenizer,
            "measured_on": self.measured_on,
            "model": {"bytes": _stored(self.source)} | of_model | results.pop("model"),
            "formats": {kind: found[kind] | results[kind] for kind in self.formats},
        }
        record.facts.artifacts = artifacts(record.workspace, folder)
        link = record.link(f"{self.job.config.name}-gguf", folder)
        for line in table(record.facts.results):
            say(line)
        say(f"exported {', '.join(self.formats)}; {link}")

    def _convert(self, model: Path, out: Path) -> dict[str, Any]:
        """Writes the file of 16-bit floats. Raises `StageFailed` when llama.cpp would split text otherwise."""
        say("converting to f16")
        end, probes = self.chat.end_of_turn_id, self._probes()
        recognised = self.llama.convert(model, out, end)
        written, pre, differing = choose_pre_tokenizer(self.llama, out, probes, recognised)
        if pre != written:
            self.llama.convert(model, out, end, pre)
        with Reader(self.llama, out) as reader:
            check_metadata(reader.facts, self.chat, self.vocabulary, out.name)
        if differing:
            say(f"note: llama.cpp splits {len(differing)} of {len(probes)} texts otherwise, such as {differing[0]!r}:")
            say("      what is served here is token ids of the trained template; other programs may give others")
        return {"pre_tokenizer": pre, "recognised": recognised, "texts": len(probes), "differing": len(differing)}

    def _quantise(self, whole: Path, out: Path, kind: str) -> dict[str, str]:
        say(f"quantising to {kind}")
        note = self.llama.quantise(whole, out, kind, compute_threads())
        return {"note": note} if note else {}

    def _probes(self) -> dict[tuple[str, bool], list[int]]:
        """Texts, with and without what is put around them, and the model's own token ids of each."""
        tokenizer = self.chat.tokenizer
        rendered = [tokenizer.decode(row.ids) for row in self.rows]
        found = {}
        for text in (*TEXTS, *rendered):
            for special in (False, True):
                found[text, special] = tokenizer(text, add_special_tokens=special)["input_ids"]
        return found


def _stored(source: Source) -> int:
    """Bytes of the weights that the merge's record names."""
    return sum(one.bytes for one in source.facts.artifacts if one.path.endswith(".safetensors"))


def as_listed(source: Source, workspace: Workspace, outside: Path) -> Path:
    """A folder of links to the files that the merge's record names: whatever else lies beside them is not the model."""
    folder = outside / source.output.name  # the name goes into the file
    for artifact in source.facts.artifacts:
        link = folder / Path(artifact.path).relative_to(workspace.shown(source.output))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(workspace.path(artifact.path).resolve())
    return folder


def _rows(job: Job, source: Source, chat: Chat) -> tuple[list[Encoded], str]:
    """The very rows that training held out: SFT's conversations, else the chosen answers of DPO's pairs."""
    limit = job.config.export_config.rows
    try:
        for kind, stage in PARTS.items():
            ancestor = find.ancestor(job.workspace, source.file, source.facts, stage)
            rows: list[Any] = recorded(job.workspace, job.config, *ancestor, "held_out", kind) if ancestor else []
            if rows and kind is Conversation:
                return [chat.conversation(row.messages) for row in rows[:limit]], "held-out conversations"
            if rows and kind is PreferencePair:
                return [chat.pair(row)[0] for row in rows[:limit]], "held-out pairs' chosen answers"
        why = "its training held no rows out"
    except UserError as error:
        why = str(error)
    say(f"note: the loss of quality is measured on two conversations of the chat contract alone: {why}")
    return [chat.conversation(probe) for probe in PROBES], "conversations of the chat contract"


def choose_pre_tokenizer(
    llama: LlamaCpp, file: Path, probes: dict[tuple[str, bool], list[int]], recognised: bool
) -> tuple[str, str, list[str]]:
    """The pre-tokenizer that the file names, that which gives the model's own token ids, and texts where it does not.

    There are none of these, unless its converter `recognised` the tokenizer and what it named for it still differs somewhere.
    Raises `StageFailed` where no pre-tokenizer of llama.cpp's fits.
    """
    with Reader(llama, file) as reader:
        written, bpe = reader.facts["tokenizer.ggml.pre"], reader.facts["tokenizer.ggml.model"] == "gpt2"
        first = _differing(reader, probes)
    if not first:
        return written, written, []
    for pre in PRE_TOKENIZERS if bpe else ():
        with Reader(llama, file, pre=pre) as reader:
            if not _differing(reader, probes):
                return written, pre, []
    if recognised:
        return written, written, first
    raise StageFailed(
        f"llama.cpp has no pre-tokenizer that splits as this model's tokenizer does: {first[0][:60]!r} gives other tokens",
        remedy="--backend transformers, which takes the merged model as it is",
    )


def _differing(reader: Reader, probes: dict[tuple[str, bool], list[int]]) -> list[str]:
    different = []
    for special in (False, True):
        texts = [text for text, of in probes if of is special]
        for text, found in zip(texts, reader.tokenize(texts, special), strict=True):
            if found != probes[text, special]:
                different.append(text)
    return different
