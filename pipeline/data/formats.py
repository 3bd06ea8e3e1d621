"""The shapes that rows come in, and one conversion each to the project's own."""

from typing import Any

from pipeline.data.rows import KINDS, SHAPES, Row, RowFault


def converted(values: dict[str, Any], kind: type[Row] | None = None) -> tuple[type[Row], dict[str, Any]]:
    """What kind of row some values are, and the values in the project's own shape. Raises `RowFault`."""
    if kind:
        return kind, values
    for field, known in KINDS.items():
        if field in values:
            return known, values
    found = ", ".join(values) or "nothing"
    raise RowFault("unknown-shape", f"has no known shape (found: {found})", "; ".join(SHAPES.values()))
