"""One model's figures, item by item."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from eval.measure import Items, measure
from pipeline.chat import Chat, Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, Question

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def items(trained: "Trained") -> Items:
    workspace = trained.workspace
    return Items(
        read_rows(workspace, "data/sft", Conversation)[:3],
        read_rows(workspace, "data/dpo", PreferencePair)[:3],
        read_rows(workspace, "data/eval/questions", Question)[:3],
    )


def test_figures_stand_in_the_order_of_the_items(trained: "Trained", model: Any, chat: Chat, items: Items) -> None:
    config = trained.job("eval_config.batch_size=2", "eval_config.max_tokens=8").config.eval_config
    forward = measure(model, chat, items, config, "test")
    backward = measure(
        model, chat, Items(items.conversations[::-1], items.pairs[::-1], items.questions[::-1]), config, "test"
    )
    assert backward.losses[::-1] == pytest.approx(forward.losses, abs=1e-4)
    assert backward.margins[::-1] == pytest.approx(forward.margins, abs=1e-3)
    assert backward.answers[::-1] == forward.answers
    assert len(set(forward.losses)) == len(set(forward.margins)) == 3
    assert all(len(answer.tokens) <= 8 for answer in forward.answers)


def test_losses_and_margins_are_those_of_each_row_by_itself(
    trained: "Trained", model: Any, chat: Chat, items: Items, answer_losses: Callable[[Any, Encoded], list[float]]
) -> None:
    attention = model.config._attn_implementation
    config = trained.job("eval_config.batch_size=2").config.eval_config
    found = measure(model, chat, Items(items.conversations, items.pairs), config, "test")
    assert model.config._attn_implementation == attention  # generation goes on with it
    rows = [answer_losses(model, chat.conversation(row.messages)) for row in items.conversations]
    assert found.losses == pytest.approx([sum(losses) / len(losses) for losses in rows], abs=1e-4)
    sides = [[answer_losses(model, side) for side in chat.pair(pair)] for pair in items.pairs]
    for margin, (chosen, rejected) in zip(found.margins, sides, strict=True):
        assert margin == pytest.approx(sum(rejected) - sum(chosen), abs=1e-4 * (len(chosen) + len(rejected)))


def test_what_is_not_asked_is_not_measured(trained: "Trained", model: Any, chat: Chat, items: Items) -> None:
    result = measure(model, chat, Items(conversations=items.conversations), trained.job().config.eval_config, "test")
    assert len(result.losses) == 3
    assert (result.margins, result.answers, result.scores) == ([], [], {})
