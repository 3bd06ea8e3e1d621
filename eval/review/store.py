"""Every vote as one JSON line in `votes.jsonl`, on the disk before the reviewer hears that it is kept.

The first line is the plan. A line is never changed: undoing is a line too. Writers, in one process or several, take
turns by the file's lock, and `seq` counts a reviewer's lines: one sent twice is kept once, and of two tabs that tell
different things the second is refused. What a crash tore was never acknowledged; it is shut off by the next writer,
passed over by readers, and said. No line names a contestant: who stood left is known by the key alone (`blind.py`).
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from eval.review import blind
from pipeline.errors import UserError

VOTES, KEY = "votes.jsonl", "key"
UNDO, SKIP = "undo", "skip"
Side = Literal["left", "right"]
Choice = Literal[Side, "tie", "bad", "skip"]
Rating = Literal["accuracy", "helpfulness", "clarity", "style"]
SIDES: tuple[Side, Side] = ("left", "right")
RATINGS: dict[Rating, str] = {
    "accuracy": "Technical accuracy",
    "helpfulness": "Helpfulness",
    "clarity": "Clarity",
    "style": "Style and tone",
}


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first vote. `votes_each`: people whose votes decide a prompt."""

    at: str
    commitment: str
    against: str
    planned: int
    votes_each: int
    answers_sha256: str


@dataclass(frozen=True)
class Line:
    """`choice`: a Choice, or `undo` of that item. `ratings`: by side, then by what is rated, 1 to 5."""

    at: str
    reviewer: str
    seq: int
    item: str
    choice: str
    ratings: dict[str, dict[str, int]] = field(default_factory=dict)
    comment: str = ""

    def same(self, other: "Line") -> bool:
        """Whether both tell the same, whenever they were sent."""
        return asdict(self) | {"at": ""} == asdict(other) | {"at": ""}


class Stale(Exception):
    """The reviewer's lines are not those that whoever sent this knew of."""


@dataclass(frozen=True)
class Told:
    """What the file says. `torn`: the numbers of lines that say nothing."""

    plan: Plan
    lines: list[Line]
    torn: list[int]

    def of(self, reviewer: str) -> list[Line]:
        return [line for line in self.lines if line.reviewer == reviewer]


def standing(lines: list[Line]) -> dict[str, Line]:
    """By item the votes that were not undone, in the order in which they came."""
    kept: dict[str, Line] = {}
    for line in lines:
        if line.choice == UNDO:
            kept.pop(line.item, None)
        else:
            kept[line.item] = line
    return kept


class Store:
    """The folder of one review."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / VOTES

    def begin(self, make: Callable[[str], Plan]) -> tuple[Plan, bytes]:
        """The plan, made (from the key's commitment) where there is none yet, and the key. Raises `UserError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as file:
            content = self._content(file)
            plan = self._parse(content).plan if b"\n" in content else None  # a torn plan was shown to nobody
            key = self._key(plan is None)
            if plan is None:
                plan = make(blind.commitment(key))
                os.ftruncate(file, 0)
                self._write(file, json.dumps({"review": 1} | asdict(plan)).encode() + b"\n", 0)
                _sync(self.folder)
        if blind.commitment(key) != plan.commitment:
            raise UserError("is not the key that this review was sealed with", where=str(self.folder / KEY))
        return plan, key

    def read(self) -> Told:
        with self._locked(os.O_RDONLY, fcntl.LOCK_SH) as file:
            return self._parse(self._content(file))

    def append(self, line: Line, fits: Callable[[list[Line]], bool]) -> None:
        """Keeps the line, once. `fits` is asked of the reviewer's earlier lines.

        Raises `Stale` where the reviewer has told something else since, and OSError where it cannot be kept.
        """
        with self._locked(os.O_RDWR, fcntl.LOCK_EX) as file:
            content = self._content(file)
            mine = self._parse(content).of(line.reviewer)
            if line.seq < len(mine) and mine[line.seq].same(line):
                return  # sent again: it had been kept
            if line.seq != len(mine) or not fits(mine):
                raise Stale
            shut = b"" if content.endswith(b"\n") else b"\n"
            told = json.dumps(asdict(line), ensure_ascii=True).encode()
            self._write(file, shut + told + b"\n", len(content))

    @contextmanager
    def held(self) -> Iterator[Told]:
        """What the file says, while nobody writes into it."""
        with self._locked(os.O_RDWR, fcntl.LOCK_EX) as file:
            yield self._parse(self._content(file))

    def _key(self, new: bool) -> bytes:
        """Read, or where no vote could have been cast yet, made. Nobody else on the machine may read it."""
        path = self.folder / KEY
        if new and not (path.is_file() and path.stat().st_size == blind.KEY_BYTES):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, blind.new_key())
                os.fsync(handle)
            finally:
                os.close(handle)
            _sync(self.folder)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            what = "is gone: without it nobody can tell whose answers were voted for"
            raise UserError(what, where=str(path), remedy="a copy of it, or another review") from None

    def _parse(self, content: bytes) -> Told:
        first, *rest = content.split(b"\n")
        try:
            values = json.loads(first)
            values.pop("review")
            plan = Plan(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError("is no plan of a review", where=f"{self.path}:1") from None
        lines, torn = [], []
        for number, text in enumerate(rest, 2):
            if not text.strip():
                continue
            try:
                lines.append(_line(json.loads(text)))
            except (ValueError, TypeError, RecursionError):
                torn.append(number)
        return Told(plan, lines, torn)

    def _write(self, file: int, data: bytes, offset: int) -> None:
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(file, data[done:], offset + done)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, offset)  # a full disk: nothing of it stays
            raise

    def _content(self, file: int) -> bytes:
        with os.fdopen(os.dup(file), "rb") as opened:
            opened.seek(0)
            return opened.read()

    @contextmanager
    def _locked(self, flags: int, how: int) -> Iterator[int]:
        file = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, how)
            yield file  # closing lets go
        finally:
            os.close(file)


def _line(values: Any) -> Line:
    """Raises ValueError or TypeError for what no server wrote."""
    line = Line(**values)
    texts = (line.at, line.reviewer, line.item, line.choice, line.comment)
    if not all(isinstance(text, str) for text in texts) or not isinstance(line.seq, int):
        raise ValueError
    if line.choice not in (*get_args(Choice), UNDO) or not isinstance(line.ratings, dict):
        raise ValueError
    return line


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
