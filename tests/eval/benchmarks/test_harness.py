"""The profile's own lm-eval task: found anywhere, and scored as one would by hand."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmarks.harness import run
from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import StageFailed, UserError
from pipeline.tasks import find_tasks
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Trained

TASK = "aletheia_choices"
ITEMS = 5


def right_by_hand(model: Any, chat: Chat, row: dict[str, Any]) -> float:
    """1.0 when the right letter is the likeliest after the prompt that training would have made of the question."""
    import torch

    letters = ["A", "B", "C", "D"]
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
    text = f"{row['question']}\n\n{choices}\n\nAnswer with one letter."
    prompt = chat.prompt([Message(role="user", content=text)])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    tokens = [chat.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
    assert [len(t) for t in tokens] == [1] * 4
    return float(max(range(4), key=lambda i: logits[tokens[i][0]].item()) == row["answer"])


def test_scores_are_those_computed_by_hand_wherever_one_stands(
    trained: "Trained", model: Any, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the task's files are found from the profile, not from here
    folder = trained.workspace.path("data/eval")
    config = trained.job(f"eval_config.limit={ITEMS}", "eval_config.batch_size=2").config.eval_config
    scores = run(model, chat, find_tasks(folder, [TASK]), config, "test")[TASK]
    lines = [line for path in sorted((folder / "choices").glob("*.jsonl")) for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines[:ITEMS]]
    assert scores.items == {i: right_by_hand(model, chat, row) for i, row in enumerate(rows)}
    assert (scores.metric, scores.version) == ("acc", "2.0")


def test_changed_items_are_scored_anew_not_from_a_cache(
    model: Any, chat: Chat, workspace: Workspace, trained: "Trained"
) -> None:
    """The same file, rewritten with its answers moved on by one."""
    config = trained.job(f"eval_config.limit={ITEMS}").config.eval_config
    path = min(workspace.path("data/eval/choices").glob("*.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for shift in (0, 1):
        moved = [row | {"answer": (row["answer"] + shift) % 4} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in moved))
        scores = run(model, chat, find_tasks(workspace.path("data/eval"), [TASK]), config, "test")[TASK].items
        assert scores == {i: right_by_hand(model, chat, row) for i, row in enumerate(moved[:ITEMS])}


def test_own_tasks_are_configurations_and_others_stay_names(workspace: Workspace) -> None:
    own, other = find_tasks(workspace.path("data/eval"), [TASK, "truthfulqa_mc2"])
    assert isinstance(own, dict)
    assert own["dataset_kwargs"]["data_files"]["test"].startswith(str(workspace.root))
    assert other == "truthfulqa_mc2"


@pytest.mark.parametrize("files", ["choices/*.jsonl", ["choices/*.jsonl"], {"test": ["choices/devops.jsonl"]}])
def test_data_files_may_have_every_shape_that_lm_eval_knows(workspace: Workspace, files: Any) -> None:
    folder = workspace.path("data/eval")
    (folder / "tasks" / "mine.yaml").write_text(f"task: mine\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n")
    [task] = find_tasks(folder, ["mine"])
    assert isinstance(task, dict)
    assert json.dumps(task["dataset_kwargs"]["data_files"]).count(f"{folder}/choices/") == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("task: [", r"mine\.yaml:2:1: "),
        ("just text", r"mine\.yaml: a task is a mapping"),
        ("dataset_path: json", r"mine\.yaml: a task is a mapping"),
        ("task: x\ndataset_kwargs: {data_files: {test: gone/*.jsonl}}", r"mine\.yaml: no file is named .*gone"),
    ],
)
def test_a_task_that_cannot_be_used_is_named_before_anything_runs(workspace: Workspace, text: str, what: str) -> None:
    folder = workspace.path("data/eval")
    (folder / "tasks" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=what):
        find_tasks(folder, ["x"])


def test_a_task_that_is_not_asked_for_is_no_obstacle(workspace: Workspace) -> None:
    folder = workspace.path("data/eval")
    (folder / "tasks" / "mine.yaml").write_text("task: x\ndataset_kwargs: {data_files: {test: gone.jsonl}}")
    assert isinstance(find_tasks(folder, [TASK])[0], dict)


def test_a_task_whose_data_cannot_be_had_fails_in_one_line(model: Any, chat: Chat, trained: "Trained") -> None:
    task = {"task": "x", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}
    with pytest.raises(StageFailed, match=r"^lm-eval: ") as failure:
        run(model, chat, [task], trained.job().config.eval_config, "test")
    assert "\n" not in str(failure.value)
