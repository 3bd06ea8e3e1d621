"""One record as a page: what was asked, what came out and how sure it is, what it was made of, what its person notes.

    aletheia exp show EXP-2026-11-21-003

What is empty is not shown, and what is shortened ends in `…`; `--json` has the whole. A half that cannot be read is
named with file, line and column, and the other is shown.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

from aletheia.exp.figures import besides, figure_table
from aletheia.exp.reading import brief, flat, number, plain, read, short, short_hash, table, wrapped
from aletheia.output import print_json, print_table
from pipeline.progress import duration
from pipeline.records.file import Reading
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import metrics
from pipeline.records.schema import Facts, Verdict
from pipeline.workspace import Workspace

PLACED = {  # keys of the person's half that have a place of their own, or that the facts repeat
    "experiment_id", "date", "profile", "stages", "status", "description", "hypothesis", "success_criteria", "overrides",
    "observations", "conclusion", "next_steps",
}  # fmt: skip
_TICK = re.compile(r"^\[([ xX])\]\s*")

Section = Iterator[tuple[str, list[str]]]


def show(workspace: Workspace, name: str, as_json: bool) -> None:
    file, record = read(workspace, name)
    facts, person = record.facts, record.person
    status = liveness(facts) if facts else "unreadable" if record.damage else "planned"
    problems = [str(problem) for problem in (record.mistake, record.damage, record.edited) if problem]
    if as_json:
        values = facts.model_dump(mode="json", exclude_none=True) if facts else None
        data = {"id": file.id, "person": person, "facts": values, "liveness": status}
        print_json(plain(data | ({"problems": problems} if problems else {})))
        return
    stage, profile = (facts.stage, facts.profile) if facts else (person.get("stages"), person.get("profile"))
    rows: list[tuple[str, Any]] = [(file.id, f"{brief(stage)}, profile {brief(profile)}"), ("status", status)]
    rows += [("problem", problem) for problem in problems]
    for section in (_asked(record), _found(record), _made_of(record), _noted(person)):
        filled = [(label, lines) for label, lines in section if lines]
        rows += [("", ""), *filled] if filled else []
    print_table(rows[0], rows[1:], sys.stdout)


def _asked(record: Reading) -> Section:
    """What was expected, and what became of that."""
    facts, person = record.facts, record.person
    yield "description", wrapped(person.get("description"))
    yield "hypothesis", wrapped(person.get("hypothesis"))
    if facts and facts.verdict:
        yield "verdict", list(_verdict(facts.verdict))
    else:
        yield "criteria", [_entry(criterion) for criterion in _list(person.get("success_criteria"))]
    yield "history", _history(facts)
    yield "failure", list(_failure(facts))


def _history(facts: Facts | None) -> list[str]:
    changes = facts.history if facts else []
    told = [f"{c.status} {c.at.replace('T', ' ')}{f' ({c.note})' if c.note else ''}" for c in changes]
    return [" → ".join(told)] if told else []


def _failure(facts: Facts | None) -> Iterator[str]:
    if facts is None or facts.failure is None:
        return
    failure = facts.failure
    yield from wrapped(failure.message)
    if failure.step is not None:
        yield f"at step {failure.step}"
    if failure.rows:
        yield f"rows {', '.join(failure.rows[:10])}{f' and {len(failure.rows) - 10} more' if len(failure.rows) > 10 else ''}"
    if failure.traceback:
        yield f"traceback in experiments/{failure.traceback}"


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield f"{verdict.finding or 'none yet'}; criteria frozen {verdict.frozen_at.replace('T', ' ')}"
    if not verdict.judged:
        yield from (_entry(criterion.model_dump()) for criterion in verdict.criteria)
    rows = [(c.criterion, c.role, c.finding, c.observed, c.n_needed or "", c.why) for c in verdict.judged]
    yield from table(("criterion", "role", "finding", "observed", "n needed", "why"), rows)
    yield from (f"changed after start: {change}" for change in verdict.changed_after_start)


def _found(record: Reading) -> Section:
    results = record.facts.results if record.facts else {}
    yield "figures", figure_table(results)
    yield "and", table(("", ""), list(besides(results)))


def _made_of(record: Reading) -> Section:
    facts = record.facts
    overrides = facts.overrides if facts else record.person.get("overrides")
    yield "overrides", [f"{key} = {brief(value)}" for key, value in flat(overrides)] or wrapped(overrides)
    if facts is None:
        return
    yield "data", table(("", ""), list(_data(facts.data)))
    base, lineage = facts.lineage.base or {}, facts.lineage
    rows: list[tuple[str, Any]] = (
        [("base", f"{brief(base.get('name'))}  {short_hash(base.get('sha256'))}")] if base else []
    )
    rows += [("took", f"{taken.stage} {taken.id}  {short_hash(taken.sha256)}") for taken in lineage.inputs]
    rows += [("parent", lineage.parent)] if lineage.parent else []
    rows += [("children", wrapped(", ".join(lineage.children)))] if lineage.children else []
    yield "lineage", table(("", ""), rows)
    size = sum(artifact.bytes for artifact in facts.artifacts) / 1e6
    yield "artifacts", [f"{len(facts.artifacts)} files, {number(size)} MB"] if facts.artifacts else []
    yield "pictures", table(("", ""), [(picture.path, picture.purpose) for picture in facts.visualizations])
    yield "resources", list(_resources(facts.resources))
    yield "code", list(_code(facts.code))
    yield "external", table(("", ""), [(path, short(value)) for path, value in flat(facts.external)])


def _data(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and "rows" in value:
            domains = value.get("domains")
            of = f" of {len(domains)} domains" if isinstance(domains, dict) and len(domains) > 1 else ""
            yield f"{prefix}{key}", f"{brief(value['rows'])} rows{of}  {short_hash(value.get('sha256'))}"
        elif isinstance(value, dict):
            yield from _data(value, f"{prefix}{key}.")
        elif value:
            yield f"{prefix}{key}", short(value)


def _resources(values: dict[str, Any]) -> Iterator[str]:
    amounts, leaves = {path: metric.value for path, metric in metrics(values).items()}, dict(flat(values))
    lines = (
        (("wall_seconds", "{} wall clock"), ("cpu_seconds", "{} processor"), ("gpu_hours", "{} GPU hours")),
        (("peak_memory_gb", "{} GB memory at most"), ("gpu_peak_memory_gb", "{} GB GPU memory at most")),
        (
            ("energy.kwh", "{} kWh"),
            ("energy.co2_kg", "{} kg CO2"),
            ("cost.amount", f"{{}} {leaves.get('cost.currency')}"),
        ),
    )
    for line in lines:
        told = [
            form.format(duration(leaves.pop(path)) if path.endswith("_seconds") else number(leaves.pop(path)))
            for path, form in line
            if amounts.get(path)
        ]
        how = f"  ({leaves.get('energy.how', 'estimated')})" if line[0][0] == "energy.kwh" else ""
        if told:
            yield ", ".join(told) + how
    known = {"energy.how", "cost.currency"}
    yield from (f"{path}: {short(value)}" for path, value in leaves.items() if value and path not in known)


def _code(values: dict[str, Any]) -> Iterator[str]:
    if values.get("commit"):
        patch = dict(flat(values)).get("patch.path")
        kept = f", kept in experiments/{patch}" if patch else ""
        yield f"{brief(values['commit'])}{f' with changes{kept}' if values.get('dirty') else ''}"
    elif values.get("reason"):
        yield f"no commit: {short(values['reason'])}"
    if values.get("command"):
        yield short(values["command"])


def _noted(person: dict[str, Any]) -> Section:
    yield "observations", [line for entry in _list(person.get("observations")) for line in wrapped(entry)]
    yield "conclusion", wrapped(person.get("conclusion"))
    yield "next steps", [_ticked(step) for step in _list(person.get("next_steps"))]
    for key, value in person.items():
        if key not in PLACED:
            yield str(key), wrapped(value)


def _ticked(step: Any) -> str:
    """Done or not, the step, and the plan that it became; as a mapping or as text with a box."""
    if isinstance(step, dict):
        plan = f" → {short(step['promoted_to'])}" if step.get("promoted_to") else ""
        return f"[{'x' if step.get('done') else ' '}] {short(step.get('step'))}{plan}"
    mark = _TICK.match(str(step))
    return f"[{mark[1].lower() if mark else ' '}] {_TICK.sub('', str(step))}"


def _entry(value: Any) -> str:
    """A criterion in a line: its text, and in brackets what else is said of it."""
    said = [(key, short(child)) for key, child in value.items() if child is not None] if isinstance(value, dict) else []
    if not said:
        return short(value)
    aside = ", ".join(f"{key} {text}" for key, text in said[1:])
    return f"{said[0][1]}{f' ({aside})' if aside else ''}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]
