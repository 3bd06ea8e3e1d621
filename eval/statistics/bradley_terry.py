"""Three or more contestants from votes on pairs of them: a strength each, on one scale.

    win : tie : loss  =  exp(θ_a) : ν·exp((θ_a + θ_b)/2) : exp(θ_b)

Bradley & Terry 1952 with Davidson's ties (1970); the strengths θ sum to 0. The intervals come from the sums over a
prompt (sandwich), whose votes are not independent: both orders, all the pairs. Each θ has a normal prior of deviation
5, without which a contestant that won all would have no finite strength; its interval is no narrower than the model's
own, for residuals say nothing where one side won all.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

from pipeline.statistics import CONFIDENCE, Figure

PRIOR_PRECISION = 1 / 25


class Vote(NamedTuple):
    """`score`: 1 the first wins, ½ a tie, 0 the second wins. `prompt`: what the vote was about."""

    first: str
    second: str
    score: float
    prompt: Hashable


@dataclass(frozen=True)
class Ranking:
    """Best first. `wins[a, b]` is the chance that a wins over b when one of them does, with its interval."""

    strengths: dict[str, Figure]
    wins: dict[tuple[str, str], Figure]


def rank(votes: Sequence[Vote]) -> Ranking:
    """Strengths in log odds; n is the number of prompts.

    Raises ValueError for a score that is none, a contestant against itself, or groups that were never compared.
    """
    import numpy as np
    from scipy import stats

    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    _check(votes, names)
    first, second = (np.array([names.index(getattr(v, side)) for v in votes]) for side in ("first", "second"))
    design = np.eye(len(names))[first] - np.eye(len(names))[second]  # (votes, contestants)
    score = np.array([v.score for v in votes])
    known: dict[Hashable, int] = {}
    prompt = np.array([known.setdefault(v.prompt, len(known)) for v in votes])
    theta, covariances = _fit(design, score, prompt)
    n = len(known)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) if n > 1 else float("nan")

    def figure(contrast: Any, scale: Any) -> Figure:
        value = contrast @ theta
        half = t * float(max(contrast @ covariance @ contrast for covariance in covariances)) ** 0.5
        if n == 1:
            return Figure(value=round(float(scale(value)), 6), n=n)
        low, high = (round(float(scale(end)), 6) for end in (value - half, value + half))
        return Figure(value=round(float(scale(value)), 6), ci_low=low, ci_high=high, n=n)

    one = np.eye(len(names)) - 1 / len(names)  # beside the mean of all
    order = sorted(range(len(names)), key=lambda i: -theta[i])
    return Ranking(
        strengths={names[i]: figure(one[i], lambda x: x) for i in order},
        wins={
            (names[i], names[j]): figure(one[i] - one[j], lambda x: 1 / (1 + np.exp(-x)))
            for i, j in permutations(order, 2)
        },
    )


def _check(votes: Sequence[Vote], names: list[str]) -> None:
    if not votes:
        raise ValueError("a ranking of no votes")
    group = {name: {name} for name in names}
    for vote in votes:
        if vote.score not in (0.0, 0.5, 1.0):
            raise ValueError(f"a vote of {vote.score}; 1, 0.5 or 0")
        if vote.first == vote.second:
            raise ValueError(f"{vote.first} against itself")
        if group[vote.first] is not group[vote.second]:
            group[vote.first] |= group[vote.second]
            for name in group[vote.first]:
                group[name] = group[vote.first]
    if len(group[names[0]]) < len(names):
        raise ValueError(f"{names[0]} was never compared, even by way of others, with all of {', '.join(names)}")


def _fit(design: Any, score: Any, prompt: Any) -> tuple[Any, list[Any]]:
    """Newton's method; θ `(contestants,)` and two covariances of it: from the prompts' sums, and the model's own.

    The model is a multinomial logit: a vote's outcomes have the features (d/2, 0), (0, 1) and (−d/2, 0), d the row of
    `design`, and the parameters are θ and log ν. Without ties ν is left out.
    """
    import numpy as np

    votes, contestants = design.shape
    ties = bool((score == 0.5).any())
    features = np.zeros((votes, 3, contestants + 1))
    features[:, 0, :-1], features[:, 2, :-1], features[:, 1, -1] = design / 2, -design / 2, 1
    found = features[np.arange(votes), (2 * (1 - score)).astype(int)]
    prior = np.full(contestants + 1, PRIOR_PRECISION)
    parameters = np.zeros(contestants + 1)
    for _ in range(100):
        logits = features @ parameters + np.array([0.0, 0.0 if ties else -np.inf, 0.0])
        chance = np.exp(logits - logits.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        expected = np.einsum("vo,vop->vp", chance, features)
        curvature = np.einsum("vo,vop,voq->pq", chance, features, features) - expected.T @ expected + np.diag(prior)
        step = np.linalg.solve(curvature, (found - expected).sum(0) - prior * parameters)
        parameters += np.clip(step, -1, 1)
        if abs(step).max() < 1e-9:
            break
    residual = np.zeros((int(prompt.max()) + 1, contestants + 1))
    np.add.at(residual, prompt, found - expected)
    inverse = np.linalg.inv(curvature)
    correction = len(residual) / max(1, len(residual) - 1)
    clustered = correction * inverse @ residual.T @ residual @ inverse
    return parameters[:-1], [covariance[:-1, :-1] for covariance in (clustered, inverse)]
