"""What people wrote, in whatever shape, rolled up."""

from collections.abc import Callable
from typing import Any

import pytest

from aletheia.report import notes
from aletheia.report.project import Project
from tests.aletheia.report.conftest import Put


def test_learnings_stand_by_kind(put: Put, project: Callable[[], Project]) -> None:
    put("EXP-2026-01-01-001", None, {"learnings": {"domain": "one", "training": ["two", "three"], "mine": ["four"]}})
    put("EXP-2026-01-01-002", None, {"learnings": ["five"], "insights": "six"})
    told = {kind: [note.text for note in items] for kind, items in notes.learnings(project()).items()}
    assert told == {
        "training": ["two", "three"],
        "domain": ["one"],
        "general": ["five"],
        "insights": ["six"],
        "mine": ["four"],
    }
    assert list(told)[:2] == ["training", "domain"]


def test_the_journal_is_newest_first_whatever_its_shape(put: Put, project: Callable[[], Project]) -> None:
    put("EXP-2026-01-02-001", None, {"journal": [{"date": "2026-03-01", "learned": "a"}, "said", {}]})
    put("EXP-2026-01-05-001", None, {"journal": "a text"})
    put("EXP-2026-01-03-001", None, {"journal": {"entries": [{"learned": "b"}]}})
    told = [(day.date, day.said) for day in notes.journal(project())]
    assert told == [
        ("2026-03-01", {"learned": "a"}),
        ("2026-01-05", {"": "a text"}),
        ("2026-01-03", {"learned": "b"}),
        ("2026-01-02", {"": "said"}),
    ]


def test_steps_are_open_or_done_and_say_what_they_became(put: Put, project: Callable[[], Project]) -> None:
    steps = [
        "plain",
        "[x] ticked",
        "[ ] not yet",
        {"step": "as a mapping", "done": True, "promoted_to": "EXP-2026-01-02-001"},
        {"step": "with more", "done": False, "who": "M."},
        None,
    ]
    put("EXP-2026-01-01-001", None, {"next_steps": steps})
    told = [(step.number, step.text, step.done, step.became) for step in notes.next_steps(project())]
    assert told == [
        (1, "plain", False, ""),
        (2, "ticked", True, ""),
        (3, "not yet", False, ""),
        (4, "as a mapping", True, "EXP-2026-01-02-001"),
        (5, "with more; who: M.", False, ""),
    ]


def test_a_conclusion_in_parts_is_one(put: Put, project: Callable[[], Project]) -> None:
    put("EXP-2026-01-01-001", None, {"conclusion": {"outcome": "pass", "because": ["all", "hold"]}})
    [conclusion] = notes.conclusions(project())
    assert conclusion.text == "outcome: pass; because: all; because: hold"


@pytest.mark.parametrize("odd", [5, True, [[]], [None], {"a": None}, {1: {2: [3]}}, [{"x": [{"y": 1}]}], "", [], {}])
def test_any_shape_is_taken_as_it_is(put: Put, project: Callable[[], Project], odd: Any) -> None:
    keys = (
        "learnings",
        "journal",
        "next_steps",
        "observations",
        "conclusion",
        "issues",
        "visualizations",
        "tags",
        "stages",
    )
    put("EXP-2026-01-01-001", None, dict.fromkeys(keys, odd))
    found = project()
    told = [notes.learnings(found), notes.journal(found), notes.next_steps(found), notes.conclusions(found)]
    assert len(told) == 4 and all(isinstance(note.text, str) for note in notes.notes(found, "observations"))
    assert all(isinstance(path, str) for path, _ in notes.pictures(found.entries[0]))
