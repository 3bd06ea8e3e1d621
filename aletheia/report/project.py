"""Everything that the report tells, read once: an `Entry` a record, newest first.

Configuration, environment, curves and samples are kept of the newest `FULL` records; of the others what the index,
the trends, the lineage and the roll-ups need. A record that cannot be read is an entry that says why.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aletheia.summary import figures
from pipeline.errors import UserError
from pipeline.progress import track
from pipeline.records import ids
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import Metric, metrics
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

FULL = 200  # records with a section of their own; more would make a page that no browser opens quickly
_BULK: dict[str, Any] = {"configuration": {}, "data": {}, "code": {}, "environment": {}, "artifacts": []}


@dataclass
class Entry:
    """A record. `facts` is None for a plan and for one whose lower half cannot be read; `whole`: nothing was left out."""

    file: RecordFile
    status: str
    facts: Facts | None = None
    person: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    metrics: dict[str, Metric] = field(default_factory=dict)
    whole: bool = True

    @property
    def id(self) -> str:
        return self.file.id

    @property
    def kind(self) -> str:
        """The status in one word: `running on host` is running."""
        return self.status.split()[0]

    @property
    def stage(self) -> str:
        if self.facts:
            return self.facts.stage
        stages = texts(self.person.get("stages"))
        return "pipeline" if len(stages) > 1 else (stages or ["?"])[0]

    @property
    def profile(self) -> str:
        return self.facts.profile if self.facts else text(self.person.get("profile"))

    @property
    def description(self) -> str:
        return text(self.person.get("description"))

    @property
    def tags(self) -> list[str]:
        return texts(self.person.get("tags"))

    @property
    def parent(self) -> str | None:
        return self.facts.lineage.parent if self.facts else None

    @property
    def finding(self) -> str | None:
        return self.facts.verdict.finding if self.facts and self.facts.verdict else None

    @cached_property
    def started(self) -> str:
        """`2026-11-21 04:23`, UTC; the day alone where no run says more."""
        with_time = self.facts.history[0].at if self.facts and self.facts.history else ""
        try:
            return datetime.fromisoformat(with_time).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
        except (ValueError, OverflowError):
            return self.id[4:14]

    @property
    def seconds(self) -> float | None:
        return _number(self.facts.resources.get("wall_seconds")) if self.facts else None

    @property
    def cost(self) -> tuple[float, str] | None:
        """Amount and currency."""
        cost = self.facts.resources.get("cost") if self.facts else None
        amount = _number(cost.get("amount")) if isinstance(cost, dict) else None
        return None if amount is None or cost is None else (amount, text(cost.get("currency")))


@dataclass(frozen=True)
class Project:
    """`strangers`: YAML files in experiments/ that are named like no record, and so were not read."""

    name: str
    workspace: Workspace
    written: str
    entries: list[Entry]
    strangers: list[str]

    @cached_property
    def by_id(self) -> dict[str, Entry]:
        return {entry.id: entry for entry in self.entries}

    @cached_property
    def age(self) -> dict[str, int]:
        """0 is the newest."""
        return {entry.id: place for place, entry in enumerate(self.entries)}

    @property
    def counts(self) -> dict[str, int]:
        """Records by status, the most frequent first."""
        return dict(Counter(entry.kind for entry in self.entries).most_common())

    @property
    def whole(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.whole]

    def link(self, path: Path, folder: Path) -> str | None:
        """From a page in `folder` to a file of the project; None for one that is not there, or outside."""
        try:
            path = path.resolve()
            inside = path.is_relative_to(self.workspace.root) and path.is_file()
        except (OSError, ValueError):  # a name too long, or with a NUL
            return None
        return quote(os.path.relpath(path, folder)) if inside else None

    def picture(self, entry: Entry, name: str, folder: Path) -> str | None:
        """A picture is named from the root, from experiments/ or from the record's folder."""
        places = (self.workspace.root, self.workspace.experiments, entry.file.folder)
        return next((link for place in places if (link := self.link(place / name, folder))), None)

    def grouped(self) -> list[tuple[Entry, int]]:
        """Newest first, what a pipeline experiment ran below it in the order it ran; with the depth."""
        children: dict[str, list[Entry]] = {}
        for entry in reversed(self.entries):
            children.setdefault(entry.parent if entry.parent in self.by_id else "", []).append(entry)
        placed: dict[str, tuple[Entry, int]] = {}
        tops = children.get("", [])[::-1]
        for top in [*tops, *self.entries]:  # the second time for records that name each other as parents
            waiting = [(top, 0)]
            while waiting:
                entry, depth = waiting.pop()
                if entry.id not in placed:
                    placed[entry.id] = (entry, depth)
                    waiting += [(child, depth + 1) for child in reversed(children.get(entry.id, []))]
        return list(placed.values())


def read_project(workspace: Workspace) -> Project:
    paths = ids.newest_first(workspace)
    entries = [
        read_entry(workspace, path, whole=place < FULL)
        for place, path in enumerate(track(paths, "reads records", "record"))
    ]
    others = {*workspace.experiments.glob("*.yaml"), *workspace.experiments.glob("*.yml")} - set(paths)
    strangers = sorted(path.name for path in others if not path.name.startswith("."))
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Project(workspace.root.name, workspace, written, entries, strangers)


def read_entry(workspace: Workspace, path: Path, whole: bool = True) -> Entry:
    """Reads without writing: an edit below the line is shown here, and undone by what next runs."""
    entry = Entry(RecordFile(path), "planned", whole=whole)
    try:
        reading = entry.file.read()
    except UserError as error:
        entry.status, entry.problems = "unreadable", [str(error).replace(f"{workspace.root}/", "")]
        return entry
    facts, entry.person = reading.facts, reading.person
    if facts is not None:
        entry.status, entry.figures, entry.metrics = liveness(facts), figures(facts), metrics(facts.results)
        entry.facts = facts if whole else facts.model_copy(update=_BULK)
    if reading.damage or (reading.mistake and facts is None):
        entry.status = "unreadable"
    if reading.damage:
        entry.problems.append(f"the part below the line: {reading.damage}")
    if reading.mistake:
        entry.problems.append(f"the part above the line: {reading.mistake}")
    if reading.pending:
        entry.problems.append("what the pipeline knows of it waits beside the file; `aletheia exp sync` completes it")
    if entry.status == "dead":
        entry.problems.append("its process is gone and did not say how it ended; `aletheia exp repair` closes it")
    if reading.edited:
        entry.problems.append(reading.edited)
    for aside in sorted(entry.file.folder.glob("edited-below-*.yaml")):
        entry.problems.append(f"was edited below the line; the edit was undone and is kept in {aside}")
    entry.problems = [problem.replace(f"{workspace.root}/", "") for problem in entry.problems]
    return entry


def text(value: Any) -> str:
    """What stands where a text is expected, whatever it is, in a line or as it was written."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text(child)}" for key, child in value.items())
    if isinstance(value, list):
        return ", ".join(text(child) for child in value)
    return "" if value is None else str(value)


def texts(value: Any) -> list[str]:
    """What stands where a list of texts is expected, whatever it is; below headings, each behind its heading."""
    if isinstance(value, dict):
        return [f"{key}: {item}" for key, child in value.items() for item in texts(child)]
    items = value if isinstance(value, list) else [value]
    return [written for item in items if (written := text(item)).strip()]


def _number(value: Any) -> float | None:
    metric = metrics({"value": value}).get("value")
    return metric.value if metric else None
