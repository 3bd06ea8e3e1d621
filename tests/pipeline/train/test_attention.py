"""Packed passes against transformers' own padded forward: log-probs and gradients of every document, in float64."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from little import gradients, little_model, pair, plain_log_probs, sequence
from torch import Tensor

from pipeline.encoded import Encoded
from pipeline.train import attention
from pipeline.train.head import bare, sequence_sums, token_log_probs
from pipeline.train.passes import Pass, Row, lay

EXACT = 1e-10  # float64: what rounding leaves, with room
WINDOW = 4  # shorter than the documents
MODELS: dict[str, dict[str, Any]] = {
    "one head of keys a head": {"heads": 4},
    "grouped-query": {"heads": 2},
    "window": {"kind": "Mistral", "sliding_window": WINDOW},
    "scale of its own": {"kind": "Granite", "attention_multiplier": 0.7},
    "no adapter": {"adapter": {}},
}
SOURCE = random.Random(0)
SEQUENCES: list[Row] = [sequence(SOURCE, (3, 6)), sequence(SOURCE, (2, 3), (4, 5)), sequence(SOURCE, (1, 4))]
PAIRS: list[Row] = [
    pair(SOURCE, 5, 4, 6),
    pair(SOURCE, 6, 7, 1),
    pair(SOURCE, 1, 2, 3),
]  # answers longer than the window


def model_of(name: str) -> Any:
    model = little_model(**MODELS[name])
    attention.install(bare(model))
    return model


def sides(rows: Sequence[Row]) -> list[Encoded]:
    return [side for row in rows for side in ((row,) if isinstance(row, Encoded) else row)]


def packed(rows: Sequence[Row]) -> Pass:
    (batch,) = lay(rows, 10_000, packed=True)
    return batch


def by_document(model: Any, batch: Pass) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of all trained tokens; and of each sequence its sum's gradient."""
    found = token_log_probs(model, batch)
    return found.detach(), gradients(list(sequence_sums(found, batch)), model)


def plainly(model: Any, rows: Sequence[Row]) -> tuple[Tensor, list[Tensor]]:
    found = plain_log_probs(model, sides(rows))
    attention.install(bare(model))
    return torch.cat(found).detach(), gradients([each.sum() for each in found], model)


def furthest(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> tuple[float, list[float]]:
    """Of the log-probs, absolute; of each sequence's gradient, relative."""
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(one[1], other[1], strict=True)]
    return float((one[0] - other[0]).abs().max()), apart


@pytest.mark.parametrize("rows", [SEQUENCES, PAIRS], ids=["sequences", "pairs"])
@pytest.mark.parametrize("name", MODELS)
def test_each_documents_log_probs_and_gradients_are_those_of_a_padded_batch(name: str, rows: list[Row]) -> None:
    model = model_of(name)
    off, apart = furthest(by_document(model, packed(rows)), plainly(model, rows))
    assert off < EXACT and max(apart) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_a_leak_between_sequences_would_be_seen(name: str) -> None:
    """Attention over the whole row in place of each document: right for the first alone."""
    model, batch = model_of(name), packed(SEQUENCES)
    leaky = replace(batch, documents=((batch.tokens, 0, 0),))
    off, apart = furthest(by_document(model, leaky), plainly(model, SEQUENCES))
    assert off > 0.01 and apart[0] < EXACT and min(apart[1:]) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_a_leak_from_the_chosen_answer_into_the_rejected_one_would_be_seen(name: str) -> None:
    model, batch = model_of(name), packed(PAIRS)
    assert batch.documents
    leaky = replace(
        batch, documents=tuple((prompt, chosen + rejected, 0) for prompt, chosen, rejected in batch.documents)
    )
    sums = sequence_sums(token_log_probs(model, leaky), leaky)
    expected = torch.stack([each.sum() for each in plain_log_probs(model, sides(PAIRS))])
    apart = (sums - expected).abs()
    assert apart[::2].max() < EXACT
    assert (apart[1::2][[0, 2]] > 0.01).all()  # the second's one token is predicted by the prompt


def test_a_window_that_is_forgotten_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("window")
    monkeypatch.setattr(attention, "_window", lambda queries, keys, window, device: whole(queries, keys))
    for rows in (SEQUENCES, PAIRS):
        off, _ = furthest(by_document(model, packed(rows)), plainly(model, rows))
        assert off > 0.01


def whole(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("rows", [SEQUENCES, PAIRS], ids=["sequences", "pairs"])
@pytest.mark.parametrize("name", ["grouped-query", "window"])
def test_a_document_depends_neither_on_its_neighbours_nor_on_their_order(name: str, rows: list[Row]) -> None:
    model = model_of(name)
    attention.install(bare(model))

    def of(row: Row, *, among: Sequence[Row]) -> Tensor:
        batch = packed(among)
        place = next(i for i, each in enumerate(batch.rows) if among[each] is row)
        numbers = [place] if isinstance(row, Encoded) else [2 * place, 2 * place + 1]
        with torch.no_grad():
            found = token_log_probs(model, batch)
        return torch.cat([found[batch.sequence == number] for number in numbers])

    for row in rows:
        alone = of(row, among=[row])
        for neighbours in (rows, rows[::-1], [*rows[1:], *rows], [row, rows[0], rows[0]]):
            assert (of(row, among=neighbours) - alone).abs().max() < EXACT


def test_no_mask_is_built_and_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, Any]] = []
    honest = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        seen.append((query.shape[2], key.shape[2], attn_mask))
        return honest(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = model_of("grouped-query")
    token_log_probs(model, packed(SEQUENCES))
    lengths = [len(row.ids) for row in sides(SEQUENCES)]
    assert seen == [(length, length, None) for length in lengths] * 2  # layers


def test_a_models_dropout_of_attention_is_kept_in_training_and_absent_in_eval() -> None:
    model = little_model(attention_dropout=0.5)
    attention.install(bare(model))
    in_eval = [token_log_probs(model, packed(PAIRS)) for _ in range(2)]
    model.train()
    in_training = [token_log_probs(model, packed(PAIRS)) for _ in range(2)]
    assert torch.equal(*in_eval)
    assert all((a - b).abs().max() > 0.01 for a, b in ((in_training[0], in_training[1]), (in_training[0], in_eval[0])))


def test_without_documents_it_is_transformers_own_sdpa() -> None:
    """Validation, generation and padded passes go through it."""
    for name in ("grouped-query", "window"):
        model = model_of(name)
        expected = plain_log_probs(model, sides(SEQUENCES))
        attention.install(bare(model))
        (batch,) = lay(SEQUENCES, 10_000, packed=False)
        found = token_log_probs(model, batch)
        ours = {row: found[batch.sequence == place] for place, row in enumerate(batch.rows)}
        assert all(torch.equal(ours[row], each) for row, each in enumerate(expected))
