"""What is exported is the merged model, its tokenizer and its template; what it lost is measured; a part is never a whole."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.chat import CONTRACT_FILE, Chat
from pipeline.errors import StageFailed, UserError
from pipeline.export import Export, as_listed, choose_pre_tokenizer
from pipeline.model import load_model
from pipeline.records.file import RecordFile
from pipeline.stage import run_stage
from pipeline.to_gguf.llamacpp import LlamaCpp, Reader, check_metadata, cpu_features
from pipeline.to_gguf.loss import Loss, check_conversion, measure, table
from pipeline.workspace import INSTALLED

if TYPE_CHECKING:
    from tests.conftest import Said, Trained

needs_llamacpp = pytest.mark.skipif(LlamaCpp.find() is None, reason="llama.cpp is not installed: make setup-llamacpp")
FORMATS = ("f16", "q8_0", "q4_k_m")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment as far as it is looked at before anything runs: a stamp, and what the converter knows."""
    folder = tmp_path / "llamacpp"
    (folder / "llama.cpp" / "conversion").mkdir(parents=True)
    (folder / "llama.cpp" / "conversion" / "__init__.py").write_text('MAP = {\n    "LlamaForCausalLM": "llama",\n}\n')
    (folder / INSTALLED).write_text(json.dumps({"version": "0", "cpu": cpu_features()}))
    monkeypatch.setenv("ALETHEIA_LLAMACPP", str(folder))
    return folder


# ── Refused before there is a record ─────────────────────────────────────────────────────────────────────────────────


def test_without_llamacpp_one_line_says_what_to_do(
    trained: "Trained", aletheia: "Callable[..., Said]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALETHEIA_LLAMACPP", str(tmp_path / "nowhere"))
    said = aletheia(trained.workspace, "export", "gguf", "--profile", "small")
    assert said.code == 2 and said.out == ""
    assert said.err == "error: llama.cpp is not installed; try `make setup-llamacpp`: about ten minutes, once\n"


def test_an_interrupted_setup_is_no_environment(environment: Path) -> None:
    assert LlamaCpp.find()
    (environment / INSTALLED).write_text('{"version": "0"')
    assert LlamaCpp.find() is None
    (environment / INSTALLED).unlink()
    assert LlamaCpp.find() is None


def test_one_built_for_another_cpu_is_not_run(environment: Path) -> None:
    (environment / INSTALLED).write_text(json.dumps({"version": "0", "cpu": [*cpu_features(), "avx1024"]}))
    with pytest.raises(UserError, match="another CPU"):
        LlamaCpp.required()


def test_a_model_that_the_converter_does_not_know_is_refused(environment: Path, trained: "Trained") -> None:
    (environment / "llama.cpp" / "conversion" / "__init__.py").write_text("")
    with pytest.raises(UserError, match="does not know LlamaForCausalLM"):
        Export.prepare(trained.job())


def test_only_a_merged_model_is_taken(environment: Path, trained: "Trained") -> None:
    with pytest.raises(UserError, match="is no merge record"):
        Export.prepare(trained.job(source=trained.dpo))


def test_the_rows_are_those_that_training_held_out(environment: Path, trained: "Trained") -> None:
    facts = trained.record("sft").facts()
    assert facts
    export = Export.prepare(trained.job())
    assert len(export.rows) == facts.data["held_out"]["rows"] > 2
    assert len(Export.prepare(trained.job("export_config.rows=2")).rows) == 2
    assert dict(export.plan())["measured on"] == f"{len(export.rows)} held-out conversations"


@pytest.mark.parametrize("formats", ["[]", "[f16,f16]"])
def test_formats_are_at_least_one_and_each_once(trained: "Trained", formats: str) -> None:
    with pytest.raises(UserError, match=r"export_config\.formats: .*at least one format, and each once"):
        trained.job(f"export_config.formats={formats}")


