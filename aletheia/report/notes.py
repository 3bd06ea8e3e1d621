"""What people wrote, rolled up over all records: verdicts, learnings, observations, journal, next steps, issues.

A record's keys are free: whatever shape stands there (a text for a list, a list for a mapping) is taken as it is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aletheia.report.project import Entry, Project, text, texts

_TICKED = re.compile(r"^\[([ xX])\]\s*")
KINDS = ("training", "infrastructure", "domain")  # of learnings, in this order; others follow
_DONE = ("done", "ticked", "status")  # keys by which a step written as a mapping says that it is done


@dataclass(frozen=True)
class Note:
    entry: Entry
    text: str


@dataclass(frozen=True)
class Step(Note):
    """`number` counts from 1, as `aletheia exp promote` does; `became`: the record that it was promoted to."""

    number: int
    done: bool
    became: str = ""


@dataclass(frozen=True)
class Day:
    """A journal entry: its keys as they were written."""

    entry: Entry
    date: str
    said: dict[str, Any]


def learnings(project: Project) -> dict[str, list[Note]]:
    """By kind (training, infrastructure, domain, …); what was written without one is `general`."""
    found: dict[str, list[Note]] = {kind: [] for kind in KINDS}
    for entry in project.entries:
        written = entry.person.get("learnings")
        kinds = list(written.items()) if isinstance(written, dict) else [("general", written)]
        for kind, lessons in [*kinds, ("insights", entry.person.get("insights"))]:
            for lesson in texts(lessons):
                found.setdefault(str(kind), []).append(Note(entry, lesson))
    return {kind: told for kind, told in found.items() if told}


def notes(project: Project, key: str) -> list[Note]:
    """`observations`, `issues`: one note an item."""
    return [Note(entry, item) for entry in project.entries for item in texts(entry.person.get(key))]


def conclusions(project: Project) -> list[Note]:
    """One a record."""
    told = [(entry, "; ".join(texts(entry.person.get("conclusion")))) for entry in project.entries]
    return [Note(entry, conclusion) for entry, conclusion in told if conclusion]


def journal(project: Project) -> list[Day]:
    """Newest day first."""
    days = [day for entry in project.entries for day in _days(entry)]
    return sorted(days, key=lambda day: day.date, reverse=True)


def next_steps(project: Project) -> list[Step]:
    return [step for entry in project.entries for step in _steps(entry)]


def pictures(entry: Entry) -> list[tuple[str, str]]:
    """Path and purpose: the pipeline's, then the person's."""
    found = [(picture.path, picture.purpose) for picture in entry.facts.visualizations] if entry.facts else []
    written = entry.person.get("visualizations")
    for picture in written if isinstance(written, list) else [] if written is None else [written]:
        named = picture if isinstance(picture, dict) else {"path": picture}
        found.append((text(named.get("path")), text(named.get("purpose"))))
    return found


def _days(entry: Entry) -> Iterator[Day]:
    written = entry.person.get("journal")
    if isinstance(written, dict):  # one entry, or all of them under `entries`
        written = written.get("entries", written)
    for day in written if isinstance(written, list) else [written]:
        if isinstance(day, dict) and day:
            yield Day(entry, text(day.get("date")) or entry.id[4:14], {k: v for k, v in day.items() if k != "date"})
        elif day not in (None, {}):
            yield Day(entry, entry.id[4:14], {"": text(day)})


def _steps(entry: Entry) -> Iterator[Step]:
    written = entry.person.get("next_steps")
    for number, step in enumerate(written if isinstance(written, list) else [written], 1):
        if isinstance(step, dict):
            done = any(str(step.get(key)).lower() in ("true", "done", "yes", "x") for key in _DONE)
            others = {key: value for key, value in step.items() if key not in (*_DONE, "step", "promoted_to")}
            said = "; ".join(filter(None, (text(step.get("step")), text(others))))
            yield Step(entry, said, number, done, text(step.get("promoted_to")))
        elif text(step).strip():
            mark = _TICKED.match(text(step))
            yield Step(entry, _TICKED.sub("", text(step)), number, bool(mark and mark[1] != " "))
