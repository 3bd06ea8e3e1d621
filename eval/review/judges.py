"""What automatic judges said of the same answers, from the files beside an evaluation's record."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.names import BASE, MODEL
from pipeline.records import items
from pipeline.records.metrics import as_metric

VERDICTS = "verdicts.jsonl"


def scores(folder: Path, against: str, primary: str) -> dict[str, dict[str, float]]:
    """By judge, then by the prompt's id: 1 where the model is the better, 0 where `against` is.

    `primary`: what the judge of `answers.jsonl` is called, whose scores are of the model against its base.
    """
    found: dict[str, dict[str, float]] = {}
    if against == BASE:
        for prompt, score in _read(items.read(folder / items.ANSWERS)):
            found.setdefault(primary, {})[prompt] = score
    for row in items.read(folder / VERDICTS):
        judge, sides = row.get("judge"), (row.get("model"), row.get("against"))
        if not isinstance(judge, str) or set(sides) != {MODEL, against}:
            continue
        for prompt, score in _read([row]):
            found.setdefault(judge, {})[prompt] = score if sides == (MODEL, against) else 1 - score
    return found


def _read(rows: Iterable[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    for row in rows:
        prompt, score = row.get("id"), as_metric(row.get("score"))
        if isinstance(prompt, str) and score and 0 <= score.value <= 1:
            yield prompt, score.value
