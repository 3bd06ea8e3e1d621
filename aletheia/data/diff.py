"""`aletheia data diff`: rows added, removed and changed between two files, snapshots or records."""

import difflib
import json
import re
import sys
from typing import Any

from aletheia.output import print_json
from pipeline.data import store
from pipeline.data.diff import Difference, Item, difference, fields
from pipeline.data.read import row_of
from pipeline.data.rows import KINDS, Row, RowFault, row_hash
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.progress import printable, say
from pipeline.records import find, items
from pipeline.records.ids import ID
from pipeline.workspace import Workspace

SHOWN = 20  # rows of a sort, unless all are asked for


def diff(before: str, after: str, text: bool, every: bool, as_json: bool) -> bool:
    """Whether both hold the same rows."""
    workspace = Workspace.find()
    found = difference(_side(workspace, before), _side(workspace, after))
    if as_json:
        print_json(_json(found))
    else:
        _print(found, text, every)
    return not (found.added or found.removed or found.changed or found.moved)


def _side(workspace: Workspace, name: str) -> list[Item]:
    """The rows of a record, a snapshot, or a path. Raises `UserError`."""
    if ID.fullmatch(name):
        return _of_record(workspace, name)
    if re.fullmatch(r"[0-9a-f]{6,64}", name) and not workspace.path(name).exists():
        known = store.named(workspace, name)
        if len(known) != 1:
            what = f"{len(known)} snapshots begin so" if known else "there is no such file and no such snapshot"
            raise UserError(what, where=name, remedy="a longer hash" if known else "aletheia exp show EXP names them")
        return [Item(row_hash(row), row.id, "", row) for row in _snapshot(workspace, known[0])]
    found, broken = [], 0
    for source in sources(workspace, name):
        for raw in source.raws():
            try:
                row = row_of(raw, source.shown)
                found.append(Item(row_hash(row), row.id, "", row))
            except RowFault:
                broken += 1
    if broken:
        say(f"note: {broken} rows of {name} cannot be read and are left out; aletheia data check {name}")
    return found


def _of_record(workspace: Workspace, experiment_id: str) -> list[Item]:
    """By `rows.jsonl`; with their texts where the record's snapshots are still there."""
    file = find.named(workspace, experiment_id)
    facts = file.read().facts
    parts = items.rows(workspace.experiments / file.id)
    if facts is None or not parts:
        raise UserError("names no rows", where=workspace.shown(file.path), remedy="a data, sft, dpo or eval record")
    texts: dict[str, Row] = {}
    for sha256 in _kept(workspace, facts.data):
        try:
            texts |= {row_hash(row): row for row in _snapshot(workspace, sha256)}
        except UserError as error:
            say(f"note: {error}")
    if any(sha256 not in texts for hashes in parts.values() for sha256 in hashes.values()):
        say(f"note: not all rows of {file.id} are kept on this machine; those are compared by hash alone")
    return [
        Item(sha256, row_id, part, texts.get(sha256))
        for part, hashes in parts.items()
        for row_id, sha256 in hashes.items()
    ]


def _kept(workspace: Workspace, data: Any) -> list[str]:
    """Every set of rows that a record's `data` names, however deep, and that is kept as a snapshot."""
    if not isinstance(data, dict):
        return []
    sha256 = data.get("sha256")
    here = store.named(workspace, sha256) if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else []
    return here + [found for value in data.values() for found in _kept(workspace, value)]


def _snapshot(workspace: Workspace, sha256: str) -> list[Row]:
    """Its rows; their kind is told by their fields."""
    kind = next((KINDS[key] for key in KINDS if key in store.first_values(workspace, sha256)), None)
    return list(store.load(workspace, sha256, kind)) if kind else []


def _print(found: Difference, text: bool, every: bool) -> None:
    counts = f"{found.same} rows the same, {len(found.added)} added, {len(found.removed)} removed, "
    moved = f", {len(found.moved)} moved" if found.moved else ""
    print(f"{counts}{len(found.changed)} changed{moved}")
    for sign, listed in (("+", found.added), ("-", found.removed)):
        for item in listed if every else listed[:SHOWN]:
            print(printable(f"{sign} {_named(item)}"))
        _hidden(len(listed), sign, every)
    for old, new in found.changed if every else found.changed[:SHOWN]:
        what = ", ".join(fields(old.row, new.row)) if old.row and new.row else "content"
        print(printable(f"~ {_named(new)}: {what}"))
        if text and old.row and new.row:
            for line in difflib.unified_diff(_lines(old.row), _lines(new.row), n=1, lineterm=""):
                if not line.startswith(("---", "+++", "@@")):
                    print(f"    {printable(line)}")
    _hidden(len(found.changed), "~", every)
    for old, new in found.moved if every else found.moved[:SHOWN]:
        print(printable(f"> {new.id}: {old.part} → {new.part}"))
    _hidden(len(found.moved), ">", every)


def _hidden(count: int, sign: str, every: bool) -> None:
    if count > SHOWN and not every:
        print(f"{sign} {count - SHOWN} more: --all", file=sys.stderr)


def _named(item: Item) -> str:
    place = f"  ({item.part})" if item.part else ""
    asked = f"  {' '.join(item.row.asked[-1].split())[:70]}" if item.row else ""
    return f"{item.id}{place}{asked}"


def _lines(row: Row) -> list[str]:
    values = row.model_dump(mode="json", exclude={"id"} if row.id == row.where else None)
    return json.dumps(values, ensure_ascii=False, indent=1).replace("\\n", "\n").splitlines()


def _json(found: Difference) -> dict[str, Any]:
    def brief(item: Item) -> dict[str, Any]:
        return {"id": item.id, "sha256": item.sha256, "part": item.part or None}

    return {
        "same": found.same,
        "added": [brief(item) for item in found.added],
        "removed": [brief(item) for item in found.removed],
        "changed": [
            {"before": brief(old), "after": brief(new)}
            | ({"fields": fields(old.row, new.row)} if old.row and new.row else {})
            for old, new in found.changed
        ],
        "moved": [{"id": new.id, "before": old.part, "after": new.part} for old, new in found.moved],
    }
