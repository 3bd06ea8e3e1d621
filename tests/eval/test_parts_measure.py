"""One model's values, item by item."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from eval.contestants import Contestant
from eval.heldout import HeldOut, Measured
from eval.winrate.part import WinRate
from pipeline.chat import Chat, Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, Question

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def rows(trained: "Trained") -> HeldOut:
    config = trained.job("eval_config.batch_size=2").config.eval_config
    conversations = read_rows(trained.workspace, "data/sft", Conversation)[:3]
    return HeldOut(config, conversations, read_rows(trained.workspace, "data/dpo", PreferencePair)[:3])


@pytest.fixture(scope="module")
def who(model: Any, chat: Chat) -> Contestant:
    return Contestant("model", "test", chat, lambda: model)


def losses(found: Measured) -> list[float]:
    return [row.loss for row in found.ends]


def test_figures_stand_in_the_order_of_the_rows(rows: HeldOut, who: Contestant, model: Any) -> None:
    forward = rows.measure(who, model)
    backward = HeldOut(rows.config, rows.conversations[::-1], rows.pairs[::-1]).measure(who, model)
    assert losses(backward)[::-1] == pytest.approx(losses(forward), abs=1e-4)
    assert backward.margins[::-1] == pytest.approx(forward.margins, abs=1e-3)
    assert len(set(losses(forward))) == len(set(forward.margins)) == 3


def test_answers_stand_in_the_order_of_the_questions(trained: "Trained", who: Contestant, model: Any) -> None:
    questions = read_rows(trained.workspace, "data/eval/questions", Question)[:3]
    config = trained.job("eval_config.max_tokens=8").config.eval_config
    forward, backward = (WinRate(config, asked).measure(who, model) for asked in (questions, questions[::-1]))
    assert backward.answers[::-1] == forward.answers
    assert backward.texts[::-1] == forward.texts
    assert all(len(answer.tokens) <= 8 for answer in forward.answers)


def test_losses_and_margins_are_those_of_each_row_by_itself(
    rows: HeldOut, who: Contestant, model: Any, chat: Chat, answer_losses: Callable[[Any, Encoded], list[float]]
) -> None:
    attention = model.config._attn_implementation
    found = rows.measure(who, model)
    assert model.config._attn_implementation == attention  # generation goes on with it
    each = [answer_losses(model, chat.conversation(row.messages)) for row in rows.conversations]
    assert losses(found) == pytest.approx([sum(losses) / len(losses) for losses in each], abs=1e-4)
    sides = [[answer_losses(model, side) for side in chat.pair(pair)] for pair in rows.pairs]
    for margin, (chosen, rejected) in zip(found.margins, sides, strict=True):
        assert margin == pytest.approx(sum(rejected) - sum(chosen), abs=1e-4 * (len(chosen) + len(rejected)))


def test_what_is_not_held_out_is_not_measured(rows: HeldOut, who: Contestant, model: Any) -> None:
    result = HeldOut(rows.config, rows.conversations).measure(who, model)
    assert (len(result.ends), result.margins) == (3, [])
