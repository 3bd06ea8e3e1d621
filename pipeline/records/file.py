"""A record's file: the person's half, the line, the program's half.

Above the line every byte is the person's and is read afresh before each write, so an editor may save in between.
Below it the program writes everything anew. Its last version is kept in `EXP-…/below.yaml`, and the next one in
`below.next.yaml` from before it is written until after; when the file's is neither, the edit is kept aside and undone.
"""

import hashlib
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records.schema import Facts

LINE = "# ─── Below this line the pipeline writes. Edits here are detected, kept aside and undone. ───"
_LINE = re.compile("^# (?:─)+ Below this line the pipeline writes\\..*$".encode(), re.MULTILINE)


@dataclass(frozen=True)
class Halves:
    """`below` is None for a plan that a person wrote and nothing has run."""

    above: bytes
    below: bytes | None


def split(content: bytes, shown: str) -> Halves:
    """Raises `UserError` when the line stands more than once."""
    marks = list(_LINE.finditer(content))
    if len(marks) > 1:
        line = content[: marks[1].start()].count(b"\n") + 1
        raise UserError("the line that divides the record stands twice", where=f"{shown}:{line}", remedy="deleting one")
    if not marks:
        return Halves(content, None)
    end = content.find(b"\n", marks[0].end())
    return Halves(content[: marks[0].start()], content[end + 1 :] if end >= 0 else b"")


class RecordFile:
    """Reads and writes one record. `folder` beside it holds what is too large or too private for the record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.stem
        self.folder = path.with_suffix("")
        self._last, self._next = self.folder / "below.yaml", self.folder / "below.next.yaml"

    def person(self) -> dict[str, Any]:
        """The person's half, parsed. Raises `UserError` with file, line and column."""
        return self._parse(self._halves().above.decode("utf-8-sig", "replace"), first_line=1)

    def facts(self) -> Facts | None:
        """The program's half; None where nothing has run. An edited half is put back first."""
        halves = self._undo_edits()
        if halves.below is None:
            if self._written():
                raise UserError(
                    "the line that divides the record is gone", where=str(self.path), remedy=f"adding {LINE}"
                )
            return None
        first_line = halves.above.count(b"\n") + 2
        values = self._parse(halves.below.decode("utf-8", "replace"), first_line)
        try:
            return Facts.model_validate(values)
        except ValueError as error:
            raise UserError(
                f"not a record's lower half: {str(error).splitlines()[0]}", where=f"{self.path}:{first_line}"
            ) from None

    def write(self, facts: Facts) -> None:
        """Replaces the lower half; the upper half is whatever stands in the file at this moment."""
        below = yamlio.dump(facts.model_dump(mode="json", exclude_none=True)).encode()
        self.folder.mkdir(exist_ok=True)
        write_atomically(self._next, below)
        above = self._undo_edits().above
        if above and not above.endswith(b"\n"):
            above += b"\n"
        write_atomically(self.path, above + LINE.encode() + b"\n" + below)
        os.replace(self._next, self._last)

    def _halves(self) -> Halves:
        if self.path.exists() and not self.path.is_file():  # reading a pipe would wait for ever
            raise UserError("is no file", where=str(self.path))
        try:
            return split(self.path.read_bytes(), str(self.path))
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(self.path)) from None

    def _written(self) -> list[bytes]:
        """What the program wrote below the line: the next version, while a write is under way, and the last."""
        versions = []
        for path in (self._next, self._last):  # in this order: the next becomes the last
            with suppress(FileNotFoundError):
                versions.append(path.read_bytes())
        return versions

    def _undo_edits(self) -> Halves:
        """Both halves, the lower one as the program wrote it."""
        halves = self._halves()
        while True:
            below, written = halves.below, self._written()
            if below is None or not written or below in written:
                return halves
            again = self._halves()
            if again == halves:
                break
            halves = again  # not edited: another process has written it in the meantime
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{hashlib.sha256(below).hexdigest()[:8]}"
        aside = self.folder / f"edited-below-{name}.yaml"
        write_atomically(aside, below)
        write_atomically(self.path, halves.above + LINE.encode() + b"\n" + written[0])
        say(f"note: {self.path}: was edited below the line; the edit is kept in {aside} and undone")
        return Halves(halves.above, written[0])

    def _parse(self, text: str, first_line: int) -> dict[str, Any]:
        try:
            value = yamlio.load(text).value
        except yamlio.YamlError as error:
            where = f"{self.path}:{error.line + first_line - 1}:{error.column}"
            raise UserError(error.what, where=where) from None
        if value is not None and not isinstance(value, dict):
            raise UserError("a record is a mapping of keys to values", where=f"{self.path}:{first_line}")
        return value or {}


def write_atomically(path: Path, content: bytes) -> None:
    """A reader, or a crash, sees the old file or the new one, whole. Raises OSError (a full disk) with the old kept."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
