"""Agreement against Krippendorff's own worked examples, and its interval over simulated votes."""

from typing import Any, Literal

import numpy as np
import pytest

from eval.statistics import agreement
from eval.statistics.agreement import alpha, on_decisive, positions, with_people
from pipeline.statistics import Figure, proportion

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", examples A to C; a row an observer, a dot no vote
BINARY = ["0100000010", "1110010000"]
TWO_OBSERVERS = ["aabbdcccedda", "babbbccceddd"]
FOUR_OBSERVERS = ["123321412...", "1233224125.3", ".3332342251.", "1233244125 1.".replace(" ", "")]


def units(observers: list[str], kind: type = str) -> list[list[Any]]:
    return [[None if v == "." else kind(v) for v in unit] for unit in zip(*observers, strict=True)]


@pytest.mark.parametrize(
    ("observers", "level", "published"),
    [
        pytest.param(BINARY, "nominal", 0.095, id="binary, two observers"),
        pytest.param(TWO_OBSERVERS, "nominal", 0.692, id="five values, two observers"),
        pytest.param(FOUR_OBSERVERS, "nominal", 0.743, id="four observers, votes missing"),
        pytest.param(FOUR_OBSERVERS, "ordinal", 0.815, id="the same by rank"),
    ],
)
def test_alpha_is_krippendorffs_own(
    observers: list[str], level: Literal["nominal", "ordinal"], published: float
) -> None:
    found = alpha(units(observers, int if level == "ordinal" else str), level)
    assert found is not None
    assert found.value == pytest.approx(published, abs=0.0006)


def test_a_unit_of_one_vote_says_nothing_and_order_of_votes_and_names_of_values_change_nothing() -> None:
    votes = units(FOUR_OBSERVERS, int)
    found = alpha(votes, "ordinal")
    assert found is not None and found.n == 11, "of 12 units, one has a single vote"
    assert alpha([unit for unit in votes if sum(v is not None for v in unit) > 1], "ordinal") == found
    assert alpha([unit[::-1] for unit in votes], "ordinal") == found
    assert alpha([[None if v is None else 10.0 * v for v in unit] for unit in votes], "ordinal") == found


def test_votes_against_one_another_are_worse_than_chance_and_equal_ones_are_1() -> None:
    opposed, equal = alpha([(0, 1), (1, 0)] * 5), alpha([(0, 0), (1, 1)] * 5)
    assert opposed is not None and opposed.value < -0.8
    assert equal == Figure(value=1.0, n=10)
    assert alpha([(1, 1), (1, 1)]) is None, "one value alone: agreement by chance would look the same"
    assert alpha([(1, None), (None, 0)]) is None
    assert alpha([]) is None


def test_by_rank_a_far_miss_costs_more_than_a_near_one() -> None:
    same = [(v, v) for v in (1, 2, 3, 4, 5)] * 4
    near, far = alpha([*same, (1, 2)], "ordinal"), alpha([*same, (1, 5)], "ordinal")
    assert near is not None and far is not None and near.value > far.value + 0.03


def votes(rng: np.random.Generator, n: int, knows: float) -> list[list[float | None]]:
    """Three reviewers' A, tie or B; each sees the truth with this chance, else guesses; a fifth of votes is missing.

    Alpha is then `knows` squared, the chance that both of two saw it.
    """
    cast = np.where(rng.random((n, 3)) < knows, rng.integers(0, 3, (n, 1)), rng.integers(0, 3, (n, 3))) / 2
    return [
        [None if lacks else float(v) for v, lacks in zip(*unit, strict=True)]
        for unit in zip(cast, rng.random((n, 3)) < 0.2, strict=True)
    ]


@pytest.mark.parametrize(("n", "knows"), [(30, 0.6), (60, 0.8), (200, 0.9)])
def test_alphas_interval_covers_it_in_93_to_97_of_100_runs(
    n: int, knows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as 400 runs tell, which is to 2 of 100."""
    monkeypatch.setattr(agreement, "SAMPLES", 150)
    rng = np.random.default_rng(n)
    found = [figure for _ in range(400) if (figure := alpha(votes(rng, n, knows), "nominal"))]
    assert np.mean([f.value for f in found]) == pytest.approx(knows**2, abs=0.015)
    ends = [(f.ci_low, f.ci_high) for f in found if f.ci_low is not None and f.ci_high is not None]
    assert 0.92 <= np.mean([low <= knows**2 <= high for low, high in ends]) <= 0.98
    assert len(ends) > 390


def test_too_few_differing_units_give_no_interval() -> None:
    equal = [(0, 0), (1, 1)] * 20
    few, enough = alpha([*equal, (0, 1), (1, 0)]), alpha([*equal, (0, 1), (1, 0), (0, 1)])
    assert few is not None and few.ci_low is None and few.value < 1
    assert enough is not None and enough.ci_low is not None and enough.ci_high is not None
    assert enough.ci_low < enough.value < enough.ci_high < 1


def test_agreement_on_decisive_leaves_out_ties_and_what_is_not_scored() -> None:
    judge, other = [1.0, 0.0, 0.5, 1.0, None, 0.0], [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert on_decisive(judge, other) == proportion(2, 3)
    assert on_decisive([0.5], [1.0]) is None


def test_a_judge_is_held_to_the_verdict_of_most_people() -> None:
    people = [[1.0, 1.0, 0.0], [0.0, 0.5, None], [1.0, 0.0], [None, None], [0.0]]
    found = with_people([1.0, 0.0, 0.5, 1.0, 1.0], people)
    assert found.same == proportion(3, 4), "no one voted on the fourth"
    assert found.on_decisive == proportion(2, 3)
    with pytest.raises(ValueError, match="no rows"):
        with_people([1.0], [[None]])


def test_a_judge_that_always_says_what_most_prompts_deserve_agrees_and_knows_nothing() -> None:
    """Why alpha stands beside the share: 85 of 100, all of it by chance."""
    truth = ([1.0] * 17 + [0.0] * 3) * 5
    found = with_people([1.0] * 100, [[t, t, t] for t in truth])
    assert found.same.value == 0.85
    assert found.alpha is not None and found.alpha.value < 0.05
    assert found.among_people == Figure(value=1.0, n=100)


def test_a_judge_that_likes_what_it_sees_first_is_seen() -> None:
    rng = np.random.default_rng(2)
    better = rng.random(200) < 0.6
    biased = rng.random(200) < 0.3
    found = positions((better | biased).astype(float).tolist(), (better & ~biased).astype(float).tolist())
    assert found.consistent == proportion(int((~biased).sum()), 200)
    assert (found.favoured_first, found.favoured_second) == (int(biased.sum()), 0)
    assert found.p_value < 1e-9


def test_inconsistency_without_a_favourite_is_not_called_one() -> None:
    """Noise alone, in 1000 judges: at most 6 of 100."""
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, 3, (2, 1000, 40)) / 2
    called = [positions(a.tolist(), b.tolist()).p_value < 0.05 for a, b in zip(*pairs, strict=True)]
    assert np.mean(called) <= 0.06
