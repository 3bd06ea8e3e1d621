"""Figures out of what people write into their tables.

0.93, "0.93"                    0.93
"~3e-8"                         {value: 3e-8, text: ~3e-8}
"1.49 [1.48, 1.50]"             {value: 1.49, ci_low: 1.48, ci_high: 1.5}
"41 ms", "93.2 %"               {value: 41, text: 41 ms}
"0.29 ± 0.02"                   {value: 0.29, text: 0.29 ± 0.02}: ± of what is not said
"< 1e-5"                        {text: < 1e-5}: a bound is no value
"""

import math
import re
from typing import Any

from aletheia.exp.foreign import LONG, number, plain

INTERVALS = ("ci_95", "ci95", "ci", "interval", "confidence_interval", "95_ci")
BESIDE = {"name", "target", "unit", "status", "passed", "notes", "n", "ci_low", "ci_high", *INTERVALS}
_N = r"([-+−]?\d[\d.]*(?:[eE][-+−]?\d+)?)"
_UNIT = r"(?:%|s|ms|min|h|x|[KMG]i?B|nats|bits|tok(?:ens)?/s)"
_ABOUT = re.compile(rf"(?:~|≈|ca?\.|about )?\s*{_N}\s*{_UNIT}?(?:\s*(?:±|\+/-)\s*{_N}\s*{_UNIT}?)?")
_INTERVAL = re.compile(rf"{_N}\s*(?:\[|\((?:95\s*%\s*)?CI:?\s*)\s*{_N}\s*(?:,|;|–|to)\s*{_N}\s*[\])]")
_BOUND = re.compile(rf"(?:<=?|>=?|≤|≥)\s*{_N}\s*{_UNIT}?")


def results(person: dict[str, Any]) -> dict[str, Any]:
    """The program's `results` of an imported record."""
    found: dict[str, Any] = {}
    metrics = _of_rows(person["metrics"]) if isinstance(person.get("metrics"), list) else figures(person.get("metrics"))
    if metrics:
        found["metrics"] = metrics
    epochs = person.get("epochs") or {}
    named = {key: figures(epochs.get(key)) for key in ("best", "latest")}
    if any(named.values()):
        found["epochs"] = {key: value for key, value in named.items() if value}
    return found


def figures(value: Any) -> Any:
    """A figure, a mapping of figures by name, or None where there is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value if math.isfinite(value) else {"text": str(value)}
    if isinstance(value, str):
        return _figure(value)
    if not isinstance(value, dict):
        return None
    if "value" in value:
        return _with_interval(value)
    inner = {plain(str(key)): found for key, child in value.items() if (found := figures(child)) is not None}
    return inner or None


def _of_rows(rows: list[Any]) -> dict[str, Any]:
    """A table: by the name in each row, or by what stands in its first column."""
    found: dict[str, Any] = {}
    for row in rows:
        if not isinstance(row, dict) or not row:
            continue
        name = plain(str(row.get("name") or next(iter(row.values()))))
        columns = {key: value for key, value in row.items() if plain(key) not in BESIDE}
        figure = _with_interval(row) if "value" in row else figures(columns)
        if figure is not None and name and name not in found:
            found[name] = figure
    return found


def _with_interval(row: dict[str, Any]) -> Any:
    figure = figures(row["value"]) if not isinstance(row["value"], dict) else None
    if figure is None:
        return None
    interval = next((row[key] for key in row if plain(key) in INTERVALS), None)
    low, high = (
        interval if isinstance(interval, list) and len(interval) == 2 else (row.get("ci_low"), row.get("ci_high"))
    )
    more = {key: value for key, value in (("ci_low", low), ("ci_high", high)) if _is_number(value)}
    if isinstance(row.get("n"), int) and not isinstance(row["n"], bool):
        more["n"] = row["n"]
    if not more:
        return figure
    return (figure if isinstance(figure, dict) else {"value": figure}) | more


def _figure(text: str) -> Any:
    text = text.strip().strip("*`").strip()
    if len(text) > LONG:
        return None
    if (exact := number(text)) is not None:
        return exact
    if match := _INTERVAL.fullmatch(text):
        ends = [_number(match[group]) for group in (1, 2, 3)]
        if None not in ends:
            return dict(zip(("value", "ci_low", "ci_high"), ends, strict=True))
    if (match := _ABOUT.fullmatch(text)) and (value := _number(match[1])) is not None:
        return {"value": value, "text": text}
    return {"text": text} if _BOUND.fullmatch(text) else None


def _number(text: str) -> int | float | None:
    return number(text.replace("−", "-"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
