"""A judge's bias cancels, its knowledge narrows, and a judge that knows nothing does no harm."""

from functools import cache

import numpy as np
import pytest

from eval.statistics.prediction_powered import FEWEST, Corrected, corrected
from pipeline.statistics import Figure, rate

TRUTH = 0.2 * 0.5 + 0.8 * 0.6  # a fifth of all ties, six of ten others won
RUNS = 1000


@cache
def runs(n: int, judges: int, knows: float, weight: float | None = None) -> list[Corrected]:
    """People score `n` prompts; the judge these and `judges` more. It knows the score with this chance, else says "won"
    in nine of ten cases: a judge that likes the one side."""
    rng = np.random.default_rng([n, judges, int(10 * knows)])
    every = n + judges
    people = np.where(rng.random((RUNS, every)) < 0.2, 0.5, (rng.random((RUNS, every)) < 0.6).astype(float))
    judge = np.where(rng.random((RUNS, every)) < knows, people, (rng.random((RUNS, every)) < 0.9).astype(float))
    return [
        corrected(p[:n].tolist(), j[:n].tolist(), j[n:].tolist(), weight) for p, j in zip(people, judge, strict=True)
    ]


def coverage(figures: list[Figure]) -> float:
    ends = [(f.ci_low, f.ci_high) for f in figures if f.ci_low is not None and f.ci_high is not None]
    return sum(low <= TRUTH <= high for low, high in ends) / len(figures)


def width(figures: list[Figure]) -> float:
    return float(np.mean([f.ci_high - f.ci_low for f in figures]))  # type: ignore[operator]


@pytest.mark.parametrize("knows", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("n", [20, 100, 500])
def test_the_rate_is_unbiased_and_covered_in_93_to_97_of_100_runs_whatever_the_judge(n: int, knows: float) -> None:
    found = [run.rate for run in runs(n, 2 * n, knows)]
    assert np.mean([f.value for f in found]) == pytest.approx(TRUTH, abs=0.01)
    assert 0.93 <= coverage(found) <= 0.97


def test_the_judge_alone_would_be_wrong() -> None:
    alone = [run.judge_alone for run in runs(100, 200, 0.5)]
    assert np.mean([f.value for f in alone]) > TRUTH + 0.1
    assert coverage(alone) < 0.01


def test_a_bias_left_uncorrected_would_be_seen() -> None:
    """The planted fault: people's scores and the judge's, thrown into one."""
    rng, hits = np.random.default_rng(1), []
    for _ in range(300):
        people = (rng.random(100) < 0.6).astype(float)
        judge = np.where(rng.random(200) < 0.5, rng.random(200) < 0.6, rng.random(200) < 0.9).astype(float)
        figure = rate([*people.tolist(), *judge.tolist()])
        hits.append(figure.ci_low <= 0.6 <= figure.ci_high)  # type: ignore[operator]
    assert np.mean(hits) < 0.7


def test_a_good_judge_narrows_and_one_that_knows_nothing_gets_no_say() -> None:
    good, blind = runs(100, 200, 0.9), runs(100, 200, 0.0)
    assert width([r.rate for r in good]) < 0.72 * width([r.people_alone for r in good])
    assert np.median([r.worth for r in good]) > 190, "as many prompts as people would have had to score"
    assert width([r.rate for r in blind]) < 1.03 * width([r.people_alone for r in blind])
    assert np.mean([r.judge_weight for r in blind]) < 0.1 < 0.5 < np.mean([r.judge_weight for r in good])


def test_untuned_a_poor_judge_does_harm() -> None:
    """Why λ is fitted: with λ = 1, as first published, a blind judge adds its own noise. It covers all the same."""
    untuned = [run.rate for run in runs(100, 200, 0.0, 1.0)]
    assert width(untuned) > 1.2 * width([run.rate for run in runs(100, 200, 0.0)])
    assert 0.93 <= coverage(untuned) <= 0.97


def test_untuned_it_is_the_formula_by_hand() -> None:
    people, judge, elsewhere = [1.0, 0.0] * 5, [1.0, 1.0] * 5, [1.0, 1.0, 0.0, 1.0]
    found = corrected(people, judge, elsewhere, weight=1.0)
    assert found.rate.value == pytest.approx(0.75 + 0.5 - 1.0)
    error = (0.25 / 4 + (10 / 36) / 10) ** 0.5  # variance of the judge elsewhere, and of what people correct
    assert found.rate.ci_high == pytest.approx(0.25 + 2.262157 * error, abs=1e-5)
    assert found.rate.ci_low == 0.0, "within 0 and 1"


def test_a_judge_that_says_one_thing_changes_nothing() -> None:
    people = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0]
    found = corrected(people, [1.0] * 10, [1.0] * 50)
    assert (found.rate.value, found.judge_weight, found.worth) == (0.7, 0.0, 10)


@pytest.mark.parametrize(
    ("people", "judge", "elsewhere", "match"),
    [
        ([1.0] * (FEWEST - 1), [1.0] * (FEWEST - 1), [1.0] * 9, "10 prompts"),
        ([1.0] * 20, [1.0] * 20, [1.0], "10 prompts"),
        ([1.0] * 20, [1.0] * 19, [1.0] * 9, "one score of the judge"),
    ],
    ids=["few people", "no judge elsewhere", "unpaired"],
)
def test_too_little_is_refused(people: list[float], judge: list[float], elsewhere: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        corrected(people, judge, elsewhere)
