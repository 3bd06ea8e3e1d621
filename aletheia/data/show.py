"""`aletheia data show`: rows as the sequences that are trained, token by token, and what all rows of a path come to.

Each token is trained, masked or past `max_length`; ids and mask are training's own (`pipeline.chat`), never a second
reading. The rules on tokens are applied (`pipeline.gate.tokens`); what else may reject a row (duplicates, leaks, secrets)
is for `aletheia data check`. With --html the same goes to a page (`aletheia/data/page.py`).
"""

import difflib
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from aletheia.output import print_table, printable
from pipeline.chat import Chat, Encoded
from pipeline.data.formats import converted
from pipeline.data.raw import Raw
from pipeline.data.rows import NAMES, Conversation, PreferencePair, Row, RowFault, validated
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.gate.tokens import Totals, encode, faults
from pipeline.model import Base, find_base
from pipeline.progress import Progress, say
from pipeline.records.file import write_atomically
from pipeline.stage import Job

LARGE, MEGABYTE = 50_000_000, 1_000_000  # bytes; reading more than LARGE takes seconds, and is shown
IN_TERMINAL, ON_PAGE = 1, 200  # rows, unless another number is asked for
BROKEN_SAID = 20  # rows that are no rows: this many are named
PAST_SHOWN = 1000  # tokens past max_length of one sequence: it is not trained, however long it is
DOMAINS_SHOWN = 50
LONGEST_CHARACTER = 8  # tokens; UTF-8 needs 4 bytes at most
MARK = "<!-- Written by `aletheia data show`: the next one replaces it. -->"
State = Literal["trained", "masked", "past"]
END = "■"
PLAIN: dict[State, tuple[str, str]] = {"trained": ("⟦", "⟧"), "masked": ("", ""), "past": ("⟪", "⟫")}
ANSI: dict[State, str] = {"trained": "32", "masked": "2", "past": "9;31"}  # green, dim, struck out in red
ANSI_END = "7"  # reversed


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
                row = _row(source, raw)
            except RowFault as fault:
                where = f"{source.shown}:{raw.line}"
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
            say(printable(f"{where}: {what}"))

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


def show(
    path: str,
    job: Job,
    wanted: str | None = None,
    rows: int | None = None,
    html: Path | None = None,
    totals_only: bool = False,
    as_json: bool = False,
) -> None:
    """Prints rows, and what all of them come to; with `html` prints only where that file is.

    Raises `UserError` where nothing is to be shown, or the file cannot be written.
    """
    if html:
        if as_json:
            raise UserError("is one output, --html another", where="--json", remedy="one of them")
        _check_replaceable(html)
    reader = Reader(job, path)
    limit = 0 if totals_only else rows or (ON_PAGE if html else IN_TERMINAL)
    kept: list[Example] = []
    for example in reader.examples(wanted):
        if reader.rows > limit:
            continue
        if html or as_json:
            kept.append(example)
        else:
            _print(reader, example)
    if html:
        from aletheia.data.page import page

        _write(html, page(reader, kept))
        print(job.workspace.shown(html.resolve()))
    elif as_json:
        print(json.dumps(_json(reader, kept)))  # ASCII: no character of a row reaches a terminal
    elif totals_only or wanted is None:
        _print_totals(reader, min(limit, reader.rows), totals_only)


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


def lengths(totals: Totals) -> list[tuple[str, dict[str, int]]]:
    """Of each domain: sequences, min, median, p95, max, in tokens; the largest domains, in the order of their names."""
    found = totals.as_json()["lengths"].items()
    return sorted(sorted(found, key=lambda item: -item[1]["sequences"])[:DOMAINS_SHOWN])


def heading(reader: Reader) -> str:
    """What the rows were encoded with."""
    base, contract = reader.base, reader.chat.contract
    revision = f" at {base.revision[:12]}" if base.revision else ""
    return f"base and tokenizer {base.name}{revision}, chat contract {contract.sha256[:12]}"


# ── The terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(reader: Reader, example: Example) -> None:
    coloured = _is_coloured()
    if reader.rows == 1:
        print(f"# {printable(heading(reader))}; {_legend(coloured)}")
    for side in example.sides:
        print(f"# {printable(example.row.where)}  {printable(example.row.id)}  {side.name}: {side.text()}")
        for reason in example.rejected:
            print(f"# training rejects this row: {printable(reason)}")
        found = runs(pieces(reader.chat, side, side.max_length + PAST_SHOWN))
        print("".join(_painted(run) if coloured else _marked(run) for run in found))
        if side.unshown:
            print(f"# {side.unshown:,} more tokens past max_length")


