"""Figures with their uncertainty. The unit is the row or the prompt, and every consumer derives from here.

Intervals are 95 %: Student's t on per-row values (Miller 2024, arXiv 2411.00640, section 2), Wilson for proportions
(Wilson 1927). Differences are paired on the same rows. Rows of one family are not independent: their sums are the unit.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
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


def mean(values: Sequence[float], families: Sequence[Hashable] | None = None) -> Figure:
    """Mean of per-row values with Student's t interval; none where all are the same, for that says nothing of others.

    `families`: which family each row is of, such as one text asked in several ways. Raises ValueError for no rows.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean of no rows")
    average, error, freedom = _mean_and_error(values, families)
    if error == 0:  # one row, or no spread to judge by
        return Figure(value=round(average, 6), n=n)
    half = _t(freedom) * error
    return _rounded(average, average - half, average + half, n)


def rate(scores: Sequence[float], families: Sequence[Hashable] | None = None) -> Figure:
    """Mean of scores between 0 and 1, such as ½ for a tie, with Wilson's interval for as many rows as they are worth.

    The n that a plain share would need for the same error takes the place of n, and t that of z (effective n: Korn &
    Graubard 1998). Near 0 and 1, where t on the scores covers 85 to 90 % at n = 20, this one keeps to 95.
    Raises ValueError for no rows, or a score outside 0 to 1.
    """
    if not scores:
        raise ValueError("a rate of no rows")
    if not all(0 <= score <= 1 for score in scores):  # so asked, NaN is no score
        raise ValueError("a score outside 0 to 1")
    if families is None and set(scores) <= {0.0, 1.0}:
        return proportion(round(sum(scores)), len(scores))
    n = len(scores)
    average, error, freedom = _mean_and_error(scores, families)
    if families and average in (0.0, 1.0):  # one side won all: each family is one win
        alike = proportion(int(average) * len(set(families)), len(set(families)))
        return alike.model_copy(update={"n": n})
    if error == 0:
        return Figure(value=round(average, 6), n=n)
    worth = average * (1 - average) / error**2
    return _rounded(average, *_wilson(average, worth, _t(freedom)), n)


def bounds(scores: Sequence[float], unscored: int) -> tuple[Figure, Figure]:
    """The rate were every row without a score lost, and were every one won (Horowitz & Manski 2000).

    What is outside both intervals holds whatever became of those rows. Raises ValueError for no rows at all.
    """
    return rate([*scores, *[0.0] * unscored]), rate([*scores, *[1.0] * unscored])


def proportion(successes: int, n: int) -> Figure:
    """Share of `n` with Wilson's interval. Raises ValueError for no rows."""
    from scipy.special import ndtri

    if n == 0:
        raise ValueError("a share of no rows")
    return _rounded(successes / n, *_wilson(successes / n, n, float(ndtri((1 + CONFIDENCE) / 2))), n)


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


def rows_needed(difference: float, deviation: float, power: float = 0.8) -> int:
    """How many rows show a mean difference of this size: ((z₁₋α/₂ + z_power)·σ/δ)². Raises ValueError for none."""
    if not difference:
        raise ValueError("no number of rows shows a difference of 0")
    return math.ceil((smallest_difference(1, deviation, power) / difference) ** 2)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of the decisive prompts under a fair coin; 1.0 when there are none. Of 0/1 pairs: McNemar's."""
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _mean_and_error(values: Sequence[float], families: Sequence[Hashable] | None) -> tuple[float, float, float]:
    """Mean, its standard error and the degrees of freedom; no error where all are the same, or of one family.

    Of families: cluster-robust, without the bias of few and unequal ones: CR2 and its freedom (Bell & McCaffrey 2002).
    Where each has one row that is s/√n and n − 1.
    """
    n = len(values)
    average = math.fsum(values) / n
    if min(values) == max(values):
        return average, 0.0, 0.0
    if families is None:
        return average, math.sqrt(math.fsum((v - average) ** 2 for v in values) / (n - 1) / n), n - 1
    sizes: dict[Hashable, int] = defaultdict(int)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, family in zip(values, families, strict=True):
        sizes[family] += 1
        sums[family] += value - average
    if len(sizes) == 1 or max(map(abs, sums.values())) < 1e-9:  # no more than rounding
        return average, 0.0, 0.0
    variance = math.fsum(sums[family] ** 2 / (1 - size / n) for family, size in sizes.items()) / n**2
    shared = [size**2 / (n - size) for size in sizes.values()]
    others = math.fsum(shared) ** 2 - math.fsum(w**2 for w in shared)
    return average, math.sqrt(variance), n**2 / (sum(size**2 for size in sizes.values()) + others)


def _wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    weight = quantile**2 / n
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def _t(freedom: float) -> float:
    """What Student's t exceeds, either way, in 5 of 100 cases."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _rounded(value: float, low: float, high: float, n: int) -> Figure:
    return Figure(value=round(value, 6), ci_low=round(low, 6), ci_high=round(high, 6), n=n)


def as_record(results: Any) -> Any:
    """Figures and changes as plain values for a record, also those in mappings within."""
    if isinstance(results, dict):
        return {name: as_record(value) for name, value in results.items()}
    return results.model_dump(exclude_none=True) if isinstance(results, BaseModel) else results
