"""The card that a model carries on the hub: read back by huggingface_hub, and its snippet run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from aletheia.exp.export import export
from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Trained

DEEPSEEK = "deepseek-ai/deepseek-coder-7b-instruct-v1.5"
SFT, DPO, MERGE, EVAL, PIPELINE = (f"EXP-2026-01-01-00{number}" for number in range(1, 6))
CONFIGURATION = {
    "name": "aletheia",
    "base_model": DEEPSEEK,
    "seed": 42,
    "sft_config": {"learning_rate": 2e-4, "lora_rank": 16},
    "dpo_config": {"beta": 0.1},
}
BASE = {"name": DEEPSEEK, "revision": "f" * 40, "sha256": "b" * 64}
LOCAL = {"name": "tiny", "sha256": "b" * 64}


def change(before: float, after: float, half: float, n: int = 30) -> dict[str, Any]:
    ends = (("before", before), ("after", after), ("delta", after - before))
    return {k: {"value": v, "ci_low": v - half, "ci_high": v + half, "n": n} for k, v in ends}


def taken(name: str, stage: str) -> dict[str, Any]:
    return {"id": name, "stage": stage, "path": f"checkpoints/{name}", "sha256": "a" * 64}


@pytest.fixture
def chain(place: Workspace, write_record: Callable[..., RecordFile]) -> Callable[..., None]:
    """sft → dpo → merge → eval as records, with `sft` and the others laid over what they say."""

    def write(base: dict[str, Any] = BASE, person: str = "# mine\n", **over: dict[str, Any]) -> None:
        def stage(name: str, stage: str, results: dict[str, Any], source: list[dict[str, Any]]) -> None:
            facts = {
                "stage": stage,
                "profile": "small",
                "configuration": CONFIGURATION,
                "results": results,
                "lineage": {"base": base, "inputs": source, "parent": PIPELINE},
                "data": {"train": {"rows": 35, "sha256": "d" * 64}},
                "code": {"commit": "c" * 40, "dirty": stage == "dpo"},
                "resources": {"wall_seconds": 60.0},
                "environment": {"cpu": "AMD EPYC", "host": "secret-host"},
                "artifacts": [{"path": f"checkpoints/{name}/out/model.safetensors", "sha256": "e" * 64, "bytes": 9}],
            }
            write_record(place, name, facts | over.get(stage, {}), person=person)

        stage(SFT, "sft", {"eval_loss": change(6.0, 5.4, 0.1, 25), "training": {"steps": 54}}, [])
        stage(
            DPO,
            "dpo",
            {"preference_accuracy": {"value": 0.87, "ci_low": 0.7, "ci_high": 0.95, "n": 30}},
            [taken(SFT, "sft")],
        )
        stage(MERGE, "merge", {"receipt": {"modules": 28}}, [taken(DPO, "dpo")])
        judged = {
            "against": DEEPSEEK,
            "benchmarks": {"mmlu.pro": change(0.2, 0.23, 0.1) | {"metric": "acc"}},
            "eval_loss": change(6.0, 5.5, 0.1, 25),
            "win_rate": {
                "value": 0.8,
                "ci_low": 0.67,
                "ci_high": 0.93,
                "n": 30,
                "weakness": "reads words",
                "judge": "words",
            },
        }
        stage(EVAL, "eval", judged, [taken(MERGE, "merge")])

    return write


def card_of(place: Workspace, name: str, **options: Any) -> tuple[ModelCard, str]:
    path = place.root / export(place, name, "model-card", None, options.get("output"), options.get("force", False))
    return ModelCard.load(path), path.read_text("utf-8")


def section(text: str, heading: str) -> str:
    return re.split(rf"^## {re.escape(heading)}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def test_the_hubs_metadata_says_what_it_is_and_whose_base_it_has(place: Workspace, chain: Callable[..., None]) -> None:
    chain()
    data = card_of(place, MERGE)[0].data
    assert data.base_model == DEEPSEEK
    assert data.base_model_relation == "finetune"  # the hub's `merge` is one of several models
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        "transformers",
        "text-generation",
        "aletheia-merged",
    )
    assert data.tags == ["aletheia", "lora", "sft", "dpo"]
    assert (data.license, data.license_name) == ("other", "deepseek")
    assert data.license_link.startswith(f"https://huggingface.co/{DEEPSEEK}/")
    adapter = card_of(place, DPO)[0].data
    assert (adapter.base_model_relation, adapter.library_name, adapter.model_name) == (
        "adapter",
        "peft",
        "aletheia-dpo",
    )


def test_the_model_index_holds_the_evaluations_figures_with_interval_n_and_record(
    place: Workspace, chain: Callable[..., None]
) -> None:
    chain()
    results = {(r.dataset_name, r.metric_type): r for r in card_of(place, MERGE)[0].data.eval_results}
    assert {key: result.metric_value for key, result in results.items()} == {
        ("mmlu.pro", "acc"): 0.23,
        ("held-out rows of small", "eval_loss"): 5.5,
        ("held-out rows of small", "win_rate"): 0.8,
    }
    benchmark = results["mmlu.pro", "acc"]
    assert benchmark.dataset_type == "mmlu.pro"
    assert benchmark.metric_args == {
        "ci_low": pytest.approx(0.13),
        "ci_high": pytest.approx(0.33),
        "n": 30,
        "record": EVAL,
    }


def test_an_adapters_card_takes_in_the_evaluation_of_its_merge_and_not_its_ancestors_figures(
    place: Workspace, chain: Callable[..., None]
) -> None:
    chain()
    sources = {r.metric_args["record"] for r in card_of(place, DPO)[0].data.eval_results}
    assert sources == {DPO, EVAL}
    assert {r.metric_args["record"] for r in card_of(place, SFT)[0].data.eval_results} == {SFT}


def test_a_base_that_is_not_on_the_hub_is_not_named_there_and_no_licence_is_guessed(
    place: Workspace, chain: Callable[..., None]
) -> None:
    chain(base=LOCAL)
    card, text = card_of(place, MERGE)
    assert (card.data.base_model, card.data.license) == (None, None)
    assert "base_model_relation" not in card.data.to_dict()
    assert "tiny is a local model and not on the hub." in text
    assert "Licence: not stated." in text


def test_what_only_a_person_can_say_comes_from_above_the_line(place: Workspace, chain: Callable[..., None]) -> None:
    person = """\
