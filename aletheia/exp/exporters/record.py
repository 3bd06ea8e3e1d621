"""What every exporter takes from a record: its two halves, its figures by name, its curves by step, the files beside it."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aletheia.exp.reading import flat
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import find, items
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import metrics
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

LOG = "log.jsonl"
PICTURES = (".png", ".svg", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Finished:
    """A record that has run and does not run any more. `status` is the true one: complete, failed, cancelled or dead."""

    workspace: Workspace
    file: RecordFile
    person: dict[str, Any]
    facts: Facts
    status: str

    @property
    def id(self) -> str:
        return self.file.id

    @property
    def started(self) -> datetime | None:
        return moment(self.facts.history[0].at) if self.facts.history else None

    @property
    def ended(self) -> datetime | None:
        """None for a dead run: nobody saw its end."""
        return moment(self.facts.history[-1].at) if self.facts.history and self.status != "dead" else None

    def note_external(self, name: str, where: dict[str, Any]) -> None:
        """Writes where it went into `external`, on top of what the record says by now."""
        facts = self.file.facts()
        if facts is None or liveness(facts).startswith("running"):
            say(f"note: {self.file.path}: runs again; where it was exported to is not noted in it")
            return
        facts.external[name] = where | {"at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        self.file.write(facts)


def finished(workspace: Workspace, name: str) -> Finished:
    """Raises `UserError` for a plan, for a record that runs, and for one that cannot be read."""
    file = find.named(workspace, name)
    reading = file.read()
    shown = workspace.shown(file.path)
    if reading.damage:
        raise reading.damage
    if reading.mistake:
        say(f"note: {reading.mistake}; what stands above the line is left out")
    if reading.facts is None or reading.facts.status == "planned":
        raise UserError("is a plan: nothing has run", where=shown, remedy=f"make run EXP={file.id}")
    status = liveness(reading.facts)
    if status.startswith("running"):
        raise UserError(f"is {status}: its figures are not there yet", where=shown, remedy="once it has ended")
    return Finished(workspace, file, reading.person, reading.facts, status)


def with_children(record: Finished) -> list[Finished]:
    """The record, and what ran as its part; a part that cannot be exported is named and left out."""
    family = [record]
    for child in dict.fromkeys(record.facts.lineage.children):
        if child == record.id:
            continue
        try:
            family.append(finished(record.workspace, child))
        except UserError as error:
            say(f"note: {error}; left out")
    return family


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Every finite number of the results by name: values, the ends of their intervals, their n, and what stands beside."""
    found: dict[str, float] = {}
    for path, metric in metrics(results).items():
        ends = {"": metric.value, ".ci_low": metric.ci_low, ".ci_high": metric.ci_high, ".n": metric.n}
        found |= {f"{path}{end}": float(value) for end, value in ends.items() if value is not None}
    beside = {path: as_number(value) for path, value in besides(results).items()}
    return found | {path: value for path, value in beside.items() if value is not None and math.isfinite(value)}


def besides(results: dict[str, Any]) -> dict[str, Any]:
    """What the results hold beyond `metrics`: words, lists, numbers inside a figure, what is no finite number."""
    shown = set()
    for path in metrics(results):
        for stem in (path, f"{path}.after"):
            shown |= {stem, *(f"{stem}.{part}" for part in ("value", "ci_low", "ci_high", "n"))}
    return {path: value for path, value in flat(results) if path not in shown and value not in (None, [], {})}


def curves(record: Finished) -> dict[int, dict[str, float]]:
    """The log's numbers by step, NaN and infinity included. What cannot be told as a number of a step is said."""
    merged: dict[int, dict[str, float]] = {}
    odd, again = 0, 0
    for line in items.read(record.file.folder / LOG):
        step = as_number(line.get("step"))
        if step is None or not step.is_integer() or not 0 <= step < 2**53:
            odd += 1
            continue
        at = merged.setdefault(int(step), {})
        for name, value in flat({key: value for key, value in line.items() if key != "step"}):
            number = as_number(value)
            if number is None:
                odd += 1
                continue
            again += name in at and at[name] != number and name != "epoch"
            at[name] = number
    if odd:
        say(f"note: {odd} entries of {record.id}'s {LOG} are no number of a step, and in no curve")
    if again:
        say(f"note: {again} values stand twice for one step of {record.id}'s {LOG}; the later one is taken")
    return dict(sorted(merged.items()))


def pictures(record: RecordFile, workspace: Workspace, facts: Facts) -> list[tuple[Path, str]]:
    """The visualizations that are there, with their purpose. Only pictures below `experiments/`; others are named."""
    found = []
    for entry in facts.visualizations:
        places = (workspace.root / entry.path, workspace.experiments / entry.path, record.folder / entry.path)
        inside = (p for p in places if p.resolve().is_relative_to(workspace.experiments.resolve()))
        path = next((p for p in inside if p.suffix.lower() in PICTURES and p.is_file()), None)
        if path is None:
            say(f"note: {record.id} names the picture {entry.path}, which is not there; left out")
        else:
            found.append((path, entry.purpose))
    return found


def attachments(record: Finished) -> list[tuple[Path, str]]:
    """Files to go along, with the folder each belongs in: the record itself, whole, its log and its pictures."""
    log = record.file.folder / LOG
    beside = [(log, "")] if log.is_file() else []
    plots = [(path, "plots") for path, _ in pictures(record.file, record.workspace, record.facts)]
    return [(record.file.path, ""), *beside, *plots]


def as_number(value: Any) -> float | None:
    """NaN and infinity are numbers; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def moment(at: str) -> datetime | None:
    """A time of the history; None for what is none."""
    try:
        time = datetime.fromisoformat(at)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def texts(value: Any) -> list[str]:
    """What a person wrote under a key that takes one text or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [str(text).strip() for text in values if text is not None and str(text).strip()]
