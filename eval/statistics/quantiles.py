"""Quantiles with their intervals: exact, from the order of the values alone (Conover 1999, section 3.2)."""

from collections.abc import Sequence

from pipeline.statistics import CONFIDENCE, Figure


def quantile(values: Sequence[float], share: float) -> Figure:
    """The value that `share` of the population lies below, `0 < share < 1`.

    The interval runs from one ordered value to another, with at least 95 % whatever the distribution; none where so few
    values do not reach beyond it on both sides. Raises ValueError for no values.
    """
    import numpy as np
    from scipy import stats

    n = len(values)
    if n == 0:
        raise ValueError("a quantile of no values")
    ordered = sorted(values)
    below = stats.binom(n, share)  # so many of the values lie below the population's quantile
    first, last = (int(below.ppf(p)) for p in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    found = Figure(value=round(float(np.quantile(ordered, share)), 6), n=n)
    if first < 1 or last + 1 > n:
        return found
    low, high = (round(float(ordered[place]), 6) for place in (first - 1, last))
    return found.model_copy(update={"ci_low": low, "ci_high": high})
