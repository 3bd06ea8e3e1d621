"""What people think of answers: one JSON line each, in `feedback.jsonl` beside the serve record.

A line is on the disk before the server says that it is kept (fsync), whole or not at all: writers take turns by the
file's lock, and what a crash tore is shut off by the next writer and passed over by the reader. No address is kept.
Only the standard library: vLLM's environment loads this too.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "feedback.jsonl"
MAX_BODY = 4 << 20  # bytes of one request
MAX_FILE = 1 << 30  # bytes of the file
MAX_MESSAGES, MAX_TEXT, MAX_NAME = 1000, 20_000, 200  # turns; characters of a remark; of a name or id
ROLES = ("system", "user", "assistant")
RATINGS = ("up", "down")


class Invalid(ValueError):
    """A value that is no feedback: which part, and why."""

    def __init__(self, what: str, part: str | None = None) -> None:
        super().__init__(f"{part}: {what}" if part else what)
        self.part = part


@dataclass(frozen=True)
class Feedback:
    """One rating. `messages` is what was asked, up to the user's last turn; `better` is what should have been answered."""

    answer: str
    rating: str  # one of RATINGS
    messages: tuple[dict[str, str], ...] = ()
    completion_id: str = ""
    text: str = ""
    better: str = ""
    model: str = ""
    contract: str = ""  # these three are the server's: no request may set them
    time: str = ""
    id: str = ""


THE_SERVERS = ("contract", "time", "id")


def parse(values: Any) -> Feedback:
    """Of a request or a line of the file. Raises `Invalid`."""
    if not isinstance(values, dict):
        raise Invalid('must be an object: {"messages" or "completion_id", "answer", "rating"}')
    known = {field.name for field in fields(Feedback)}
    values = {name: value for name, value in values.items() if value is not None}
    for name in values:
        if name not in known:
            raise Invalid("is not known here", name)
        if name != "messages" and not isinstance(values[name], str):
            raise Invalid("must be text", name)
    for name in ("answer", "rating"):
        if not values.get(name, "").strip():
            raise Invalid("is missing", name)
    if values["rating"] not in RATINGS:
        raise Invalid("must be `up` or `down`", "rating")
    for name, most in {"text": MAX_TEXT, "model": MAX_NAME, "completion_id": MAX_NAME}.items():
        if len(values.get(name, "")) > most:
            raise Invalid(f"has more than {most:,} characters", name)
    messages = _messages(values.pop("messages", []))
    if not messages and not values.get("completion_id"):
        raise Invalid("is missing, and so is `completion_id`: nobody could tell what was asked", "messages")
    return Feedback(messages=messages, **values)


def _messages(values: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(values, list) or len(values) > MAX_MESSAGES:
        raise Invalid(f"must be a list of at most {MAX_MESSAGES:,} messages", "messages")
    for number, message in enumerate(values):
        right = (
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] in ROLES
            and isinstance(message["content"], str)
        )
        if not right:
            raise Invalid(f'must be {{"role": one of {", ".join(ROLES)}, "content": text}}', f"messages.{number}")
    if values and values[-1]["role"] != "user":
        raise Invalid("must end with the user's question: the answer stands in `answer`", "messages")
    return tuple(values)


def request(body: bytes) -> Feedback:
    """What a client sent. Raises `Invalid`, also for a conversation that no pair could be made of."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"the body is not JSON: {error}") from None
    for name in THE_SERVERS:
        if isinstance(values, dict) and name in values:
            raise Invalid("is not known here", name)
    told = parse(values)
    for number, message in enumerate(told.messages):
        if not message["content"].strip():
            raise Invalid("is blank", f"messages.{number}.content")
    roles = [message["role"] for message in told.messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise Invalid("must be an optional system, then user and assistant in turn, as in training", "messages")
    return told


def append(path: Path, feedback: Feedback, model: str, contract: str) -> str:
    """Keeps it, and returns its id. Raises `OSError` where it could not be kept, and `Invalid` where it is no UTF-8."""
    kept = asdict(feedback) | {
        "id": f"fb-{uuid.uuid4().hex}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": feedback.model or model,
        "contract": contract,
    }
    values = {name: kept[name] for name in ("id", "time", *kept) if kept[name]}
    try:
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise Invalid("holds a lone surrogate, half of a character") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with _locked(path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as file:
        size = os.fstat(file).st_size
        if size + len(line) > MAX_FILE:
            raise OSError(f"{path.name} is full")
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # what a crash tore stays a line of its own
        try:
            _write(file, line, size)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)  # a full disk: nothing of it stays
            raise
    if is_new:
        with _opened(path.parent, os.O_RDONLY) as folder:
            os.fsync(folder)
    return str(kept["id"])


def read(path: Path) -> Iterator[tuple[int, Feedback | Invalid]]:
    """Each line's number, with what it says or why it says nothing (torn by a crash, edited by hand)."""
    with _locked(path, os.O_RDONLY, fcntl.LOCK_SH) as file, os.fdopen(os.dup(file), "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, parse(json.loads(line))
            except Invalid as fault:
                yield number, fault
            except (ValueError, RecursionError):
                yield number, Invalid("is not whole JSON: a crash tore it, or a person did")


def _write(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _locked(path: Path, flags: int, how: int) -> Iterator[int]:
    with _opened(path, flags) as file:
        fcntl.flock(file, how)
        yield file  # closing lets go
