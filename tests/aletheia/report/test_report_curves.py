"""A training's log as charts: what is drawn, and what is said of what is not."""

import json
from pathlib import Path
from typing import Any

from aletheia.report.curves import MAX_POINTS, STRETCHES, charts, read_log, thin


def drawn(path: Path, lines: list[Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Charts by title, and the notes."""
    file = path / "log.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    log = read_log(file)
    assert log is not None
    return {chart["title"]: chart for chart in charts(log)}, log.notes


def test_thinning_keeps_every_spike() -> None:
    values = [1.0] * 54_321
    values[777], values[40_404] = 9.0, -9.0
    kept = thin(values)
    assert len(kept) <= MAX_POINTS and kept == sorted(set(kept))
    assert {777, 40_404} <= set(kept)
    assert thin([3.0, 1.0, 2.0]) == [0, 1, 2]


def test_training_and_validation_share_a_chart(tmp_path: Path) -> None:
    validation = {"step": 2, "eval_loss": 1.5, "eval_loss_ci_low": 1.4, "eval_loss_ci_high": 1.6, "eval_n": 25}
    found, notes = drawn(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.75, "memory_gb": 3.5}, validation])
    assert list(found) == ["Loss", "Memory"] and notes == []
    training, held_out = found["Loss"]["lines"]
    assert (training["x"], training["y"], "low" in training) == ([1, 2], [2, 1.75], False)
    assert held_out == {"name": "validation", "x": [2], "y": [1.5], "of": 1, "low": [1.4], "high": [1.6], "n": [25]}


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0},
        '{"step": 2, "loss": NaN}',
        '{"step": 3, "loss": Infinity}',
        {"step": 4, "loss": "nan"},
        {"step": 5, "loss": True, "grad_norm": None},
        '{"step": Infinity, "loss": 1.0}',
        "[]",
        '{"step": 6, "lo',
        {"step": 1, "loss": 3.0},
        {"step": 6, "train_runtime": 12.5},
    ]
    found, notes = drawn(tmp_path, lines)
    assert (found["Loss"]["lines"][0]["x"], found["Loss"]["lines"][0]["y"]) == ([1], [3])
    assert notes == [
        "lines of log.jsonl that are of no step: 3",
        "steps that stand in log.jsonl twice (a resume), of which the later is drawn: 1",
        "loss is no finite number at step 2 and 2 later",
    ]


def test_a_chart_that_is_thinned_says_how_many_points_there_were(tmp_path: Path) -> None:
    found, _ = drawn(tmp_path, [{"step": step, "loss": step % 11} for step in range(1, 3001)])
    assert found["Loss"]["note"] == "1,000 of 3,000 points: the lowest and highest of each stretch"
    assert found["Loss"]["lines"][0]["of"] == 3000


def test_gradients_by_layer_are_a_row_a_layer_in_the_models_order(tmp_path: Path) -> None:
    lines = [
        {"step": step, "grad_norm_by_layer": {"other": 0.1, "layers.10": 2.0, "layers.2": 9.0 if step == 700 else 1.0}}
        for step in range(1, 1001)
    ]
    chart = drawn(tmp_path, lines)[0]["Gradient norm by layer"]
    assert chart["rows"] == ["layers.2", "layers.10", "other"]
    assert len(chart["columns"]) == STRETCHES and all(len(row) == STRETCHES for row in chart["cells"])
    assert max(chart["cells"][0]) == 9 and "each cell the largest" in chart["note"]


def test_no_log_is_no_chart(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") is None
    assert drawn(tmp_path, []) == ({}, [])
