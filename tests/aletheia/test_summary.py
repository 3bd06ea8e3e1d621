"""The list of records: what it shows, and that no record, however odd, keeps the others from being shown."""

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aletheia.summary import figures
from pipeline import yamlio
from pipeline.records.file import LINE
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said, Trained

GOOD = {
    "status": "complete",
    "stage": "data",
    "profile": "small",
    "results": {"rows": 7},
    "resources": {"wall_seconds": 1},
}


def put(workspace: Workspace, number: int, facts: Any, above: str = "") -> Path:
    workspace.experiments.mkdir(exist_ok=True)
    path = workspace.experiments / f"EXP-2026-01-01-{number:03d}.yaml"
    path.write_text(f"{above}\n{LINE}\n{yamlio.dump(facts)}", "utf-8")
    return path


def test_the_list_shows_every_record_newest_first(aletheia: "Callable[..., Said]", trained: "Trained") -> None:
    said = aletheia(trained.workspace, "exp", "list")
    assert (said.code, said.err) == (0, ""), said.err
    header, *lines = [line for line in said.out.splitlines() if not line.startswith(" ")]
    assert header.split() == ["record", "stage", "profile", "status", "time", "figures"]
    assert [line.split()[:4] for line in lines] == [
        [trained.merge, "merge", "small", "complete"],
        [trained.dpo, "dpo", "small", "complete"],
        [trained.sft, "sft", "small", "complete"],
    ]
    assert "held-out loss" in lines[2]


def test_json_is_the_data_alone(aletheia: "Callable[..., Said]", trained: "Trained") -> None:
    said = aletheia(trained.workspace, "exp", "list", "--json")
    assert (said.code, said.err) == (0, ""), said.err
    rows = json.loads(said.out)
    assert [(row["id"], row["stage"], row["status"]) for row in rows][2] == (trained.sft, "sft", "complete")
    assert set(rows[0]) == {"id", "stage", "profile", "status", "seconds", "figures"}