license: apache-2.0
language: [en, code]
datasets: [team/rows]
intended_use: Answers about our services.
limitations: [knows nothing of <b>billing</b>, only English]
deployment: {ready: false, blockers: [no red team]}
"""
    chain(person=person)
    card, text = card_of(place, MERGE)
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en", "code"], ["team/rows"])
    assert "license_name" not in card.data.to_dict()  # the base's name is not the person's
    part = section(text, "Intended use and limits")
    assert "> Answers about our services." in part
    assert "- knows nothing of &lt;b>billing&lt;/b>\n- only English" in part
    assert "- **Blockers:**\n  - no red team" in part


def test_where_the_record_is_silent_its_pipeline_speaks(
    place: Workspace, chain: Callable[..., None], write_record: Callable[..., RecordFile]
) -> None:
    chain()
    write_record(place, PIPELINE, {"stage": "pipeline"}, person="limitations: one language\n")
    assert "> one language" in section(card_of(place, MERGE)[1], "Intended use and limits")


def test_what_is_not_shown_is_said(
    place: Workspace, chain: Callable[..., None], write_record: Callable[..., RecordFile]
) -> None:
    chain()
    control = {"record": "EXP-2026-01-01-099", "eval_loss": change(5.43, 5.434, 0.01)}
    write_record(place, PIPELINE, {"stage": "pipeline", "results": {"control": control}})
    part = section(card_of(place, MERGE)[1], "What is not shown")
    assert "A change of benchmarks.mmlu.pro: no difference shown (+0.03" in part
    assert "its judge, words, reads words" in part
    assert (
        "the control EXP-2026-01-01-099, trained on answers shuffled between the questions, came out the same" in part
    )
    assert "this is one run, with seed 42" in part
    assert "eval_loss: fell" not in part  # that is shown
    assert "no evaluation was made of it" in section(card_of(place, SFT)[1], "What is not shown")


def test_a_control_is_called_one(place: Workspace, chain: Callable[..., None]) -> None:
    shuffled = CONFIGURATION | {"sft_config": {"shuffle_answers": True}}
    chain(sft={"configuration": shuffled})
    for name in (SFT, MERGE):
        assert "**This is a control" in card_of(place, name)[1]


def test_provenance_names_records_commits_and_hashes_and_no_machine(
    place: Workspace, chain: Callable[..., None]
) -> None:
    chain()
    text = card_of(place, MERGE)[1]
    part = section(text, "Provenance")
    for name in (SFT, DPO, MERGE, EVAL):
        assert name in part
    assert f"| dpo {DPO} | commit {'c' * 40}, with uncommitted changes |" in part
    assert f"{MERGE} took | dpo {DPO}, SHA-256 {'a' * 64}" in part
    assert f"model.safetensors | 9 bytes, SHA-256 {'e' * 64}" in part
    assert f"base weights | SHA-256 {'b' * 64}" in part
    assert "secret-host" not in text
    assert str(place.root) not in text


def test_how_it_was_trained_goes_through_every_stage_with_its_figures(
    place: Workspace, chain: Callable[..., None]
) -> None:
    chain()
    text = card_of(place, MERGE)[1]
    part = section(text, "How it was trained")
    titles = re.findall(r"^### (.*)$", part, re.MULTILINE)
    assert [title.rpartition(" ")[2] for title in titles] == [f"({SFT})", f"({DPO})", f"({MERGE})"]
    assert "| lora_rank | 16 |" in part
    assert "| preference_accuracy | 0.87 | \\[0.7, 0.95\\] | 30 |" in part
    measured = section(text, "What was measured")
    assert "| eval_loss | 6 | 5.4 | -0.6 | \\[-0.7, -0.5\\] | 25 | fell |" in measured
    assert f"Evaluation ({EVAL}): before is {DEEPSEEK}, after is the model of {MERGE}." in measured


def test_a_record_whose_sources_are_gone_or_turn_in_a_circle_still_gets_a_card(
    place: Workspace, chain: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    chain(sft={"lineage": {"base": BASE, "inputs": [taken(DPO, "dpo")]}})
    assert "### Supervised" in card_of(place, MERGE)[1]
    (place.experiments / f"{SFT}.yaml").unlink()
    assert "### Supervised" not in card_of(place, MERGE, force=True)[1]
    assert f"there is no record `{SFT}`" in capsys.readouterr().err


def test_results_of_another_shape_make_no_traceback_and_no_false_figure(
    place: Workspace, chain: Callable[..., None]
) -> None:
    odd = {"benchmarks": [1], "eval_loss": {"before": "x", "after": None}, "win_rate": 0.5, "control": 3}
    nulls = {"base": {}, "inputs": [taken(MERGE, "merge")]}
    chain(eval={"results": odd, "lineage": nulls, "data": {"a": [1]}, "configuration": {"sft_config": 3}})
    card = card_of(place, MERGE)[0]
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("stage", "status", "what"),
    [
        ("eval", "complete", f"is a record of eval, which makes no model; try {MERGE}"),
        ("pipeline", "complete", f"is a record of pipeline, which makes no model; try {MERGE}"),
        ("sft", "failed", "is failed: there is no model to describe"),
    ],
)
def test_only_what_made_a_model_has_a_card(
    place: Workspace,
    chain: Callable[..., None],
    write_record: Callable[..., RecordFile],
    stage: str,
    status: str,
    what: str,
) -> None:
    chain()
    lineage = {"children": [SFT, DPO, MERGE, EVAL]} if stage == "pipeline" else {"inputs": [taken(MERGE, "merge")]}
    write_record(place, "EXP-2026-01-01-006", {"stage": stage, "status": status, "lineage": lineage})
    with pytest.raises(UserError, match=re.escape(what)):
        export(place, "EXP-2026-01-01-006", "model-card", None, None, False)


def test_nothing_in_a_record_becomes_html_code_or_metadata(place: Workspace, chain: Callable[..., None]) -> None:
    evil = "<script>x</script> | \"\n---\nlicense: mit\n```\nimport os # '"
    person = f"description: {json.dumps(evil)}\nlimitations: {json.dumps(evil)}\n'<b>': 1\n"
    configuration = {"name": evil, "seed": evil, "sft_config": {evil: evil}, "trust_remote_code": False}
    results = {"benchmarks": {evil: change(0.2, 0.3, 0.01) | {"metric": evil}}, evil: {"value": 1.0, "n": 3}}
    over = {"configuration": configuration, "results": results, "environment": {"cpu": evil}, "code": {"commit": evil}}
    chain(base={"name": evil, "revision": evil, "sha256": evil}, person=person, sft=over, eval=over)
    card, text = card_of(place, SFT)
    assert card.data.license is None
    assert card.data.base_model == evil  # as it stands, quoted
    tokens = MarkdownIt("commonmark").enable("table").parse(card.content.split("\n---\n\n", 1)[1])
    assert not [t for t in tokens if t.type == "html_block"]
    assert not [c for t in tokens for c in t.children or [] if c.type == "html_inline"]
    (snippet,) = [t.content for t in tokens if t.type == "fence" and t.info == "python"]
    compile(snippet, "snippet", "exec")
    assert f"from_pretrained({json.dumps(evil)}, revision={json.dumps(evil)}" in snippet
    assert text.count("\n# ") == 1


def test_the_snippet_names_hub_base_revision_and_end_of_turn(place: Workspace, chain: Callable[..., None]) -> None:
    chain()
    contract = {"sha256": "9" * 64, "end_of_turn": "<|EOT|>", "end_of_turn_id": 32021, "bos_id": 1}
    folder = place.checkpoints / DPO / "adapter"
    folder.mkdir(parents=True)
    (folder / "chat_contract.json").write_text(json.dumps(contract))
    text = card_of(place, DPO)[1]
    assert f'AutoModelForCausalLM.from_pretrained("{DEEPSEEK}", revision="{"f" * 40}"' in text
    assert "eos_token_id=32021" in text
    assert "&lt;\\|EOT\\|> (token 32021)" in text
    assert "Its chat contract is not at hand" in card_of(place, MERGE)[1]


@pytest.mark.parametrize("stage", ["sft", "merge"])
def test_the_snippet_really_runs_and_stops_at_the_end_of_turn(
    copied: "Trained", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    name = getattr(copied, stage)
    export(copied.workspace, name, "model-card", None, None, False)
    text = (copied.workspace.experiments / name / "model-card.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(copied.workspace.root)
    variables: dict[str, Any] = {}
    exec(snippet, variables)
    answer = variables["output"][0, variables["inputs"]["input_ids"].shape[1] :].tolist()
    end = variables["tokenizer"].eos_token_id
    assert 0 < len(answer) <= 256
    assert end not in answer[:-1]
    assert answer[-1] == end or len(answer) == 256
    assert Path(variables["path"]).is_relative_to("checkpoints")
    assert "eos_token_id=" in snippet
