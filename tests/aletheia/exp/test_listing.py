"""`exp list`: what it shows, which filters mean what, and that no record, however odd, hides the others."""

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from aletheia.exp import listing
from pipeline import yamlio
from pipeline.records import index
from pipeline.records.file import LINE, RecordFile
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

Aletheia = Callable[..., "Said"]
Write = Callable[..., RecordFile]

GOOD = {
    "status": "complete",
    "stage": "data",
    "profile": "small",
    "results": {"rows": 7},
    "resources": {"wall_seconds": 1},
}
RUNNING = {"status": "running", "at": "x", "host": os.uname().nodename}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files settle at once, so that what is listed a second time comes from the cache."""
    monkeypatch.setattr(index, "SETTLED", 0.0)


def put(workspace: Workspace, number: int, facts: Any, above: str = "") -> Path:
    workspace.experiments.mkdir(exist_ok=True)
    path = workspace.experiments / f"EXP-2026-01-01-{number:03d}.yaml"
    path.write_text(f"{above}\n{LINE}\n{yamlio.dump(facts)}", "utf-8")
    return path


def loss(value: float, width: float = 0.1) -> dict[str, Any]:
    """Results with a held-out loss of `value`, and a change of −0.5 ± `width`."""

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "ci_low": value - width, "ci_high": value + width, "n": 25}

    return {"eval_loss": {"before": figure(value + 0.5), "after": figure(value), "delta": figure(-0.5)}}


@pytest.fixture
def some(place: Workspace, write_record: Write) -> Workspace:
    """Six records, each of another kind."""
    write_record(place, "EXP-2026-01-01-001", {"results": loss(5.5), "resources": {"wall_seconds": 90}})
    write_record(
        place, "EXP-2026-01-02-001", {"results": loss(5.1), "resources": {"wall_seconds": 30}}, "tags: [night]\n"
    )
    write_record(place, "EXP-2026-01-02-002", {"stage": "eval", "profile": "other", "results": loss(6.5)})
    write_record(place, "EXP-2026-01-03-001", {"stage": "dpo", "status": "failed"}, "tags: [night, long]\n")
    write_record(place, "EXP-2026-01-04-001", None, "stages: [sft, eval]\nprofile: small\ndescription: More data\n")
    lineage = {"children": ["EXP-2026-01-02-001", "EXP-2026-01-02-002"]}
    person = "date: 2025-06-07\nstages: [sft, eval]\n"
    write_record(place, "EXP-2026-01-05-001", {"stage": "pipeline", "lineage": lineage}, person)
    return place


def listed(aletheia: Aletheia, workspace: Workspace, *arguments: str) -> list[str]:
    """`03-001` for EXP-2026-01-03-001, in the order listed."""
    said = aletheia(workspace, "exp", "list", *arguments, "--json")
    assert said.code == 0, said.err
    return [row["id"][12:] for row in json.loads(said.out)]


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_list_shows_every_record_newest_first(aletheia: Aletheia, some: Workspace) -> None:
    said = aletheia(some, "exp", "list")
    assert (said.code, said.err) == (0, ""), said.err
    assert said.out.splitlines() == [
        "record              date        stage     profile  status    time        figures",
        "EXP-2026-01-05-001  2025-06-07  pipeline  small    complete              sft → eval",
        "EXP-2026-01-04-001              pipeline  small    planned               sft → eval",
        "                                                                         More data",
        "EXP-2026-01-03-001              dpo       small    failed",
        "EXP-2026-01-02-002              eval      other    complete              "
        "held-out loss 7.00 → 6.50, change -0.50 [-0.60, -0.40] n=25",
        "EXP-2026-01-02-001              sft       small    complete  30 s        "
        "held-out loss 5.60 → 5.10, change -0.50 [-0.60, -0.40] n=25",
        "EXP-2026-01-01-001              sft       small    complete  1 min 30 s  "
        "held-out loss 6.00 → 5.50, change -0.50 [-0.60, -0.40] n=25",
    ]


def test_json_is_the_data_alone(aletheia: Aletheia, some: Workspace) -> None:
    said = aletheia(some, "exp", "list", "--json")
    assert (said.code, said.err) == (0, ""), said.err
    row = json.loads(said.out)[-1]
    assert row.pop("metrics")["eval_loss.delta"] == {"value": -0.5, "ci_low": -0.6, "ci_high": -0.4, "n": 25}
    assert row == {
        "id": "EXP-2026-01-01-001",
        "date": "2026-01-01",
        "stage": "sft",
        "stages": [],
        "profile": "small",
        "status": "complete",
        "seconds": 90.0,
        "tags": [],
        "description": None,
        "verdict": None,
        "figures": ["held-out loss 6.00 → 5.50, change -0.50 [-0.60, -0.40] n=25"],
        "problems": [],
    }


def test_a_verdict_is_shown_where_there_is_one(aletheia: Aletheia, place: Workspace, write_record: Write) -> None:
    write_record(place, "EXP-2026-01-01-001", {"verdict": {"frozen_at": "then", "finding": "inconclusive"}})
    write_record(place, "EXP-2026-01-01-002", {"verdict": {"frozen_at": "then"}})
    header, second, first = aletheia(place, "exp", "list").out.splitlines()
    assert header.split()[-1] == "verdict"
    assert (second.split()[-1], first.split()[-1]) == ("complete", "inconclusive")


def test_no_records_are_an_empty_list_and_a_note(aletheia: Aletheia, workspace: Workspace) -> None:
    said = aletheia(
        workspace, "exp", "list", "--json", "--stage", "sft", "--where", "eval_loss < 1", "--sort", "eval_loss"
    )
    assert (said.code, json.loads(said.out)) == (0, [])
    said = aletheia(workspace, "exp", "list")
    assert (said.code, said.out) == (0, "")
    assert said.err == "no records in experiments yet; try make demo\n"


def test_a_list_that_nothing_is_on_says_so(aletheia: Aletheia, some: Workspace) -> None:
    said = aletheia(some, "exp", "list", "--stage", "merge")
    assert (said.code, said.out, said.err) == (0, "", "none of 6 records is like that\n")


def test_numbers_are_ordered_as_numbers_past_999(aletheia: Aletheia, workspace: Workspace) -> None:
    for number in (999, 1000, 2):
        put(workspace, number, GOOD)
    assert listed(aletheia, workspace) == ["01-1000", "01-999", "01-002"]
    assert listed(aletheia, workspace, "--sort", "date") == ["01-002", "01-999", "01-1000"]
    assert listed(aletheia, workspace, "--sort", "-date") == ["01-1000", "01-999", "01-002"]


def test_a_run_whose_process_is_gone_is_dead_and_a_plan_is_planned(aletheia: Aletheia, workspace: Workspace) -> None:
    gone = {"status": "running", "at": "2026-01-01T00:00:00Z", "host": os.uname().nodename, "pid": 1, "started": 1.0}
    put(workspace, 1, GOOD | {"status": "running", "history": [gone]})
    put(workspace, 2, GOOD | {"status": "running", "history": [gone | {"host": "elsewhere"}]})
    (workspace.experiments / "EXP-2026-01-01-003.yaml").write_text("hypothesis: More data helps.\n")
    rows = json.loads(aletheia(workspace, "exp", "list", "--json").out)
    assert [row["status"] for row in rows] == ["planned", "running on elsewhere", "dead"]
    for status, number in (("planned", "003"), ("running", "002"), ("dead", "001")):
        assert listed(aletheia, workspace, "--status", status) == [f"01-{number}"]


def test_a_process_that_dies_is_dead_in_the_next_list(aletheia: Aletheia, workspace: Workspace) -> None:
    """Its record does not change then: the cache holds what was written, and what is true is asked each time."""
    with subprocess.Popen(["sleep", "60"]) as process:
        started = psutil.Process(process.pid).create_time()
        run = RUNNING | {"pid": process.pid, "started": started}
        put(workspace, 1, GOOD | {"status": "running", "history": [run]})
        assert listed(aletheia, workspace, "--status", "running") == ["01-001"]
        process.kill()
    assert listed(aletheia, workspace, "--status", "dead") == ["01-001"]


# ── filters and order ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stage", "sft"], ["02-001", "01-001"]),
        (["--stage", "pipeline"], ["05-001", "04-001"]),
        (["--status", "failed"], ["03-001"]),
        (["--tag", "night"], ["03-001", "02-001"]),
        (["--tag", "night", "--stage", "dpo"], ["03-001"]),
        (["--profile", "other"], ["02-002"]),
        (["--since", "2026-01-03"], ["04-001", "03-001"]),  # the newest says it is of 2025
        (["--since", "2026-01-02", "--until", "2026-01-02"], ["02-002", "02-001"]),
        (["--until", "2025-12-31"], ["05-001"]),
        (["--where", "eval_loss < 5.5"], ["02-001"]),
        (["--where", "eval_loss <= 5.5"], ["02-001", "01-001"]),
        (["--where", "eval_loss.before > 5.9", "--where", "eval_loss < 6"], ["01-001"]),
        (["--where", "eval_loss.delta.ci_high < -0.3"], ["02-002", "02-001", "01-001"]),
        (["--where", "eval.eval_loss > 6"], ["05-001"]),
        (["--sort", "eval_loss"], ["02-001", "01-001", "02-002", "05-001", "04-001", "03-001"]),
        (["--sort", "-eval_loss"], ["02-002", "01-001", "02-001", "05-001", "04-001", "03-001"]),
        (["--sort", "seconds", "--stage", "sft"], ["02-001", "01-001"]),
        (["--sort=-seconds", "--stage", "sft"], ["01-001", "02-001"]),
        (["--sort", "date"], ["05-001", "01-001", "02-001", "02-002", "03-001", "04-001"]),
        (["--sort", "-eval_loss", "--limit", "1"], ["02-002"]),
    ],
    ids=" ".join,
)
def test_the_list_holds_what_was_asked_for(
    aletheia: Aletheia, some: Workspace, arguments: list[str], expected: list[str]
) -> None:
    assert listed(aletheia, some, *arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--stage", "stf"], "--stage: no record has `stf`; try sft"),
        (["--status", "compelte"], "--status: no record has `compelte`; try complete"),
        (["--tag", "nigth"], "--tag: no record has `nigth`; try night"),
        (["--profile", "smal"], "--profile: no record has `smal`; try small"),
        (["--where", "eval_los < 5"], "--where: no record has a figure `eval_los`; try eval_loss"),
        (["--sort", "-evalloss"], "--sort: no record has a figure `evalloss`; try eval_loss"),
        (["--where", "eval_loss"], "--where: `eval_loss` is no criterion; try METRIC OP NUMBER"),
        (["--where", "__import__('os').system('x') < 1"], r"--where: `__import__\('os'\).*` is no criterion"),
        (["--since", "yesterday"], "--since: `yesterday` is no date; try YYYY-MM-DD"),
        (["--until", "2026-02-30"], "--until: `2026-02-30` is no date; try YYYY-MM-DD"),
        (["--limit", "0"], "Invalid value for '--limit'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_one_line_that_names_what_is_near(
    aletheia: Aletheia, some: Workspace, arguments: list[str], error: str
) -> None:
    said = aletheia(some, "exp", "list", *arguments)
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(f"error: {error}[^\n]*\n", said.err), said.err


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (["--where", "eval_loss < 9"], "note: 3 of 6 records have no `eval_loss`"),
        (["--sort", "eval_loss"], "note: 3 of 6 records have no `eval_loss` and stand last"),
        (["--sort", "seconds"], "note: 4 of 6 records have no `seconds` and stand last"),
        (["--limit", "2"], "note: 4 more; --limit 6 shows all"),
    ],
    ids=["where", "sort", "seconds", "limit"],
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_what_is_left_out_is_counted(
    aletheia: Aletheia, some: Workspace, arguments: list[str], form: list[str], note: str
) -> None:
    assert aletheia(some, "exp", "list", *arguments, *form).err == f"{note}\n"


def test_unreadable_records_that_a_filter_leaves_out_are_counted(aletheia: Aletheia, some: Workspace) -> None:
    (some.experiments / "EXP-2026-01-09-001.yaml").write_text("tags: [")
    (some.experiments / "EXP-2026-01-09-002.yaml").write_text(f"{LINE}\nstatus: [")
    said = aletheia(some, "exp", "list", "--stage", "sft")
    assert said.err == "note: 2 of the records left out cannot be read; aletheia exp lint says why\n"
    assert listed(aletheia, some, "--status", "unreadable") == ["09-002", "09-001"]


def test_the_figure_asked_for_is_shown_with_its_interval(aletheia: Aletheia, some: Workspace) -> None:
    said = aletheia(some, "exp", "list", "--where", "eval_loss.delta < 0", "--sort", "eval_loss.delta", "--limit", "1")
    assert "eval_loss.delta -0.5 [-0.6, -0.4] n=25" in said.out
    assert said.out.count("eval_loss.delta") == 1


def test_sorting_by_time_shows_no_figure_of_that_name(
    aletheia: Aletheia, place: Workspace, write_record: Write
) -> None:
    write_record(place, "EXP-2026-01-01-001")
    assert listed(aletheia, place, "--sort", "seconds") == ["01-001"]
    write_record(place, "EXP-2026-01-01-001", {"results": {"training": {"seconds": 7}}})
    said = aletheia(place, "exp", "list", "--sort", "seconds")
    assert (said.code, said.err) == (0, "note: 1 of 1 records have no `seconds` and stand last\n")
    assert "seconds" not in said.out


def test_what_is_wrong_with_a_record_is_told_with_its_place(aletheia: Aletheia, some: Workspace) -> None:
    broken = some.experiments / "EXP-2026-01-01-001.yaml"
    broken.write_bytes(b"tags: [}\n" + broken.read_bytes())
    *_, row, figures = aletheia(some, "exp", "list").out.splitlines()
    assert row.split()[:4] == ["EXP-2026-01-01-001", "sft", "small", "complete"]
    assert "experiments/EXP-2026-01-01-001.yaml:1:8: " in row
    assert "held-out loss" in figures
    problems = json.loads(aletheia(some, "exp", "list", "--json").out)[-1]["problems"]
    assert len(problems) == 1
    assert problems[0] in row


def test_a_control_is_not_the_pipelines_figure(aletheia: Aletheia, place: Workspace, write_record: Write) -> None:
    shuffled = {"configuration": {"sft_config": {"shuffle_answers": True}}}
    write_record(place, "EXP-2026-01-01-001", {"results": loss(5.0)})
    write_record(place, "EXP-2026-01-01-002", {"results": loss(6.0)} | shuffled)
    children = ["EXP-2026-01-01-001", "EXP-2026-01-01-002", "EXP-2026-01-01-009"]
    write_record(place, "EXP-2026-01-01-003", {"stage": "pipeline", "lineage": {"children": children}})
    rows = json.loads(aletheia(place, "exp", "list", "--json").out)
    assert rows[0]["metrics"]["sft.eval_loss"]["value"] == 5.0


def test_a_terminal_shows_the_newest_fifty_and_says_how_many_more(
    place: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 61):
        put(place, number, GOOD)
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        listing.list_records(place, listing.Filters(), None, None, False)
    shown = b""
    while b"EXP-2026-01-01-011" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    assert shown.count(b"EXP-") == 50
    assert capfd.readouterr().err == "note: 10 more; --limit 60 shows all\n"


def test_what_is_no_terminal_gets_every_record(aletheia: Aletheia, place: Workspace) -> None:
    for number in range(1, 61):
        put(place, number, GOOD)
    said = aletheia(place, "exp", "list")
    assert (said.out.count("EXP-"), said.err) == (60, "")


# ── hostile records ──────────────────────────────────────────────────────────────────────────────────────────────────

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
    "numbers of hundreds of digits": GOOD
    | {"results": {"preference_accuracy": {"value": 10**400, "n": 10**400}}, "resources": {"wall_seconds": 10**400}},
    "its own child": GOOD | {"stage": "pipeline", "lineage": {"children": ["EXP-2026-01-01-001"]}},
    "a stage of many lines": GOOD | {"stage": "one\ntwo\x1b[2J"},
    "a profile of many lines": GOOD | {"profile": "one\ntwo\x1b[2J"},
}  # fmt: skip


def assert_listed(aletheia: Aletheia, workspace: Workspace) -> None:
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
    asked = ("--where", "rows > 6", "--sort", "-rows", "--stage", "data", "--profile", "small")
    said = aletheia(workspace, "exp", "list", *asked, "--json")
    assert "EXP-2026-01-01-002" in [row["id"] for row in json.loads(said.out)]


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_record_does_not_hide_the_others(aletheia: Aletheia, workspace: Workspace, name: str) -> None:
    put(workspace, 1, GOOD).write_bytes(BYTES[name])
    put(workspace, 2, GOOD)
    assert_listed(aletheia, workspace)


@pytest.mark.parametrize("name", FACTS)
def test_a_record_of_odd_facts_does_not_hide_the_others(aletheia: Aletheia, workspace: Workspace, name: str) -> None:
    put(workspace, 1, FACTS[name])
    put(workspace, 2, GOOD)
    assert_listed(aletheia, workspace)


@pytest.mark.parametrize(
    "above",
    [
        "tags: [",
        "date: 9999-99-99",
        "tags: {}",
        "stages: [[sft]]\ndescription: [1, {a: b}]",
        "profile: 7\n\x1b[2J: x",
        "- 1",
    ],
)
def test_a_persons_half_of_any_shape_hides_nothing(aletheia: Aletheia, workspace: Workspace, above: str) -> None:
    put(workspace, 1, GOOD, above)
    put(workspace, 2, GOOD)
    assert_listed(aletheia, workspace)
    said = aletheia(workspace, "exp", "list", "--status", "complete")
    assert "EXP-2026-01-01-001" in said.out  # the pipeline's half is whole


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_does_not_hide_the_others(aletheia: Aletheia, workspace: Workspace, kind: str) -> None:
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


def test_other_files_among_the_records_are_no_records(aletheia: Aletheia, workspace: Workspace) -> None:
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
