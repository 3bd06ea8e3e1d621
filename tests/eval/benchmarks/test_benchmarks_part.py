"""Benchmarks as a part of an evaluation: what is left out, what it will take, guards, and the record that comes of it."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmarks import estimate
from eval.benchmarks.harness import Scores
from eval.benchmarks.part import Benchmarks
from eval.contestants import Contestant
from eval.evaluate import Evaluate
from eval.names import BASE, MODEL
from pipeline.chat import Chat
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base
from pipeline.stage import run_stage
from pipeline.workspace import CHECKOUT
from tests.eval.benchmarks.test_harness import picked, rows_of
from tests.serving.vllm_backend.test_loras import rehash

if TYPE_CHECKING:
    from tests.conftest import Trained

TASK = "aletheia_choices"
OFFLINE = "hellaswag"  # its data is not in the cache of these tests


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def small(trained: "Trained", tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    copied = trained.copy_to(tmp_path_factory.mktemp("benchmarks") / "root")
    shutil.copytree(CHECKOUT / "data" / "eval" / "code", copied.workspace.path("data/eval/code"))
    return copied


def made_up(values: list[float], asked: str = "the same", metric: str = "acc", lower: bool = False) -> Scores:
    items = {str(i): value for i, value in enumerate(values)}
    return Scores(metric, "1", lower, items, dict.fromkeys(items, asked), {"item": 0})


def part(small: "Trained", *assignments: str) -> Benchmarks:
    return Benchmarks.prepare(small.job(*assignments))


def test_the_run_goes_on_with_tasks_that_can_and_the_record_names_the_others(
    small: "Trained", capfd: pytest.CaptureFixture[str]
) -> None:
    asked = f"eval_config.tasks=[{TASK}, {OFFLINE}, aletheia_code]"
    record = run_stage(Evaluate, small.job(asked, "eval_config.limit=2", parts=("benchmarks",)))
    results = record.facts.results
    assert list(results["benchmarks"]) == [TASK]
    assert results["benchmarks"][TASK]["asked"]["bos_tokens"] == 1
    assert results["benchmarks_left_out"].keys() == {OFFLINE, "aletheia_code"}
    assert "aletheia eval prefetch" in results["benchmarks_left_out"][OFFLINE]
    assert results["benchmarks_run"]["through"] == {BASE: "in process", MODEL: "in process"}
    assert results["benchmarks_run"]["predicted"]["requests"] == 2 * 4
    said = capfd.readouterr().err
    assert f"{OFFLINE}" in said and "left out" in said and "2 items, 8 requests a model, 2 models" in said


def test_where_none_can_run_nothing_starts(small: "Trained") -> None:
    with pytest.raises(UserError, match="none of hellaswag can run here: its data is not on this machine"):
        part(small, f"eval_config.tasks=[{OFFLINE}]")


def test_without_tasks_there_is_nothing_to_do(small: "Trained", chat: Chat, tmp_path: Path) -> None:
    none = part(small, "eval_config.tasks=[]")
    assert none.plan() == [("benchmarks", "none")]
    assert none.measure(Contestant(BASE, "base", chat, lambda: None), None) == {}
    assert none.compare({BASE: {}, MODEL: {}}, tmp_path).results == {}


def test_a_guard_must_be_among_the_tasks(small: "Trained") -> None:
    with pytest.raises(UserError, match=r"eval_config.guard_tasks: mmlu is not among eval_config.tasks"):
        part(small, "eval_config.guard_tasks=[mmlu]")


def test_a_name_that_is_no_task_is_a_mistake_and_not_left_out(small: "Trained") -> None:
    with pytest.raises(UserError, match="helaswag: there is no such task; did you mean hellaswag"):
        part(small, f"eval_config.tasks=[{TASK}, helaswag]")


def test_the_plan_shows_what_runs_and_what_is_left_out(small: "Trained") -> None:
    plan = part(small, f"eval_config.tasks=[{TASK}, {OFFLINE}]", "eval_config.limit=7").plan()
    assert plan[0] == ("benchmarks", f"{TASK}: 7 items")
    assert plan[1][1].startswith(f"{OFFLINE}: its data is not on this machine")


def test_figures_are_paired_and_each_has_the_test_of_its_kind(small: "Trained", tmp_path: Path) -> None:
    before, after = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    graded = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.3, 0.5, 0.7, 0.6]
    base = {"right": made_up(before), "graded": made_up(graded[0], metric="chrf")}
    ours = {"right": made_up(after), "graded": made_up(graded[1], metric="chrf")}
    found = part(small).compare({BASE: base, MODEL: ours, "sft": base}, tmp_path)
    right, grades = found.results["benchmarks"]["right"], found.results["benchmarks"]["graded"]
    assert right["delta"]["value"] == 0.5 and right["mcnemar_p"] == pytest.approx(2 * (1 + 5) / 32, abs=1e-4)
    assert "mcnemar_p" not in grades and 0 < grades["t_test_p"] < 0.1
    assert right["holm_p"] == pytest.approx(max(right["mcnemar_p"], 2 * grades["t_test_p"]), abs=2e-4)
    assert found.items["benchmarks.right"]["1"] == (1.0, 0.0)
    assert found.results["others"]["sft"]["benchmarks"]["right"]["delta"] == right["delta"]


def test_what_the_test_of_so_many_tasks_doubts_is_not_called_better(
    small: "Trained", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six of 60 items gained and none lost: McNemar's p is 0.031, and 0.094 as the least of three."""
    before, after, alike = [0.0] * 60, [1.0] * 6 + [0.0] * 54, [0.0, 1.0] * 30

    def told(*others: str) -> tuple[str, dict[str, Any]]:
        ends = [{"gains": made_up(side)} | {name: made_up(alike) for name in others} for side in (before, after)]
        found = part(small).compare({BASE: ends[0], MODEL: ends[1]}, tmp_path)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gains ")]
        return line, found.results["benchmarks"]["gains"]

    alone, among = told(), told("second", "third")
    assert alone[0].endswith(": better") and alone[1]["delta"]["ci_low"] > 0
    assert among[0].endswith(": no difference shown") and among[1]["delta"] == alone[1]["delta"]


