"""`--fix`: what is safe to mend in JSONL files, mended in place. Everything else is left to the person.

Safe is what takes no word from any row: white space around an answer, byte order marks, and rows whose text stands in the
set already, in a row that stays. Rows are read as the gate reads them. A line that needs nothing stays byte for byte, and so
does one that is no valid row, or would be none when mended.

The file as it was is kept beside it, hidden. Of a link, what it leads to is mended. Compressed files, files that are not
UTF-8, CSV, Parquet, JSON arrays and hub data sets are not written.
"""

import hashlib
import io
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Check
from pipeline.data.formats import converted
from pipeline.data.json_rows import Decoder
from pipeline.data.raw import encoding_fault
from pipeline.data.rows import Conversation, PreferencePair, Row, RowFault, text_digest, validated
from pipeline.data.source import Source
from pipeline.errors import UserError
from pipeline.gate.rules import selected
from pipeline.gate.text import tidy
from pipeline.progress import say
from pipeline.workspace import Workspace

_MARK = "\ufeff"  # a byte order mark, where it marks nothing
_ANSWERS = ("completion", "output", "response", "answer")  # of a conversation, where they are texts
_TALKS = ("messages", "conversations", "prompt", "instruction", "question", "query")  # where messages may stand
_ASSISTANT = ("assistant", "gpt", "chatgpt", "bot", "model")
_CHUNK = 1 << 20  # bytes
_MARK_FIRST, _MARKS, _SPACE, _REPEATED = (
    "byte order mark taken out",
    "rows with a byte order mark inside taken out",
    "rows with white space stripped from an answer",
    "duplicate rows taken out",
)


def fix(workspace: Workspace, found: Sequence[Source], check: Check) -> None:
    """Mends what can be mended, and says what. A file that needs nothing is not written, and none is mended twice.

    Raises `UserError` where a file cannot be read or written; it is then as it was.
    """
    seen: set[bytes] = set()
    for source in _each_once(found):
        try:
            reason = _why_not(source)
            if reason:
                say(f"note: {source.shown} is not mended: {reason}")
                continue
            mending = _Mending(source.shown, set(selected(check)), seen)
            kept = _rewritten(source.path.resolve(), mending)
        except OSError as error:
            raise UserError(
                f"cannot be mended, and is as it was: {error.strerror or error}", where=source.shown
            ) from None
        if kept:
            done = ", ".join(f"{n:,} {what}" for what, n in sorted(mending.counts.items()))
            say(f"fixed {source.shown}: {done}; the file as it was: {workspace.shown(kept)}")


def _each_once(found: Sequence[Source]) -> list[Source]:
    """A file read a second time would be all duplicates. By inode: links of both kinds are one file."""
    files: dict[Any, Source] = {}
    for source in found:
        try:
            status = None if source.hub else source.path.stat()
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=source.shown) from None
        files.setdefault((status.st_dev, status.st_ino) if status else source.shown, source)
    return list(files.values())


