"""One record as a section of the page: what was asked, what came out, how it ran, what its person notes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aletheia.exp.reading import flat, plain
from aletheia.report import notes
from aletheia.report.curves import charts, read_log
from aletheia.report.figures import Row, rows
from aletheia.report.project import Entry, Project, text, texts
from aletheia.report.samples import Samples, read_samples
from pipeline.progress import duration, track
from pipeline.records.schema import Facts

SHORT = 60  # characters of what stands in a cell of a grid
# Keys of the person's half by where they stand; what is in neither is told as a note.
ASKED = (
    "title",
    "description",
    "milestone",
    "objective",
    "hypothesis",
    "success_criteria",
    "expected_results",
    "methodology",
    "variables",
    "conditions",
)
ELSEWHERE = {"experiment_id", "date", "profile", "stages", "status", "overrides", "tags", "visualizations"}
COMPARED = ("configuration", "data", "environment", "code")


@dataclass(frozen=True)
class Section:
    """`file`: a link to the record, None where the page stands where it cannot reach it; so for a picture's third.

    `result`: a link to an evaluation's own page (`eval/page/`), None where there is none.
    """

    entry: Entry
    file: str | None
    path: str
    asked: list[tuple[str, Any]]
    noted: list[tuple[str, Any]]
    overrides: dict[str, Any]
    key_facts: list[tuple[str, str]]
    children: list[str]
    rows: list[Row]
    charts: list[dict[str, Any]]
    log_notes: list[str]
    samples: Samples
    pictures: list[tuple[str, str, str | None]]
    result: str | None = None


def sections(project: Project, folder: Path) -> Iterator[Section]:
    """Of the newest records, grouped as in the index. `folder`: where the page will stand."""
    grouped = [entry for entry, _ in project.grouped() if entry.whole]
    for entry in track(grouped, "writes the page", "record"):
        yield _section(entry, project, folder)


def _section(entry: Entry, project: Project, folder: Path) -> Section:
    facts, person = entry.facts, entry.person
    log = read_log(entry.file.folder / "log.jsonl")
    log_notes = log.notes if log else []
    if log and log.not_drawn:
        log_notes = [*log_notes, f"also in the log, not drawn: {', '.join(log.not_drawn)}"]
    return Section(
        entry=entry,
        file=project.link(entry.file.path, folder),
        path=project.workspace.shown(entry.file.path),
        asked=[(key, person[key]) for key in ASKED if _filled(person.get(key))],
        noted=[(k, v) for k, v in person.items() if k not in ELSEWHERE and k not in ASKED and _filled(v)],
        overrides=dict(flat(facts.overrides if facts else person.get("overrides"))),
        key_facts=sorted(_key_facts(entry, facts), key=lambda fact: len(fact[1]) > SHORT) if facts else [],
        children=[child.id for child in reversed(project.entries) if child.parent == entry.id],
        rows=rows(facts.results) if facts else [],
        charts=list(charts(log)) if log else [],
        log_notes=log_notes,
        samples=read_samples(entry.file.folder / "answers.jsonl"),
        pictures=[(path, what, project.picture(entry, path, folder)) for path, what in notes.pictures(entry)],
        result=project.link(entry.file.folder / "result.html", folder),
    )


def compared(entry: Entry, facts: Facts) -> dict[str, Any]:
    """What the comparison in the browser needs of a record."""
    parts = {part: dict(flat(getattr(facts, part))) for part in COMPARED}
    return {
        "parts": {part: {key: _brief(value) for key, value in leaves.items()} for part, leaves in parts.items()},
        "metrics": {name: [m.value, m.ci_low, m.ci_high, m.n] for name, m in entry.metrics.items()},
    }


def _key_facts(entry: Entry, facts: Facts) -> Iterator[tuple[str, str]]:
    """What one wants to know first of how it ran."""
    resources, code, environment = facts.resources, facts.code, facts.environment
    yield "Started", f"{entry.started} UTC"
    if entry.seconds is not None:
        yield "Time", duration(entry.seconds)
    if resources.get("gpu_hours"):
        yield "GPU hours", text(resources["gpu_hours"])
    for label, key in (("Peak memory", "peak_memory_gb"), ("Peak GPU memory", "gpu_peak_memory_gb")):
        if resources.get(key):
            yield label, f"{text(resources[key])} GB"
    energy = resources.get("energy")
    if isinstance(energy, dict):
        yield "Energy", f"{text(energy.get('kwh'))} kWh, {text(energy.get('co2_kg'))} kg CO₂"
        yield "Energy from", text(energy.get("how"))
    if entry.cost:
        yield "Cost", f"{entry.cost[0]:.3g} {entry.cost[1]}"
    base = facts.lineage.base
    if base:
        yield "Base model", f"{text(base.get('name'))} {text(base.get('sha256'))[:12]}"
    if code.get("commit"):
        yield "Code", f"{text(code['commit'])[:12]}{' with changes' if code.get('dirty') else ''}"
    machine = environment.get("gpus") or environment.get("cpu")
    if machine:
        yield "Machine", f"{', '.join(texts(machine))} on {text(environment.get('host'))}"
    if code.get("command"):
        yield "Command", text(code["command"])


def _filled(value: Any) -> bool:
    return value not in (None, "", [], {})


def _brief(value: Any) -> Any:
    """A value in a cell."""
    shown = json.dumps(plain(value), ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
    return f"{shown[:300]}…" if isinstance(shown, str) and len(shown) > 300 else shown
