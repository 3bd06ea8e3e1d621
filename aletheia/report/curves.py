"""A training's log as charts: `experiments/EXP-…/log.jsonl`, one JSON object a line, drawn with at most 1000 points a curve.

Where there are more, each stretch keeps its lowest and its highest: no spike is lost. What could not be read, was not
finite or stands twice is said beside the charts.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

MAX_POINTS = 1000
STRETCHES = 150  # columns of the picture of gradients by layer
BY_LAYER = "grad_norm_by_layer"
# Title, unit, and (name, key in the log) of each curve.
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "", (("training", "loss"), ("validation", "eval_loss"))),
    (
        "Preference accuracy",
        "share of pairs",
        (("training", "rewards/accuracies"), ("validation", "eval_preference_accuracy")),
    ),
    ("Reward margin", "nats", (("training", "rewards/margins"),)),
    ("Learning rate", "", (("learning rate", "learning_rate"),)),
    ("Gradient norm", "before clipping", (("gradient norm", "grad_norm"),)),
    ("Update size", "‖Δθ‖ / ‖θ‖ of the adapter", (("update", "update_norm"),)),
    ("Memory", "GB", (("memory", "memory_gb"),)),
    ("Speed", "tokens a second", (("speed", "tokens_per_second"),)),
)
_PLACES = {"step", "epoch", "tokens", "num_tokens", BY_LAYER}
_ENDS = ("_ci_low", "_ci_high", "_n")


@dataclass
class Log:
    """Values by key and step. The later of two lines of one step counts: a resume writes again what was lost."""

    values: dict[str, dict[float, float]] = field(default_factory=dict)
    layers: dict[str, dict[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def not_drawn(self) -> list[str]:
        """Keys of the log that no chart shows."""
        drawn = {key for _, _, curves in CHARTS for _, key in curves}
        return sorted(k for k in self.values if k not in drawn | _PLACES and not k.endswith(_ENDS))


def read_log(path: Path) -> Log | None:
    """None where there is no log."""
    log, unreadable = Log(), 0
    twice: set[float] = set()
    not_finite: dict[str, list[float]] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    step, entry = _parse(line)
                except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
                    unreadable += 1
                    continue
                if any(step in log.values.get(key, {}) for key in entry if key not in _PLACES):
                    twice.add(step)
                for key, value in entry.items():
                    if key == BY_LAYER and isinstance(value, dict):
                        for layer, norm in value.items():
                            _put(log.layers.setdefault(layer, {}), step, norm)
                    elif not _put(log.values.setdefault(key, {}), step, value):
                        not_finite.setdefault(key, []).append(step)
    except OSError as error:
        return None if isinstance(error, FileNotFoundError) else Log(notes=[f"{path.name}: {error.strerror}"])
    if unreadable:
        log.notes.append(f"lines of {path.name} that are of no step: {unreadable:,}")
    if twice:
        log.notes.append(
            f"steps that stand in {path.name} twice (a resume), of which the later is drawn: {len(twice):,}"
        )
    for key, steps in not_finite.items():
        log.notes.append(f"{key} is no finite number at step {_short(steps[0])}{_others(len(steps) - 1)}")
    return log


def charts(log: Log) -> Iterator[dict[str, Any]]:
    """What the page draws, each with its title, its unit and what was left out of it."""
    for title, unit, curves in CHARTS:
        lines = [_line(name, key, log) for name, key in curves if log.values.get(key)]
        if lines:
            whole = sum(line["of"] for line in lines)
            drawn = sum(len(line["x"]) for line in lines)
            note = f"{drawn:,} of {whole:,} points: the lowest and highest of each stretch" if drawn < whole else ""
            yield {"title": title, "unit": unit, "note": note, "x": "step", "lines": lines}
    if any(log.layers.values()):
        yield _by_layer(log.layers)


def thin(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """The places of the points to draw: all, or the lowest and highest of each of `limit / 2` stretches."""
    if len(values) <= limit:
        return list(range(len(values)))
    places: set[int] = set()
    for stretch in _stretches(len(values), limit // 2):
        places |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(places)


def _parse(line: str) -> tuple[float, dict[str, Any]]:
    entry = json.loads(line)
    step = float(entry["step"])
    if not math.isfinite(step):
        raise ValueError(f"step {step}")
    return step, entry


def _put(curve: dict[float, float], step: float, value: Any) -> bool:
    """Whether it was a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return not isinstance(value, str)  # `"nan"`; other things are no figures at all
    try:
        if not math.isfinite(value):
            return False
        curve[step] = float(value)
    except OverflowError:
        return False
    return True


def _others(count: int) -> str:
    return f" and {count:,} later" if count else ""


def _line(name: str, key: str, log: Log) -> dict[str, Any]:
    curve = sorted(log.values[key].items())
    kept = [curve[place] for place in thin([value for _, value in curve])]
    line: dict[str, Any] = {
        "name": name,
        "x": [_short(step) for step, _ in kept],
        "y": [_short(value) for _, value in kept],
        "of": len(curve),
    }
    low, high = log.values.get(f"{key}_ci_low", {}), log.values.get(f"{key}_ci_high", {})
    if low and high:
        line |= {"low": [_short(low.get(s)) for s, _ in kept], "high": [_short(high.get(s)) for s, _ in kept]}
    rows = log.values.get("eval_n", {}) if key.startswith("eval_") else {}
    if rows:
        line["n"] = [_short(rows.get(step)) for step, _ in kept]
    return line


def _by_layer(layers: dict[str, dict[float, float]]) -> dict[str, Any]:
    """A row a layer, a column a stretch of steps, each cell the largest norm in it."""
    steps = sorted({step for curve in layers.values() for step in curve})
    columns = [[steps[place] for place in stretch] for stretch in _stretches(len(steps), STRETCHES)]
    names = sorted(layers, key=_layer_order)
    cells = [[max((layers[n][s] for s in column if s in layers[n]), default=None) for column in columns] for n in names]
    note = (
        f"each cell the largest of its stretch of up to {max(map(len, columns))} steps"
        if len(columns) < len(steps)
        else ""
    )
    return {
        "title": "Gradient norm by layer",
        "unit": "logarithmic colours",
        "note": note,
        "x": "step",
        "cells": [[_short(cell) for cell in row] for row in cells],
        "columns": [_short(column[0]) for column in columns],
        "rows": [str(name) for name in names],
    }


def _stretches(length: int, wanted: int) -> list[range]:
    bounds = [length * i // min(wanted, length) for i in range(min(wanted, length) + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _layer_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() and len(part) < 9 else (-1, part) for part in name.split(".")], name


def _short(value: float | None) -> float | int | None:
    """Five digits are more than a screen shows."""
    if value is None:
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.5g}")
