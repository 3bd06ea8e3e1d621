"""The list of records: which of them, in what order, as a table or as JSON.

    aletheia exp list --stage sft --where "eval_loss < 5.5" --sort eval_loss

It reads the index (`pipeline/records/index.py`), not the records. Whatever is not shown because it has no such figure,
cannot be read or stands beyond the limit is counted on stderr.
"""

import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from operator import itemgetter
from typing import Any, get_args

from aletheia.exp.reading import figure, short
from aletheia.output import print_table
from aletheia.summary import figures, seconds, took
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import criteria, index
from pipeline.records.criteria import Parsed
from pipeline.records.index import Entry
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import Metric, metrics, resolve
from pipeline.records.person import STAGES
from pipeline.records.schema import Status
from pipeline.workspace import Workspace

PAGE = 50  # records on a terminal, where no limit is given
OF_EVERY = ("date", "seconds")  # what one can sort by besides figures; the table shows both
STATUSES = (*get_args(Status), "dead", "unreadable")


@dataclass(frozen=True)
class Filters:
    """What is to be listed; None asks for nothing in particular."""

    stage: str | None = None
    status: str | None = None
    tag: str | None = None
    profile: str | None = None
    since: str | None = None  # dates, YYYY-MM-DD
    until: str | None = None
    where: Sequence[str] = ()  # METRIC OP NUMBER


@dataclass(frozen=True)
class Row:
    """An entry, its true status, and for a pipeline experiment the results of its stages too, by their names."""

    entry: Entry
    status: str
    results: dict[str, Any]

    def metric(self, path: str) -> Metric | None:
        return resolve(self.results, path)

    @property
    def verdict(self) -> str | None:
        verdict = self.entry.facts.verdict if self.entry.facts else None
        return verdict.finding if verdict else None

    @property
    def seconds(self) -> float | None:
        return seconds(self.entry.facts) if self.entry.facts else None


@index.uncollected()
def list_records(workspace: Workspace, filters: Filters, sort: str | None, limit: int | None, as_json: bool) -> None:
    """Raises `UserError` for a filter or an order that nothing could meet."""
    wanted = [criteria.parse(text, "--where") for text in filters.where]
    since, until = _date(filters.since, "--since"), _date(filters.until, "--until")
    rows = every = _rows(index.entries(workspace))
    if every:
        _check_names(filters, every)
        rows = _matching(every, filters, since, until)
        for criterion in wanted:
            rows = _where(rows, criterion, every)
        rows = _sorted(rows, sort, every) if sort else rows
    if not rows:
        folder = workspace.shown(workspace.experiments)
        say(f"none of {len(every)} records is like that" if every else f"no records in {folder} yet; try make demo")
    if limit is None and not as_json and sys.stdout and sys.stdout.isatty():
        limit = PAGE
    shown = rows[:limit]
    if as_json:
        lines = ",\n ".join(json.dumps(_as_json(row), ensure_ascii=False) for row in shown)
        print(f"[{lines}]")  # a record a line: indented, ten thousand would take a second longer
    elif shown:
        asked = [criterion.path for criterion in wanted] + ([sort.removeprefix("-")] if sort else [])
        _print_table(shown, [path for path in dict.fromkeys(asked) if path not in OF_EVERY])
    if len(shown) < len(rows):
        say(f"note: {len(rows) - len(shown)} more; --limit {len(rows)} shows all")


def _rows(entries: Sequence[Entry]) -> list[Row]:
    known = {entry.id: entry for entry in entries}
    return [Row(e, liveness(e.facts) if e.facts else e.status, _results(e, known)) for e in entries]


def _results(entry: Entry, known: dict[str, Entry]) -> dict[str, Any]:
    """As criteria name them: `eval.eval_loss` is a figure of a pipeline experiment's stage `eval`."""
    if entry.facts is None:
        return {}
    children = [known[child].facts for child in entry.facts.lineage.children if child in known]
    return entry.facts.results | {
        f.stage: f.results for f in children if f and f.status == "complete" and not index.shuffled(f)
    }


def _date(text: str | None, option: str) -> str | None:
    try:
        return None if text is None else date.fromisoformat(text).isoformat()
    except ValueError:
        raise UserError(f"`{text}` is no date", where=option, remedy="YYYY-MM-DD") from None


def _check_names(filters: Filters, every: list[Row]) -> None:
    """A name that is neither one of the pipeline's nor any record's is a slip, not an empty list."""
    for option, name, names in (
        ("--stage", filters.stage, {*STAGES, "pipeline", *(row.entry.stage for row in every)}),
        ("--status", filters.status, {*STATUSES}),
        ("--tag", filters.tag, {tag for row in every for tag in row.entry.tags}),
        ("--profile", filters.profile, {row.entry.profile for row in every if row.entry.profile}),
    ):
        if name is not None and name not in names:
            raise UserError(f"no record has `{name}`", where=option, remedy=_near(name, names))


