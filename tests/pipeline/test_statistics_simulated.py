"""Intervals and tests over thousands of simulated comparisons: they err as often as they say, and no more.

The scores are those of a judge that sees each prompt in both orders, and gives 1, ½ or 0 in each.
"""

from functools import cache

import numpy as np
import pytest

from pipeline import statistics
from pipeline.statistics import Figure, bounds, mean, proportion, rate, rows_needed, sign_test, smallest_difference


def judged(rng: np.random.Generator, runs: int, n: int, win: float, tie: float, consistent: float = 0.6) -> np.ndarray:
    """Scores `(runs, n)` over both orders; the verdict stays when the sides are swapped with this chance."""
    once, again = (np.searchsorted([1 - win - tie, 1 - win], rng.random((runs, n)), "right") / 2 for _ in range(2))
    return (once + np.where(rng.random((runs, n)) < consistent, once, again)) / 2


def covers(figure: Figure, truth: float) -> bool:
    return figure.ci_low is not None and figure.ci_high is not None and figure.ci_low <= truth <= figure.ci_high


@pytest.mark.parametrize("n", [20, 50, 200, 500])
def test_2000_comparisons_of_a_model_with_itself_are_called_a_difference_in_at_most_6_of_100(n: int) -> None:
    """By the sign test, by the interval, and so by both together."""
    runs, p_value = judged(np.random.default_rng(n), 2000, n, win=0.3, tie=0.4), cache(sign_test)
    counts = zip((runs > 0.5).sum(1).tolist(), (runs < 0.5).sum(1).tolist(), strict=True)
    by_test = [p_value(wins, losses) < 0.05 for wins, losses in counts]
    by_interval = [not covers(rate(scores), 0.5) for scores in runs.tolist()]
    assert np.mean(by_test) <= 0.06
    assert np.mean(by_interval) <= 0.06


def test_two_orders_counted_as_two_prompts_would_be_seen() -> None:
    """The planted fault: verdicts that agree in both orders are one finding, not two."""
    scores = judged(np.random.default_rng(1), 500, 50, win=0.5, tie=0.0, consistent=1.0)
    assert np.mean([not covers(rate([*s, *s]), 0.5) for s in scores.tolist()]) > 0.1


@pytest.mark.parametrize(("win", "tie"), [(0.4, 0.2), (0.25, 0.4), (0.7, 0.2), (0.15, 0.1)])
@pytest.mark.parametrize("n", [20, 60, 500])
def test_the_rates_interval_covers_it_in_93_to_97_of_100_runs(n: int, win: float, tie: float) -> None:
    runs = judged(np.random.default_rng(n), 1500, n, win, tie).tolist()
    assert 0.93 <= np.mean([covers(rate(scores), win + tie / 2) for scores in runs]) <= 0.97


def test_students_t_alone_would_miss_a_high_rate_of_few_prompts() -> None:
    """Why the rate has Wilson's: nine wins of ten, twenty prompts, as most figures of fine-tuning have."""
    runs = judged(np.random.default_rng(4), 1500, 20, win=0.9, tie=0.0).tolist()
    assert np.mean([covers(mean(scores), 0.9) for scores in runs]) < 0.9
    assert np.mean([covers(rate(scores), 0.9) for scores in runs]) >= 0.93


def test_a_rate_without_ties_is_a_proportion_and_one_of_ties_alone_says_nothing() -> None:
    assert rate([1.0] * 7 + [0.0] * 5) == proportion(7, 12)
    assert rate([1.0] * 6) == proportion(6, 6)
    assert rate([0.5] * 9) == Figure(value=0.5, n=9)
    tied = rate([1.0] * 6 + [0.5] * 4)
    assert 0 < tied.ci_low < 0.8 < tied.ci_high < 1  # type: ignore[operator]


@pytest.mark.parametrize("scores", [[], [1.5], [-0.5, 1.0], [float("nan"), 0.5], [0.5, float("nan")]])
def test_what_is_no_score_is_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no rows|outside 0 to 1"):
        rate(scores)


def families(rng: np.random.Generator, few: int) -> tuple[list[int], np.ndarray]:
    """The family of each prompt, of 1 to 6 prompts each, and scores `(400, prompts)`: a family's are alike."""
    sizes = rng.integers(1, 7, few)
    of = np.repeat(np.arange(few), sizes)
    chance = rng.beta(0.6, 0.4, (400, few))[:, of]
    scores = np.where(rng.random(chance.shape) < 0.2, 0.5, (rng.random(chance.shape) < chance).astype(float))
    return of.tolist(), scores


