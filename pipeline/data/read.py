"""All rows of a file or folder, at once: for what must have every one of them right. The gate judges row by row instead."""

from pipeline.data.formats import converted
from pipeline.data.rows import SHAPES, AnyRow, RowFault, place, validated
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.workspace import Workspace


def read_rows(workspace: Workspace, name: str, kind: type[AnyRow]) -> list[AnyRow]:
    """All rows of a file or folder. Raises `UserError` with file and line at the first that is not right."""
    rows: list[AnyRow] = []
    for source in sources(workspace, name):
        for raw in source.raws():
            try:
                if raw.values is None:
                    raise raw.fault or AssertionError
                rows.append(validated(converted(raw.values, kind)[1], kind, source.shown, raw.line, raw.item))
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
