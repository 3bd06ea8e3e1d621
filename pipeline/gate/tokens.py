"""Rows as token ids: what is too long, what a cut would lose, and what all rows come to.

A row longer than `max_length` is never cut: it is rejected. What a cut would do to it is said, since that is what other
tools do without a word.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat, Encoded
from pipeline.data.rows import Conversation, PreferencePair, Row
from pipeline.errors import UserError

Fault = tuple[str, str]  # the rule's name, the reason


@dataclass
class Totals:
    """What rows come to as tokens. A pair counts as two sequences."""

    max_length: int
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: int = 0  # sequences
    lost: int = 0  # tokens past max_length, of the sequences that are too long
    ended: int = 0  # sequences that end in a trained end-of-turn within max_length
    lengths: "dict[str, array[int]]" = field(default_factory=lambda: defaultdict(lambda: array("I")))  # by domain

    def add(self, domain: str, sides: Sequence[Encoded], end_of_turn: int) -> None:
        for encoded in sides:
            length = len(encoded.ids)
            self.sequences += 1
            self.tokens += length
            self.trained += sum(encoded.mask)
            self.too_long += length > self.max_length
            self.lost += max(0, length - self.max_length)
            self.ended += length <= self.max_length and _ends(encoded, length, end_of_turn)
            self.lengths[domain].append(length)

    def text(self) -> str:
        every, tokens = self.sequences or 1, self.tokens or 1
        cut = f"; {self.too_long:,} too long, a cut would lose {self.lost:,} tokens" if self.too_long else ""
        return (
            f"{self.tokens:,} tokens in {self.sequences:,} sequences, {self.trained / tokens:.0%} of them trained, "
            f"{self.ended / every:.0%} end in the end-of-turn within max_length {self.max_length:,}{cut}"
        )

    def as_json(self) -> dict[str, Any]:
        import numpy as np

        def spread(lengths: Sequence[int]) -> dict[str, int]:
            quartiles = np.quantile(np.asarray(lengths), [0, 0.5, 0.95, 1]).round().astype(int).tolist()
            return dict(zip(("min", "median", "p95", "max"), quartiles, strict=True))

        every = self.sequences or 1
        return {
            "max_length": self.max_length,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "trained_share": round(self.trained / (self.tokens or 1), 4),
            "ends_in_end_of_turn": round(self.ended / every, 4),
            "too_long": self.too_long,
            "tokens_lost_if_cut": self.lost,
            "lengths": {domain: {"sequences": len(found)} | spread(found) for domain, found in self.lengths.items()},
        }


def encode(chat: Chat, row: Row) -> list[Encoded]:
    """The sequences that a row is trained as: one of a conversation, two of a pair, none of another kind.

    Raises `UserError` when the template does not take the row.
    """
    if isinstance(row, Conversation):
        return [chat.conversation(row.messages)]
    if isinstance(row, PreferencePair):
        return list(chat.pair(row))
    return []


def faults(chat: Chat, row: Row, max_length: int, totals: Totals | None = None) -> Iterator[Fault]:
    """What makes a row unfit to be trained as it is."""
    if isinstance(row, Conversation | PreferencePair):
        if token := next((t for text in (*row.asked, *row.answers) if (t := chat.reserved(text))), None):
            yield "special-token", f"its text holds the special token {token}"
            return
        try:
            sides = encode(chat, row)
        except UserError as error:  # the template takes the others, not this one
            yield "template", error.what
            return
        if totals:
            totals.add(row.domain, sides, chat.end_of_turn_id)
        yield from cut(sides, max_length, chat.end_of_turn_id)


def cut(sides: Sequence[Encoded], max_length: int, end_of_turn: int) -> Iterator[Fault]:
    """What cutting at `max_length` would do to the sequences of a row; nothing when all of them fit."""
    longest = max(sides, key=lambda encoded: len(encoded.ids))
    length = len(longest.ids)
    if length <= max_length:
        return
    yield "too-long", f"{length} tokens, max_length is {max_length}: {length - max_length} would be lost"
    over = [encoded for encoded in sides if len(encoded.ids) > max_length]
    if any(not any(encoded.mask[:max_length]) for encoded in over):
        yield "nothing-trained", f"the first {max_length} tokens are all prompt"
    elif not any(_ends(encoded, max_length, end_of_turn) for encoded in over):
        yield "no-end-of-turn", f"cut at {max_length} tokens, its answer would never end"
    if len(sides) == 2 and sides[0].ids[:max_length] == sides[1].ids[:max_length]:
        yield "same-when-cut", f"chosen and rejected are the same in their first {max_length} tokens"


def _ends(encoded: Encoded, length: int, end_of_turn: int) -> bool:
    """Whether the last of the first `length` tokens is a trained end-of-turn."""
    return encoded.mask[length - 1] and encoded.ids[length - 1] == end_of_turn
