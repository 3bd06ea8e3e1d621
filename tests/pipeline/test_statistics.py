"""Intervals and tests against published values, scipy's own routines and simulation."""

import math
import random
from math import comb

import numpy as np
import pytest
from scipy import stats

from pipeline.statistics import (
    Change,
    Figure,
    as_record,
    holm,
    mean,
    paired,
    proportion,
    sign_test,
    smallest_difference,
)

# Student (1908), hours of sleep gained by ten patients with one drug and with another
FIRST_DRUG = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND_DRUG = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def change(value: float, low: float | None, high: float | None) -> Change:
    return Change(
        before=Figure(value=0, n=9),
        after=Figure(value=0, n=9),
        delta=Figure(value=value, ci_low=low, ci_high=high, n=9),
    )


def test_paired_interval_is_the_published_one_of_students_sleep_data() -> None:
    delta = paired(FIRST_DRUG, SECOND_DRUG).delta
    assert (delta.value, delta.ci_low, delta.ci_high, delta.n) == (1.58, 0.700114, 2.459886, 10)  # R: t.test


def test_paired_delta_is_the_mean_of_the_differences_not_the_difference_of_two_intervals() -> None:
    result = paired(FIRST_DRUG, SECOND_DRUG)
    expected = stats.ttest_rel(SECOND_DRUG, FIRST_DRUG).confidence_interval(0.95)
    assert (result.delta.ci_low, result.delta.ci_high) == pytest.approx(tuple(expected), abs=1e-6)
    for end, values in ((result.before, FIRST_DRUG), (result.after, SECOND_DRUG)):
        low, high = stats.t.interval(0.95, 9, np.mean(values), stats.sem(values))
        assert (end.value, end.ci_low, end.ci_high) == pytest.approx((np.mean(values), low, high), abs=1e-6)
    assert result.before.ci_high > result.after.ci_low, "the ends overlap, and the difference is shown all the same"  # type: ignore[operator]
    assert result.verdict(lower_is_better=False) == "better"


def test_paired_interval_covers_the_truth_in_95_of_100_runs() -> None:
    draw, truth, runs = random.Random(1), 0.3, 2000
    covered = 0
    for _ in range(runs):
        before = [draw.gauss(2.0, 1.0) for _ in range(12)]
        after = [b + draw.gauss(truth, 0.5) for b in before]
        delta = paired(before, after).delta
        assert delta.ci_low is not None and delta.ci_high is not None
        covered += delta.ci_low <= truth <= delta.ci_high
    assert 0.93 <= covered / runs <= 0.97


def test_no_difference_is_called_better_or_worse_in_at_most_7_of_100_runs() -> None:
    draw, runs = random.Random(2), 1000
    said = [
        paired(*([draw.gauss(0, 1) for _ in range(8)] for _ in range(2))).verdict(lower_is_better=True)
        for _ in range(runs)
    ]
    assert 0.03 <= 1 - said.count("no difference shown") / runs <= 0.07


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_proportion_has_the_published_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    share = proportion(successes, n)  # Newcombe (1998), table I, method 3
    assert (round(share.ci_low or 0, 4), round(share.ci_high or 0, 4), share.n) == (low, high, n)
    assert share.value == pytest.approx(successes / n, abs=1e-6)


def test_paired_shares_have_proportions_at_their_ends() -> None:
    before, after = [0.0, 0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0, 0.0]
    result = paired(before, after, shares=True)
    assert (result.before, result.after) == (proportion(2, 5), proportion(3, 5))
    assert result.delta.value == paired(before, after).delta.value


def test_paired_shares_that_all_stayed_or_all_changed_keep_an_uncertainty() -> None:
    """A t interval has no width there; published for b = c = 0, n = 8: 0 ± 1.96·√(1/100)."""
    stayed, changed = (paired([0.0] * 8, [end] * 8, shares=True).delta for end in (0.0, 1.0))
    assert (stayed.ci_low, stayed.ci_high) == (pytest.approx(-0.196, abs=1e-3), pytest.approx(0.196, abs=1e-3))
    assert changed.ci_low is not None
    assert 0.4 < changed.ci_low < 0.9


