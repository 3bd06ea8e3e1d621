"""How far votes agree: people among themselves, a judge with people, a judge with itself when the sides are swapped.

Krippendorff's alpha is 1 − observed / expected disagreement: 1 all agree, 0 as by chance, below 0 worse than chance
(Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"). Votes may be missing anywhere.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import statistics
from pipeline.statistics import CONFIDENCE, Figure

SAMPLES = 500
FEWEST = 3  # units on which votes differ; fewer do not tell how rare that is
Score = float | None  # 1, ½ or 0 for a side; None: not voted


def alpha(
    units: Sequence[Sequence[Any]], level: Literal["nominal", "ordinal"] = "nominal", seed: int = 0
) -> Figure | None:
    """Krippendorff's alpha of the votes on each unit, None where missing; units of fewer than two votes say nothing.

    `ordinal`: votes are numbers, and count by rank. The interval is a bootstrap of the units (Zapf et al. 2016), as t
    on the log of 1 − alpha; none where votes differ on fewer than 3 units. None where all votes are the same, or none
    can be paired.
    """
    import numpy as np
    from scipy import stats

    votes = [[v for v in unit if v is not None] for unit in units]
    votes = [unit for unit in votes if len(unit) > 1]
    cast: set[Hashable] = {v for unit in votes for v in unit}
    if len(cast) < 2:
        return None
    place = {value: i for i, value in enumerate(sorted(cast) if level == "ordinal" else cast)}  # type: ignore[type-var]
    counts = np.zeros((len(votes), len(place)))
    for i, unit in enumerate(votes):
        for value in unit:
            counts[i, place[value]] += 1
    n = len(votes)
    value = float(_alphas(counts, np.ones((1, n)), level)[0])
    if (counts.max(1) < counts.sum(1)).sum() < FEWEST:
        return Figure(value=round(value, 6), n=n)
    resampled = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), SAMPLES)
    disagreements = 1 - _alphas(counts, resampled, level)
    disagreements = disagreements[disagreements > 0]  # not samples in which all agree, nor NaN, of one value alone
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.log(disagreements).std(ddof=1) * (n / (n - 1)) ** 0.5
    low, high = (round(float(1 - (1 - value) * np.exp(sign * half)), 6) for sign in (1, -1))
    return Figure(value=round(value, 6), ci_low=low, ci_high=high, n=n)


def _alphas(counts: Any, weights: Any, level: str) -> Any:
    """Of `counts` `(units, values)` for each row of `weights` `(samples, units)`; NaN where one value is left."""
    import numpy as np

    votes = counts.sum(1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    together = np.tensordot(weights, pairs / (votes - 1)[:, None, None], 1)  # the coincidence matrices
    totals = together.sum(2)
    if level == "ordinal":
        rank = totals.cumsum(1) - totals / 2
        distance = (rank[:, :, None] - rank[:, None, :]) ** 2
    else:
        distance = 1 - np.eye(counts.shape[1])
    observed = (together * distance).sum((1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * distance).sum((1, 2)) / (totals.sum(1) - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - observed / expected


def on_decisive(scores: Sequence[Score], others: Sequence[Score]) -> Figure | None:
    """Share of the prompts on which both name a winner where it is the same one; None where there is no such prompt."""
    both = [(a, b) for a, b in zip(scores, others, strict=True) if a not in (None, 0.5) and b not in (None, 0.5)]
    return statistics.proportion(sum(a == b for a, b in both), len(both)) if both else None


@dataclass(frozen=True)
class WithPeople:
    """A judge beside people: `same` verdict, ties included; `on_decisive` alone; `alpha`, with chance taken out.

    `among_people` is how far they agree with one another: no judge is held to more.
    """

    same: Figure
    on_decisive: Figure | None
    alpha: Figure | None
    among_people: Figure | None


def with_people(judge: Sequence[Score], people: Sequence[Sequence[Score]]) -> WithPeople:
    """`people`: each prompt's votes; their verdict is the side that most of the decisive ones name, else a tie.

    Raises ValueError where no prompt has both.
    """
    verdicts = [_majority(votes) for votes in people]
    both = [(j, p) for j, p in zip(judge, verdicts, strict=True) if j is not None and p is not None]
    return WithPeople(
        same=statistics.proportion(sum(j == p for j, p in both), len(both)),
        on_decisive=on_decisive(judge, verdicts),
        alpha=alpha(both, "ordinal"),
        among_people=alpha(people, "ordinal"),
    )


def _majority(votes: Sequence[Score]) -> Score:
    cast = [v for v in votes if v is not None]
    if not cast:
        return None
    balance = sum(v - 0.5 for v in cast)
    return 0.5 if balance == 0 else float(balance > 0)


@dataclass(frozen=True)
class Positions:
    """Whether the order of the sides mattered; `p_value` is the sign test of first against second."""

    consistent: Figure
    favoured_first: int
    favoured_second: int
    p_value: float


def positions(shown_first: Sequence[float], shown_second: Sequence[float]) -> Positions:
    """The scores of one side on the same prompts, shown first and shown second. Raises ValueError for none."""
    pairs = list(zip(shown_first, shown_second, strict=True))
    first, second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    consistent = statistics.proportion(len(pairs) - first - second, len(pairs))
    return Positions(consistent, first, second, statistics.sign_test(first, second))
