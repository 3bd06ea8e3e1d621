"""A win-rate as it would be were both answers equally long.

    logit P(win) = θ + φ·tanh(Δ / s), Δ the difference of the lengths and s its standard deviation

The rate is P at Δ = 0 (Dubois et al. 2024, arXiv 2404.04475). Both parameters are fitted anew in every bootstrap sample of
the questions, so the interval holds what the fit does not know. Half a win and half a loss of equal length are added to
the questions, and φ has a normal prior of deviation 5 (an odds ratio of 150): without them a sample in which one side won
all, or all of its longer answers, would have no finite fit.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.statistics import CONFIDENCE, Figure

SAMPLES = 500
PRIOR_PRECISION = 1 / 25
FEWEST = 10  # questions; fewer do not tell length from quality


def length_controlled(scores: Sequence[float], differences: Sequence[float], seed: int = 0) -> Figure | None:
    """`scores` 1, ½ or 0 a question, `differences` of its two lengths; the interval is a bootstrap t on the log odds.

    None where they cannot tell the two apart: all answers differ alike in length, or all decisive questions went to the
    longer answer, or all to the shorter.
    """
    import numpy as np
    from scipy import stats
    from scipy.special import expit as sigmoid

    won, difference = np.asarray(scores, float), np.asarray(differences, float)
    n, spread = len(won), difference.std()
    if n < FEWEST or spread == 0 or len(set(np.sign((won - 0.5) * difference)) - {0.0}) < 2:
        return None
    longer = np.tanh(difference / spread)
    resampled = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), SAMPLES)
    odds = _log_odds_at_equal_length(longer, won, np.ones((1, n)))[0]
    deviation = _log_odds_at_equal_length(longer, won, resampled).std(ddof=1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 2) * deviation * (n / (n - 2)) ** 0.5
    value, low, high = (round(float(sigmoid(x)), 6) for x in (odds, odds - half, odds + half))
    return Figure(value=value, ci_low=low, ci_high=high, n=n)


def _log_odds_at_equal_length(longer: Any, won: Any, weights: Any) -> Any:
    """Newton's method for each row of `weights` `(samples, questions)`; returns θ `(samples,)`."""
    import numpy as np
    from scipy.special import expit as sigmoid

    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(50):
        p = sigmoid(theta[:, None] + phi[:, None] * longer)
        at_equal = sigmoid(theta)
        residual, variance = weights * (won - p), weights * p * (1 - p)
        gradient = residual.sum(1) + 0.5 - at_equal, residual @ longer - PRIOR_PRECISION * phi
        a, b, c = variance.sum(1) + at_equal * (1 - at_equal), variance @ longer, variance @ longer**2 + PRIOR_PRECISION
        determinant = a * c - b * b
        steps = (c * gradient[0] - b * gradient[1]) / determinant, (a * gradient[1] - b * gradient[0]) / determinant
        theta, phi = (value + np.clip(step, -1, 1) for value, step in zip((theta, phi), steps, strict=True))
        if max(abs(steps[0]).max(), abs(steps[1]).max()) < 1e-7:
            break
    return theta
