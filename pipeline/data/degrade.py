"""The medium and the low condition made from high rows, on the same prompts: to test quality against quantity.

    medium   right, but incomplete and without an example: no code blocks, of the paragraphs and list items after the first
             every second one, no bold or headings
    low      generic: the first sentence alone, between stock phrases that say nothing

Mechanical and the same every time; nothing wrong is put in, so `low` is useless rather than false. Long answers get shorter
with their quality (on the shipped set to about a third and an eighth), so a fair test also holds the tokens trained equal.
Short ones do not: of an answer of one paragraph without code there is nothing to leave out, so that `medium` is the answer
itself, and an answer shorter than the stock phrases (90 to 150 characters) gets LONGER as `low`, and still says what it said.
A set of such answers has no conditions to compare; `aletheia data degrade` counts them.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

from pipeline.data.rows import Conversation, Message

Quality = Literal["medium", "low"]
OPENINGS = (
    "Great question! This is something many teams run into.",
    "There are several things to consider here, and it depends on your setup.",
    "This is a common topic, and there is no single right answer.",
    "Good question. It is important to understand the basics first.",
    "This can be tricky, but it is worth getting right.",
    "Thanks for asking! Let us look at this in general terms.",
)
CLOSINGS = (
    "In general, follow best practices and test carefully. Hope this helps!",
    "Always consult the documentation, and monitor the results over time.",
    "It is advisable to review your requirements and choose what fits best.",
    "Make sure that everything is configured properly, and adjust as needed.",
    "As always, consider performance, security and maintainability.",
    "Feel free to reach out if you have further questions!",
)
_BLOCK = re.compile(r"^( *)(```+|~~~+).*?^\1\2[`~]*[ \t]*$\n?", re.DOTALL | re.MULTILINE)
_MARKUP = re.compile(r"\*\*|__|^#+ ", re.MULTILINE)
_PIECE = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )")  # between paragraphs, and before list items
_MARKER = re.compile(r"^(?:[-*]|\d+\.) ")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"“])")


def degrade(row: Conversation, quality: Quality) -> Conversation:
    """The row with each of its answers made so; its prompts and its id stay, and fields that were not set are not."""
    make = _medium if quality == "medium" else _low
    messages = [
        Message(role="assistant", content=make(m.content, f"{row.id} {turn}")) if m.role == "assistant" else m
        for turn, m in enumerate(row.messages)
    ]
    degraded = row.model_copy(update={"messages": messages, "quality": quality})
    return Conversation.model_validate(degraded.model_dump(exclude_unset=True, exclude={"run"}))


def _medium(answer: str, _: str) -> str:
    pieces = _pieces(answer)
    return "\n\n".join(pieces[:1] + pieces[2::2])


def _low(answer: str, seed: str) -> str:
    sentence = _SENTENCE.split(_MARKER.sub("", _pieces(answer)[0]), maxsplit=1)[0].rstrip(":")
    closed = sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
    return f"{_drawn(OPENINGS, seed)} {closed} {_drawn(CLOSINGS, f'{seed} end')}"


def _pieces(answer: str) -> list[str]:
    """Paragraphs and list items without code blocks; the answer itself where nothing else is left."""
    prose = _MARKUP.sub("", _BLOCK.sub("\n", answer))
    return [piece.strip() for piece in _PIECE.split(prose) if piece.strip()] or [answer.strip()]


def _drawn(phrases: Sequence[str], seed: str) -> str:
    return phrases[int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]) % len(phrases)]