def test_the_word_that_was_left_out_is_named(trained: "Trained", aletheia: "Callable[..., Said]") -> None:
    said = aletheia(trained.workspace, "export", "--profile", "small")
    assert said.code == 2 and said.err == "error: No such option: --profile; try aletheia export gguf --help\n"


def test_what_the_merges_record_does_not_name_is_no_part_of_the_model(
    environment: Path, copied: "Trained", tmp_path: Path
) -> None:
    export, model = Export.prepare(copied.job()), copied.output("merge")
    before, planned = load_file(model / "model.safetensors"), dict(export.plan())["model"]
    (model / "model-zz.safetensors").write_bytes(bytes(20_000_000))
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "zz.safetensors"}}')
    (model / "adapter_config.json").write_text("{}")
    export = Export.prepare(copied.job())
    assert dict(export.plan())["model"] == planned
    taken = as_listed(export.source, copied.workspace, tmp_path)
    assert taken.name == "model" and not {"model-zz.safetensors", "adapter_config.json"} & {
        f.name for f in taken.iterdir()
    }
    loaded = load_model(taken, export.base).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


# ── What is said of few rows ─────────────────────────────────────────────────────────────────────────────────────────


def test_two_rows_give_no_interval_and_that_is_said() -> None:
    model, other = Loss([4.0, 5.5]), Loss([4.1, 5.7], [0.1, 0.4], [0.9, 1.0])
    assert other.figures(model)["kl"] == {"value": 0.25, "n": 2}
    lines = table(results_of(other, model))
    assert not any("[" in line for line in lines) and "115.58 (n = 2)" in lines[1]
    assert lines[-1] == "fewer than 5 rows are too few for an interval"


def test_an_interval_stays_within_what_its_figure_can_be() -> None:
    model, other = (
        Loss([4.0] * 5),
        Loss([4.1, 4.0, 4.0, 4.0, 4.0], [0.5, 0.0, 0.0, 0.0, 0.0], [0.5, 1.0, 1.0, 1.0, 1.0]),
    )
    found = other.figures(model)
    assert found["kl"]["ci_low"] == 0 and found["kl"]["ci_high"] > 0.1
    assert found["same_top_token"]["ci_high"] == 1 and found["same_top_token"]["ci_low"] < 0.9
    assert found["eval_loss"]["delta"]["ci_low"] < 0  # a loss may fall
    assert table(results_of(other, model))[-1] == "measured on 5 rows"


def results_of(loss: Loss, model: Loss) -> dict[str, Any]:
    of_model = {"bytes": 10} | model.figures(model)
    return {"model": of_model, "formats": {"f16": {"bytes": 5} | loss.figures(model)}, "measured_on": "rows"}


# ── Only what is whole has its name ──────────────────────────────────────────────────────────────────────────────────

BREAKS = """\
import pathlib, sys
def main():
    out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
    out.write_bytes(b"GGUF half")
    sys.exit("the disk is full")
"""


def test_a_conversion_that_fails_leaves_nothing_that_looks_finished(environment: Path, copied: "Trained") -> None:
    tools = environment / "llama.cpp"
    (tools / "convert_hf_to_gguf.py").write_text(BREAKS)
    (tools / "conversion" / "base.py").write_text(
        "class TextModel:\n    get_vocab_base_pre = _create_vocab_sentencepiece = None\n"
    )
    (tools / "gguf.py").write_text("class SpecialVocab:\n    add_to_gguf = None\n")
    with pytest.raises(StageFailed, match=r"convert\.py failed: the disk is full"):
        run_stage(Export, copied.job())
    partial = [path for path in copied.workspace.checkpoints.rglob("*.gguf")]
    assert [path.parent.name for path in partial] == ["gguf.partial"]
    record = RecordFile(copied.workspace.experiments / f"{partial[0].parents[1].name}.yaml")
    facts = record.facts()
    assert facts and facts.status == "failed" and not facts.artifacts
    assert not (copied.workspace.checkpoints / "small-gguf").exists()


