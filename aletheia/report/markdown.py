"""The project's log in Markdown: experiments, pictures, lessons, next steps and issues, one table or list each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aletheia.report import MARK, notes
from aletheia.report.project import Entry, Project

CELL = 300  # characters


def log(project: Project, folder: Path) -> str:
    return "\n".join(_lines(project)).rstrip() + "\n"


def _lines(project: Project) -> Iterator[str]:
    counts = ", ".join(f"{count} {kind}" for kind, count in project.counts.items())
    yield from (MARK, f"# {_text(project.name)}: experiments", "")
    yield from (f"Written {project.written}. {len(project.entries)} records{f': {counts}' if counts else ''}.", "")


def _text(value: Any) -> str:
    return str(value)
