"""Figures with their uncertainty. The unit is the row or the prompt, and every consumer derives from here.

Intervals are 95 %: Student's t on per-row values (Miller 2024, arXiv 2411.00640, section 2), Wilson for proportions
(Wilson 1927). Differences are paired on the same rows.
"""

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

CONFIDENCE = 0.95


class Figure(BaseModel):
    """A value, its 95 % interval and the number of rows behind it. The interval is None where n says nothing."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    n: int

    def text(self, unit: str = "", digits: int = 3) -> str:
        number = f"{self.value:.{digits}f}"
        if self.ci_low is None or self.ci_high is None:
            return f"{number}{unit} (n = {self.n})"
        return f"{number}{unit} [{self.ci_low:.{digits}f}, {self.ci_high:.{digits}f}]"


class Change(BaseModel):
    """The same rows before and after. `delta` is the mean of the differences, not the difference of two intervals."""

    before: Figure
    after: Figure
    delta: Figure

    def verdict(self, lower_is_better: bool | None) -> str:
        """`better` or `worse` only where the interval excludes 0; None, of unknown direction: `higher` or `lower`."""
        low, high = self.delta.ci_low, self.delta.ci_high
        if low is None or high is None or not (low > 0 or high < 0):  # so asked, NaN shows nothing
            return "no difference shown"
        if lower_is_better is None:
            return "higher" if self.delta.value > 0 else "lower"
        return "better" if (self.delta.value < 0) == lower_is_better else "worse"


def mean(values: Sequence[float]) -> Figure:
    """Mean of per-row values with Student's t interval; none where all are the same, for that says nothing of others.

    Raises ValueError for no rows.
    """
    from scipy import stats

    n = len(values)
    if n == 0:
        raise ValueError("a mean of no rows")
    average = math.fsum(values) / n
    if min(values) == max(values):  # one row, or no spread to judge by
        return Figure(value=round(average, 6), n=n)
    variance = math.fsum((v - average) ** 2 for v in values) / (n - 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt(variance / n)
    return _rounded(average, average - half, average + half, n)


def proportion(successes: int, n: int) -> Figure:
    """Share of `n` with Wilson's interval. Raises ValueError for no rows."""
    from scipy import stats

    if n == 0:
        raise ValueError("a share of no rows")
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return _rounded(successes / n, float(interval.low), float(interval.high), n)


def paired(before: Sequence[float], after: Sequence[float], shares: bool = False) -> Change:
    """The change on the same rows, in the same order; `shares`: the values are 0 or 1, so the ends are proportions."""
    end = (lambda v: proportion(round(sum(v)), len(v))) if shares else mean
    deltas = [a - b for b, a in zip(before, after, strict=True)]
    return Change(before=end(before), after=end(after), delta=_difference_of_shares(deltas) if shares else mean(deltas))


def _difference_of_shares(deltas: Sequence[float]) -> Figure:
    """Paired 0/1 rows: Wald's interval with half a row added to each of the four outcomes (Agresti & Min 2005).

    It keeps its width where no row changed, or all did, which a t interval does not.
    """
    from scipy import stats

    n = len(deltas)
    gained, lost = (sum(delta == sign for delta in deltas) + 0.5 for sign in (1, -1))
    centre = (gained - lost) / (n + 2)
    variance = ((gained + lost) - (gained - lost) ** 2 / (n + 2)) / (n + 2) ** 2
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return _rounded((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Each p adjusted for that many tests: below α means found with at most α of any false one (Holm 1979)."""
    ordered, adjusted, largest = sorted(p_values, key=p_values.__getitem__), {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def smallest_difference(n: int, deviation: float, power: float = 0.8) -> float:
    """The smallest mean difference that n rows can show: (z₁₋α/₂ + z_power)·σ/√n, two-sided α = 0.05."""
    from scipy import stats

    z = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(power)
    return float(z * deviation / math.sqrt(n))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of the decisive prompts under a fair coin; 1.0 when there are none."""
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _rounded(value: float, low: float, high: float, n: int) -> Figure:
    return Figure(value=round(value, 6), ci_low=round(low, 6), ci_high=round(high, 6), n=n)


def as_record(results: dict[str, Any]) -> dict[str, Any]:
    """Figures and changes as plain values for a record."""
    return {k: v.model_dump(exclude_none=True) if isinstance(v, BaseModel) else v for k, v in results.items()}
