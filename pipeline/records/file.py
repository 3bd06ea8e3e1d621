"""A record's file: the person's half, the line, the program's half.

Above the line every byte is the person's and is read afresh before each write, so an editor may save in between. While
it is no YAML, in mid-edit, nothing is written into the file: the program's half waits beside it, in
`EXP-…/below.next.yaml`, and `exp sync` or the next write completes it. Below the line the program writes everything
anew; its last version is kept in `EXP-…/below.yaml`. When the file's is neither of the two, the edit is kept aside with
a diff, and undone. The half ends with a seal, its own SHA-256, so that an edit shows in any other checkout too.
"""

import difflib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records.schema import Facts

LINE = "# ─── Below this line the pipeline writes. Edits here are detected, kept aside and undone. ───"
_LINE = re.compile("^# (?:─)+ Below this line the pipeline writes\\..*$".encode(), re.MULTILINE)
_BELOW_BEGINS = re.compile(rb"^schema_version:", re.MULTILINE)
_SEAL = re.compile(rb"^seal: ([0-9a-f]{64})\s*\Z", re.MULTILINE)
_SETTLES_WITHIN = 0.5  # seconds an editor may take to save a file


@dataclass(frozen=True)
class Halves:
    """`below` is None for a plan that a person wrote and nothing has run. `stray`: program's text found elsewhere."""

    whole: bytes
    above: bytes
    below: bytes | None
    stray: bytes = b""


@dataclass(frozen=True)
class Written:
    """What the program wrote below the line, kept beside the file: the last version, and one that waits to go in."""

    waiting: bytes | None = None
    last: bytes | None = None

    @property
    def newest(self) -> bytes | None:
        return self.last if self.waiting is None else self.waiting

    def holds(self, below: bytes | None) -> bool:
        return below is not None and any(_same(below, version) for version in (self.waiting, self.last))


@dataclass(frozen=True)
class Reading:
    """A record as it stands, read without touching it. Each half may be unreadable by itself."""

    person: dict[str, Any]
    facts: Facts | None  # None: a plan, or unreadable
    mistake: UserError | None = None  # in the person's half: with file, line and column
    damage: UserError | None = None  # in the program's half
    edited: str | None = None  # how the file's lower half differs from what the program wrote
    pending: bool = False  # the program's half waits beside the file
    sealed: bool = False  # the file's lower half carries a seal, whether or not it fits


NOTHING = Written()


