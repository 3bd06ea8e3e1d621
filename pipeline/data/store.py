"""Snapshots: a set of rows kept once, under the hash of its content, in `checkpoints/data/<sha256>.jsonl.gz`.

The hash counts rows, not their order: the order that training took is its seed's, and stands beside it in the record. The
rows lie in the order of their own hashes, so that one set is one file, byte for byte.
"""

import gzip
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.rows import AnyRow, Row, row_hash
from pipeline.errors import UserError
from pipeline.records import items
from pipeline.workspace import Workspace


def keep(workspace: Workspace, rows: Sequence[Row]) -> Path:
    """Where the rows lie; written only if they do not lie there yet."""
    hashed = sorted((row_hash(row), row.id, row) for row in rows)
    path = _path(workspace, items.digest(sha256 for sha256, _, _ in hashed))
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as raw:
        try:
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as out:
                for sha256, _, row in hashed:
                    values = row.model_dump(mode="json", exclude_unset=True)
                    if row.id == row.where:
                        values.pop("id", None)
                    line = {"sha256": sha256, "where": row.where, "row": values}
                    out.write(json.dumps(line, ensure_ascii=False, sort_keys=True).encode() + b"\n")
            raw.flush()
            os.fsync(raw.fileno())
        except BaseException:
            Path(raw.name).unlink()
            raise
    Path(raw.name).replace(path)
    return path


def load(workspace: Workspace, sha256: str, kind: type[AnyRow]) -> list[AnyRow]:
    """The rows of a snapshot. Raises `UserError` when it is not there, or not what its name says."""
    path = _path(workspace, sha256)
    shown = workspace.shown(path)
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for text in lines:
                line = json.loads(text)
                row = kind.model_validate(line["row"])
                row.put(line["where"])
                rows.append(row)
    except FileNotFoundError:
        raise UserError("there is no such snapshot", where=shown) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"is no readable snapshot: {error}", where=shown, remedy="deleting it") from None
    if items.digest(map(row_hash, rows)) != sha256:
        raise UserError("does not hold the rows that its name says", where=shown, remedy="deleting it")
    return rows


def first_values(workspace: Workspace, sha256: str) -> dict[str, Any]:
    """The fields of its first row, by which its kind can be told; none where it is empty or not readable."""
    try:
        with gzip.open(_path(workspace, sha256), "rt", encoding="utf-8", newline="\n") as lines:
            values: dict[str, Any] = json.loads(next(lines))["row"]
            return values
    except (OSError, EOFError, ValueError, KeyError, TypeError, StopIteration):
        return {}


def named(workspace: Workspace, prefix: str) -> list[str]:
    """The hashes of the snapshots whose hash begins so."""
    return sorted(p.name.removesuffix(".jsonl.gz") for p in _folder(workspace).glob(f"{prefix}*.jsonl.gz"))


def _path(workspace: Workspace, sha256: str) -> Path:
    return _folder(workspace) / f"{sha256}.jsonl.gz"


def _folder(workspace: Workspace) -> Path:
    return workspace.checkpoints / "data"
