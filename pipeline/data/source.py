"""Where rows come from: a file, a folder or a hub, read one row at a time whatever its size, each with its place.

    for source in sources(workspace, "data/sft"):
        for raw in source.raws(): ...

A name is one of
- a file: .jsonl .ndjson .json .csv .tsv, each also gzipped (.gz), or .parquet;
- a folder of any mixture of them, with its subfolders, in the order of their names;
- `hub:OWNER/NAME[@REVISION][/CONFIG][#SPLIT]`, a data set on the Hugging Face hub (`pipeline.data.hub`).

What cannot be read is a `Raw` too, with a fault in place of values, so that nothing is passed over in silence; a file that
cannot be opened at all is a `UserError`.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.hub import PREFIX, DataSet
from pipeline.data.json_rows import json_document, json_lines
from pipeline.data.raw import Raw, broken, say_once
from pipeline.data.tables import csv_rows, delimited, parquet_rows
from pipeline.errors import UserError
from pipeline.workspace import Workspace

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
KNOWN = ".jsonl, .ndjson, .json, .csv or .tsv (each also .gz), or .parquet"
_BUFFER = 1 << 20  # bytes
_UNREADABLE = (OSError, EOFError, zlib.error)  # a disk's error, gzip cut short, gzip damaged
_NO_ROWS = (".md", ".rst", ".yaml", ".yml", ".toml", ".py", ".ipynb", ".sh", ".html", ".pdf", ".png", ".jpg", ".svg")
_NO_ROWS_STEMS = ("README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "Makefile")
_OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` notes


@dataclass
class Source:
    """One file of rows, or one split of a data set on a hub."""

    path: Path  # of a hub's data set: its name
    shown: str  # as a person named it, relative to the workspace
    bytes_read: int = 0  # so far, for progress, of `size`
    hub: DataSet | None = None

    @property
    def size(self) -> int:
        """Bytes on disk; 0 where that is not known."""
        return 0 if self.hub else self.path.stat().st_size

    def raws(self) -> Iterator[Raw]:
        """Raises `UserError` when there is nothing to open."""
        self.bytes_read = 0
        last = 0
        for number, raw in enumerate(self._raws(), 1):
            if raw.line > last:
                last = raw.line
            else:
                raw = replace(raw, item=number)
            yield raw

    def _raws(self) -> Iterator[Raw]:
        if self.hub:
            yield from self.hub.raws()
            return
        line = 0
        try:
            for raw in self._parquet() if self.path.suffix.lower() == ".parquet" else self._text():
                yield raw
                line = raw.line
        except _UNREADABLE as error:
            yield broken(line + 1, "broken-file", f"cannot be read from here on: {_said(error)}", "make the file anew")

    def _parquet(self) -> Iterator[Raw]:
        from pyarrow import ArrowException

        self._opened().close()
        size = self.size
        try:
            for raw, share in parquet_rows(self.path):
                self.bytes_read = round(share * size)
                yield raw
        except ArrowException as error:
            raise OSError(str(error)) from None

    def _text(self) -> Iterator[Raw]:
        with self._opened() as raw_file, io.BufferedReader(raw_file, _BUFFER) as file:
            content: Any = file
            if file.peek(2)[:2] == b"\x1f\x8b":  # whatever its name
                content = gzip.GzipFile(fileobj=file)  # a larger buffer above it would lose what precedes a fault
            elif self.path.suffix.lower() == ".gz" and file.peek(1):
                yield broken(1, "broken-file", "is not gzip", "its right name")
                return
            head = content.peek(4)[:4]
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
                yield broken(1, "broken-file", "is UTF-16 or another encoding, not UTF-8", "save the file as UTF-8")
                return
            if head[:3] == b"\xef\xbb\xbf":
                content.read(3)
            suffix = _suffix(self.path)
            table = suffix in (".csv", ".tsv")
            text = io.TextIOWrapper(content, "utf-8", "surrogateescape", newline="" if table else None)
            if table:
                lines, delimiter = delimited(text, "," if suffix == ".csv" else "\t", self._note)
                yield from csv_rows(lines, delimiter)
            elif suffix == ".json":
                yield from json_document(text)
            else:
                yield from json_lines(text)

    def _note(self, text: str) -> None:
        say_once(str(self.path.resolve()), f"{self.shown}: {text}")

    def _opened(self) -> "_Counted":
        try:
            return _Counted(self)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=self.shown) from None


class _Counted(io.FileIO):
    """A file that tells its source how much of it was read."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.path)
        self._source = source

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._source.bytes_read += count or 0
        return count


def sources(workspace: Workspace, name: str) -> list[Source]:
    """The files that a name stands for, in the order of their names. Raises `UserError` when there are none."""
    if name.startswith(PREFIX):
        return [Source(Path(name), name, hub=DataSet.named(workspace, name))]
    path = workspace.path(name)
    if path.is_file():
        if not _is_known(path):
            raise UserError(
                f"is no kind of file that rows are read from ({path.suffix or 'no ending'})", where=name, remedy=KNOWN
            )
        return [Source(path, workspace.shown(path))]
    if path.is_symlink() and not path.exists():
        raise UserError(f"is a link to {os.readlink(path)}, which is not there", where=name)
    if not path.is_dir():
        raise UserError(
            "there is no such file or folder", where=name, remedy=f"a path from {workspace.root}, or an absolute one"
        )
    files = _files(workspace, path)
    found = [p for p in files if _is_known(p)]
    others = [p for p in files if not _is_known(p)]
    if not found:
        raise UserError(f"holds no .jsonl file or other rows (found: {_endings(others)})", where=name, remedy=KNOWN)
    meant = [
        p for p in others if p.suffix not in _NO_ROWS and p.stem not in _NO_ROWS_STEMS and p.name not in _OF_DATASETS
    ]
    if meant:
        count = f"{len(meant)} file{'s' * (len(meant) > 1)}"
        passed = f"{count} of another kind passed over: {_endings(meant)}; rows are read from {KNOWN}"
        say_once(str(path.resolve()), f"{workspace.shown(path)}: {passed}")
    return [Source(p, workspace.shown(p)) for p in found]


def _files(workspace: Workspace, folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, links followed. Raises `UserError` where one leads nowhere."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot be read: {error.strerror}", where=workspace.shown(Path(error.filename)))

    files: list[Path] = []
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        files += (
            [] if real in seen else [p for n in names if not n.startswith(".") and not (p := Path(where, n)).is_fifo()]
        )
        seen.add(real)
    lost = next((f for f in sorted(files) if not f.exists()), None)
    if lost:
        raise UserError(f"is a link to {os.readlink(lost)}, which is not there", where=workspace.shown(lost))
    return sorted(files)


def _is_known(path: Path) -> bool:
    """Whether rows are read from such a file."""
    if path.name in _OF_DATASETS:
        return False
    return path.suffix.lower() == ".parquet" or _suffix(path) in TEXTS


def _suffix(path: Path) -> str:
    """Without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _endings(files: list[Path]) -> str:
    """`.arrow, .txt`."""
    return ", ".join(sorted({p.suffix or p.name for p in files})) or "nothing"


def _said(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the gzip file ends too early"
    if isinstance(error, zlib.error | gzip.BadGzipFile):
        return f"the gzip file is damaged ({error})"
    return (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]
