"""Quantiles: their intervals hold what they say, and are none where they cannot be had."""

import random

import pytest

from eval.statistics.quantiles import quantile


def test_the_interval_runs_between_the_textbook_ranks() -> None:
    """The median of 30: from the 10th to the 21st value (Conover 1999, table A3)."""
    figure = quantile([float(value) for value in range(30, 0, -1)], 0.5)
    assert (figure.value, figure.ci_low, figure.ci_high, figure.n) == (15.5, 10.0, 21.0, 30)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_it_covers_at_least_95_percent_of_skewed_values_with_ties(share: float) -> None:
    draw = random.Random(7)
    population = [int(10 * 2 ** draw.gauss(0, 1.5)) for _ in range(20_000)]
    true = sorted(population)[int(share * len(population))]
    covered = 0
    for _ in range(400):
        figure = quantile([float(draw.choice(population)) for _ in range(60)], share)
        assert figure.ci_low is not None and figure.ci_high is not None
        covered += figure.ci_low <= true <= figure.ci_high
    assert covered / 400 > 0.93


def test_too_few_values_give_no_interval() -> None:
    for values, share in (([3.0], 0.5), ([1.0, 2.0, 3.0, 4.0, 5.0], 0.5), ([float(i) for i in range(30)], 0.1)):
        assert quantile(values, share).ci_low is None
    with pytest.raises(ValueError):
        quantile([], 0.5)