def _why_not(source: Source) -> str:
    """Why a file is not mended; "" where it is."""
    if source.hub or source.path.suffix.lower() not in (".jsonl", ".ndjson"):
        return "only plain JSONL files are"
    with source.path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b":
        return "it is compressed"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        return "it is UTF-16 or another encoding, not UTF-8"
    return ""


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Mending:
    """Of one file: its lines before and after, and what was done to them."""

    def __init__(self, shown: str, rules: set[str], seen: set[bytes]) -> None:
        self.counts: Counter[str] = Counter()
        self._shown, self._rules, self._seen = shown, rules, seen
        self._decoder = Decoder()

    def lines(self, path: Path) -> Iterator[tuple[bytes, bytes]]:
        """Split where the gate splits them, ends included. A line that is taken out is empty afterwards."""
        with path.open("rb") as file, io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="") as text:
            for number, line in enumerate(text, 1):
                before = line.encode("utf-8", "surrogateescape")
                try:
                    after, done = self._line(line, number)
                except (RowFault, ValueError, RecursionError):
                    yield before, before
                    continue
                self.counts.update(done)
                yield before, after.encode() if done else before

    def _line(self, line: str, number: int) -> tuple[str, list[str]]:
        """The line as it is to be, and what was done. Raises `RowFault`, `ValueError`, `RecursionError`: let it be."""
        done = []
        if number == 1 and line.startswith(_MARK):
            line = line.removeprefix(_MARK)
            done.append(_MARK_FIRST)
        old = values = self._values(line)
        row = self._row(values, number)
        if "odd-characters" in self._rules and (_MARK in line or "\\ufeff" in line.lower()):
            unmarked = {key: value if key == "id" else _without_marks(value) for key, value in values.items()}
            if unmarked != values:
                values, row = unmarked, self._row(unmarked, number)
                done.append(_MARKS)
        trained = isinstance(row, Conversation | PreferencePair)
        if "edge-whitespace" in self._rules and trained and any(a != tidy(a) for a in row.answers):
            tidied = _tidied_pair(values) if isinstance(row, PreferencePair) else _tidied(values)
            if tidied != values:
                values, row = tidied, self._row(tidied, number)
                done.append(_SPACE)
        if "duplicate" in self._rules and trained:
            digest = text_digest(row)
            if digest in self._seen:
                return "", [_REPEATED]
            self._seen.add(digest)
        if values is old:
            return line, done
        end = line[len(line.rstrip("\r\n")) :]
        return json.dumps(values, ensure_ascii=False) + end, done

    def _values(self, line: str) -> dict[str, Any]:
        """As the gate reads them, and no half of a character in any field: it could not be written again."""
        fault = encoding_fault(line)
        values = None if fault else self._decoder.decode(line)
        if "\\ud" in line.lower():
            fault = fault or encoding_fault(json.dumps(values, ensure_ascii=False))
        if fault or self._decoder.fault or not isinstance(values, dict):
            raise ValueError("no row")
        return values

    def _row(self, values: dict[str, Any], number: int) -> Row:
        kind, own = converted(values)
        return validated(own, kind, self._shown, number)


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_marks(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_marks(v) for v in value]
    return value.replace(_MARK, "") if isinstance(value, str) else value


def _tidied(values: dict[str, Any]) -> dict[str, Any]:
    """A conversation of any format, each of its answers tidied."""
    tidied = dict(values)
    for field, value in values.items():
        if isinstance(value, list) and field in (*_TALKS, *_ANSWERS):
            tidied[field] = [_tidied_message(message) for message in value]
        elif field in _ANSWERS:
            tidied[field] = _tidied_message(value)
    return tidied


def _tidied_pair(values: dict[str, Any]) -> dict[str, Any]:
    """Both answers alone: what stands before them is the prompt's."""
    tidied = dict(values)
    for side in ("chosen", "rejected"):
        value = values[side]
        tidied[side] = [*value[:-1], _tidied_message(value[-1])] if isinstance(value, list) else _tidied_message(value)
    return tidied


def _tidied_message(value: Any) -> Any:
    """An answer as a text, or as a message if it is the assistant's."""
    if isinstance(value, dict) and (value.get("role") or value.get("from")) in _ASSISTANT:
        return {k: tidy(v) if k in ("content", "value") and isinstance(v, str) else v for k, v in value.items()}
    return tidy(value) if isinstance(value, str) else value


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rewritten(path: Path, mending: _Mending) -> Path | None:
    """Where the old file is kept, now that the new one is in its place; None where nothing was to mend. Raises `OSError`."""
    lines, same = mending.lines(path), 0
    for before, after in lines:
        if before != after:
            break
        same += len(before)
    else:
        return None
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise OSError("the file is read-only")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as out:
        new = Path(out.name)
        try:
            with path.open("rb") as old:
                while same:
                    same -= out.write(old.read(min(same, _CHUNK)))
            out.write(after)
            out.writelines(after for _, after in lines)
            out.flush()
            os.fsync(out.fileno())
            os.fchmod(out.fileno(), mode)
            return _replaced(path, new)
        finally:
            new.unlink(missing_ok=True)


def _replaced(path: Path, new: Path) -> Path:
    """Where the old file is kept now that the new one is in its place."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    kept = path.with_name(f".{path.name}.{sha256[:8]}.orig")
    if kept.exists():
        os.replace(new, path)
        return kept
    try:
        os.link(path, kept)
        os.replace(new, path)
    except BaseException:
        if kept.exists() and kept.samefile(path):  # nothing was replaced
            kept.unlink()
        raise
    return kept