@pytest.mark.parametrize("few", [20, 80])
def test_prompts_of_families_are_covered_only_where_the_families_are_known(few: int) -> None:
    truth = 0.2 * 0.5 + 0.8 * 0.6
    hits: dict[str, list[bool]] = {"known": [], "known, t": [], "unknown": []}
    for seed in range(4):
        of, runs = families(np.random.default_rng([few, seed]), few)
        for scores in runs.tolist():
            hits["known"].append(covers(rate(scores, of), truth))
            hits["known, t"].append(covers(mean(scores, of), truth))
            hits["unknown"].append(covers(rate(scores), truth))
    assert 0.93 <= np.mean(hits["known"]) <= 0.97
    assert 0.93 <= np.mean(hits["known, t"]) <= 0.97
    assert np.mean(hits["unknown"]) < 0.85


def test_families_of_one_row_change_nothing_and_one_family_alone_says_nothing() -> None:
    scores = [1.0, 0.5, 0.0, 1.0, 0.5, 1.0, 1.0]
    alone = [f"family {i}" for i in range(7)]
    assert (mean(scores, alone), rate(scores, alone)) == (mean(scores), rate(scores))
    assert mean(scores, ["one"] * 7) == rate(scores, ["one"] * 7) == Figure(value=mean(scores).value, n=7)
    thirds = rate([0.2, 0.7, 0.9] * 5, [i // 3 for i in range(15)])
    assert thirds.ci_low is None, "families with one and the same mean have no spread to judge by"
    with pytest.raises(ValueError):
        mean(scores, alone[:-1])


def test_rows_that_are_copies_are_worth_one() -> None:
    """Equal families of equal rows: the interval is that of one row each, whatever the copies."""
    scores, thrice = [1.0, 0.5, 0.0, 1.0, 0.5, 1.0, 1.0], [0, 1, 2, 3, 4, 5, 6] * 3
    once, copied = mean(scores), mean(scores * 3, thrice)
    assert (copied.ci_low, copied.ci_high) == pytest.approx((once.ci_low, once.ci_high), abs=1e-6)
    all_won = rate([1.0] * 21, thrice)
    assert (all_won.ci_low, all_won.n) == (proportion(7, 7).ci_low, 21)


def test_bounds_hold_whatever_the_unscored_would_have_been() -> None:
    """Here a judge fails on prompts that were lost: the plain rate of the others is 0.59, and the truth one half."""
    rng, hits, plain = np.random.default_rng(7), [], []
    for won in (rng.random((1000, 60)) < 0.5).tolist():
        unscored = [not w and rng.random() < 0.3 for w in won]
        scores = [float(w) for w, lacks in zip(won, unscored, strict=True) if not lacks]
        worst, best = bounds(scores, sum(unscored))
        assert worst.n == best.n == 60
        hits.append(worst.ci_low <= 0.5 <= best.ci_high)  # type: ignore[operator]
        plain.append(covers(rate(scores), 0.5))
    assert np.mean(hits) >= 0.95
    assert np.mean(plain) < 0.9, "and without the bounds it would be missed"


def test_bounds_without_unscored_rows_are_the_rate_and_without_scores_all_there_is() -> None:
    assert bounds([1.0, 0.0, 0.5], 0) == (rate([1.0, 0.0, 0.5]),) * 2
    worst, best = bounds([], 4)
    assert (worst.value, best.value) == (0.0, 1.0)


def test_sign_test_is_mcnemars_exact_test_and_finds_what_an_unpaired_one_does_not() -> None:
    """Of 100 items 9 are gained and 1 lost: 0.0215 paired; with 60 right before, two proportions tell nothing."""
    from scipy import stats

    assert sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    unpaired = stats.chi2_contingency([[60, 40], [68, 32]], correction=False).pvalue
    assert unpaired > 0.2


def test_rows_needed_are_those_of_the_smallest_difference() -> None:
    assert [rows_needed(d, 0.41) for d in (0.05, 0.10, 0.15)] == [528, 132, 59]
    assert smallest_difference(528, 0.41) <= 0.05 < smallest_difference(527, 0.41)
    assert rows_needed(-0.1, 0.41) == 132
    with pytest.raises(ValueError, match="difference of 0"):
        rows_needed(0.0, 0.41)


def test_paired_differences_of_tied_items_are_covered() -> None:
    """0, ½ or 1 before and after, most of them unchanged."""
    rng, hits = np.random.default_rng(9), []
    for before, moved in zip(rng.integers(0, 3, (1000, 60)) / 2, rng.random((1000, 60)), strict=True):
        after = np.where(moved < 0.3, 1 - before, np.where(moved < 0.4, 1.0, before))
        hits.append(covers(statistics.paired(before.tolist(), after.tolist()).delta, 0.05))
    assert 0.93 <= np.mean(hits) <= 0.97
