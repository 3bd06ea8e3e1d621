"""Merge: base + adapters into one plain `transformers` folder, a tensor at a time, with a receipt.

    aletheia merge --profile tiny        make merge PROFILE=tiny
    aletheia merge --profile tiny --set merge_config.adapters=[EXP-2026-11-20-001]        this one too
    aletheia merge --profile tiny --resume        goes on with the files that an interrupted merge had finished

Takes the newest adapter: DPO's, or SFT's where none or only an older DPO stands; those of `merge_config.adapters` are
added to it, each at its own scale. What an adapter may be: `merging/lora.py`; the arithmetic: `merging/update.py`. Writes
`checkpoints/EXP-…/model` with tokenizer, template, chat contract and a generation_config that stops at the end-of-turn;
the link is `<name>-merged`. The receipt in the record (`merging/receipt.py`): every merged tensor read back and compared
with base + adapters, every other tensor unchanged bit for bit, and the logits of real prompts against plain peft.

Until all of it holds, the folder is `model.partial`; it gets its name in one step, once it is on the disk. Beside it
`merge.json` names the files that are whole, by their hashes; a resume checks these and writes the others. An adapter
trained over a quantised base is merged into the weights as stored; a base that is itself stored quantised is refused.
"""

import csv
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline import imports
from pipeline.beside import beside, in_a_process
from pipeline.chat import PROBES, Chat
from pipeline.data.rows import Message, PreferencePair
from pipeline.errors import UserError
from pipeline.merging import lora
from pipeline.merging.further import Taken, further, taken
from pipeline.merging.receipt import Changed, NotMerged, WeightCheck, check_logits
from pipeline.merging.shards import Journal, rewrite, shards, size, tensors
from pipeline.merging.update import Adapter, together
from pipeline.merging.writer import sync
from pipeline.model import Base, check_trained_on, find_base
from pipeline.progress import Progress, say
from pipeline.records import find
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Artifact, Input
from pipeline.stage import Job, Source, take
from pipeline.training_data import PARTS, recorded

PROMPTS_CHECKED = 4
TABLE = "modules.csv"  # beside the record: what each tensor changed by