@pytest.mark.parametrize("chances", [(0.1, 0.1), (0.05, 0.02), (0.3, 0.1), (0.0, 0.02)])
def test_paired_shares_interval_covers_the_truth_in_95_of_100_runs(chances: tuple[float, float]) -> None:
    """Exact, over all outcomes of 20 rows, of which `chances` gain and lose."""
    gain, lose = chances
    covered = 0.0
    for gained in range(21):
        for lost in range(21 - gained):
            probability = (
                comb(20, gained) * comb(20 - gained, lost) * gain**gained * lose**lost
                * (1 - gain - lose) ** (20 - gained - lost)
            )  # fmt: skip
            before = [0.0] * gained + [1.0] * lost + [1.0] * (20 - gained - lost)
            after = [1.0] * gained + [0.0] * lost + [1.0] * (20 - gained - lost)
            delta = paired(before, after, shares=True).delta
            assert delta.ci_low is not None and delta.ci_high is not None
            covered += probability * (delta.ci_low <= gain - lose <= delta.ci_high)
    assert covered > 0.94


def test_values_without_spread_give_no_interval() -> None:
    assert mean([0.5] * 5) == Figure(value=0.5, n=5)
    assert Change(before=mean([1.0]), after=mean([1.0]), delta=mean([0.1] * 9)).verdict(False) == "no difference shown"


def test_paired_rows_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError):
        paired([1.0, 2.0], [1.0])


def test_no_rows_give_no_figure() -> None:
    with pytest.raises(ValueError, match="no rows"):
        mean([])
    with pytest.raises(ValueError, match="no rows"):
        proportion(0, 0)


def test_one_row_has_a_value_and_no_interval() -> None:
    assert mean([2.5]) == Figure(value=2.5, n=1)
    assert paired([1.0], [0.5]).verdict(lower_is_better=True) == "no difference shown"


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (-0.2, -0.3, -0.1, "better"),
        (0.2, 0.1, 0.3, "worse"),
        (-0.2, -0.5, 0.1, "no difference shown"),
        (-0.2, -0.4, 0.0, "no difference shown"),
        (0.0, 0.0, 0.0, "no difference shown"),
        (-0.2, None, None, "no difference shown"),
        (math.nan, math.nan, math.nan, "no difference shown"),
    ],
)
def test_verdict_says_better_only_outside_the_noise(
    value: float, low: float | None, high: float | None, said: str
) -> None:
    assert change(value, low, high).verdict(lower_is_better=True) == said
    mirrored = {"better": "worse", "worse": "better"}.get(said, said)
    assert change(value, low, high).verdict(lower_is_better=False) == mirrored


def test_figures_that_are_not_finite_show_no_difference() -> None:
    for broken in (math.nan, math.inf):
        assert paired([1.0, 2.0], [broken, 1.0]).verdict(lower_is_better=False) == "no difference shown"


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(8, 2, 112 / 1024), (6, 0, 2 / 64), (3, 3, 1.0), (0, 0, 1.0), (1, 9, 22 / 1024)]
)
def test_sign_test_is_exact_and_two_sided(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p, abs=1e-12)


def test_smallest_difference_is_found_with_the_power_it_names() -> None:
    n, deviation = 100, 0.5
    least = smallest_difference(n, deviation)
    assert least == pytest.approx((1.959964 + 0.841621) * deviation / 10, abs=1e-6)
    runs = np.random.default_rng(3).normal(least, deviation, size=(4000, n))
    assert np.mean(stats.ttest_1samp(runs, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_text_shows_the_interval_or_else_how_few_rows_there_were() -> None:
    assert Figure(value=1.23456, ci_low=1.0, ci_high=1.5, n=9).text() == "1.235 [1.000, 1.500]"
    assert Figure(value=0.5, n=1).text(" nats", 1) == "0.5 nats (n = 1)"


def test_record_holds_plain_values_and_leaves_out_an_interval_that_is_not_known() -> None:
    assert as_record({"loss": mean([2.5]), "n": 3}) == {"loss": {"value": 2.5, "n": 1}, "n": 3}


def test_a_difference_of_unknown_direction_is_neither_better_nor_worse() -> None:
    assert [change(v, v - 0.1, v + 0.1).verdict(None) for v in (0.5, -0.5)] == ["higher", "lower"]
    assert change(0.05, -0.1, 0.2).verdict(None) == "no difference shown"


def test_holm_is_the_published_example() -> None:
    """Holm 1979 by hand: 0.01·4, then 0.013·3 no less than that before it, 0.04·2, 0.2."""
    found = holm({"c": 0.04, "a": 0.01, "d": 0.2, "b": 0.013})
    assert found == pytest.approx({"a": 0.04, "b": 0.04, "c": 0.08, "d": 0.2})
    assert holm({}) == {} and holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_one_of_ten_tasks_without_a_difference_is_called_one_in_at_most_6_of_100_runs() -> None:
    rng = random.Random(5)
    called = [min(holm({str(i): rng.random() for i in range(10)}).values()) < 0.05 for _ in range(2000)]
    assert sum(called) / len(called) <= 0.06
