"""Rows out of sources: one where it was found, the kind of a file's rows, or all rows of a file or folder at once."""

from typing import overload

from pipeline.data.formats import converted
from pipeline.data.raw import Raw
from pipeline.data.rows import SHAPES, AnyRow, Row, RowFault, place, validated
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.workspace import Workspace


@overload
def row_of(raw: Raw, file: str, kind: type[AnyRow]) -> AnyRow: ...
@overload
def row_of(raw: Raw, file: str, kind: type[Row] | None = None) -> Row: ...
def row_of(raw: Raw, file: str, kind: type[Row] | None = None) -> Row:
    """What was found, as a row of `kind`; without one its fields tell it. Raises `RowFault`."""
    if raw.values is None:
        raise raw.fault or AssertionError("a row without values has a fault")
    found, values = converted(raw.values, kind)
    return validated(values, found, file, raw.line, raw.item)


def kind_of(source: Source) -> type[Row] | None:
    """Of the first row that can be told."""
    for raw in source.raws():
        try:
            if raw.values is not None:
                return converted(raw.values)[0]
        except RowFault:
            continue
    return None


def read_rows(workspace: Workspace, name: str, kind: type[AnyRow]) -> list[AnyRow]:
    """All rows, for what must have every one right: the gate judges row by row instead.

    Raises `UserError` with file and line at the first that is not.
    """
    rows: list[AnyRow] = []
    for source in sources(workspace, name):
        for raw in source.raws():
            try:
                rows.append(row_of(raw, source.shown, kind))
            except RowFault as fault:
                where = place(source.shown, raw.line, raw.item)
                raise UserError(fault.what, where=where, remedy=fault.remedy) from None
    if not rows:
        raise UserError("holds no rows", where=name, remedy=f"rows like {SHAPES[kind]}, one a line")
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise UserError(f"the id `{row.id}` stands at {seen[row.id]} too", where=row.where)
        seen[row.id] = row.where
    return rows