def test_contestants_that_were_not_asked_the_same_are_not_compared(small: "Trained", tmp_path: Path) -> None:
    base, ours = {TASK: made_up([1.0, 0.0])}, {TASK: made_up([1.0, 0.0], asked="another template")}
    with pytest.raises(StageFailed, match=f"{TASK}: base and model were not asked the same, first at item 0"):
        part(small).compare({BASE: base, MODEL: ours}, tmp_path)


def test_another_contestants_guards_are_shown_and_decide_nothing(small: "Trained", tmp_path: Path) -> None:
    job = part(small, f"eval_config.guard_tasks=[{TASK}]")
    worse, better = {TASK: made_up([0.0] * 12)}, {TASK: made_up([1.0] * 12)}
    found = job.compare({BASE: worse, MODEL: better, "sft": {TASK: made_up([1.0] * 12)}}, tmp_path)
    assert found.results["guards"]["regressed"]["value"] == 0
    assert found.results["others"]["sft"]["guards"]["tasks"][TASK]["finding"] == "not known"
    assert found.guardrails == ["guards.regressed < 1"]


def test_more_than_the_hours_allowed_is_asked_less_and_the_record_says_so(
    small: "Trained", model: Any, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each try, of 8 of 24 items, takes an hour."""
    hours = itertools.count(step=3600)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    asked = part(small, "eval_config.limit=24", "eval_config.max_hours=5.5")
    scores = asked.measure(Contestant(BASE, "base", chat, lambda: None), model)
    assert asked.expected is not None and asked.expected.hours == pytest.approx(2 * 24 / 8)
    assert len(scores[TASK].items) == 22 == int(24 * 5.5 / 6)
    found = asked.compare({BASE: scores, MODEL: scores}, tmp_path)
    assert found.results["benchmarks_run"]["share_of_items"] == pytest.approx(5.5 / 6, abs=1e-4)
    assert found.results["benchmarks"][TASK]["asked"]["of"] == 30


def test_a_guard_that_regresses_refutes_the_record(small: "Trained", base: Base, chat: Chat, tmp_path: Path) -> None:
    """The model has unlearnt the letter that the base chooses, and that is said to be the right one."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    copied = small.copy_to(tmp_path / "root")
    folder, row = copied.workspace.path("data/eval"), rows_of(copied.workspace.path("data/eval"))[0]
    lost = row | {"answer": picked(base.load(), chat, row)}
    (letter,) = chat.tokenizer("ABCD"[lost["answer"]], add_special_tokens=False)["input_ids"]
    weights = load_file(file := copied.output("merge") / "model.safetensors")
    weights["model.embed_tokens.weight"][letter] *= -1  # and with it the output layer's
    save_file(weights, file, metadata={"format": "pt"})
    rehash(copied, "merge")
    assert picked(AutoModelForCausalLM.from_pretrained(file.parent), chat, row) != lost["answer"], (
        "else nothing is planted"
    )
    for path in (folder / "choices").glob("*.jsonl"):
        path.unlink()
    (folder / "choices" / "lost.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [lost] * 8))
    job = copied.job(f"eval_config.guard_tasks=[{TASK}]", parts=("benchmarks",), criteria=("aletheia_choices >= 0",))
    record = run_stage(Evaluate, job)
    guards, verdict = record.facts.results["guards"], record.facts.verdict
    assert guards["tasks"][TASK]["finding"] == "regressed"
    assert verdict is not None and verdict.finding == "refuted"
    assert [(one.criterion, one.role, one.finding) for one in verdict.judged] == [
        ("aletheia_choices >= 0", "primary", "supported"), ("guards.regressed < 1", "guardrail", "refuted"),
    ]  # fmt: skip
    assert not verdict.changed_after_start, "the guard is the profile's, and nobody's edit"
    read = record.file.facts()
    assert read is not None and read.verdict == verdict
