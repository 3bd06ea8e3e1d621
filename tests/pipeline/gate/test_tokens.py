"""Rows as tokens: what is too long, what a cut would lose, and totals that add up."""

from typing import Any

import pytest

from pipeline.chat import Chat, Encoded
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.gate.tokens import Totals, cut, encode, faults
from pipeline.model import Base

END = 9


def sequence(prompt: int, *answers: int, end: bool = True) -> Encoded:
    """A prompt, then answers with their end-of-turn, each after a masked token."""
    ids, mask = [1] * prompt, [False] * prompt
    for turn, length in enumerate(answers):
        if turn:
            ids, mask = [*ids, 1], [*mask, False]
        ids += [5] * (length - 1) + [END if end else 5]
        mask += [True] * length
    return Encoded(ids, mask)


@pytest.fixture
def chat(base: Base) -> Chat:
    return base.chat()


def conversation(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    messages: list[Any] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return Conversation(id="x", messages=messages)


def names(sides: list[Encoded], max_length: int) -> list[str]:
    return [name for name, _ in cut(sides, max_length, END)]


@pytest.mark.parametrize(
    ("sides", "max_length", "expected"),
    [
        ([sequence(4, 6)], 10, []),
        ([sequence(4, 6)], 9, ["too-long", "no-end-of-turn"]),
        ([sequence(4, 6)], 4, ["too-long", "nothing-trained"]),
        ([sequence(4, 3, 6)], 7, ["too-long"]),  # it would end, with the first answer
        ([sequence(4, 3, 6)], 9, ["too-long", "no-end-of-turn"]),
        ([sequence(4, 6), sequence(4, 3)], 10, []),
        ([sequence(4, 6), sequence(4, 3)], 8, ["too-long", "no-end-of-turn"]),
        ([sequence(4, 6), sequence(4, 8)], 8, ["too-long", "no-end-of-turn", "same-when-cut"]),
    ],
)
def test_what_a_cut_would_lose(sides: list[Encoded], max_length: int, expected: list[str]) -> None:
    assert names(sides, max_length) == expected


def test_tokens_lost_are_counted_in_the_reason() -> None:
    [(_, reason), _] = cut([sequence(4, 6)], 7, END)
    assert reason == "10 tokens, max_length is 7: 3 would be lost"


def test_special_token_and_a_template_that_refuses_are_faults_of_the_row(chat: Chat) -> None:
    assert [name for name, _ in faults(chat, conversation("q", "a <|EOT|> b"), 2048)] == ["special-token"]
    refusing = Chat(chat.tokenizer, "refusing")
    refusing.tokenizer = type(
        "Refusing", (), {"apply_chat_template": lambda *_, **__: (_ for _ in ()).throw(ValueError("no tables"))}
    )()
    [(name, reason)] = faults(refusing, conversation("q", "a"), 2048)
    assert name == "template" and "no tables" in reason


def test_totals_are_what_the_sequences_come_to(chat: Chat) -> None:
    totals = Totals(max_length=60)
    rows = [conversation("Where are the logs?", "In Loki."), conversation("And then?", "word " * 80)]
    encoded = [chat.conversation(row.messages) for row in rows]
    limit = (len(encoded[0].ids) + len(encoded[1].ids)) // 2
    totals = Totals(max_length=limit)
    for row in rows:
        list(faults(chat, row, limit, totals))
    found = totals.as_json()
    assert found["tokens"] == sum(len(e.ids) for e in encoded)
    assert found["trained_tokens"] == sum(sum(e.mask) for e in encoded)
    assert (found["sequences"], found["too_long"], found["ends_in_end_of_turn"]) == (2, 1, 0.5)
    assert found["tokens_lost_if_cut"] == len(encoded[1].ids) - limit
    assert found["lengths"]["unknown"]["max"] == len(encoded[1].ids)
    assert f"{found['tokens']:,} tokens in 2 sequences" in totals.text() and "1 too long" in totals.text()


def test_a_pair_is_two_sequences(chat: Chat) -> None:
    ask, yes, no = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    pair = PreferencePair(prompt=[ask], chosen=[yes], rejected=[no])  # type: ignore[list-item]
    assert encode(chat, pair) == list(chat.pair(pair)) and len(encode(chat, pair)) == 2
