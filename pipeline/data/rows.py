"""What a row is: four kinds, and what makes a row of its kind wrong. Only the text fields are required.

    row = validated({"messages": [...]}, Conversation, "data/sft/devops.jsonl", 3)

A row's hash counts its content, not its place, so that two sets of rows can be compared whatever their order.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.records import items

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class RowFault(Exception):
    """Why some values are no row: the rule of the gate that they break (`pipeline/gate/rules.py`), what, and what to do."""

    def __init__(self, rule: str, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.rule, self.what, self.remedy = rule, what, remedy


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: Text


class Row(BaseModel):
    """Unknown fields are kept and ignored."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str = ""
    domain: str = "unknown"
    difficulty: str = "unknown"
    _file: str = ""
    _line: int = 0
    _item: int = 0

    @property
    def where(self) -> str:
        """`data/sft/devops.jsonl:3`; `dump.json:1#17` of a row that shares its line with others."""
        return place(self._file, self._line, self._item)

    @property
    def file(self) -> str:
        return self._file

    @property
    def line(self) -> int:
        return self._line

    @property
    def item(self) -> int:
        return self._item

    def put(self, where: str) -> None:
        """At this place, as `where` names it; an id that its place gave it goes with it."""
        named_by_place = self.id in ("", self.where)
        self._file, _, at = where.rpartition(":")
        line, _, item = at.partition("#")
        self._line, self._item = int(line), int(item or 0)
        if named_by_place:
            self.id = where

    @property
    def asked(self) -> list[str]:
        """What is put to the model."""
        raise NotImplementedError

    @property
    def answers(self) -> list[str]:
        """What it is to answer, or not to."""
        raise NotImplementedError

    @property
    def texts(self) -> list[str]:
        """Everything that makes two rows with one prompt differ."""
        return self.answers


class Conversation(Row):
    messages: list[Message] = Field(min_length=2)

    @model_validator(mode="after")
    def _roles(self) -> "Conversation":
        _check_turns(self.messages)
        if self.messages[-1].role != "assistant":
            raise _wrong("role-order", "the last message must be the assistant's: it is what is trained")
        return self

    @property
    def asked(self) -> list[str]:
        return [m.content for m in self.messages if m.role != "assistant"]

    @property
    def answers(self) -> list[str]:
        return [m.content for m in self.messages if m.role == "assistant"]


class PreferencePair(Row):
    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1, max_length=1)
    rejected: list[Message] = Field(min_length=1, max_length=1)
    fault: str = "unknown"

    @model_validator(mode="after")
    def _sides(self) -> "PreferencePair":
        _check_turns([*self.prompt, self.chosen[0]])
        if self.prompt[-1].role != "user":
            raise _wrong("role-order", "the last message of prompt must be the user's")
        if self.chosen[0].role != "assistant" or self.rejected[0].role != "assistant":
            raise _wrong("role-order", "chosen and rejected must be the assistant's")
        if self.chosen[0].content.strip() == self.rejected[0].content.strip():
            raise _wrong("same-sides", "chosen and rejected are the same text")
        return self

    @property
    def asked(self) -> list[str]:
        return [m.content for m in self.prompt]

    @property
    def answers(self) -> list[str]:
        return [self.chosen[0].content, self.rejected[0].content]


class Question(Row):
    prompt: Text
    key_points: list[Text] = Field(min_length=1)
    must_not: list[Text] = []
    reference: str | None = None

    @property
    def asked(self) -> list[str]:
        return [self.prompt]

    @property
    def answers(self) -> list[str]:
        return [self.reference] if self.reference else []


class MultipleChoice(Row):
    question: Text
    choices: list[Text] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answer(self) -> "MultipleChoice":
        if self.answer >= len(self.choices):
            raise _wrong("wrong-type", f"answer is {self.answer}, and there are {len(self.choices)} choices")
        return self

    @property
    def asked(self) -> list[str]:
        return [self.question]

    @property
    def answers(self) -> list[str]:
        return [self.choices[self.answer]]

    @property
    def texts(self) -> list[str]:
        return self.choices


