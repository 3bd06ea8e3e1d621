"""`aletheia eval prefetch`: what is fetched while there is a hub is what runs when there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.benchmarks.prefetch import Fetched, check_all, prefetch
from pipeline.errors import StageFailed, UserError
from pipeline.profile import load_profile
from pipeline.stage import Job
from pipeline.workspace import CHECKOUT, Workspace

README = """---
configs:
- config_name: multiple_choice
  data_files: [{split: validation, path: multiple_choice/validation.jsonl}]
---
"""
ROWS = [
    {"question": f"{word}?", "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
     "mc2_targets": {"choices": ["Yes.", "No.", "Never."], "labels": [1, 0, 0]}} for word in ("Is it", "Was it", "Will it")
]  # fmt: skip
CHILD = """
import json, os, sys
from tests.eval.benchmarks.fake_hub import hub
files = {name: text.encode() for name, text in json.loads(sys.argv[1]).items()}
with hub("truthfulqa/truthful_qa", files) as (address, asked):
    os.environ["HF_ENDPOINT"] = address
    from eval.benchmarks import preflight
    from eval.benchmarks.prefetch import prefetch
    from pipeline.profile import load_profile
    from pipeline.stage import Job
    from pipeline.tasks import find_tasks
    from pipeline.workspace import Workspace
    workspace = Workspace.find()
    names = "eval_config.tasks=[aletheia_choices, truthfulqa_mc2, hellaswag, humaneval_instruct, cruxeval_input]"
    rows = prefetch(Job(workspace, load_profile(workspace, "small", [names])))
    found = [row.row()[:3] + (row.size or 0, row.problem or "") for row in rows]
    times = len(asked)
tasks = find_tasks(workspace.path("data/eval"), ["truthfulqa_mc2", "hellaswag"])
after = preflight.check(tasks, run_code=False)
print(json.dumps([found, [[each.name, each.items] for each in after.ready], after.left_out, times, len(asked)]))
"""


def test_what_was_prefetched_runs_without_a_hub(workspace: Workspace, tmp_path: Path) -> None:
    files = {"README.md": README, "multiple_choice/validation.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(files)],
        cwd=CHECKOUT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"),
             "ALETHEIA_ROOT": str(workspace.root), "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fetched, ready, left_out, *asked = json.loads(done.stdout.splitlines()[-1])
    assert [row[:3] for row in fetched[:2]] == [
        ["aletheia_choices", "own", "30"], ["truthfulqa_mc2", "truthfulqa/truthful_qa", "3"],
    ]  # fmt: skip
    assert all(row[3] > 0 and not row[4] for row in fetched[:2]), "bytes on disk"
    assert [row[4].partition("(")[0] for row in fetched[2:]] == [
        "its data cannot be had ", "its data cannot be had ", "it runs code outside the sandbox, in a way of its own",
    ]  # fmt: skip
    assert ready == [["truthfulqa_mc2", len(ROWS)]]
    assert left_out == {
        "hellaswag": "its data is not on this machine, and the hub cannot be reached: aletheia eval prefetch where it can"
    }
    assert asked[0] == asked[1] > 0, "the hub was asked while it was there, and not after"
    assert f"in {tmp_path / 'hf'}" in done.stderr


def test_own_tasks_need_no_hub_and_others_do(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.benchmarks.prefetch.why_offline", lambda: "HF_HUB_OFFLINE is set")
    own, other = (
        Job(workspace, load_profile(workspace, "small", [f"eval_config.tasks=[{name}]"]))
        for name in ("aletheia_choices", "hellaswag")
    )
    assert [(row.task, row.source, row.items) for row in prefetch(own)] == [("aletheia_choices", "own", 30)]
    with pytest.raises(UserError, match="eval prefetch: HF_HUB_OFFLINE is set"):
        prefetch(other)


def test_a_name_that_nobody_knows_is_said_without_a_hub_too(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.benchmarks.prefetch.why_offline", lambda: "HF_HUB_OFFLINE is set")
    typo, none = (
        Job(workspace, load_profile(workspace, "small", [f"eval_config.tasks={names}", "eval_config.guard_tasks=[]"]))
        for names in ("[helaswag]", "[]")
    )
    assert [row.problem for row in prefetch(typo)] == ["there is no such task; did you mean hellaswag?"]
    with pytest.raises(UserError, match=r"eval_config.tasks: names no task, so there is nothing to fetch"):
        prefetch(none)


def test_what_could_not_be_had_fails_at_the_end_and_is_named() -> None:
    had = Fetched("hellaswag", "Rowan/hellaswag", 10042, 11_000_000)
    assert had.row() == ("hellaswag", "Rowan/hellaswag", "10,042", "11.0 MB")
    check_all([had])
    with pytest.raises(StageFailed, match="1 of 2 could not be had: mmlu"):
        check_all([had, Fetched("mmlu", "", problem="gone")])