# ── With llama.cpp ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def exported(trained: "Trained", tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """One export of all formats, in a workspace of this file's own; its record is `merge`'s newest child."""
    copy = trained.copy_to(tmp_path_factory.mktemp("exported") / "root")
    run_stage(Export, copy.job())
    return copy


@pytest.fixture(scope="module")
def folder(exported: "Trained") -> Path:
    return (exported.workspace.checkpoints / "small-gguf").resolve()


@pytest.fixture(scope="module")
def facts(exported: "Trained", folder: Path) -> Any:
    return RecordFile(exported.workspace.experiments / f"{folder.parent.name}.yaml").facts()


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return LlamaCpp.required()


@pytest.fixture(scope="module")
def chat(trained: "Trained") -> Chat:
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(trained.output("merge")), "merged")


@pytest.fixture(scope="module")
def reader(llama: LlamaCpp, folder: Path) -> Iterator[Reader]:
    with Reader(llama, folder / "f16.gguf", 512) as reader:
        yield reader


@needs_llamacpp
def test_each_format_is_smaller_and_loses_more(facts: Any, folder: Path) -> None:
    found = facts.results["formats"]
    assert tuple(found) == FORMATS
    sizes = [found[kind]["bytes"] for kind in FORMATS]
    assert sizes == [(folder / f"{kind}.gguf").stat().st_size for kind in FORMATS]
    assert sizes[0] > 1.5 * sizes[1] and sizes[1] > 1.1 * sizes[2]
    kl = [found[kind]["kl"]["value"] for kind in FORMATS]
    assert 0 <= kl[0] < kl[1] < kl[2] and kl[0] < 1e-4
    assert found["q8_0"]["kl"]["ci_low"] > 0
    assert all(0.9 < found[kind]["same_top_token"]["value"] <= 1 for kind in FORMATS[:2])


