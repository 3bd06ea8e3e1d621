"""The project's log in Markdown: tables of experiments and of pictures, lessons, conclusions, open steps, issues.

What records say stands in it as text: no cell ends its row early, nothing becomes a heading, a link or HTML.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aletheia.report import MARK, notes
from aletheia.report.project import Entry, Project, texts

CELL = 600  # characters of a table's cell
EXPERIMENTS = ("id", "date", "stage", "profile", "status", "what", "figures", "verdict")


def log(project: Project, folder: Path) -> str:
    """`folder`: where the log will stand, from which it links to the records' files."""
    return "\n".join(_lines(project, folder)).rstrip() + "\n"


def _lines(project: Project, folder: Path) -> Iterator[str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in project.counts.items())
    yield from (MARK, "", f"# {_text(project.name)}: experiments", "")
    yield f"Written {project.written}. {len(project.entries)} records{f': {counts}' if counts else ''}."
    problems = [f"{_id(e, project, folder)}: {_text(problem)}" for e in project.entries for problem in e.problems]
    if project.strangers:
        problems.append(f"not read, because named like no record: {_text(', '.join(project.strangers))}")
    yield from _list("Needs a look", problems)
    yield from _section("Experiments")
    yield from _table(EXPERIMENTS, [_experiment(entry, project, folder) for entry in project.entries])
    yield from _section("Visualizations")
    pictures = [
        (_link(path, project.picture(e, path, folder)), _cell(purpose), _id(e, project, folder))
        for e in project.entries
        for path, purpose in notes.pictures(e)
    ]
    yield from _table(("path", "purpose", "record"), pictures)
    yield from _section("Lessons learned")
    learned = notes.learnings(project)
    for day in notes.journal(project):
        for lesson in texts(day.said.get("learned")):
            learned.setdefault("from the journal", []).append(notes.Note(day.entry, lesson))
    if not learned:
        yield "None written yet."
    for kind, told in learned.items():
        yield from (f"### {_text(kind).capitalize()}", "", *_items(told, project, folder), "")
    steps = [step for step in notes.next_steps(project) if not step.done]
    open_steps = [f"[ ] {_text(s.text)} ({_id(s.entry, project, folder)}, step {s.number})" for s in steps]
    yield from _list("Conclusions", _told(notes.conclusions(project), project, folder))
    yield from _list("Open next steps", open_steps)
    yield from _list("Issues", _told(notes.notes(project, "issues"), project, folder))


def _experiment(entry: Entry, project: Project, folder: Path) -> list[str]:
    what = entry.description or str(entry.person.get("hypothesis") or "")
    told = [entry.stage, entry.profile, entry.status, what, "; ".join(entry.figures), entry.finding or ""]
    return [_id(entry, project, folder), entry.started[:10], *map(_cell, told)]


def _section(title: str) -> Iterator[str]:
    yield from ("", f"## {title}", "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        yield "None yet."
        return
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _list(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield from _section(title)
        yield from (f"- {item}" for item in items)


def _items(told: Sequence[notes.Note], project: Project, folder: Path) -> Iterator[str]:
    yield from (f"- {item}" for item in _told(told, project, folder))


def _told(told: Sequence[notes.Note], project: Project, folder: Path) -> list[str]:
    return [f"{_text(note.text)} ({_id(note.entry, project, folder)})" for note in told]


def _id(entry: Entry, project: Project, folder: Path) -> str:
    return _link(entry.id, project.link(entry.file.path, folder))


def _link(shown: str, target: str | None) -> str:
    return f"[{_cell(shown)}]({target})" if target else _cell(shown)


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return _text(text if len(text) <= CELL else f"{text[: CELL - 1]}…")


def _text(value: Any) -> str:
    """One line of plain words."""
    line = " ".join(str(value).split())
    for mark, escaped in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("](", "]\\("), ("]:", "]\\:")):
        line = line.replace(mark, escaped)
    return re.sub(r"^([#>+=-])", r"\\\1", line)