AnyRow = TypeVar("AnyRow", bound=Row)
KINDS: dict[str, type[Row]] = {  # by the field that only this kind has
    "messages": Conversation,
    "chosen": PreferencePair,
    "key_points": Question,
    "choices": MultipleChoice,
}
NAMES: dict[type[Row], str] = {
    Conversation: "conversations",
    PreferencePair: "preference pairs",
    Question: "open questions",
    MultipleChoice: "multiple choice",
}
SHAPES: dict[type[Row], str] = {
    Conversation: '{"messages": [{"role", "content"}, …]}',
    PreferencePair: '{"prompt": [messages], "chosen": [messages], "rejected": [messages]}',
    Question: '{"prompt", "key_points"}',
    MultipleChoice: '{"question", "choices", "answer"}',
}


def place(file: str, line: int, item: int = 0) -> str:
    """`item`: which row of the file, where the line does not tell it."""
    return f"{file}:{line}#{item}" if item else f"{file}:{line}"


def validated(values: dict[str, Any], kind: type[AnyRow], file: str, line: int, item: int = 0) -> AnyRow:
    """A row that names its place as its id where it has none. Raises `RowFault`."""
    try:
        row = kind.model_validate(values)
    except ValidationError as failure:
        raise _fault(failure, values, kind) from None
    if row.model_extra:
        _check_kept(row)
    row._file, row._line, row._item = file, line, item
    row.id = row.id or row.where
    return row


def row_hash(row: Row) -> str:
    """Over the content alone: an id that the row's place gave it does not count."""
    values = row.model_dump(mode="json", exclude={"id"} if row.id == row.where else None)
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def text_digest(row: Row) -> bytes:
    """Over what a row says, whatever its id, domain or place: rows of equal text have the same."""
    return digest(type(row).__name__, *row.asked, *row.texts)


def digest(*texts: str) -> bytes:
    """16 bytes; other texts, or the same ones cut elsewhere, have another."""
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        found.update(len(encoded).to_bytes(8, "little"))
        found.update(encoded)
    return found.digest()


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


def _check_kept(row: Row) -> None:
    """Raises `RowFault` where a field that is only kept could not be written again."""
    try:
        json.dumps(row.model_dump(mode="json"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowFault("encoding", "holds a lone surrogate, half of a character") from None
    except (ValueError, RecursionError):
        raise RowFault("wrong-type", "has a field that is nested too deeply") from None


def _fault(failure: ValidationError, values: dict[str, Any], kind: type[Row]) -> RowFault:
    """The first error, as a sentence."""
    error = failure.errors()[0]
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "missing" and len(error["loc"]) == 1:
        found = ", ".join(map(str, values)) or "nothing"
        return RowFault("missing-field", f"has no `{field}` (found: {found})", f"rows like {SHAPES[kind]}")
    if error["type"] in ("string_pattern_mismatch", "string_too_short"):
        rule, what = "empty-field", "is empty"
    elif error["type"] == "string_unicode":
        rule, what = "encoding", "holds a lone surrogate, half of a character"
    elif error["type"] == "too_short":
        rule, what = "empty-field", error["msg"]
    elif error["type"] == "missing":
        rule, what = "missing-field", "is missing"
    elif error["type"] in _OWN:
        rule, what = error["type"], error["msg"]
    else:
        rule, what = "wrong-type", error["msg"]
    return RowFault(rule, f"{field}: {what}" if field else what)


_OWN = ("role-order", "same-sides", "wrong-type")


def _wrong(rule: str, what: str) -> PydanticCustomError:
    return PydanticCustomError(rule, "{what}", {"what": what})


def _check_turns(messages: Sequence[Message]) -> None:
    turns = [m.role for m in messages]
    if turns[0] == "system":
        turns = turns[1:]
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    if turns != expected[: len(turns)]:
        named = ", ".join(turns)
        raise _wrong("role-order", f"roles must be an optional system, then user and assistant in turn, not {named}")
