"""What commands print on stdout: an aligned table for people, JSON for programs."""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.progress import printable


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], out: Any) -> None:
    """Aligned columns; the last cell of a row may be a list of lines."""
    table = [
        [*map(printable, row[:-1]), row[-1] if isinstance(row[-1], list) else [row[-1]]] for row in [header, *rows]
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(header) - 1)]
    for row in table:
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True))
        for index, line in enumerate(row[-1] or [""]):
            print(f"{cells if index == 0 else ' ' * len(cells)}  {printable(line)}".rstrip(), file=out)