class RecordFile:
    """Reads and writes one record. `folder` beside it holds what is too large or too private for the record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.stem
        self.folder = path.with_suffix("")
        self._last, self._next = self.folder / "below.yaml", self.folder / "below.next.yaml"

    def read(self) -> Reading:
        """Both halves, without writing anything. Raises `UserError` only when there is no file to read."""
        halves, written = self._settled()
        person: dict[str, Any] = {}
        facts, mistake, damage = None, None, None
        try:
            person = self._person(halves.above)
        except UserError as error:
            mistake = error
        try:
            facts = self._facts(halves, written)
        except UserError as error:
            damage = error
        edited, said = _edited(self.id, halves, written), str(person.get("experiment_id"))
        if written.newest is None and halves.below is not None and _sealed(said, halves.below):
            edited = None  # the file was renamed, and that is all
        return Reading(
            person, facts, mistake, damage, edited, _pending(halves, written), _seal_of(halves.below) is not None
        )

    def above(self) -> str:
        """The person's half as text. Raises `UserError` with the place where it is no text."""
        return self._text(self._settled()[0].above)

    def person(self) -> dict[str, Any]:
        """The person's half, parsed. Raises `UserError` with file, line and column."""
        return self._person(self._settled()[0].above)

    def facts(self) -> Facts | None:
        """The program's half; None where nothing has run. An edited half is put back first."""
        halves, written = self._settled()
        if written.last is not None and (halves.stray or not written.holds(halves.below)):
            with suppress(OSError):  # where nothing can be written, it can still be read
                self.complete()
        return self._facts(halves, written)

    def write(self, facts: Facts) -> None:
        """Replaces the lower half; the upper half is whatever stands in the file at this moment."""
        values = facts.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"seal"})
        text = yamlio.dump(values).encode()
        self.folder.mkdir(exist_ok=True)
        write_atomically(self._next, text + f"seal: {_seal(self.id, text)}\n".encode())
        self.complete()

    def complete(self) -> bool:
        """Puts the program's half into the file, where the person's half allows it; says why not, if not."""
        while True:
            try:
                halves, written = self._settled()
                if not halves.above.strip():
                    raise UserError("is empty above the line", where=str(self.path))
                self._person(halves.above)
            except UserError as error:
                say(f"note: {error}; what the pipeline knows waits in {self._next}, for aletheia exp sync")
                return False
            if written.newest is None:
                return True
            edited = _edited(self.id, halves, written)
            if edited:
                self._keep_aside(halves, written, edited)
            there = not edited and _same(halves.below, written.newest)
            if there or self._replace(halves, halves.above, written.newest):
                with suppress(FileNotFoundError):
                    os.replace(self._next, self._last)
                return True

    def rewrite_above(self, change: Callable[[str], str]) -> None:
        """For `promote`, `renumber` and `reproduce` alone: `change` edits the person's text; its encoding stays."""
        with suppress(UserError):  # what stands there twice, or was edited below, is put right first
            self.facts()
        while True:
            halves, _ = self._settled()
            self._person(halves.above)
            text = change(self._text(halves.above))
            mark = b"\xef\xbb\xbf" if halves.above.startswith(b"\xef\xbb\xbf") else b""
            self._person(text.encode())  # never leave what cannot be read
            if self._replace(halves, mark + text.encode(), halves.below):
                return

    def _content(self) -> bytes:
        if self.path.exists() and not self.path.is_file():  # reading a pipe would wait for ever
            raise UserError("is no file", where=str(self.path))
        try:
            with self.path.open("rb") as file:
                content = file.read(2 * yamlio.MAX_BYTES + 1)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(self.path)) from None
        if len(content) > 2 * yamlio.MAX_BYTES:
            raise UserError("is far larger than a record", where=str(self.path))
        return content

    def _written(self) -> Written:
        """What is there and whole: a copy that its seal does not fit is none of ours."""
        versions: dict[str, bytes] = {}
        for name, path in (("waiting", self._next), ("last", self._last)):  # in this order: the next becomes the last
            with suppress(OSError):
                version = path.read_bytes()
                versions |= {name: version} if _sealed(self.id, version) else {}
        return Written(**versions)

    def _settled(self) -> tuple[Halves, Written]:
        """The halves, and what the program wrote; an irregular file is given the time that an editor needs to save."""
        before, deadline = None, 0.0
        while True:
            content, written = self._content(), self._written()
            halves = split(content, written)
            if content.strip() and not _edited(self.id, halves, written):
                return halves, written
            if content == before and (written.newest is None or time.monotonic() > deadline):
                return halves, written
            if content != before:
                deadline = time.monotonic() + _SETTLES_WITHIN
            before = content
            time.sleep(0.02)

    def _person(self, above: bytes) -> dict[str, Any]:
        return self._parse(self._text(above), first_line=1)

    def _text(self, above: bytes) -> str:
        if above.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError("is UTF-16", where=f"{self.path}:1:1", remedy="saving it as UTF-8")
        try:
            text = above.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = above[: error.start].count(b"\n") + 1
            column = error.start - (above.rfind(b"\n", 0, error.start) + 1) + 1
            raise UserError("is not UTF-8", where=f"{self.path}:{line}:{column}") from None
        lone = re.search(r"\r(?!\n)", text)
        if lone:  # YAML takes it for a line break, editors do not: what looks like a comment could be a key
            line = text.count("\n", 0, lone.start()) + 1
            column = lone.start() - (text.rfind("\n", 0, lone.start()) + 1) + 1
            raise UserError(
                "a carriage return stands alone", where=f"{self.path}:{line}:{column}", remedy="deleting it"
            )
        return text

    def _facts(self, halves: Halves, written: Written) -> Facts | None:
        below = halves.below if written.newest is None else written.newest
        if below is None:
            return None
        first_line = halves.above.count(b"\n") + 2
        values = self._parse(below.decode("utf-8", "replace"), first_line)
        values.pop("seal", None)
        try:
            plain = to_jsonable_python(values, inf_nan_mode="constants")  # YAML has bytes, dates and sets besides
            return Facts.model_validate(plain)
        except ValueError as error:
            detail = " ".join(str(error).splitlines()[1:3]) or str(error)
            raise UserError(f"not a record's lower half: {detail}", where=f"{self.path}:{first_line}") from None

    def _replace(self, seen: Halves, above: bytes, below: bytes | None) -> bool:
        """False, and nothing written, when the file is no longer the one that was `seen`: an editor has saved."""
        end = b"\r\n" if above.split(b"\n", 1)[0].endswith(b"\r") else b"\n"
        content = above
        if below is not None:
            if above and not above.endswith(b"\n"):
                content += end
            content += (LINE.encode() + b"\n" + below.replace(b"\r\n", b"\n")).replace(b"\n", end)
        return write_atomically(self.path, content, only_if=lambda: self._is(seen.whole))

    def _is(self, content: bytes) -> bool:
        try:
            return self._content() == content
        except UserError:  # gone in the last moment
            return False

    def _keep_aside(self, halves: Halves, written: Written, edited: str) -> None:
        found = halves.stray + (halves.below or b"")
        name = f"edited-below-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{hashlib.sha256(found).hexdigest()[:8]}"
        aside = self.folder / f"{name}.yaml"
        write_atomically(aside, found)
        ours, theirs = (
            text.decode("utf-8", "replace").splitlines(keepends=True) for text in (written.newest or b"", found)
        )
        diff = "".join(difflib.unified_diff(ours, theirs, "as the pipeline wrote it", "as edited"))
        write_atomically(aside.with_suffix(".diff"), diff.encode())
        say(f"note: {self.path}: {edited}; the edit is kept in {aside} and undone")

    def _parse(self, text: str, first_line: int) -> dict[str, Any]:
        try:
            value = yamlio.load(text).value
        except yamlio.YamlError as error:
            where = f"{self.path}:{error.line + first_line - 1}:{error.column}"
            raise UserError(error.what, where=where) from None
        if value is not None and not isinstance(value, dict):
            raise UserError("a record is a mapping of keys to values", where=f"{self.path}:{first_line}:1")
        return value or {}


