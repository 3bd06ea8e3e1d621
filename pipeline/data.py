"""Rows: read from JSONL, checked, counted, hashed and split. Nothing is dropped without a line that says so.

    rows = read_rows(workspace, "data/sft", Conversation)
    train, held_out = split(rows, config.training_data.validation)

A row that is not what it should be stops the stage with file and line. A row that is right but cannot be used (longer
than `max_length`) is rejected: it goes to `rejects.jsonl` beside the record, is counted, and too many stop the stage.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config import Validation
from pipeline.errors import UserError
from pipeline.records import items
from pipeline.workspace import Workspace

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: Text


class Row(BaseModel):
    """Only the text fields are required; unknown fields are kept and ignored."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str = ""
    domain: str = "unknown"
    difficulty: str = "unknown"
    _where: str = ""

    @property
    def where(self) -> str:
        """`data/sft/devops.jsonl:3`."""
        return self._where


class Conversation(Row):
    messages: list[Message] = Field(min_length=2)

    @model_validator(mode="after")
    def _roles(self) -> "Conversation":
        _check_turns(self.messages)
        if self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's: it is what is trained")
        return self


class PreferencePair(Row):
    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1, max_length=1)
    rejected: list[Message] = Field(min_length=1, max_length=1)
    fault: str = "unknown"

    @model_validator(mode="after")
    def _sides(self) -> "PreferencePair":
        _check_turns([*self.prompt, self.chosen[0]])
        if self.prompt[-1].role != "user":
            raise ValueError("the last message of prompt must be the user's")
        if self.chosen[0].role != "assistant" or self.rejected[0].role != "assistant":
            raise ValueError("chosen and rejected must be the assistant's")
        if self.chosen[0].content.strip() == self.rejected[0].content.strip():
            raise ValueError("chosen and rejected are the same text")
        return self


class Question(Row):
    prompt: Text
    key_points: list[Text] = Field(min_length=1)
    must_not: list[Text] = []
    reference: str | None = None


class MultipleChoice(Row):
    question: Text
    choices: list[Text] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answer(self) -> "MultipleChoice":
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, and there are {len(self.choices)} choices")
        return self


AnyRow = TypeVar("AnyRow", bound=Row)
SHAPES = {
    "conversations": '{"messages": [{"role", "content"}, …]}',
    "preference pairs": '{"prompt": [messages], "chosen": [messages], "rejected": [messages]}',
}


def read_rows(workspace: Workspace, name: str, kind: type[AnyRow]) -> list[AnyRow]:
    """All rows of a JSONL file or of a folder of them. Raises `UserError` with file and line."""
    rows = [row for path in files(workspace, name) for row in _read_file(workspace, path, kind)]
    if not rows:
        raise UserError("holds no rows", where=name, remedy=f"rows like {_shape(kind)}, one a line")
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise UserError(f"the id `{row.id}` stands at {seen[row.id]} too", where=row.where)
        seen[row.id] = row.where
    return rows


def files(workspace: Workspace, name: str) -> list[Path]:
    """The JSONL files that a name stands for. Raises `UserError` when there are none."""
    path = workspace.path(name)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            "there is no such file or folder", where=name, remedy=f"a path from {workspace.root}, or an absolute one"
        )
    found = sorted(path.rglob("*.jsonl"))
    if not found:
        others = sorted({p.suffix or p.name for p in path.rglob("*") if p.is_file()})
        raise UserError(f"holds no .jsonl file (found: {', '.join(others) or 'nothing'})", where=name)
    return found


def split(rows: Sequence[AnyRow], validation: Validation) -> tuple[list[AnyRow], list[AnyRow]]:
    """Training rows and held-out rows.

    Which rows are held out depends on their content and the seed, not on their order: adding a row moves at most one other.
    """
    groups: dict[str, list[AnyRow]] = defaultdict(list)
    for row in rows:
        groups[row.domain if validation.strategy == "stratified" else ""].append(row)
    held_out = {
        row.id
        for group in groups.values()
        for row in sorted(group, key=lambda r: hashlib.sha256(f"{validation.seed} {row_hash(r)}".encode()).digest())[
            : round(len(group) * validation.fraction)
        ]
    }
    return [r for r in rows if r.id not in held_out], [r for r in rows if r.id in held_out]


def shuffle_answers(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """The control: every answer stands under another row's question. The texts themselves stay as they are.

    Raises `UserError` when the rows are too few for that.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    places = [(row, turn) for row in order for turn, m in enumerate(rows[row].messages) if m.role == "assistant"]
    most = max(Counter(row for row, _ in places).values(), default=0)  # moved so far, no answer stays in its own row
    if 2 * most > len(places):
        raise UserError("too few rows to shuffle answers between them", where=rows[0].where)
    shuffled = [row.model_copy(deep=True) for row in rows]
    for (row, turn), (donor, donor_turn) in zip(places, places[most:] + places[:most], strict=True):
        shuffled[row].messages[turn].content = rows[donor].messages[donor_turn].content
    return shuffled


def row_hash(row: Row) -> str:
    """Over the content alone: an id that the row's place gave it does not count."""
    values = row.model_dump(exclude={"id"} if row.id == row.where else None)
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def hashes(rows: Sequence[Row]) -> dict[str, str]:
    """Each row's hash by its id, for `records.items.write_rows`."""
    return {row.id: row_hash(row) for row in rows}


def describe(rows: Sequence[Row]) -> dict[str, Any]:
    """Count, hash over the content in any order, and domains, for a record."""
    return {
        "rows": len(rows),
        "sha256": items.digest(map(row_hash, rows)),
        "domains": dict(sorted(Counter(r.domain for r in rows).items())),
    }


def _read_file(workspace: Workspace, path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    rows = []
    shown = workspace.shown(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=shown) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{shown}:{number}"
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"is not UTF-8 (byte {error.start + 1})", where=where) from None
        except json.JSONDecodeError as error:
            raise UserError(f"is not JSON: {error.msg} at column {error.colno}", where=where) from None
        except RecursionError:
            raise UserError("is nested too deeply", where=where) from None
        if not isinstance(values, dict):
            raise UserError(f"is a {type(values).__name__}, not an object", where=where)
        rows.append(_validated(values, kind, where))
    return rows


def _validated(values: dict[str, Any], kind: type[AnyRow], where: str) -> AnyRow:
    try:
        row = kind.model_validate(values)
    except ValidationError as failure:
        error = failure.errors()[0]
        field = ".".join(map(str, error["loc"]))
        if error["type"] == "missing" and len(error["loc"]) == 1:
            raise UserError(
                f"has no `{field}` (found: {', '.join(map(str, values)) or 'nothing'})",
                where=where,
                remedy=f"rows like {_shape(kind)}",
            ) from None
        what = (
            "is empty"
            if error["type"] in ("string_pattern_mismatch", "string_too_short")
            else error["msg"].removeprefix("Value error, ")
        )
        raise UserError(f"{field}: {what}" if field else what, where=where) from None
    row._where = where
    row.id = row.id or where
    return row


def _shape(kind: type[Row]) -> str:
    texts = [name for name in kind.model_fields if name not in Row.model_fields]
    named = {"Conversation": "conversations", "PreferencePair": "preference pairs"}.get(kind.__name__)
    return SHAPES[named] if named else "{" + ", ".join(f'"{name}"' for name in texts) + "}"


def _check_turns(messages: Sequence[Message]) -> None:
    turns = [m.role for m in messages]
    if turns[0] == "system":
        turns = turns[1:]
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    if turns != expected[: len(turns)]:
        raise ValueError(f"roles must be an optional system, then user and assistant in turn, not {', '.join(turns)}")
