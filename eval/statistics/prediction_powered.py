"""A win-rate from a few people and a judge that scored many more: people say what is true, the judge narrows it.

    rate = λ·mean(judge on the prompts of its own) + mean(people − λ·judge on the prompts of both)

Whatever the judge's bias it cancels between the two means, and λ is fitted so that a judge that knows nothing gets no
say: prediction-powered inference (Angelopoulos et al. 2023, arXiv 2301.09633), tuned (PPI++, arXiv 2311.01453).
It holds as long as people saw a random part of the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import statistics
from pipeline.statistics import CONFIDENCE, Figure

FEWEST = 10  # prompts that people scored; fewer do not tell how wrong the judge is


@dataclass(frozen=True)
class Corrected:
    """`rate` by both; `judge_weight` is λ; beside it what people alone and the judge alone say.

    `worth` is how many prompts people would have to score to know as much without the judge.
    """

    rate: Figure
    judge_weight: float
    people_alone: Figure
    judge_alone: Figure
    worth: int


def corrected(
    people: Sequence[float], judge: Sequence[float], judge_elsewhere: Sequence[float], weight: float | None = None
) -> Corrected:
    """Scores of 0 to 1: of people and of the judge on the same prompts, and of the judge on prompts no one else scored.

    `weight`: λ, which 1 makes the untuned method; by default the best between 0 and 1. Raises ValueError for fewer
    than 10 prompts of both, or 2 of the judge's own.
    """
    import numpy as np
    from scipy import stats

    seen, judged, elsewhere = (np.asarray(x, float) for x in (people, judge, judge_elsewhere))
    n, many = len(seen), len(elsewhere)
    if len(judged) != n:
        raise ValueError("one score of the judge to each of people's")
    if n < FEWEST or many < 2:
        raise ValueError(f"{FEWEST} prompts that people scored, and 2 that the judge alone did, or more of either")
    everywhere = np.concatenate([judged, elsewhere])
    weights = np.full(n, weight) if weight is not None else _weights(seen, judged, everywhere)
    weight, left = float(weights.mean()), seen - weights * judged
    value = weight * elsewhere.mean() + left.mean()
    variance = weight**2 * elsewhere.var(ddof=1) / many + left.var(ddof=1) / n
    people_alone = statistics.rate(people)
    rate = Figure(value=round(float(value), 6), n=n + many)
    if variance > 0:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * variance**0.5
        ends = (round(float(np.clip(end, 0, 1)), 6) for end in (value - half, value + half))
        rate = rate.model_copy(update=dict(zip(("ci_low", "ci_high"), ends, strict=True)))
    worth = round(seen.var(ddof=1) / variance) if variance > 0 else n
    return Corrected(rate, round(weight, 4), people_alone, statistics.rate(everywhere.tolist()), worth)


def _weights(seen: Any, judged: Any, everywhere: Any) -> Any:
    """The best λ for each prompt `(n,)`, fitted without its people's score: one fitted with it biases the rate."""
    import numpy as np

    n, spread = len(seen), everywhere.var(ddof=1) * len(everywhere) / (len(everywhere) - len(seen))
    products = (seen - seen.mean()) * (judged - judged.mean())
    without = (products.sum() - n / (n - 1) * products) / (n - 2)
    return np.clip(without / spread, 0, 1) if spread else np.zeros(n)