@dataclass
class Merge:
    name: ClassVar[str] = "merge"

    job: Job
    base: Base
    chat: Chat
    source: Source
    taken: list[Taken]  # the source's, and the further ones
    adapter: Adapter
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source = take(job, find.latest_first(job.workspace, job.profile.id, ["dpo", "sft"]), "adapter")
        base, first = find_base(job.workspace, job.profile), taken(source)
        if base.stored_quantised:
            raise job.profile.error("base_model", f"{base.name} is stored quantised", "the model it was quantised from")
        if job.own_process and first.trained_over == "none" and not job.config.merge_config.adapters:
            imports.leave_out("bitsandbytes")
        identity = beside(base.identity)  # reads all of the weights, while the libraries are imported
        if job.own_process:
            with imports.left_out("scipy"):  # of transformers, losses that find objects in images have use for it
                import peft  # noqa: F401
        chat = base.chat()
        check_trained_on(base, chat, job.workspace, source, identity)
        all_taken = [first, *further(job, base, chat, first)]
        # what peft builds to say which layers it is on would leave its memory here, the more the more layers there are
        adapters = in_a_process(
            lambda: [lora.read(one.folder, base.folder, base.trust_remote_code) for one in all_taken]
        )
        adapter = together(adapters, [one.name for one in all_taken])
        return cls(job, base, chat, source, all_taken, adapter, [one.input for one in all_taken if one.input])

    @property
    def trained_over(self) -> str:
        """The base's quantization in training: `auto` is what was chosen."""
        return self.taken[0].trained_over

    def plan(self) -> list[tuple[str, str]]:
        names = " + ".join(one.name for one in self.taken)
        return [
            ("adapter", f"{names}, {self.adapter.kind} on {len(self.adapter.updates)} modules"),
            ("base", f"{self.base.name} as stored; training saw it with quantization {self.trained_over}"),
            ("arithmetic", self.job.config.merge_config.arithmetic),
            ("writes", f"{size(self.base.folder) / 1e9:.2f} GB"),
        ]

    def run(self, record: Record) -> None:
        arithmetic = self.job.config.merge_config.arithmetic
        # its hash was compared with the source's a moment ago
        identity = {"name": self.base.name, "revision": self.base.revision, "sha256": self.taken[0].base}
        record.facts.lineage.base, record.facts.lineage.inputs = identity, self.inputs
        record.facts.data = {
            "contract": self.chat.contract.sha256,
            "template": self.chat.contract.facts(),
            "adapters": [one.facts() for one in self.taken],
        }
        folder, partial = record.output / "model", record.output / "model.partial"
        journal = Journal(record.output / "merge.json", self._task())
        timing: dict[str, float] = {}

        self._begin(folder, partial, journal)
        check = WeightCheck(self.base.folder, partial, self.adapter, arithmetic)
        changes = {name: self._change(name) for name in self.adapter.updates}
        try:
            with (
                _timed(timing, "merging_and_checking_seconds"),
                Progress("merging and checking", len(tensors(self.base.folder)), "tensor") as progress,
                closing(rewrite(self.base.folder, partial, changes, journal)) as on_disk,
            ):
                for _ in check.each(on_disk):
                    progress.advance()
            receipt = check.receipt()
            record.facts.data["generation_config"] = self._write_the_rest(partial, set(journal.files))
            with _timed(timing, "comparing_logits_seconds"):
                receipt |= self._check_logits(partial, receipt["rounding_share_of_update"])
        except NotMerged:  # nothing of it is gone on with
            journal.forget()
            shutil.rmtree(partial)
            raise
        record.facts.artifacts = _artifacts(record, partial, folder, journal.files)
        _put(partial, folder)
        journal.forget()

        record.facts.results = {
            "receipt": receipt,
            "each_tensor": record.workspace.shown(_write_table(record.folder / TABLE, check.changed())),
            "timing": timing,
        }
        link = record.link(f"{self.job.config.name}-merged", folder)
        say(f"merged {self.adapter.kind}, {receipt['modules']} modules; within rounding: all; {link}")

    def _task(self) -> str:
        """What the merged bytes depend on. A merge of anything else goes on with none of them."""
        return json.dumps(
            {
                "base": self.taken[0].base,
                "adapters": [one.sha256 for one in self.taken],
                "arithmetic": self.job.config.merge_config.arithmetic,
                "torch": version("torch"),
            }
        )

    def _change(self, name: str) -> Any:
        arithmetic = self.job.config.merge_config.arithmetic
        return lambda weight, out: self.adapter.updates[name].merged(weight, arithmetic, out)

    def _begin(self, folder: Path, partial: Path, journal: Journal) -> None:
        """An empty folder to write into; on a resume, one with the files that are whole."""
        if self.job.resume:
            if folder.is_dir() and not partial.is_dir():  # killed after it had its name, before the record was closed
                folder.rename(partial)
            journal.take_up(partial)
            say(f"goes on with {len(journal.files)} of {len(shards(self.base.folder))} files, whole by their hashes")
        partial.mkdir(exist_ok=True)
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in journal.files:
                path.unlink()
        there = sum((partial / name).stat().st_size for name in journal.files)
        needed, free = size(self.base.folder) - there, shutil.disk_usage(partial).free
        if free < needed * 1.05:
            raise UserError(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free", where=str(partial))

    def _write_the_rest(self, folder: Path, weights: set[str]) -> dict[str, Any]:
        """Configuration, tokenizer, template and contract; generation stops at the end-of-turn that was trained."""
        from transformers import AutoConfig

        AutoConfig.from_pretrained(self.base.folder, trust_remote_code=self.base.trust_remote_code).save_pretrained(
            folder
        )
        self.chat.tokenizer.save_pretrained(folder)
        self.chat.contract.save(folder)
        tokenizer, name = self.chat.tokenizer, "generation_config.json"
        base = self.base.folder / name
        carried: dict[str, Any] = json.loads(base.read_text("utf-8")) if base.exists() else {}
        carried.pop("_from_model_config", None)  # it is what we say now, not what transformers derived
        set_here = {
            "eos_token_id": self.chat.end_of_turn_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        # as it is: transformers refuses to write what some published models have in it
        (folder / name).write_text(json.dumps(carried | set_here, indent=2) + "\n", "utf-8")
        for path in folder.rglob("*"):
            if path.name not in weights:
                sync(path)
        sync(folder)
        return {"set": set_here, "carried_over": {k: v for k, v in carried.items() if k not in set_here}}

    def _check_logits(self, merged: Path, rounding_share: float) -> dict[str, Any]:
        if not self.job.config.merge_config.check_logits:
            return {"logits": "not compared: merge_config.check_logits is false"}
        prompts = [self.chat.prompt(messages) for messages in self._prompts()]
        over = {one.trained_over for one in self.taken}
        adapters = [one.folder for one in self.taken]
        return check_logits(
            self.base, merged, adapters, prompts, rounding_share, over.pop() if len(over) == 1 else "none"
        )

    def _prompts(self) -> list[Sequence[Message]]:
        """Of rows that its training held out, or trained; of the contract's own conversations where those are gone."""
        facts = self.source.facts
        kind = next(kind for kind, stage in PARTS.items() if stage == facts.stage)
        try:
            for part in ("held_out", "train"):
                rows: list[Any] = recorded(self.job.workspace, self.job.config, self.source.file, facts, part, kind)
                if rows:
                    found = rows[:PROMPTS_CHECKED]
                    return [row.prompt if kind is PreferencePair else row.messages[:-1] for row in found]
        except UserError as error:
            say(f"note: logits are compared on prompts of the chat contract: {error}")
        return [probe[:-1] for probe in PROBES]


def _artifacts(record: Record, partial: Path, folder: Path, known: dict[str, str]) -> list[Artifact]:
    """The files by the names they will have; the hashes of the weights are known from writing them."""
    shown = record.workspace.shown
    return [
        Artifact(
            path=shown(folder / path.relative_to(partial)),
            sha256=known.get(path.name) or find.sha256(path),
            bytes=path.stat().st_size,
        )
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    ]


def _put(partial: Path, folder: Path) -> None:
    """Gives the whole folder its name. What a run of this record left there before is replaced."""
    old = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        say(f"note: replaces {folder}")
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_table(path: Path, changed: Sequence[Changed]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Changed)])
        table.writeheader()
        table.writerows(asdict(one) for one in changed)
    return path


@contextmanager
def _timed(timing: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timing[what] = round(time.perf_counter() - start, 2)
