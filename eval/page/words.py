"""Figures as a person reads them: to two digits of their interval, shares in per cent, never without n."""

import math

from eval.page.claims import SHARE, Claim
from pipeline.statistics import Figure


def figure(found: Figure, unit: str = "", sign: str = "") -> str:
    """`5.47 [5.45, 5.49]`, `41 % [38, 44]`; with `sign`, of a change: `+6.0 points [3.1, 8.9]`."""
    scale = 100 if unit == SHARE else 1
    decimals = _decimals(found, scale)
    value = number(found.value * scale, decimals, sign)
    after = ("" if unit != SHARE else " points") if sign else (" %" if unit == SHARE else "")
    if found.ci_low is None or found.ci_high is None:
        return f"{value}{after}"
    ends = (number(end * scale, decimals, sign) for end in (found.ci_low, found.ci_high))
    return f"{value}{after} [{', '.join(ends)}]"


def change(claim: Claim) -> str:
    """`6.00 → 5.47`, or of a rate `83 %, chance 50 %`."""
    scale = 100 if claim.unit == SHARE else 1
    decimals = _decimals(claim.change.delta, scale)
    before, after = (number(f.value * scale, decimals) for f in (claim.change.before, claim.change.after))
    per_cent = " %" if claim.unit == SHARE else ""
    if claim.chance is not None:
        return f"{after}{per_cent}, chance {number(claim.chance * 100, 0)}{per_cent}"
    return f"{before} → {after}{per_cent}"


def delta(claim: Claim) -> str:
    unit = f" {claim.unit}" if claim.unit not in (SHARE, "") else ""
    return f"{bare(claim)}{unit}"


def bare(claim: Claim) -> str:
    """The change without its unit, where that is said beside it."""
    return figure(claim.change.delta, claim.unit, "+")


def number(value: float, decimals: int | None, sign: str = "") -> str:
    if abs(value) >= 1e9 or (value and abs(value) < 1e-6):
        return f"{value:{sign}.3g}"
    if decimals is not None:
        return f"{value:{sign},.{decimals}f}".replace("-", "−")
    return f"{value:{sign},.4g}".replace("-", "−")


def _decimals(found: Figure, scale: int) -> int | None:
    """As many as show two digits of half the interval; None where there is none."""
    if found.ci_low is None or found.ci_high is None:
        return None
    half = abs(found.ci_high - found.ci_low) / 2 * scale
    return max(0, min(6, 1 - math.floor(math.log10(half)))) if half > 0 and math.isfinite(half) else None
