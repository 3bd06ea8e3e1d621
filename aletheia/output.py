"""What commands print on stdout: an aligned table for people, JSON for programs."""

import json
from collections.abc import Sequence
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], out: Any) -> None:
    """Aligned columns; the last cell of a row is a list of lines."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header) - 1)]
    for row in [header, *([*row[:-1], *([row[-1]] if isinstance(row[-1], list) else [[row[-1]]])] for row in rows)]:
        cells = "  ".join(f"{cell!s:<{width}}" for cell, width in zip(row[:-1], widths, strict=True))
        lines = row[-1] if isinstance(row[-1], list) else [row[-1]]
        for index, line in enumerate(lines or [""]):
            print((f"{cells}  {line}" if index == 0 else f"{' ' * len(cells)}  {line}").rstrip(), file=out)
