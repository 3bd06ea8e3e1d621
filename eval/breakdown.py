"""Held-out figures taken apart: perplexity, every token alike, and by domain or fault.

A set of rows seen in ten parts shows a difference somewhere by chance alone: every part carries `holm_p`, its p adjusted
for all of them. Loss is a mean over rows of each row's mean −log p a token, so perplexity is exp of that mean.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pipeline import statistics
from pipeline.statistics import CONFIDENCE, Change, Figure


def perplexity(change: Change) -> dict[str, Figure]:
    """Of a change in loss, nats a token: both perplexities, and `ratio`, after / before, whose interval is the paired one."""
    ends = {"before": change.before, "after": change.after, "ratio": change.delta}
    return {name: _exp(figure) for name, figure in ends.items()}


def by_token(before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> Change:
    """The change in loss were every token worth the same, and not every row: long rows then count more.

    Its error is clustered by row, CR2 with its freedom (Bell & McCaffrey 2002).
    """
    deltas = [a - b for b, a in zip(before, after, strict=True)]
    return Change(before=_weighted(before, tokens), after=_weighted(after, tokens), delta=_weighted(deltas, tokens))


def changes_by(groups: Sequence[str], before: Sequence[float], after: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The paired change of each group's rows, with `holm_p` where it has an interval."""
    ends: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for group, pair in zip(groups, zip(before, after, strict=True), strict=True):
        ends[group].append(pair)
    changes = {
        group: statistics.paired([b for b, _ in ends[group]], [a for _, a in ends[group]]) for group in sorted(ends)
    }
    p_values = {group: p_value([a - b for b, a in pairs]) for group, pairs in ends.items()}
    return with_holm(statistics.as_record(changes), p_values)


def shares_by(groups: Sequence[str], deltas: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Of each group the share of rows whose delta is above 0, with `holm_p` of the sign test."""
    found: dict[str, list[float]] = defaultdict(list)
    for group, delta in zip(groups, deltas, strict=True):
        found[group].append(delta)
    gained = {group: (sum(d > 0 for d in found[group]), len(found[group])) for group in sorted(found)}
    shares = {group: statistics.proportion(wins, n) for group, (wins, n) in gained.items()}
    p_values: dict[str, float | None] = {
        group: statistics.sign_test(wins, sum(d < 0 for d in found[group])) for group, (wins, _) in gained.items()
    }
    return with_holm(statistics.as_record(shares), p_values)


def told(changes: dict[str, dict[str, Any]], lower_is_better: bool) -> str:
    """One line of `changes_by`'s: where there is a difference, and how few rows the others have."""
    found: dict[str, list[str]] = defaultdict(list)
    for group, facts in changes.items():
        change = Change.model_validate(facts)
        shown = facts.get("holm_p", 1.0) < 1 - CONFIDENCE
        verdict = change.verdict(lower_is_better) if shown else "no difference shown"
        found[verdict].append(f"{group} (n = {change.delta.n})")
    return "; ".join(f"{verdict}: {', '.join(groups)}" for verdict, groups in found.items())


def p_value(deltas: Sequence[float]) -> float | None:
    """Of Student's t test that the mean is 0; None of one row, or of rows that are all alike."""
    from scipy.special import stdtr

    figure, n = statistics.mean(deltas), len(deltas)
    if figure.ci_low is None:
        return None
    average = math.fsum(deltas) / n
    error = math.sqrt(math.fsum((d - average) ** 2 for d in deltas) / (n - 1) / n)
    return float(2 * stdtr(n - 1, -abs(average) / error))


def with_holm(figures: dict[str, dict[str, Any]], p_values: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """Each figure with its p, adjusted for as many as have one."""
    adjusted = statistics.holm({name: p for name, p in p_values.items() if p is not None})
    return {
        name: figure | ({"holm_p": round(adjusted[name], 4)} if name in adjusted else {})
        for name, figure in figures.items()
    }


def _exp(figure: Figure) -> Figure:
    """Whole orders of magnitude, as of two rows, are no interval a person can use: one that overflows is left out."""
    try:
        ends = [None if end is None else math.exp(end) for end in (figure.value, figure.ci_low, figure.ci_high)]
    except OverflowError:
        return Figure(value=round(math.exp(min(figure.value, 700.0)), 6), n=figure.n)
    value, low, high = (None if end is None else round(end, 6) for end in ends)
    return Figure(value=value or 0.0, ci_low=low, ci_high=high, n=figure.n)


def _weighted(values: Sequence[float], weights: Sequence[int]) -> Figure:
    """As `statistics.mean` of every token's value with the rows as families, without a value a token."""
    from scipy.special import stdtrit

    total = sum(weights)
    average = math.fsum(w * v for v, w in zip(values, weights, strict=True)) / total
    figure = Figure(value=round(average, 6), n=len(values))
    squares = [(w * (v - average)) ** 2 / (1 - w / total) for v, w in zip(values, weights, strict=True) if w < total]
    if not math.fsum(squares):
        return figure
    shared = [w**2 / (total - w) for w in weights]
    others = math.fsum(shared) ** 2 - math.fsum(s**2 for s in shared)
    freedom = total**2 / (sum(w**2 for w in weights) + others)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(math.fsum(squares)) / total
    return figure.model_copy(update={"ci_low": round(average - half, 6), "ci_high": round(average + half, 6)})
