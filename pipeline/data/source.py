"""Where rows come from: a file or a folder, read one row at a time whatever its size, each with its place.

    for source in sources(workspace, "data/sft"):
        for raw in source.raws(): ...

What cannot be read is a `Raw` too, with a fault in place of values, so that nothing is passed over in silence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.rows import RowFault
from pipeline.errors import UserError
from pipeline.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as it was found."""

    line: int  # 1-based
    values: dict[str, Any] | None
    fault: RowFault | None = None  # where there are no values


@dataclass
class Source:
    """One file of rows."""

    path: Path
    shown: str  # as a person named it, relative to the workspace
    bytes_read: int = 0  # so far, for progress

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def raws(self) -> Iterator[Raw]:
        try:
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    self.bytes_read += len(line)
                    if line.strip():
                        yield _parsed(line, number)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=self.shown) from None


def sources(workspace: Workspace, name: str) -> list[Source]:
    """The files that a name stands for, in the order of their names. Raises `UserError` when there are none."""
    path = workspace.path(name)
    if path.is_file():
        return [Source(path, workspace.shown(path))]
    if not path.is_dir():
        raise UserError(
            "there is no such file or folder", where=name, remedy=f"a path from {workspace.root}, or an absolute one"
        )
    found = sorted(path.rglob("*.jsonl"))
    if not found:
        others = sorted({p.suffix or p.name for p in path.rglob("*") if p.is_file()})
        raise UserError(f"holds no .jsonl file (found: {', '.join(others) or 'nothing'})", where=name)
    return [Source(p, workspace.shown(p)) for p in found]


def _parsed(line: bytes, number: int) -> Raw:
    try:
        values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Raw(number, None, RowFault("encoding", f"is not UTF-8 (byte {error.start + 1})"))
    except json.JSONDecodeError as error:
        return Raw(number, None, RowFault("broken-json", f"is not JSON: {error.msg} at column {error.colno}"))
    except RecursionError:
        return Raw(number, None, RowFault("broken-json", "is nested too deeply"))
    if not isinstance(values, dict):
        return Raw(number, None, RowFault("wrong-type", f"is a {type(values).__name__}, not an object"))
    return Raw(number, values)
