"""The draw: exactly from the distribution it names, the same for the same seed, of any size of vocabulary."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from serving.transformers_backend.sampling import Draw, gumbel, noisy, token_scores

DRAWS = 4000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def drawn(logits: torch.Tensor, draws: list[Draw], position: int = 7) -> list[int]:
    return [int(noisy(logits, draw, position).argmax()) for draw in draws]


def fits(tokens: list[int], probabilities: torch.Tensor) -> bool:
    """Pearson's chi-squared test over the tokens that can be drawn."""
    counted, possible = Counter(tokens), [i for i, p in enumerate(probabilities.tolist()) if p > 0]
    expected = [probabilities[i].item() * len(tokens) for i in possible]
    if len(possible) == 1 or not set(counted) <= set(possible):
        return set(counted) <= set(possible)
    return bool(chisquare([counted[i] for i in possible], expected).pvalue > 1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_over_seeds_a_token_comes_as_often_as_its_probability_says(temperature: float) -> None:
    tokens = drawn(LOGITS, [Draw(temperature, 1.0, seed) for seed in range(DRAWS)])
    assert fits(tokens, (LOGITS.double() / temperature).softmax(-1))
    assert not fits(tokens, (LOGITS.double() / (temperature * 1.2)).softmax(-1)), "the test tells temperatures apart"


def test_over_positions_too_and_one_position_says_nothing_about_the_next() -> None:
    tokens = [drawn(LOGITS, [Draw(1.0, 1.0, 5)], position)[0] for position in range(DRAWS)]
    p = LOGITS.double().softmax(-1)
    assert fits(tokens, p)
    assert fits([6 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)], torch.outer(p, p).flatten())


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.6, 2), (0.9, 4)])
def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    p = LOGITS.double().softmax(-1)
    assert p[: kept - 1].sum() < top_p <= p[:kept].sum()
    nucleus = torch.cat([p[:kept], torch.zeros(len(p) - kept)])
    order = torch.tensor([4, 0, 5, 3, 1, 2])  # the likeliest need not stand first
    found = drawn(LOGITS[order], [Draw(1.0, top_p, seed) for seed in range(DRAWS)])
    assert fits([int(order[token]) for token in found], nucleus / nucleus.sum())


def test_no_token_is_drawn_by_too_coarse_a_number() -> None:
    """Noise in float32 would draw one of these hundred thousand some ten times in a thousand."""
    logits = torch.full((100_000,), -40.0)
    logits[7] = 0.0
    assert drawn(logits, [Draw(1.0, 1.0, seed) for seed in range(300)]) == [7] * 300


def test_the_noise_is_gumbels_of_the_seed_and_the_position_alone() -> None:
    noise = gumbel(1, 2, 50_000)
    assert (noise == gumbel(1, 2, 50_000)).all()
    assert (noise[:100] == gumbel(1, 2, 100)).all(), "nor of the size"
    assert abs(noise.mean() - 0.5772) < 0.03 and abs(noise.var() - torch.pi**2 / 6) < 0.05
    others = [gumbel(2, 2, 100), gumbel(1, 3, 100), gumbel(-1, 2, 100), gumbel(1 + 2**64, 2, 100)]
    assert len({tuple(other) for other in [*others, noise[:100]]}) == 5


def test_the_lowest_temperature_is_greedy_and_the_highest_draws_from_all() -> None:
    assert set(drawn(LOGITS * 30, [Draw(1e-300, 1.0, seed) for seed in range(50)])) == {0}
    assert len(set(drawn(LOGITS, [Draw(1e300, 1.0, seed) for seed in range(200)]))) == len(LOGITS)


def test_a_score_is_the_tokens_log_prob_and_the_likeliest_beside_it() -> None:
    log_probs = LOGITS.log_softmax(-1)
    [first, last] = token_scores(torch.stack([log_probs, log_probs.flip(0)]), [3, 5], 2)
    assert (first.logprob, list(first.top)) == (pytest.approx(log_probs[3].item()), [0, 1])
    assert (last.logprob, list(last.top)) == (pytest.approx(log_probs[0].item()), [5, 4])
    assert token_scores(log_probs[None], [3], 0)[0].top == {}
    assert len(token_scores(log_probs[None], [3], 99)[0].top) == len(LOGITS)
