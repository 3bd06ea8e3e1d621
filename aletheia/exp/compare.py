"""Records side by side: what differs in configuration, data, environment and code, and by how much the figures differ.

    aletheia exp compare EXP-2026-11-21-003 EXP-2026-11-21-004

The first is the reference. A difference has an interval only where both records hold values of the same items. It is
called better or worse only where the items are known to be the same, not by their ids alone, where it is known whether
the figure should be high or low, and where its interval excludes 0.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from aletheia.exp import differences
from aletheia.exp.differences import Side
from aletheia.exp.reading import brief, figure, number, plain, read_facts, short, table, wrapped
from aletheia.output import print_json, print_table
from pipeline.errors import UserError
from pipeline.records.items import ROWS
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import as_metric
from pipeline.workspace import Workspace

IDS_SHOWN = 10


def compare(workspace: Workspace, names: Sequence[str], as_json: bool) -> None:
    sides = [Side(*read_facts(workspace, name)) for name in names]
    if len(sides) < 2:
        raise UserError("one record alone has nothing to be compared with", remedy=f"aletheia exp show {names[0]}")
    for index, side in enumerate(sides):
        if side.id in [earlier.id for earlier in sides[:index]]:
            raise UserError(f"{side.id} is named twice", remedy="two different records")
    found = _compared(sides)
    if as_json:
        print_json(plain(found))
        return
    rows: list[tuple[str, Any]] = []
    for label, lines in _page(sides, found):
        rows += [("", ""), (label, lines)] if rows else [(label, lines)]
    print_table(rows[0], rows[1:], sys.stdout)


def _compared(sides: list[Side]) -> dict[str, Any]:
    first, *others = sides
    return {
        "records": [
            {"id": s.id, "stage": s.facts.stage, "profile": s.facts.profile, "status": liveness(s.facts)} for s in sides
        ],
        "configuration": differences.settings({s.id: s.facts.configuration for s in sides}),
        "data": {s.id: differences.rows(first, s) for s in others},
        "trained_there_held_out_here": {s.id: differences.crossed(first, s) for s in others},
        "built_on": differences.settings({s.id: _built_on(s) for s in sides}),
        "environment": differences.settings({s.id: s.facts.environment for s in sides}),
        "code": differences.settings({s.id: _code(s) for s in sides}),
        "figures": {path: list(_figures(sides, path)) for path in dict.fromkeys(p for s in sides for p in s.figures)},
    }


def _built_on(side: Side) -> dict[str, Any]:
    taken = {taken.stage: {"id": taken.id, "sha256": taken.sha256} for taken in side.facts.lineage.inputs}
    return {"base": side.facts.lineage.base or {}, **taken}


def _code(side: Side) -> dict[str, Any]:
    patch = side.facts.code.get("patch")
    changes = patch.get("sha256") if isinstance(patch, dict) else None
    return {key: side.facts.code.get(key) for key in ("commit", "dirty")} | {"changes": changes}


def _figures(sides: list[Side], path: str) -> Iterator[dict[str, Any]]:
    for side in sides:
        metric = side.figures.get(path)
        if metric is None:
            continue
        values = {key: value for key, value in vars(metric).items() if value is not None}
        reference = path in sides[0].figures and side is not sides[0]
        yield {"id": side.id, **values} | (
            {"difference": differences.difference(path, sides[0], side)} if reference else {}
        )


def _page(sides: list[Side], found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    ids = [side.id for side in sides]
    records = [tuple(record.values()) for record in found["records"]]
    stages = {side.facts.stage for side in sides}
    note = ["their stages differ: a figure of the same name may measure another thing"] if len(stages) > 1 else []
    yield "records", table(("", "stage", "profile", "status"), records) + note
    for block in ("configuration", "built_on", "environment", "code"):
        rows = [(key, *(short(values.get(i, "absent")) for i in ids)) for key, values in found[block].items()]
        yield block.replace("_", " "), table(("", *ids), rows) or ["the same"]
        if block == "configuration":
            yield "data", [line for side in sides[1:] for line in _data(sides[0], side, found)]
    yield "figures", _figure_lines(found["figures"], ids)


def _data(first: Side, side: Side, found: dict[str, Any]) -> Iterator[str]:
    yield f"{first.id} → {side.id}"
    for part, change in found["data"][side.id].items():
        if "only_in" in change:
            yield f"  {part}: only in {change['only_in']}, {brief(change['rows'])} rows"
            continue
        before, after = change["rows"]
        if change["same"]:
            yield f"  {part}: the same {brief(after)} rows"
        elif "added" not in change:
            yield f"  {part}: {brief(before)} → {brief(after)} rows, another set; which rows differ, no {ROWS} tells: only"
            yield "    the hashes of whole sets can be compared"
        else:
            counts = [f"{len(change[what])} {what}" for what in ("added", "removed", "changed")]
            yield f"  {part}: {brief(before)} → {brief(after)} rows: {', '.join(counts)}"
            yield from (_named(what, change[what]) for what in ("added", "removed", "changed") if change[what])
    crossed = found["trained_there_held_out_here"][side.id]
    if crossed:
        yield _named(f"{first.id} trained on, {side.id} holds out", crossed)


def _named(what: str, ids: list[str]) -> str:
    more = f" … {len(ids)} in all" if len(ids) > IDS_SHOWN else ""
    return f"    {what}: {', '.join(ids[:IDS_SHOWN])}{more}"


def _figure_lines(figures: dict[str, list[dict[str, Any]]], ids: list[str]) -> list[str]:
    rows, same = [], []
    alone: dict[str, list[str]] = {}
    for path, found in figures.items():
        first = found[0]
        if len(found) < 2:
            alone.setdefault(first["id"], []).append(path)
        elif len(found) == len(ids) and all(_value(entry) == _value(first) for entry in found):
            same.append(path)
        else:
            rows += [(path if e is first else "", e["id"], _value(e), _difference(first, e)) for e in found]
    told = table(("", "record", "value", f"difference from {ids[0]}"), rows)
    told += wrapped(f"the same in all: {', '.join(same)}") if same else []
    return told + [
        line for record, paths in alone.items() for line in wrapped(f"in {record} alone: {', '.join(paths)}")
    ]


def _value(entry: dict[str, Any]) -> str:
    metric = as_metric(entry)
    return figure(metric) if metric else ""


def _difference(first: dict[str, Any], entry: dict[str, Any]) -> str:
    if "difference" not in entry:
        return ""
    change = entry["difference"]
    if change is None and "n" not in entry and "ci_low" not in entry:
        return f"{number(entry['value'] - first['value'], '+')}, no interval"
    if change is None:
        return "no interval: not on shared items"
    ends = f" [{number(change['ci_low'], '+')}, {number(change['ci_high'], '+')}]" if "ci_low" in change else ""
    of = "" if set(change["of"]) == {change["n"]} else f" of {change['of'][0]} and {change['of'][1]}"
    left_out = f", {change['changed_items']} whose content differs left out" if change["changed_items"] else ""
    by = ", matched by id alone" if "matched_by" in change else ""
    return f"{number(change['value'], '+')}{ends} on {change['n']} shared{of}{left_out}{by}: {change['finding']}"