def split(content: bytes, written: Written = NOTHING) -> Halves:
    """Where the line is gone or doubled, the halves are told by what the program is known to have written."""
    marks = list(_LINE.finditer(content))
    if not marks:
        begins = _BELOW_BEGINS.search(content) if written.last is not None or _SEAL.search(content) else None
        if begins:
            return Halves(content, content[: begins.start()], content[begins.start() :], stray=b"# the line was gone\n")
        return Halves(content, content, None if written.last is None else b"")
    pieces = [content[: marks[0].start()]]
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        end = content.find(b"\n", mark.end())
        begin = len(content) if end < 0 else end + 1
        pieces.append(content[begin : following.start() if following else len(content)])
    above, *between, below = pieces
    if not between:
        return Halves(content, above, below)
    if not written.holds(below):  # which one divides cannot be told: the first
        return Halves(content, above, (LINE + "\n").encode().join([*between, below]))
    ours = [piece for piece in between if _BELOW_BEGINS.match(piece)]
    persons = [piece for piece in between if not _BELOW_BEGINS.match(piece)]
    return Halves(content, b"".join([above, *persons]), below, stray=b"# the line stood twice\n" + b"".join(ours))


def _edited(record_id: str, halves: Halves, written: Written) -> str | None:
    """How the file's lower half differs from what the program wrote; None when it does not."""
    if halves.stray:
        return halves.stray.split(b"\n", 1)[0].decode().removeprefix("# ")
    if halves.below is None or written.holds(halves.below):
        return None
    if _sealed(record_id, halves.below):
        return None  # an earlier version, which an editor opened then and saved now
    if written.newest is not None:
        return "was edited below the line" if halves.below.strip() else "all below the line was deleted"
    sealed = _seal_of(halves.below) is not None  # whoever takes the seal out is found by verify and lint
    return "was edited below the line, and no copy is at hand to put it back" if sealed else None


def _seal_of(below: bytes | None) -> re.Match[bytes] | None:
    return None if below is None else _SEAL.search(below.replace(b"\r\n", b"\n"))


def _sealed(record_id: str, below: bytes) -> bool:
    below = below.replace(b"\r\n", b"\n")
    seal = _seal_of(below)
    return seal is not None and _seal(record_id, below[: seal.start()]) == seal[1].decode()


def _seal(record_id: str, below: bytes) -> str:
    """Of this record's lower half: another record's, put here, does not fit."""
    return hashlib.sha256(record_id.encode() + b"\n" + below).hexdigest()


def _pending(halves: Halves, written: Written) -> bool:
    return written.waiting is not None and not _same(halves.below, written.waiting)


def _same(one: bytes | None, other: bytes | None) -> bool:
    """Editors change line ends and the last of them; that is no edit."""
    if one is None or other is None:
        return False
    return one.replace(b"\r\n", b"\n").rstrip(b"\n") == other.replace(b"\r\n", b"\n").rstrip(b"\n")


def write_atomically(path: Path, content: bytes, only_if: Callable[[], bool] = lambda: True) -> bool:
    """A reader, or a crash, sees the old file or the new one, whole. Raises OSError (a full disk) with the old kept.

    `only_if` is asked at the last moment; when it says no, nothing is written and False returned.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        if not only_if():
            return False
        os.replace(temporary, path)
        return True
    finally:
        Path(temporary).unlink(missing_ok=True)