def test_no_records_are_an_empty_list_and_a_note(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    assert json.loads(aletheia(workspace, "exp", "list", "--json").out) == []
    said = aletheia(workspace, "exp", "list")
    assert said.code == 0
    assert "no records in experiments yet" in said.err


def test_numbers_are_ordered_as_numbers_past_999(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    for number in (999, 1000, 2):
        put(workspace, number, GOOD)
    rows = json.loads(aletheia(workspace, "exp", "list", "--json").out)
    assert [row["id"][-4:].strip("-") for row in rows] == ["1000", "999", "002"]


def test_a_run_whose_process_is_gone_is_dead_and_a_plan_is_planned(
    aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    gone = {"status": "running", "at": "2026-01-01T00:00:00Z", "host": os.uname().nodename, "pid": 1, "started": 1.0}
    put(workspace, 1, GOOD | {"status": "running", "history": [gone]})
    put(workspace, 2, GOOD | {"status": "running", "history": [gone | {"host": "elsewhere"}]})
    (workspace.experiments / "EXP-2026-01-01-003.yaml").write_text("hypothesis: More data helps.\n")
    rows = json.loads(aletheia(workspace, "exp", "list", "--json").out)
    assert [row["status"] for row in rows] == ["planned", "running on elsewhere", "dead"]


# ── hostile records ──────────────────────────────────────────────────────────────────────────────────────────────────

RUNNING = {"status": "running", "at": "x", "host": os.uname().nodename}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{('*' + p + ',') * 9}]\n" for p, c in pairwise("abcdefg"))
BYTES: dict[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "line alone": LINE.encode(),
    "line twice": f"{LINE}\n{LINE}\n".encode(),
    "not YAML": f"{LINE}\n]: [".encode(),
    "a list": f"{LINE}\n- 1\n".encode(),
    "a bomb": f"{LINE}\n{BOMB}".encode(),
    "a deep nest": f"{LINE}\n".encode() + b"[" * 100_000,
    "a large one": f"{LINE}\nx: ".encode() + b"y" * 9_000_000,
    "not UTF-8": f"{LINE}\nstatus: ".encode() + b"\xff\xfe",
    "Python's tags": f"{LINE}\n!!python/object/apply:os.system ['touch /tmp/owned']\n".encode(),
    "a long number": f"{LINE}\nstatus: {'9' * 5000}\n".encode(),
    "NUL": b"\x00",
}
FACTS: dict[str, Any] = {
    "no keys": {},
    "unknown status": GOOD | {"status": "splendid"},
    "unknown key": GOOD | {"colour": "blue"},
    "results a list": GOOD | {"results": [1]},
    "results of numbers": GOOD | {"results": {"eval_loss": 3, "win_rate": 1, "receipt": 2, "benchmarks": 4}},
    "results of text": GOOD | {"results": {"eval_loss": {"before": {"value": "x"}}}},
    "benchmarks a list": GOOD | {"results": {"benchmarks": [1]}},
    "figures without values": GOOD | {"results": {"preference_accuracy": {"ci_low": None, "ci_high": None}}},
    "figures of infinity": GOOD | {"results": {"preference_accuracy": {"value": float("inf"), "n": 1}}},
    "time is text": GOOD | {"resources": {"wall_seconds": "long"}},
    "time is a list": GOOD | {"resources": {"wall_seconds": [1]}},
    "time is NaN": GOOD | {"resources": {"wall_seconds": float("nan")}},
    "time is infinite": GOOD | {"resources": {"wall_seconds": float("inf")}},
    "configuration of another shape": GOOD | {"stage": "sft", "configuration": {"sft_config": 5}, "results": {"eval_loss": 1}},
    "a negative process": GOOD | {"status": "running", "history": [RUNNING | {"pid": -1}]},
    "a huge process": GOOD | {"status": "running", "history": [RUNNING | {"pid": 2**70}]},
    "no process": GOOD | {"status": "running", "history": [RUNNING]},
    "a process begun at NaN": GOOD | {"status": "running", "history": [RUNNING | {"pid": 1, "started": float("nan")}]},
    "a failure of many lines": GOOD | {"failure": {"kind": "x", "message": "one\ntwo\r\x1b[2Jthree"}},
    "a profile of many lines": GOOD | {"profile": "one\ntwo\x1b[2J"},
}  # fmt: skip


def assert_listed(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    """The good one is shown, the odd one has its row, and nothing of it reaches the terminal but printable text."""
    said = aletheia(workspace, "exp", "list")
    assert said.code == 0, said.err
    assert "Traceback" not in said.err
    assert not any(ord(letter) < 32 and letter != "\n" for letter in said.out)
    assert sum(line.startswith("EXP-") for line in said.out.splitlines()) == 2
    assert any(
        line.split()[:4] == ["EXP-2026-01-01-002", "data", "small", "complete"] for line in said.out.splitlines()
    )
    said = aletheia(workspace, "exp", "list", "--json")
    assert said.code == 0, said.err
    rows = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [row["id"] for row in rows] == ["EXP-2026-01-01-002", "EXP-2026-01-01-001"]


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_record_does_not_hide_the_others(
    aletheia: "Callable[..., Said]", workspace: Workspace, name: str
) -> None:
    put(workspace, 1, GOOD).write_bytes(BYTES[name])
    put(workspace, 2, GOOD)
    assert_listed(aletheia, workspace)


@pytest.mark.parametrize("name", FACTS)
def test_a_record_of_odd_facts_does_not_hide_the_others(
    aletheia: "Callable[..., Said]", workspace: Workspace, name: str
) -> None:
    put(workspace, 1, FACTS[name])
    put(workspace, 2, GOOD)
    assert_listed(aletheia, workspace)


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_does_not_hide_the_others(
    aletheia: "Callable[..., Said]", workspace: Workspace, kind: str
) -> None:
    path = put(workspace, 1, GOOD)
    put(workspace, 2, GOOD)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "link to itself" else "nothing.yaml")
    assert_listed(aletheia, workspace)


def test_other_files_among_the_records_are_no_records(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    put(workspace, 2, GOOD)
    for name in (
        "EXP-1.yaml",
        "EXP-2026-01-01-1.yaml",
        "README.md",
        "EXP-2026-01-01-001.yaml~",
        ".EXP-2026-01-01-001.yaml",
    ):
        (workspace.experiments / name).write_text("x")
    assert [row["id"] for row in json.loads(aletheia(workspace, "exp", "list", "--json").out)] == ["EXP-2026-01-01-002"]


# ── figures and tables ───────────────────────────────────────────────────────────────────────────────────────────────


def test_figures_are_shown_with_their_interval_and_n() -> None:
    figure = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 8}
    change = {"before": {"value": 2.0, "n": 8}, "after": {"value": 1.5, "n": 8}, "delta": figure | {"value": -0.5}}
    facts = Facts(
        status="complete", stage="eval", profile="p", results={"eval_loss": change, "preference_accuracy": figure}
    )
    assert figures(facts) == [
        "held-out loss 2.00 → 1.50, change -0.50 [+0.25, +0.75] n=8",
        "held-out preference accuracy 0.50 [0.25, 0.75] n=8, chance 0.50",
    ]


def test_a_figure_without_an_interval_says_how_few_rows_there_were() -> None:
    facts = Facts(status="complete", stage="eval", profile="p", results={"preference_accuracy": {"value": 1.0, "n": 1}})
    assert figures(facts) == ["held-out preference accuracy 1.00 (n = 1), chance 0.50"]


def test_a_control_is_named_as_one() -> None:
    change = {end: {"value": 1.0, "n": 1} for end in ("before", "after", "delta")}
    facts = Facts(
        status="complete", stage="sft", profile="p",
        configuration={"sft_config": {"shuffle_answers": True}}, results={"eval_loss": change},
    )  # fmt: skip
    assert figures(facts)[0].endswith("(control: answers shuffled)")