def _near(name: str, names: Iterable[str]) -> str:
    """Those that may have been meant; where none is near, some that there are."""
    return ", ".join(difflib.get_close_matches(name, names, 3, cutoff=0.4) or sorted(names)[:8])


def _matching(every: list[Row], filters: Filters, since: str | None, until: str | None) -> list[Row]:
    rows = [
        row
        for row in every
        if filters.stage in (None, row.entry.stage)
        and filters.status in (None, row.status.split()[0])  # `running on another-host`
        and (filters.tag is None or filters.tag in row.entry.tags)
        and filters.profile in (None, row.entry.profile)
        and (since is None or row.entry.date >= since)
        and (until is None or row.entry.date <= until)
    ]
    unreadable = sum(row.status == "unreadable" for row in every) - sum(row.status == "unreadable" for row in rows)
    if unreadable:
        say(f"note: {unreadable} of the records left out cannot be read; aletheia exp lint says why")
    return rows


def _where(rows: list[Row], criterion: Parsed, every: list[Row]) -> list[Row]:
    found = [(row, metric) for row in rows if (metric := row.metric(criterion.path))]
    if not found:
        _check_metric(criterion.path, every, "--where")
    if len(found) < len(rows):
        say(f"note: {len(rows) - len(found)} of {len(rows)} records have no `{criterion.path}`")
    return [row for row, metric in found if criterion.holds(metric.value)]


def _sorted(rows: list[Row], sort: str, every: list[Row]) -> list[Row]:
    """Smallest first, with a leading `-` largest first; those without the figure last."""
    path = sort.removeprefix("-")
    keyed = [(_key(row, path), row) for row in rows]
    having = sorted((pair for pair in keyed if pair[0] is not None), key=itemgetter(0), reverse=sort != path)
    lacking = [row for key, row in keyed if key is None]
    if not having and path not in OF_EVERY:
        _check_metric(path, every, "--sort")
    if lacking:
        say(f"note: {len(lacking)} of {len(rows)} records have no `{path}` and stand last")
    return [row for _, row in having] + lacking


def _key(row: Row, path: str) -> Any:
    if path == "date":
        return row.entry.date, len(row.entry.id), row.entry.id  # past 999 an id is longer
    if path == "seconds":
        return row.seconds
    metric = row.metric(path)
    return metric.value if metric else None


def _check_metric(path: str, every: list[Row], option: str) -> None:
    if not any(row.metric(path) for row in every):
        names = {name for row in every for name in metrics(row.results)}
        raise UserError(f"no record has a figure `{path}`", where=option, remedy=_near(path, names))


def _print_table(rows: list[Row], asked: list[str]) -> None:
    """Columns that would be empty are left out; the date stands there where it is not the id's."""
    header = ("record", "date", "stage", "profile", "status", "time", "verdict", "figures")
    table = [
        (
            (entry := row.entry).id,
            "" if entry.id[4:14] == entry.date else entry.date,
            entry.stage,
            entry.profile or "?",
            row.status,
            took(entry.facts) if entry.facts else "",
            row.verdict or "",
            list(_lines(row, asked)),
        )
        for row in rows
    ]
    filled = [i for i in range(len(header)) if any(row[i] for row in table)]
    print_table([header[i] for i in filled], [[row[i] for i in filled] for row in table], sys.stdout)


def _lines(row: Row, asked: list[str]) -> Iterator[str]:
    """What is wrong with it, the figures asked for, its key figures; of a plan, what it is to be."""
    entry = row.entry
    yield from entry.problems
    if entry.stage == "pipeline":
        yield " → ".join(entry.stages)
    if row.status == "planned" and entry.description:
        yield short(entry.description)
    for path in asked:
        metric = row.metric(path)
        if metric:
            yield f"{path} {figure(metric)}"
    if entry.facts:
        yield from figures(entry.facts)


def _as_json(row: Row) -> dict[str, Any]:
    entry = row.entry
    return {
        "id": entry.id,
        "date": entry.date,
        "stage": entry.stage,
        "stages": entry.stages,
        "profile": entry.profile,
        "status": row.status,
        "seconds": row.seconds,
        "tags": entry.tags,
        "description": entry.description,
        "verdict": row.verdict,
        "figures": figures(entry.facts) if entry.facts else [],
        "metrics": {path: _without_none(vars(metric)) for path, metric in metrics(row.results).items()},
        "problems": entry.problems,
    }


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
