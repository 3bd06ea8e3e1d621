"""The profile's own lm-eval task: found anywhere, and scored as one would by hand."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmarks import harness
from eval.benchmarks.harness import Scores
from eval.benchmarks.preflight import Ready, check
from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import StageFailed, UserError
from pipeline.tasks import find_tasks
from pipeline.workspace import CHECKOUT, Workspace

if TYPE_CHECKING:
    from pipeline.model import Base
    from tests.conftest import Trained

TASK = "aletheia_choices"
ITEMS = 5


def picked(model: Any, chat: Chat, row: dict[str, Any]) -> int:
    """Which letter is the likeliest after the prompt that training would have made of the question."""
    import torch

    letters = ["A", "B", "C", "D"]
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
    text = f"{row['question']}\n\n{choices}\n\nAnswer with one letter."
    prompt = chat.prompt([Message(role="user", content=text)])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    tokens = [chat.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
    assert [len(t) for t in tokens] == [1] * 4
    return max(range(4), key=lambda i: logits[tokens[i][0]].item())


def right_by_hand(model: Any, chat: Chat, row: dict[str, Any]) -> float:
    return float(picked(model, chat, row) == row["answer"])


def scored(
    folder: Path, model: Any, chat: Chat, *tasks: str, limit: int = ITEMS, batch_size: int = 2
) -> dict[str, Scores]:
    found = check(find_tasks(folder, tasks), run_code=True)
    assert not found.left_out
    chosen = harness.choose(found.ready, limit, seed=42)
    lm = harness.in_process(model, chat, batch_size)
    return harness.run(lm, chat, found.ready, chosen, "test", found.code_eval)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted(folder.glob("choices/*.jsonl")) for line in path.read_text().splitlines()
    ]


def test_scores_are_those_computed_by_hand_wherever_one_stands(
    trained: "Trained", model: Any, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the task's files are found from the profile, not from here
    folder = trained.workspace.path("data/eval")
    scores = scored(folder, model, chat, TASK)[TASK]
    rows = rows_of(folder)
    assert len(scores.items) == ITEMS
    assert scores.items == {i: right_by_hand(model, chat, rows[int(i)]) for i in scores.items}
    assert (scores.metric, scores.version, scores.lower_is_better) == ("acc", "2.0", False)


def test_how_it_was_asked_is_recorded(trained: "Trained", model: Any, chat: Chat) -> None:
    folder = trained.workspace.path("data/eval")
    asked = scored(folder, model, chat, TASK, limit=1)[TASK]
    [item] = asked.items
    row = rows_of(folder)[int(item)]
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    text = f"{row['question']}\n\n{choices}\n\nAnswer with one letter."
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert asked.prompt == {
        "item": int(item), "sha256": hashlib.sha256(rendered.encode()).hexdigest(),
        "template_sha256": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
        "bos_tokens": 1, "examples": 0, "examples_as": "none", "output": "multiple_choice",
    }  # fmt: skip


def test_changed_items_are_scored_anew_not_from_a_cache(model: Any, chat: Chat, workspace: Workspace) -> None:
    """The same file, rewritten with its answers moved on by one."""
    folder = workspace.path("data/eval")
    path = min((folder / "choices").glob("*.jsonl"))
    for other in (folder / "choices").glob("*.jsonl"):
        if other != path:
            other.unlink()
    rows = rows_of(folder)[:3]
    for shift in (0, 1):
        moved = [row | {"answer": (row["answer"] + shift) % 4} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in moved))
        scores = scored(folder, model, chat, TASK)[TASK].items
        assert scores == {i: right_by_hand(model, chat, moved[int(i)]) for i in scores}


def test_one_models_answers_are_never_anothers(trained: "Trained", model: Any, chat: Chat, base: "Base") -> None:
    """The same loaded tasks, for one model after the other and back: as the evaluation asks them."""
    found = check(find_tasks(trained.workspace.path("data/eval"), [TASK, "aletheia_questions"]), run_code=False)
    found.ready[1].leaves["aletheia_questions"].set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
    chosen, rows = harness.choose(found.ready, 2, 42), rows_of(trained.workspace.path("data/eval"))
    models = [base.load(), model, base.load()]
    ran = [harness.run(harness.in_process(m, chat, 4), chat, found.ready, chosen, "test") for m in models]
    for this, scores in zip(models, ran, strict=True):
        assert scores[TASK].items == {i: right_by_hand(this, chat, rows[int(i)]) for i in scores[TASK].items}
    first, other, again = (scores["aletheia_questions"].written for scores in ran)
    assert first == again and all(first[i] != other[i] for i in first)
    assert ran[0][TASK].asked == ran[1][TASK].asked


def test_what_a_model_wrote_and_why_its_code_fails_is_kept(own_code: Path, model: Any, chat: Chat) -> None:
    scores = scored(own_code, model, chat, "aletheia_code", limit=2)["aletheia_code"]
    assert scores.metric == "pass@1" and set(scores.items.values()) <= {0.0, 1.0}
    assert scores.written.keys() == scores.problems.keys() == scores.items.keys()
    assert all((scores.problems[i] is None) == (score == 1.0) for i, score in scores.items.items())


@pytest.fixture
def own_code(workspace: Workspace) -> Path:
    """The project's code task, its answers cut short: such a small model writes nothing that would run."""
    folder = workspace.path("data/eval")
    shutil.copytree(CHECKOUT / "data" / "eval" / "code", folder / "code")
    task = folder / "tasks" / "aletheia_code.yaml"
    task.write_text(task.read_text().replace("max_gen_toks: 512", "max_gen_toks: 12"))
    return folder


def test_items_are_drawn_the_same_for_all_and_fewer_are_a_part_of_more(trained: "Trained") -> None:
    [ready] = check(find_tasks(trained.workspace.path("data/eval"), [TASK]), run_code=False).ready
    every, some, half = (harness.choose([ready], *how)[TASK] for how in ((None, 42), (8, 42), (8, 42, 0.5)))
    assert every == list(range(ready.items)) and len(some) == 8 and len(half) == 4
    assert set(half) < set(some) < set(every) and some != every[:8], "files are sorted by domain"
    assert harness.choose([ready], 8, 43)[TASK] != some


def test_a_group_is_one_figure_over_the_items_of_its_tasks(trained: "Trained", model: Any, chat: Chat) -> None:
    folder = trained.workspace.path("data/eval")
    tasks = [
        task | {"task": name}
        for [task] in [find_tasks(folder, [TASK])]
        for name in ("left", "right")
        if isinstance(task, dict)
    ]
    left, right = check(tasks, run_code=False).ready
    group = Ready("both", left.leaves | right.leaves)
    chosen = {"left": [0, 3], "right": [1]}
    [(name, scores)] = harness.run(harness.in_process(model, chat, 2), chat, [group], chosen, "test").items()
    rows = rows_of(folder)
    assert name == "both"
    by_hand = {f"{leaf}/{i}": right_by_hand(model, chat, rows[i]) for leaf, items in chosen.items() for i in items}
    assert scores.items == by_hand
    assert scores.prompt["tasks"] == {"left": 2, "right": 1}


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


def test_a_model_that_fails_is_told_in_one_line(trained: "Trained", model: Any, chat: Chat) -> None:
    found = check(find_tasks(trained.workspace.path("data/eval"), [TASK]), run_code=False)
    lm = harness.in_process(model, chat, 2)
    lm._model = None
    with pytest.raises(StageFailed, match=r"^test: lm-eval: ") as failure:
        harness.run(lm, chat, found.ready, {TASK: [0]}, "test")
    assert "\n" not in str(failure.value)
