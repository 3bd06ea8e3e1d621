"""The loss of a step, pass by pass, against the same loss of all its rows at once."""

import random
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from little import pair, sequence
from torch import Tensor

from pipeline.config import DpoConfig
from pipeline.train import preference
from pipeline.train.objective import PreferenceLoss, SupervisedLoss, domain_weights
from pipeline.train.passes import Row, lay, supervised
from pipeline.train.preference import PairLogProbs

LOSS_TYPES = get_args(DpoConfig.model_fields["loss_type"].annotation)
SOURCE = random.Random(0)
STEP = [7, 2, 5, 0, 3]  # its rows, of all of the training
ROWS = [sequence(SOURCE, (2, SOURCE.randint(1, 9))) for _ in range(8)]
PAIRS = [pair(SOURCE, 3, SOURCE.randint(1, 9), SOURCE.randint(1, 9)) for _ in range(8)]
TOKENS = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in PAIRS]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 3.0, 0.25, 1.0, 1.5]
REFERENCE = [(-SOURCE.uniform(1, 20), -SOURCE.uniform(1, 20)) for _ in PAIRS]


def in_passes(loss: Any, rows: Sequence[Row], log_probs: list[list[Tensor]], pass_tokens: int, packed: bool) -> Tensor:
    """The sum of its parts over the step's passes; `log_probs` of each row's sequences, as a model would give them."""
    parts = []
    for batch in lay(rows, pass_tokens, packed):
        parts.append(loss.part(torch.cat([each for i in batch.rows for each in log_probs[i]]), batch))
    return torch.stack(parts).sum()


def made_up(rows: Sequence[Row]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    sides = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [[(-3 * torch.rand(sum(s.mask), dtype=torch.float64)).requires_grad_() for s in row] for row in sides]


def gradients(loss: Tensor, log_probs: list[list[Tensor]]) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, [each for row in log_probs for each in row]))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pass_tokens", [1, 12, 30, 1000])
def test_the_supervised_loss_is_the_weighted_mean_over_the_steps_tokens(pass_tokens: int, packed: bool) -> None:
    rows = [ROWS[i] for i in STEP]
    log_probs = made_up(rows)
    loss = in_passes(
        SupervisedLoss(STEP, [supervised(row) for row in ROWS], WEIGHTS), rows, log_probs, pass_tokens, packed
    )
    weights = torch.cat([torch.full_like(each, WEIGHTS[i]) for i, (each,) in zip(STEP, log_probs, strict=True)])
    expected = -(weights * torch.cat([each for (each,) in log_probs])).sum() / weights.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradients(loss, log_probs) - gradients(expected, log_probs)).abs().max() < 1e-12


def test_rows_are_weighted_by_their_domain() -> None:
    assert domain_weights({"sql": 2.0, "git": 0.5}, ["git", None, "sql", "k8s"]) == [0.5, 1.0, 2.0, 1.0]


def test_a_weight_of_two_is_the_row_twice() -> None:
    rows = [ROWS[i] for i in STEP]
    log_probs = made_up(rows)
    tokens = [supervised(row) for row in ROWS]
    weights = [2.0 if i == STEP[1] else 1.0 for i in range(len(ROWS))]
    twice, again = [*STEP, STEP[1]], [*log_probs, log_probs[1]]
    weighted = in_passes(SupervisedLoss(STEP, tokens, weights), rows, log_probs, 12, True)
    repeated = in_passes(SupervisedLoss(twice, tokens, [1.0] * len(ROWS)), [ROWS[i] for i in twice], again, 12, True)
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-12)
    assert (gradients(weighted, log_probs) - gradients(repeated, log_probs)).abs().max() < 1e-12


def all_at_once(log_probs: list[list[Tensor]]) -> PairLogProbs:
    sums = [torch.stack([row[side].sum() for row in log_probs]) for side in (0, 1)]
    reference = [torch.tensor([REFERENCE[i][side] for i in STEP], dtype=torch.float64) for side in (0, 1)]
    tokens = [torch.tensor([TOKENS[i][side] for i in STEP], dtype=torch.float64) for side in (0, 1)]
    return PairLogProbs(*sums, *reference, *tokens)


@pytest.mark.parametrize("pass_tokens", [1, 40, 1000])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_preference_loss_over_passes_is_that_of_all_pairs_at_once(loss_type: str, pass_tokens: int) -> None:
    config = DpoConfig(loss_type=loss_type, label_smoothing=0.1 if loss_type == "robust" else 0.0)
    pairs, kl = [PAIRS[i] for i in STEP], 0.7
    for weights in ([1.0] * len(PAIRS), WEIGHTS):
        log_probs = made_up(pairs)
        loss = PreferenceLoss(STEP, config, TOKENS, weights, REFERENCE, kl)
        found = in_passes(loss, pairs, log_probs, pass_tokens, packed=pass_tokens != 40)
        known, weight = all_at_once(log_probs), torch.tensor([weights[i] for i in STEP], dtype=torch.float64)
        expected = (preference.losses(config, known, kl) * weight).sum() / weight.sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert (gradients(found, log_probs) - gradients(expected, log_probs)).abs().max() < 1e-12
        told = {"kl": kl} if loss_type == "kto" else {}
        assert loss.figures() == pytest.approx(preference.figures(config, known) | told, rel=1e-6)


@pytest.mark.parametrize("pass_tokens", [1, 40, 1000])
def test_the_sft_term_is_the_mean_over_the_chosen_answers_tokens_of_the_step(pass_tokens: int) -> None:
    """Not the mean of each pair's mean, nor of each pass's: the answers are of unlike length."""
    pairs = [PAIRS[i] for i in STEP]
    log_probs = made_up(pairs)

    def loss(sft_weight: float, weights: Sequence[float]) -> Tensor:
        given = PreferenceLoss(STEP, DpoConfig(sft_weight=sft_weight), TOKENS, weights, REFERENCE)
        return in_passes(given, pairs, log_probs, pass_tokens, packed=True)

    chosen = [row[0] for row in log_probs]
    for weights in ([1.0] * len(PAIRS), WEIGHTS):
        token = torch.cat([torch.full_like(each, weights[i]) for i, each in zip(STEP, chosen, strict=True)])
        expected = -0.3 * (token * torch.cat(chosen)).sum() / token.sum()
        added = loss(0.3, weights) - loss(0.0, weights)
        assert added.item() == pytest.approx(expected.item(), rel=1e-10)
        of_pairs = -0.3 * torch.stack([each.mean() for each in chosen]).mean()
        assert added.item() != pytest.approx(of_pairs.item(), rel=1e-3)


def test_a_pair_that_takes_anothers_reference_would_be_seen() -> None:
    pairs = [PAIRS[i] for i in STEP]
    log_probs = made_up(pairs)
    right = in_passes(PreferenceLoss(STEP, DpoConfig(), TOKENS, WEIGHTS, REFERENCE), pairs, log_probs, 40, True)
    wrong = PreferenceLoss(STEP, DpoConfig(), TOKENS, WEIGHTS, [REFERENCE[i] for i in STEP] + REFERENCE)
    assert abs(in_passes(wrong, pairs, log_probs, 40, True) - right) > 1e-3
