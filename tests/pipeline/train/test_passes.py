"""Rows laid into passes: all of them, whole, once, and no more than fit."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from little import pair, sequence

from pipeline.encoded import Encoded
from pipeline.train import passes
from pipeline.train.passes import Pass, Row, lay, prompt_length, size, supervised

PAD = 0  # no row has it


def random_rows(source: random.Random, pairs: bool) -> list[Row]:
    def length(at_least: int = 1) -> int:
        return source.choice([at_least, source.randint(at_least, 9), source.randint(at_least, 60)])

    if pairs:
        return [pair(source, length(), length(), length()) for _ in range(source.randint(1, 12))]
    turns = [[(length(), length()) for _ in range(source.choice([1, 1, 3]))] for _ in range(source.randint(1, 12))]
    return [sequence(source, *each) for each in turns]


def read_back(batch: Pass) -> list[Encoded]:
    """The sequences that a pass says it holds, from its tensors alone."""
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    held: list[list[int]] = []
    if batch.documents is None:
        assert batch.attention_mask is not None
        for row, mask, places in zip(batch.input_ids, batch.attention_mask, batch.position_ids, strict=True):
            length = int(mask.sum())
            assert mask[:length].all() and places[:length].tolist() == list(range(length))
            assert (row[length:] == PAD).all()
            held.append(row[:length].tolist())
    else:
        start = 0
        for prompt, chosen, rejected in batch.documents:
            fork = start + prompt + chosen
            assert positions[start:fork] == list(range(prompt + chosen))
            assert positions[fork : fork + rejected] == list(range(prompt, prompt + rejected))
            held.append(ids[start:fork])
            if rejected:
                held.append(ids[start : start + prompt] + ids[fork : fork + rejected])
            start = fork + rejected
        assert start == len(ids)
    masks = [[False] * len(tokens) for tokens in held]
    for at, target, number in zip(batch.predicted_at, batch.targets, batch.sequence, strict=True):
        place = positions[at] + 1  # it predicts the next of its sequence
        assert held[number][place] == target and held[number][place - 1] == ids[at] and not masks[number][place]
        masks[number][place] = True
    assert batch.sequences == len(held)
    return [Encoded(tokens, mask) for tokens, mask in zip(held, masks, strict=True)]


def check(rows: Sequence[Row], pass_tokens: int, packed: bool) -> list[Pass]:
    """Every row whole and in one pass, none of which is too large."""
    found = lay(rows, pass_tokens, packed, PAD)
    assert sorted(row for batch in found for row in batch.rows) == list(range(len(rows)))
    for batch in found:
        given = [rows[i] for i in batch.rows]
        sides = [side for row in given for side in ((row,) if isinstance(row, Encoded) else row)]
        assert read_back(batch) == sides
        assert batch.input_ids.numel() <= pass_tokens or len(batch.rows) == 1
        assert batch.tokens == sum(map(size, given) if packed else (len(side.ids) for side in sides))
        assert len(batch.targets) == sum(map(supervised, given))
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_every_row_is_in_one_pass_whole_and_passes_hold_no_more_than_fits(packed: bool, pairs: bool) -> None:
    passes_of = set()
    for seed in range(30):
        source = random.Random(seed)
        rows = random_rows(source, pairs)
        for pass_tokens in (1, source.randint(2, 300), 10_000):
            found = check(rows, pass_tokens, packed)
            passes_of.add((len(found) == 1, len(found) == len(rows)))
    assert passes_of >= {(True, False), (False, True), (False, False)}  # from one pass to one a row


def lose_one(groups: list[list[int]]) -> list[list[int]]:
    return [groups[0][1:], *groups[1:]]


def double_one(groups: list[list[int]]) -> list[list[int]]:
    return [groups[0] + groups[0][:1], *groups[1:]]


def all_at_once(groups: list[list[int]]) -> list[list[int]]:
    return [[row for group in groups for row in group]]


@pytest.mark.parametrize("alter", [lose_one, double_one, all_at_once])
def test_a_row_lost_or_doubled_or_a_pass_too_large_would_be_seen(
    alter: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [sequence(random.Random(0), (3, 4)) for _ in range(6)]
    check(rows, 21, packed=True)
    honest = passes._balanced
    monkeypatch.setattr(passes, "_balanced", lambda *given: alter(honest(*given)))
    with pytest.raises(AssertionError):
        check(rows, 21, packed=True)


def test_a_row_that_is_cut_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = passes._sides
    cut = Encoded([7] * 5, [False] * 2 + [True] * 3)
    monkeypatch.setattr(passes, "_sides", lambda row: (cut,) if isinstance(row, Encoded) else honest(row))
    with pytest.raises(AssertionError):
        check([Encoded([7] * 6, [False] * 2 + [True] * 4)], 100, packed=True)


def test_passes_are_few_and_of_like_size() -> None:
    source = random.Random(1)
    rows: list[Row] = [sequence(source, (3, source.randint(1, 40))) for _ in range(200)]
    found = lay(rows, 100, packed=True)
    tokens = [batch.tokens for batch in found]
    assert len(found) <= 1.1 * sum(tokens) / 100
    assert max(tokens) - min(tokens) <= 43  # the longest row


def test_one_row_longer_than_a_pass_does_not_scatter_the_others() -> None:
    source = random.Random(1)
    rows: list[Row] = [sequence(source, (2, 98)), *(sequence(source, (1, 1)) for _ in range(5))]
    assert [batch.rows for batch in lay(rows, 10, packed=True)] == [(0,), (1, 2, 3, 4, 5)]


def test_padded_passes_hold_rows_of_like_length() -> None:
    source = random.Random(1)
    rows: list[Row] = [sequence(source, (2, answer)) for answer in (30, 1, 29, 2, 28, 3)]
    assert {frozenset(batch.rows) for batch in lay(rows, 96, packed=False)} == {
        frozenset({0, 2, 4}),
        frozenset({1, 3, 5}),
    }


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_without_a_trained_token_does_not_take_anothers_number(packed: bool) -> None:
    source = random.Random(0)
    rows = [sequence(source, (2, 3)), sequence(source, (9, 0)), sequence(source, (1, 2))]
    (batch,) = check(rows, 1000, packed)
    of_row = {row: (batch.sequence == place).sum().item() for place, row in enumerate(batch.rows)}
    assert of_row == {0: 3, 1: 0, 2: 2}
    (nothing,) = check(rows[1:2], 1000, packed)
    assert nothing.targets.dtype == nothing.predicted_at.dtype == torch.long and len(nothing.targets) == 0


def test_a_pairs_prompt_stands_once() -> None:
    given = pair(random.Random(0), 50, 3, 4)
    (batch,) = lay([given], 1000, packed=True)
    assert batch.tokens == size(given) == 57 and batch.documents == ((50, 3, 4),)


def test_sides_of_different_prompts_are_refused() -> None:
    one, other = pair(random.Random(0), 4, 3, 2)
    for wrong in (
        Encoded([60 - other.ids[0], *other.ids[1:]], other.mask),  # another token
        Encoded(other.ids, [False] * 5 + [True]),  # an answer that begins later
    ):
        with pytest.raises(ValueError, match="different prompts"):
            prompt_length((one, wrong))


def test_no_rows_are_no_passes() -> None:
    assert lay([], 100, packed=True) == lay([], 100, packed=False) == []
