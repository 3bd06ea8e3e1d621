"""`aletheia data diff`: paths, snapshots and records against one another."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from pipeline.records import items
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said, Trained

Aletheia = Callable[..., "Said"]


def changed(workspace: Workspace) -> str:
    """A copy of the conversations with one row added, one removed, one changed."""
    lines = [
        line for path in sorted((workspace.root / "data/sft").glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    rows = [json.loads(line) for line in lines]
    rows[1]["messages"][-1]["content"] = "Otherwise."
    rows[2] |= {
        "id": "new",
        "messages": [{"role": "user", "content": "new?"}, {"role": "assistant", "content": "Yes."}],
    }
    (workspace.root / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    return "changed.jsonl"


def test_paths_are_compared_by_content(aletheia: Aletheia, workspace: Workspace) -> None:
    same = aletheia(workspace, "data", "diff", "data/sft", "data/sft")
    assert (same.code, same.out) == (0, "15 rows the same, 0 added, 0 removed, 0 changed\n")
    said = aletheia(workspace, "data", "diff", "data/sft", changed(workspace))
    assert said.code == 1 and said.out.startswith("12 rows the same, 1 added, 2 removed, 1 changed\n")
    assert "\n+ new  new?\n" in said.out and ": messages\n" in said.out
    assert "+ Otherwise." not in said.out
    with_text = aletheia(workspace, "data", "diff", "data/sft", "changed.jsonl", "--text")
    assert "Otherwise." in with_text.out


def test_record_snapshot_and_path_name_the_same_rows(aletheia: Aletheia, copied: "Trained") -> None:
    facts = copied.record("sft").facts()
    assert facts is not None
    sha256 = facts.data["snapshot"]["sha256"]
    for one, other in (
        (copied.sft, "data/sft"),
        (sha256[:10], "data/sft"),
        (copied.sft, sha256),
        (copied.sft, copied.sft),
    ):
        said = aletheia(copied.workspace, "data", "diff", one, other)
        assert (said.code, said.err) == (0, ""), said.out + said.err


def test_a_year_later_the_record_still_shows_what_changed(aletheia: Aletheia, copied: "Trained") -> None:
    path = copied.workspace.root / "data/sft/devops.jsonl"
    path.write_text(path.read_text().replace("kube", "cube"))
    said = aletheia(copied.workspace, "data", "diff", copied.sft, "data/sft", "--text")
    assert said.code == 1 and " changed" in said.out and "cube" in said.out and "kube" in said.out


def test_without_its_snapshot_a_record_is_compared_by_hash_and_says_so(aletheia: Aletheia, copied: "Trained") -> None:
    for path in (copied.workspace.checkpoints / "data").iterdir():
        path.unlink()
    said = aletheia(copied.workspace, "data", "diff", copied.sft, "data/sft", "--json")
    assert said.code == 0 and "compared by hash alone" in said.err
    assert json.loads(said.out)["same"] == sum(map(len, items.rows(copied.workspace.experiments / copied.sft).values()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "error: nowhere: there is no such file or folder"),
        ("abcdef12", "error: abcdef12: there is no such file and no such snapshot"),
        ("EXP-2020-01-01-001", "error: experiments: there is no record `EXP-2020-01-01-001`"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(aletheia: Aletheia, workspace: Workspace, name: str, said: str) -> None:
    found = aletheia(workspace, "data", "diff", name, "data/sft")
    assert found.code == 2 and found.err.startswith(said) and found.err.count("\n") == 1


def test_degrade_writes_a_folder_once(aletheia: Aletheia, workspace: Workspace) -> None:
    words = ("data", "degrade", "data/sft", "--to", "medium", "--output", str(workspace.root / "medium"))
    said = aletheia(workspace, *words)
    assert said.code == 0 and said.out == "medium\n" and "15 rows of medium quality" in said.err
    rows = [
        json.loads(line) for path in (workspace.root / "medium").iterdir() for line in path.read_text().splitlines()
    ]
    assert len(rows) == 15 and {row["quality"] for row in rows} == {"medium"}
    assert aletheia(workspace, "data", "check", "medium").code == 0
    again = aletheia(workspace, *words)
    assert again.code == 2 and "is there already" in again.err


def test_degrade_passes_over_what_is_not_right_and_says_where(aletheia: Aletheia, workspace: Workspace) -> None:
    right = {
        "id": "a",
        "messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "Yes, it does."}],
    }
    lines = ["{", json.dumps(right), json.dumps({"key_points": ["x"], "prompt": "q"}), json.dumps(right)]
    (workspace.root / "mine.jsonl").write_text("\n".join(lines + ['{"text": 1}'] * 25) + "\n")
    words = ("data", "degrade", "mine.jsonl", "--to", "low", "--output", str(workspace.root / "low"))
    said = aletheia(workspace, *words)
    assert (said.code, said.out) == (0, "low\n"), said.err
    named = [line for line in said.err.splitlines() if line.startswith("passed over: ")]
    assert len(named) == 21 and named[0].startswith("passed over: mine.jsonl:1: is not JSON")
    assert "mine.jsonl:3: " in named[1] and named[2].endswith("mine.jsonl:4: the id `a` stands at mine.jsonl:2 too")
    assert named[-1] == "passed over: 8 more rows; aletheia data check mine.jsonl"
    assert "1 row of low quality" in said.err
    assert "1 answer is longer than before: it was too short to be degraded\n" in said.err
    [row] = [json.loads(line) for line in (workspace.root / "low/mine.jsonl").read_text().splitlines()]
    assert set(row) == {"id", "messages", "quality"} and row["quality"] == "low"


def test_degrade_says_which_answers_stay_and_writes_nothing_without_a_right_row(
    aletheia: Aletheia, workspace: Workspace
) -> None:
    turns = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "Yes."}]
    (workspace.root / "mine.jsonl").write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in "ab"))
    said = aletheia(
        workspace, "data", "degrade", "mine.jsonl", "--to", "medium", "--output", str(workspace.root / "as-before")
    )
    assert said.code == 0 and "2 answers are as long as before: they were too short to be degraded\n" in said.err
    (workspace.root / "mine.jsonl").write_text("{}\n")
    said = aletheia(workspace, "data", "degrade", "mine.jsonl", "--to", "low", "--output", str(workspace.root / "none"))
    assert said.code == 2 and "error: mine.jsonl: holds no conversation that is right" in said.err
    assert not (workspace.root / "none").exists()
