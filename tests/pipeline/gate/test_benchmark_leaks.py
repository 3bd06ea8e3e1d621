"""Benchmarks' texts are kept out of training, and nothing of a code benchmark is run for that."""

import sys
from pathlib import Path

import pytest

from pipeline.config import TrainingData
from pipeline.data.read import read_rows
from pipeline.data.rows import Question
from pipeline.gate.admit import evaluation_leaks
from pipeline.gate.benchmarks import forbid_tasks
from pipeline.gate.leaks import Leaks
from pipeline.workspace import CHECKOUT, Workspace


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_the_code_items_must_not_stand_in_training() -> None:
    workspace = Workspace(CHECKOUT)
    leaks = evaluation_leaks(workspace, TrainingData(), ["aletheia_choices", "aletheia_code"], quiet=True)
    items = read_rows(workspace, "data/eval/code", Question)
    assert leaks is not None and len(items) > 20
    assert all(leaks.found(item.prompt) for item in items)


def test_what_is_not_here_or_runs_code_is_said_and_not_imported(capfd: pytest.CaptureFixture[str]) -> None:
    names = ["humaneval_instruct", "cruxeval_input", "no_such_task"]
    assert forbid_tasks(Leaks(13, 0.8), CHECKOUT / "data" / "eval", names) == 0
    said = capfd.readouterr().err
    assert "note: leaks into humaneval_instruct are not checked" in said
    assert "note: leaks into cruxeval_input are not checked: it runs code in a way of its own" in said
    assert "note: leaks into no_such_task are not checked: there is no such task" in said
    assert not any("cruxeval" in name for name in sys.modules)


def test_a_task_on_this_machine_is_read(workspace: Workspace) -> None:
    folder = workspace.path("data/eval")
    (folder / "own.jsonl").write_text(
        '{"q": "What does a vacuum of a large table give back, and to whom is it given?", "a": "Pages."}\n'
    )
    (folder / "tasks" / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: own.jsonl}}\ntest_split: test\n"
        'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
    )
    leaks = Leaks(6, 0.8)
    assert forbid_tasks(leaks, folder, ["mine"]) == 2
    assert leaks.found("So: what does a vacuum of a large table give back, and to whom is it given?")
