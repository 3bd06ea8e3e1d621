"""Held-out losses and margins against a plain computation, one row at a time."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline import heldout
from pipeline.chat import Chat, Encoded
from pipeline.data.rows import Conversation, Message, PreferencePair
from pipeline.model import Base

ANSWERS = ("Yes.", "An index is a sorted copy of a column, and it costs writes.\n\n- one\n- two", "No", "é 你好 " * 20)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slowed down by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chat(base: Base) -> Chat:
    return base.chat()


@pytest.fixture(scope="module")
def model(base: Base) -> Any:
    return base.load()


@pytest.fixture(scope="module")
def rows(chat: Chat) -> list[Encoded]:
    """Of very different lengths, the longest neither first nor last, one with two turns."""
    turns = [[Message(role="user", content="What?"), Message(role="assistant", content=text)] for text in ANSWERS]
    conversations = [Conversation(messages=m) for m in (*turns, turns[0] + turns[1])]
    return [chat.conversation(row.messages) for row in conversations]


def plain_log_probs(model: Any, row: Encoded) -> list[float]:
    """log p of each trained token, unbatched and unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    return [
        float(F.log_softmax(logits[n - 1].double(), dim=-1)[token])
        for n, (token, trained) in enumerate(zip(row.ids, row.mask, strict=True))
        if trained
    ]


def test_losses_are_the_mean_over_each_rows_trained_tokens(model: Any, rows: list[Encoded]) -> None:
    expected = [-sum(p) / len(p) for p in (plain_log_probs(model, row) for row in rows)]
    assert heldout.losses(model, rows, 1, 3, "loss") == pytest.approx(expected, abs=1e-4)


def test_losses_are_those_of_transformers_on_the_same_labels(model: Any, rows: list[Encoded]) -> None:
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([r.ids]), labels=torch.tensor([r.labels])).loss.item() for r in rows]
    assert heldout.losses(model, rows, 1, 2, "loss") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("pad_id", "batch_size"), [(1, 1), (None, 2), (0, 3), (2, 5), (4000, 8)])
def test_padding_and_batching_do_not_matter(
    model: Any, rows: list[Encoded], pad_id: int | None, batch_size: int
) -> None:
    expected = [sum(plain_log_probs(model, row)) for row in rows]
    assert heldout.log_probs(model, rows, pad_id, batch_size, "log p") == pytest.approx(expected, abs=1e-3)


def test_each_row_keeps_its_place_whatever_stands_beside_it(model: Any, rows: list[Encoded]) -> None:
    forward = heldout.losses(model, rows, 1, 4, "loss")
    assert heldout.losses(model, rows[::-1], 1, 4, "loss")[::-1] == pytest.approx(forward, abs=1e-4)
    assert len({round(loss, 3) for loss in forward}) == len(rows), "rows alike could not show a mix-up"


def test_log_probs_are_float32_whatever_the_model_computes_in(base: Base, rows: list[Encoded]) -> None:
    model = base.load().to(torch.bfloat16)
    expected = [sum(plain_log_probs(model, row)) for row in rows]
    assert heldout.log_probs(model, rows, 1, 1, "log p") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(base: Base, rows: list[Encoded], training: bool) -> None:
    model = base.load().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heldout.losses(model, rows, 1, 2, "loss")
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_measuring_is_in_eval_mode(model: Any, rows: list[Encoded]) -> None:
    seen: list[bool] = []
    hook: Callable[..., None] = lambda module, *_: seen.append(module.training)  # noqa: E731
    handle = model.train().register_forward_hook(hook)
    try:
        heldout.losses(model, rows, 1, 8, "loss")
    finally:
        handle.remove()
        model.eval()
    assert seen == [False]


def test_margin_is_log_p_chosen_less_log_p_rejected(model: Any, chat: Chat) -> None:
    pairs = [chat.pair(pair) for pair in (_pair("Yes.", "no way"), _pair("b" * 50, "Add an index."))]
    expected = [sum(plain_log_probs(model, c)) - sum(plain_log_probs(model, r)) for c, r in pairs]
    assert heldout.margins(model, pairs, 1, 3, "margin") == pytest.approx(expected, abs=1e-3)
    swapped = heldout.margins(model, [(r, c) for c, r in pairs], 1, 3, "margin")
    assert swapped == pytest.approx([-m for m in expected], abs=1e-3)


def test_only_the_completions_of_a_pair_count(chat: Chat) -> None:
    pair = _pair("Yes.", "no way")
    prompt = chat.prompt(pair.prompt)
    for side, text in zip(chat.pair(pair), ("Yes.", "no way"), strict=True):
        assert side.ids[: len(prompt)] == prompt and not any(side.mask[: len(prompt)])
        assert all(side.mask[len(prompt) :])
        assert chat.tokenizer.decode(side.ids[len(prompt) :]) == f"{text}\n<|EOT|>"


def test_pair_is_encoded_as_the_conversation_it_would_be(chat: Chat) -> None:
    """What DPO scores is what SFT trains: one way to make tokens."""
    pair = _pair("Yes.", "no way")
    assert chat.pair(pair)[0] == chat.conversation([*pair.prompt, *pair.chosen])


def test_embedded_base_knows_more_than_nothing_and_less_than_all(model: Any, rows: list[Encoded]) -> None:
    """Uniform guessing over the vocabulary costs ln 4096 = 8.3 nats a token."""
    for loss in heldout.losses(model, rows[:2], 1, 2, "loss"):
        assert 1.0 < loss < 0.9 * math.log(4096)


def _pair(chosen: str, rejected: str) -> PreferencePair:
    sides = ([Message(role="assistant", content=text)] for text in (chosen, rejected))
    return PreferencePair(prompt=[Message(role="user", content="Why?")], chosen=next(sides), rejected=next(sides))
