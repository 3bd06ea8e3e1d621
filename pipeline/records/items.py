"""What lies beside a record line by line: the rows that it used, and its figures item by item.

    rows.jsonl      {"part": "train", "id", "sha256"}                      which rows, so that two records can be compared
    items.jsonl     {"figure": "eval_loss", "id", "value"}, or with "before" and "after" in place of "value"
    heldout.jsonl   {"id", "before", "after"}    of a training: the loss of sft's rows, the margin of dpo's pairs
    answers.jsonl   {"id", "score", …}           of an evaluation: the win-rate

Figures of two records are paired by these ids. A line that is torn or no object is passed over, aloud.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.progress import say
from pipeline.records.metrics import as_metric

ROWS, ITEMS, HELD_OUT, ANSWERS = "rows.jsonl", "items.jsonl", "heldout.jsonl", "answers.jsonl"
HELD_OUT_FIGURE = {"sft": "eval_loss", "dpo": "margin"}


def write_rows(folder: Path, parts: Mapping[str, Mapping[str, str]]) -> None:
    """`parts`: the rows' hashes by id, by the part's name in the record's `data` (`train`, `sft.held_out`)."""
    _write(
        folder / ROWS,
        ({"part": part, "id": i, "sha256": sha256} for part, found in parts.items() for i, sha256 in found.items()),
    )


def write_changes(folder: Path, changes: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """`changes`: before and after by item, by the figure's path in the record's `results`."""
    lines = (
        {"figure": figure, "id": item, "before": before, "after": after}
        for figure, ends in changes.items()
        for item, (before, after) in ends.items()
    )
    _write(folder / ITEMS, lines)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes by id, by part; empty where the record is older than `rows.jsonl`."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for line in read(folder / ROWS):
        part, item, sha256 = (line.get(key) for key in ("part", "id", "sha256"))
        if isinstance(part, str) and isinstance(item, str) and isinstance(sha256, str):
            found[part][item] = sha256
    return dict(found)


def digest(hashes: Iterable[str]) -> str:
    """One hash for a set of rows, whatever their order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def values(folder: Path, stage: str) -> dict[str, dict[str, float]]:
    """Values by item, by the figure's path; of a change its end, its `.before` and its `.delta`."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, figure, key in (
        (ITEMS, None, "value"),
        (HELD_OUT, HELD_OUT_FIGURE.get(stage), "value"),
        (ANSWERS, "win_rate", "score"),
    ):
        for line in read(folder / name):
            path, item = line.get("figure", figure), line.get("id")
            if not isinstance(path, str) or not isinstance(item, str):
                continue
            value, before, after = (as_metric(line.get(k)) for k in (key, "before", "after"))
            if value:
                found[path][item] = value.value
            elif before and after:
                found[path][item] = after.value
                found[f"{path}.before"][item] = before.value
                found[f"{path}.delta"][item] = after.value - before.value
                if path == "margin":  # as dpo and eval count it: the margin rose
                    found["preference_accuracy"][item] = float(after.value > before.value)
    return dict(found)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file."""
    if not path.is_file():
        return []
    objects, odd = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            odd.append(number)
    if odd:
        lines = f"line {odd[0]} is" if len(odd) == 1 else f"{len(odd)} lines, the first {odd[0]}, are"
        say(f"note: {path}: {lines} torn or no JSON object, and passed over")
    return objects


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
