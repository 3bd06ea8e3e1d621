"""The figures of a record as a table: values with their intervals, and of a change both ends and the difference."""

from collections.abc import Iterator
from typing import Any

from aletheia.exp.reading import figure, flat, interval, number, short, table
from pipeline.records.metrics import Metric, as_metric, metrics

PARTS = {"value", "ci_low", "ci_high", "n", "before", "after", "delta", "unit"}  # of a figure or a change


def figure_table(results: dict[str, Any]) -> list[str]:
    found, leaves = metrics(results), dict(flat(results))
    rows = []
    for path, metric in found.items():
        if path.endswith((".before", ".delta")) and path.rpartition(".")[0] in found:
            continue
        before, delta = found.get(f"{path}.before"), found.get(f"{path}.delta")
        shown, sign = (delta, "+") if delta else (metric, "")
        rows.append(
            (
                path,
                f"{number(before.value)} → {number(metric.value)}" if before else number(metric.value),
                number(delta.value, "+") if delta else "",
                interval(shown, sign),
                "" if shown.n is None else shown.n,
                short(leaves.get(f"{path}.unit", "")),
                "no difference shown" if delta and not excludes_0(delta) else "",
            )
        )
    return table(("", "value", "change", "95 % interval", "n", "unit", ""), rows)


def besides(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What else the results hold: words, and what stands inside a figure."""
    return _besides(results, metrics(results), "")


def excludes_0(delta: Metric) -> bool:
    """Whether a difference lies outside the noise; without an interval it shows nothing."""
    return delta.ci_low is not None and delta.ci_high is not None and (delta.ci_low > 0 or delta.ci_high < 0)


def _besides(values: dict[str, Any], found: dict[str, Metric], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = as_metric(value)
            if inner and path not in found:
                yield path, figure(inner)
            yield from _besides({k: v for k, v in value.items() if not (inner and k in PARTS)}, found, f"{path}.")
        elif path not in found and value not in (None, "", []):
            yield path, short(value)
