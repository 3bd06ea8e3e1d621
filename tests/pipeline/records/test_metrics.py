import math
from typing import Any

import pytest

from pipeline.records.metrics import Metric, as_metric, metrics, resolve

AFTER = {"value": 5.0, "ci_low": 4.2, "ci_high": 5.8, "n": 50}
CHANGE = {"before": {"value": 6.0, "n": 50}, "after": AFTER, "delta": {"value": -1.0, "ci_low": -1.6, "ci_high": -0.4}}
RESULTS = {
    "rows": 12,
    "eval_loss": CHANGE,
    "training": {"steps": 8, "curve": {"last": 2.5}},
    "benchmarks": {"arc.easy": AFTER, "choices": CHANGE},
    "metrics": {"f1": 0.87},
    "judge": "words",
    "exact": True,
}


@pytest.mark.parametrize(
    ("path", "metric"),
    [
        ("rows", Metric(12)),
        ("eval_loss", Metric(5.0, 4.2, 5.8, 50)),
        ("eval_loss.after", Metric(5.0, 4.2, 5.8, 50)),
        ("eval_loss.before", Metric(6.0, n=50)),
        ("eval_loss.delta", Metric(-1.0, -1.6, -0.4)),
        ("eval_loss.delta.ci_high", Metric(-0.4)),
        ("eval_loss.ci_low", Metric(4.2)),
        ("eval_loss.n", Metric(50)),
        ("eval_loss.value", Metric(5.0)),
        ("training.curve.last", Metric(2.5)),
        ("curve.last", Metric(2.5)),
        ("f1", Metric(0.87)),
        ("choices.delta", Metric(-1.0, -1.6, -0.4)),
        ("arc.easy", Metric(5.0, 4.2, 5.8, 50)),
        ("benchmarks.arc.easy.ci_high", Metric(5.8)),
        ("judge", None),
        ("exact", None),
        ("training", None),
        ("eval_loss.delta.delta", None),
        ("rows.value", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_figure_is_found_by_its_path(path: str, metric: Metric | None) -> None:
    assert resolve(RESULTS, path) == metric


def test_every_figure_has_a_path_that_finds_it_again() -> None:
    found = metrics(RESULTS)
    assert list(found) == [
        "rows",
        "eval_loss",
        "eval_loss.before",
        "eval_loss.delta",
        "training.steps",
        "training.curve.last",
        "benchmarks.arc.easy",
        "benchmarks.choices",
        "benchmarks.choices.before",
        "benchmarks.choices.delta",
        "metrics.f1",
    ]
    assert {path: resolve(RESULTS, path) for path in found} == found


def test_a_blocks_own_name_comes_before_what_stands_in_a_block_that_may_be_left_out() -> None:
    assert resolve({"training": {"loss": 2}, "loss": 1}, "loss") == Metric(1)
    assert resolve({"training": {"loss": 2}, "loss": "none"}, "loss") is None  # what is there is not another


def test_a_metric_tells_value_interval_and_n() -> None:
    assert Metric(5.0, 4.2, 5.8, 50).text() == "5 [4.2, 5.8] n=50"
    assert Metric(1 / 3).text(2) == "0.33"
    assert Metric(0.5, None, 0.7, 3).text() == "0.5 n=3"


@pytest.mark.parametrize(
    "value",
    [None, "5", True, [], {}, math.nan, -math.inf, 10**400, {"value": math.nan}, {"value": False}, b"5"],
    ids=repr,
)
def test_what_is_no_finite_number_is_no_figure(value: Any) -> None:
    assert as_metric(value) is None
    assert metrics({"x": value}) == {}


def test_broken_parts_of_a_figure_are_left_out() -> None:
    odd = {"value": 1, "ci_low": math.nan, "ci_high": "2", "n": 3.5}
    assert as_metric(odd) == Metric(1.0)


@pytest.mark.parametrize("results", [{"x": {"before": 1, "after": []}}, {"x": {1: {2: 3}}}, {"benchmarks": 5, "x": {}}])
def test_odd_results_are_walked_without_an_error(results: dict[str, Any]) -> None:
    metrics(results)
    assert resolve(results, "x.y.z") is None


def test_what_was_only_expected_is_no_figure_of_the_run_but_can_be_asked_for() -> None:
    results = {
        "training": {"predicted": {"seconds": 9.0}, "predicted_and_actual": {"seconds": {"ratio": 2.0}}, "seconds": 4.0}
    }
    assert metrics(results) == {"training.seconds": Metric(4.0)}
    assert resolve(results, "training.predicted_and_actual.seconds.ratio") == Metric(2.0)
