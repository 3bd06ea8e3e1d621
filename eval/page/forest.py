"""A forest plot: every change with a better direction, its interval and 0, turned so that right is better.

Figures of one unit stand on one axis; each other unit has its own. Places are percents of the axis' width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.page.claims import SHARE, Claim

TICKS = 5  # about so many


@dataclass(frozen=True)
class Mark:
    """A claim on its axis; `low` and `high` are None where it has no interval."""

    claim: Claim
    at: float
    low: float | None
    high: float | None


@dataclass
class Panel:
    unit: str
    zero: float
    ticks: list[tuple[float, str]]
    marks: list[Mark] = field(default_factory=list)


def panels(claims: Sequence[Claim]) -> list[Panel]:
    """Of the claims that have a direction, by unit in the order they come."""
    by_unit: dict[str, list[Claim]] = {}
    for claim in claims:
        if claim.lower_is_better is not None:
            by_unit.setdefault(claim.unit, []).append(claim)
    return [panel for unit, found in by_unit.items() if (panel := _panel(unit, found))]


def _panel(unit: str, claims: list[Claim]) -> Panel | None:
    """None where there is nothing but zeros to draw."""
    turned = [_turned(claim) for claim in claims]
    ends = [0.0, *(end for three in turned for end in three if end is not None)]
    low, high = min(ends), max(ends)
    if not math.isfinite(high - low) or high == low:
        return None
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    zero = place(0.0)
    assert zero is not None
    step = _step((high - low) / TICKS)
    first, last = math.ceil(low / step), math.floor(high / step)
    ticks = [(place(i * step) or 0.0, _tick(i * step, step)) for i in range(first, last + 1)]
    found = Panel("percentage points" if unit == SHARE else unit, zero, ticks)
    for claim, (value, left, right) in zip(claims, turned, strict=True):
        found.marks.append(Mark(claim, place(value) or 0.0, place(left), place(right)))
    return found


def _turned(claim: Claim) -> tuple[float, float | None, float | None]:
    """Value and ends, more being better."""
    delta, scale = claim.change.delta, 100.0 if claim.unit == SHARE else 1.0
    sign = -scale if claim.lower_is_better else scale
    if delta.ci_low is None or delta.ci_high is None:
        return sign * delta.value, None, None
    left, right = sorted((sign * delta.ci_low, sign * delta.ci_high))
    return sign * delta.value, left, right


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _tick(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step)))
    return "0" if abs(value) < step / 2 else f"{value:+.{decimals}f}".replace("-", "−")