@needs_llamacpp
def test_the_perplexities_are_what_plain_code_finds(
    exported: "Trained", facts: Any, answer_losses: Callable[..., list[float]]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported.output("merge"))
    rows = Export.prepare(exported.job()).rows
    losses = [answer_losses(model, row) for row in rows]
    expected = math.exp(sum(sum(row) / len(row) for row in losses) / len(losses))
    assert facts.results["model"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    assert facts.results["formats"]["f16"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)


@needs_llamacpp
def test_the_record_names_its_files_and_what_it_was_made_of(exported: "Trained", facts: Any, folder: Path) -> None:
    assert facts.status == "complete" and [taken.id for taken in facts.lineage.inputs] == [exported.merge]
    assert {Path(a.path).name for a in facts.artifacts} == {CONTRACT_FILE, *(f"{kind}.gguf" for kind in FORMATS)}
    assert facts.results["tokenizer"] | {"texts": 0} == {
        "pre_tokenizer": "gpt-2", "recognised": False, "texts": 0, "differing": 0,
    }  # fmt: skip
    lines = table(facts.results)
    assert [line.split()[0] for line in lines[1:5]] == ["model", *FORMATS]
    assert not list(folder.parent.glob("*.partial"))


@needs_llamacpp
def test_the_command_lists_what_it_cost(exported: "Trained", aletheia: "Callable[..., Said]", folder: Path) -> None:
    said = aletheia(exported.workspace, "exp", "list", "--stage", "export")
    assert folder.parent.name in said.out and "q4_k_m" in said.out


@needs_llamacpp
def test_the_file_carries_template_and_end_of_turn(reader: Reader, chat: Chat) -> None:
    vocabulary = len(chat.tokenizer)
    check_metadata(reader.facts, chat, vocabulary, "f16.gguf")
    for key, wrong in (
        ("vocabulary", vocabulary + 1),
        ("tokenizer.chat_template", str(chat.tokenizer.chat_template) + " "),
        ("ends", []),
    ):
        with pytest.raises(UserError, match=r"f16\.gguf"):
            check_metadata(reader.facts | {key: wrong}, chat, vocabulary, "f16.gguf")


@needs_llamacpp
def test_logits_are_the_models_at_the_positions_asked_for(exported: "Trained", reader: Reader) -> None:
    """Over more than one pass of llama.cpp's and more than one block, and nothing is left of an earlier question."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported.output("merge"))
    torch.manual_seed(0)
    ids = torch.randint(10, 1000, (1, 500)).tolist()[0]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    for positions in ([499], list(range(3, 300, 2))):
        found = torch.cat([torch.from_numpy(block) for block in reader.logits(ids, positions)])
        assert (found - expected[positions]).abs().max() < 0.05 * expected.std()


@needs_llamacpp
def test_a_model_that_is_not_the_merged_one_is_not_passed(
    llama: LlamaCpp, trained: "Trained", base: Any, folder: Path
) -> None:
    files = {"f16": folder / "f16.gguf"}
    rows = Export.prepare(trained.job("export_config.rows=2")).rows
    with pytest.raises(StageFailed, match="converted wrongly"):
        check_conversion(measure(base.load(), rows, llama, files)["f16"])


# ── How text is split ────────────────────────────────────────────────────────────────────────────────────────────────


def probes_of(tokenizer: Any) -> dict[tuple[str, bool], list[int]]:
    texts = ["Hello,   world! I'M 12345", "def f():\n\n    return 1\r\n", "naïve 你好 🚀", "{'a': [1.5, 22, 333]}", ""]
    every = [(text, special) for text in texts for special in (False, True)]
    return {(text, special): tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in every}


@pytest.fixture
def tokenizer(chat: Chat) -> Callable[[Any], Any]:
    """`tokenizer(pre)`: the model's own vocabulary and merges behind another pre-tokenizer."""
    import copy

    def make(pre: Any) -> Any:
        other = copy.deepcopy(chat.tokenizer)
        other.backend_tokenizer.pre_tokenizer = pre
        return other

    return make


@needs_llamacpp
def test_the_pre_tokenizer_is_the_one_that_splits_alike(
    llama: LlamaCpp, folder: Path, chat: Chat, tokenizer: Callable[[Any], Any]
) -> None:
    from tokenizers import Regex, pre_tokenizers

    file = folder / "f16.gguf"
    assert choose_pre_tokenizer(llama, file, probes_of(chat.tokenizer), False) == ("gpt-2", "gpt-2", [])
    qwen = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pieces = [pre_tokenizers.Split(Regex(qwen), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    like_qwen = tokenizer(pre_tokenizers.Sequence(pieces))
    assert choose_pre_tokenizer(llama, file, probes_of(like_qwen), False) == ("gpt-2", "qwen2", [])


@needs_llamacpp
def test_where_no_pre_tokenizer_fits_the_export_is_refused(
    llama: LlamaCpp, folder: Path, tokenizer: Callable[[Any], Any]
) -> None:
    from tokenizers import pre_tokenizers

    file = folder / "f16.gguf"
    pairs = [pre_tokenizers.FixedLength(2), pre_tokenizers.ByteLevel(False, use_regex=False)]
    probes = probes_of(tokenizer(pre_tokenizers.Sequence(pairs)))
    with pytest.raises(StageFailed, match="no pre-tokenizer that splits"):
        choose_pre_tokenizer(llama, file, probes, False)
    written, chosen, differing = choose_pre_tokenizer(llama, file, probes, True)
    assert written == chosen == "gpt-2" and differing


@needs_llamacpp
def test_a_file_that_is_none_is_told_in_one_line(llama: LlamaCpp, tmp_path: Path) -> None:
    (tmp_path / "f16.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(RuntimeError, match=r"f16\.gguf: .*cannot load"):
        Reader(llama, tmp_path / "f16.gguf")