def _marked(run: list[Piece]) -> str:
    """For a log: a text's own brackets are shown by their code points."""
    opened, closed = PLAIN[run[0].state]
    text = _visible("".join(piece.text for piece in run), f"⟦⟧⟪⟫{END}")
    return f"{opened}{text}{closed}{END if run[-1].ends else ''}"


def _painted(run: list[Piece]) -> str:
    ending = f"\x1b[{ANSI_END}m{_visible(run.pop().text)}\x1b[0m{END}" if run[-1].ends else ""
    code = ANSI[run[0].state] if run else ""
    lines = _visible("".join(piece.text for piece in run)).split(
        "\n"
    )  # each by itself: `less -R` forgets at a line's end
    return "\n".join(line and f"\x1b[{code}m{line}\x1b[0m" for line in lines) + ending


def _legend(coloured: bool) -> str:
    if not coloured:
        return f"in double brackets: trained; in double angle brackets: past max_length; {END} end of turn"
    return " ".join(f"\x1b[{code}m{state}\x1b[0m" for state, code in ANSI.items()) + f" max_length {END} end of turn"


def _visible(text: str, marks: str = "") -> str:
    return "".join(f"⟨{code_point(c)}⟩" if is_hidden(c) or c in marks else c for c in text)


def _print_totals(reader: Reader, shown: int, alone: bool) -> None:
    if alone:
        print(f"# {printable(heading(reader))}")
    for kind, totals in reader.totals.items():
        if totals.sequences:
            print(f"\n# {NAMES[kind]}: {totals.text()}")
            columns = ("sequences", "min", "median", "p95", "max")
            table = [(domain, *(f"{found[c]:,}" for c in columns)) for domain, found in lengths(totals)]
            print_table(("tokens by domain", *columns), table, sys.stdout)
            if len(totals.lengths) > len(table):
                print(f"and {len(totals.lengths) - len(table):,} smaller domains")
    for line in reader.summary(reader.rows if alone else shown):
        print(f"# {printable(line)}")
    if not alone and shown < reader.rows:
        print("# others: --row ID, --rows N or --html FILE")


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _json(reader: Reader, shown: list[Example]) -> dict[str, Any]:
    return {
        "path": reader.path,
        "base": reader.base.name,
        "revision": reader.base.revision,
        "contract": reader.chat.contract.sha256,
        "end_of_turn": {"token": reader.chat.end_of_turn, "id": reader.chat.end_of_turn_id},
        "rows": [
            {
                "id": example.row.id,
                "where": example.row.where,
                "domain": example.row.domain,
                "rejected": example.rejected,
                "sequences": [_json_side(reader.chat, side) for side in example.sides],
            }
            for example in shown
        ],
        "rows_left_out": reader.rows - len(shown),
        "rows_rejected": dict(reader.rejected),
        "rows_broken": reader.broken_rows,
        "broken": [{"where": where, "reason": what} for where, what in reader.broken],
        "rows_of_evaluation": reader.evaluation,
        "totals": {NAMES[kind]: totals.as_json() for kind, totals in reader.totals.items() if totals.sequences},
    }


def _json_side(chat: Chat, side: Side) -> dict[str, Any]:
    """`tokens`: where a character takes several tokens, it stands at the last of them and nothing at the others."""
    texts = [text for piece in pieces(chat, side) for text in [*[""] * (len(piece.ids) - 1), piece.text]]
    return {
        "name": side.name,
        "max_length": side.max_length,
        "past_max_length": side.past,
        "ids": side.encoded.ids,
        "tokens": texts,
        "mask": side.encoded.mask,
    }


# ── Reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


def _row(source: Source, raw: Raw) -> Row:
    if raw.values is None:
        raise raw.fault or AssertionError("a row without values has a fault")
    kind, values = converted(raw.values)
    return validated(values, kind, source.shown, raw.line)


def _of_evaluation(row: Row) -> UserError:
    return UserError("these rows are not trained on: they are for evaluation", where=row.where)


def _decoded(chat: Chat, ids: list[int]) -> str:
    text: str = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _check_replaceable(path: Path) -> None:
    """Raises `UserError` rather than replace what this command did not write."""
    if not path.exists():
        return
    if not path.is_file():
        raise UserError("is no file", where=str(path), remedy="--html with a file's name")
    with path.open("rb") as file:
        if MARK.encode() not in file.read(1024):
            raise UserError("was not written by this command, and stays", where=str(path), remedy="another --html")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
