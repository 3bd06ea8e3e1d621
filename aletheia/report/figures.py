"""Figures as a person reads them: to two significant digits of their interval, never without it.

5.434 [5.345, 5.523]
"""

import math
from dataclasses import dataclass
from typing import Any

from aletheia.exp.reading import flat
from pipeline.records.metrics import Metric, metrics


@dataclass(frozen=True)
class Row:
    """A figure of a results table; of a change also what it was before, and the change."""

    name: str
    value: Metric
    before: Metric | None = None
    change: Metric | None = None
    unit: str = ""

    @property
    def reading(self) -> str:
        """What the change's interval says; nothing where there is none."""
        if self.change is None or self.change.ci_low is None or self.change.ci_high is None:
            return ""
        if self.change.ci_low <= 0 <= self.change.ci_high:
            return "no difference shown"
        return "rose" if self.change.value > 0 else "fell"

    @property
    def strip(self) -> dict[str, float] | None:
        """The change's interval beside 0, as percents of the width of a strip; None where there is no interval."""
        if self.change is None or self.change.ci_low is None or self.change.ci_high is None:
            return None
        begin, end = min(0.0, self.change.ci_low), max(0.0, self.change.ci_high)
        if not end > begin:
            return None
        places = {"zero": 0.0, "low": self.change.ci_low, "high": self.change.ci_high, "value": self.change.value}
        return {name: round(4 + 92 * (at - begin) / (end - begin), 2) for name, at in places.items()}


def rows(results: dict[str, Any]) -> list[Row]:
    """`eval_loss`, `eval_loss.before` and `eval_loss.delta` are one row. Changes first, then what has an interval."""
    found, leaves = metrics(results), dict(flat(results))
    told = []
    for name, metric in found.items():
        base, _, end = name.rpartition(".")
        if end not in ("before", "delta") or base not in found:
            unit = leaves.get(f"{name}.unit") or ""
            told.append(Row(name, metric, found.get(f"{name}.before"), found.get(f"{name}.delta"), str(unit)))
    return sorted(told, key=lambda row: 0 if row.change else 1 if row.value.ci_low is not None else 2)


def value(metric: Metric) -> str:
    return _number(metric.value, _decimals(metric))


def interval(metric: Metric) -> str:
    """`[5.345, 5.523]`, or nothing."""
    if metric.ci_low is None or metric.ci_high is None:
        return ""
    decimals = _decimals(metric)
    return f"[{_number(metric.ci_low, decimals)}, {_number(metric.ci_high, decimals)}]"


def text(metric: Metric) -> str:
    return f"{value(metric)} {interval(metric)}".rstrip()


def _decimals(metric: Metric) -> int | None:
    """As many as show two digits of half the interval; None where there is none."""
    if metric.ci_low is None or metric.ci_high is None:
        return None
    half = abs(metric.ci_high - metric.ci_low) / 2
    return max(0, min(8, 1 - math.floor(math.log10(half)))) if half > 0 and math.isfinite(half) else None


def _number(number: float, decimals: int | None) -> str:
    if abs(number) >= 1e15:
        return f"{number:.4g}"
    if decimals is not None:
        return f"{number:,.{decimals}f}"
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 10_000 else f"{number:.4g}"
