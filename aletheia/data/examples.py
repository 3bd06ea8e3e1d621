"""Rows as the sequences that are trained, token by token: what `aletheia data show` shows, on a terminal or a page.

Each token is trained, masked or past `max_length`; ids and mask are training's own (`pipeline.chat`), never a second
reading.
"""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal

from pipeline.chat import Chat, Encoded
from pipeline.data.raw import Raw
from pipeline.data.read import row_of
from pipeline.data.rows import Conversation, PreferencePair, Row, RowFault, place
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.gate.tokens import Totals, encode, faults
from pipeline.model import Base, find_base
from pipeline.progress import Progress, say
from pipeline.stage import Job

LARGE, MEGABYTE = 50_000_000, 1_000_000  # bytes; reading more than LARGE takes seconds, and is shown
BROKEN_SAID = 20  # rows that are no rows: this many are named
PAST_SHOWN = 1000  # tokens past max_length of one sequence: it is not trained, however long it is
DOMAINS_SHOWN = 50
LONGEST_CHARACTER = 8  # tokens; UTF-8 needs 4 bytes at most
MARK = "<!-- Written by `aletheia data show`: the next one replaces it. -->"
State = Literal["trained", "masked", "past"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that are whole characters only together; mostly it is one."""

    start: int  # the first token's position
    ids: list[int]
    text: str
    state: State
    ends: bool  # the trained end-of-turn


@dataclass(frozen=True)
class Side:
    """A sequence that a row is trained as: a conversation is one, a pair two."""

    name: str
    encoded: Encoded
    max_length: int

    @property
    def trained(self) -> int:
        """Tokens, of those within max_length."""
        return sum(self.encoded.mask[: self.max_length])

    @property
    def past(self) -> int:
        return max(0, len(self.encoded.ids) - self.max_length)

    @property
    def unshown(self) -> int:
        return max(0, self.past - PAST_SHOWN)

    def text(self) -> str:
        past = f", {self.past} past max_length {self.max_length}" if self.past else ""
        return f"{len(self.encoded.ids)} tokens, {self.trained} trained{past}"


@dataclass(frozen=True)
class Example:
    """`rejected`: why it would not be trained; nothing where it would be."""

    row: Row
    sides: list[Side]
    rejected: list[str]


@dataclass
class Reader:
    """Reads a path row by row. What it met stands in its fields afterwards."""

    job: Job
    path: str
    totals: dict[type[Row], Totals] = field(init=False)
    rows: int = 0  # that were encoded, rejected or not
    rejected: Counter[str] = field(default_factory=Counter)  # rows, by the first rule that rejects them
    broken: list[tuple[str, str]] = field(default_factory=list)  # place and reason, the first of them
    broken_rows: int = 0
    evaluation: int = 0  # rows that are not for training

    def __post_init__(self) -> None:
        config = self.job.config
        self.totals = {
            Conversation: Totals(config.sft_config.max_length),
            PreferencePair: Totals(config.dpo_config.max_length),
        }

    @cached_property
    def base(self) -> Base:
        return find_base(self.job.workspace, self.job.profile)

    @cached_property
    def chat(self) -> Chat:
        return self.base.chat()

    def examples(self, wanted: str | None) -> Iterator[Example]:
        """All rows that are for training; or the one of that id or place. Raises `UserError` where there is none."""
        ids: list[str] = []
        first_evaluation: Row | None = None
        for source, raw in self._raws():
            try:
                row = row_of(raw, source.shown)
            except RowFault as fault:
                where = place(source.shown, raw.line, raw.item)
                if wanted is not None and wanted in (where, str((raw.values or {}).get("id"))):
                    raise UserError(fault.what, where=where, remedy=fault.remedy) from None
                self._break(where, fault.what, silent=wanted is not None)
                continue
            if not isinstance(row, Conversation | PreferencePair):
                self.evaluation += 1
                first_evaluation = first_evaluation or row
                if wanted in (row.id, row.where):
                    raise _of_evaluation(row)
            elif wanted is None or wanted in (row.id, row.where):
                if example := self._example(row, wanted is not None):
                    yield example
                if wanted is not None:
                    return
            else:
                ids.append(row.id)
        if wanted is not None and ids:
            raise self._no_such(wanted, ids)
        if not self.rows:
            raise _of_evaluation(first_evaluation) if first_evaluation else self._nothing()

    def summary(self, shown: int) -> list[str]:
        """What one should know of the rows that are not shown."""
        lines = []
        if shown < self.rows:
            lines.append(f"{shown:,} of {self.rows:,} rows shown")
        if self.rejected:
            rules = ", ".join(f"{name} {count:,}" for name, count in self.rejected.most_common())
            uncounted = "; special-token is not in the totals" if self.rejected["special-token"] else ""
            lines.append(f"training rejects {self.rejected.total():,} of {self.rows:,} rows: {rules}{uncounted}")
        if self.broken_rows:
            lines.append(f"broken, and not counted: {self.broken_rows:,} rows, the first at {self.broken[0][0]}")
        if self.evaluation:
            lines.append(f"for evaluation, and not trained on: {self.evaluation:,} rows")
        return lines

    def _raws(self) -> Iterator[tuple[Source, Raw]]:
        found = sources(self.job.workspace, self.path)
        size, done = sum(source.size for source in found), 0
        with Progress("reading", size // MEGABYTE, unit="MB") if size > LARGE else nullcontext() as progress:
            for source in found:
                for number, raw in enumerate(source.raws()):
                    yield source, raw
                    if progress and number % 256 == 0:
                        progress.advance((done + source.bytes_read) // MEGABYTE)
                done += source.size

    def _example(self, row: Row, alone: bool) -> Example | None:
        """None where the template does not take it. Raises `UserError` instead when it is the one that is asked for."""
        totals = self.totals[type(row)]
        found = list(faults(self.chat, row, totals.max_length, totals))
        try:
            sides = encode(self.chat, row)
        except UserError as error:
            if alone:
                raise UserError(error.what, where=row.where) from None
            self._break(row.where, error.what)
            return None
        self.rows += 1
        self.rejected.update(name for name, _ in found[:1])
        names = ["conversation"] if isinstance(row, Conversation) else ["chosen", "rejected"]
        named = [Side(name, side, totals.max_length) for name, side in zip(names, sides, strict=True)]
        return Example(row, named, [reason for _, reason in found])

    def _break(self, where: str, what: str, silent: bool = False) -> None:
        self.broken_rows += 1
        if len(self.broken) == BROKEN_SAID:
            if not silent and self.broken_rows == BROKEN_SAID + 1:
                say(f"note: more rows are broken; aletheia data check {self.path} names them all")
            return
        self.broken.append((where, what))
        if not silent:
            say(f"{where}: {what}")

    def _no_such(self, wanted: str, ids: Sequence[str]) -> UserError:
        near = difflib.get_close_matches(wanted, ids, n=1)
        broken = f" among those that can be read ({self.broken_rows:,} cannot)" if self.broken_rows else ""
        return UserError(f"there is no row `{wanted}`{broken}", where=self.path, remedy=f"--row {(near or ids)[0]}")

    def _nothing(self) -> UserError:
        if not self.broken:
            return UserError("holds no rows", where=self.path)
        where, what = self.broken[0]
        if self.broken_rows == 1:
            return UserError(what, where=where)
        more = f"{what}; {self.broken_rows - 1:,} more rows are broken too, and none is left"
        return UserError(more, where=where, remedy=f"aletheia data check {self.path}")


def pieces(chat: Chat, side: Side, most: int | None = None) -> Iterator[Piece]:
    """The first `most` tokens as text.

    Each is decoded after the one before it, as some tokenizers begin a text otherwise than they go on (SentencePiece), and
    waits for the next where it ends within a character.
    """
    ids, mask = side.encoded.ids[:most], side.encoded.mask
    special = chat.tokenizer.added_tokens_decoder
    before, context, start = "", 0, 0  # the text of ids[context:start]
    for at, token in enumerate(ids):
        text = _decoded(chat, ids[context : at + 1])
        closed = at + 1 == len(ids) or mask[at] != mask[at + 1] or token in special or ids[at + 1] in special
        partial = len(text) <= len(before) or text.endswith("\ufffd")
        if partial and not closed and at - start < LONGEST_CHARACTER:
            continue
        state: State = "past" if at >= side.max_length else "trained" if mask[at] else "masked"
        ends = mask[at] and token == chat.end_of_turn_id
        yield Piece(start, ids[start : at + 1], text[len(before) :], state, ends)
        context, start = start, at + 1
        before = _decoded(chat, ids[context:start])


def is_hidden(character: str) -> bool:
    """Whether it would be obeyed or not be seen: control and format characters, all spaces but the usual one."""
    if character.isprintable() or character in "\n\t":
        return False
    return unicodedata.category(character) != "Cn"  # a character that this Python does not know yet


def code_point(character: str) -> str:
    return f"U+{ord(character):04X}"


def runs(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one state that follow each other, up to an end-of-turn."""
    turn = 0

    def key(piece: Piece) -> tuple[State, int]:
        nonlocal turn
        turn += piece.ends
        return piece.state, turn - piece.ends

    return (list(run) for _, run in groupby(found, key))


def heading(reader: Reader) -> str:
    """What the rows were encoded with."""
    base, contract = reader.base, reader.chat.contract
    revision = f" at {base.revision[:12]}" if base.revision else ""
    return f"base and tokenizer {base.name}{revision}, chat contract {contract.sha256[:12]}"


def lengths(totals: Totals) -> list[tuple[str, dict[str, int]]]:
    """Of each domain: sequences, min, median, p95, max, in tokens; the largest domains, in the order of their names."""
    found = totals.as_json()["lengths"].items()
    return sorted(sorted(found, key=lambda item: -item[1]["sequences"])[:DOMAINS_SHOWN])


def _of_evaluation(row: Row) -> UserError:
    return UserError("these rows are not trained on: they are for evaluation", where=row.where)


def _decoded(chat: Chat, ids: list[int]) -> str:
    text: str = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
