from typing import Any

import pytest

from aletheia.exp.foreign_figures import figures, results
from pipeline.records.metrics import metrics


@pytest.mark.parametrize(
    ("written", "figure"),
    [
        (0.93, 0.93),
        ("0.93", 0.93),
        ("**0.93**", 0.93),
        ("~3e-8", {"value": 3e-8, "text": "~3e-8"}),
        ("≈ 12", {"value": 12, "text": "≈ 12"}),
        ("41 ms", {"value": 41, "text": "41 ms"}),
        ("93.2 %", {"value": 93.2, "text": "93.2 %"}),
        ("0.287 ± 0.021", {"value": 0.287, "text": "0.287 ± 0.021"}),  # ± of what is not said
        ("1.49 [1.48, 1.50]", {"value": 1.49, "ci_low": 1.48, "ci_high": 1.5}),
        ("0.91 (95 % CI 0.89–0.93)", {"value": 0.91, "ci_low": 0.89, "ci_high": 0.93}),
        ("−0.3 [−0.5, −0.1]", {"value": -0.3, "ci_low": -0.5, "ci_high": -0.1}),
        ("< 1e-5", {"text": "< 1e-5"}),
        ("≥ 0.8", {"text": "≥ 0.8"}),
        ({"value": 0.87, "ci_95": [0.86, 0.88], "n": 100}, {"value": 0.87, "ci_low": 0.86, "ci_high": 0.88, "n": 100}),
        ({"value": "~0.87", "ci_low": 0.86}, {"value": 0.87, "text": "~0.87", "ci_low": 0.86}),
        ({"Billing queue": 0.8, "note": "x"}, {"billing_queue": 0.8}),
        (float("inf"), {"text": "inf"}),
    ],
)
def test_a_figure_is_read(written: Any, figure: Any) -> None:
    assert figures(written) == figure


@pytest.mark.parametrize(
    "written",
    [
        True,
        None,
        "pass",
        "",
        "311 of 500",
        "7B",
        "1,234",
        "3.1.2",
        [1, 2],
        {},
        {"value": "x"},
        "0.9 (1-2)",
        "9" * 10**5,
    ],
)
def test_what_is_no_figure_is_none(written: Any) -> None:
    assert figures(written) is None


def test_a_table_is_read_by_its_first_column() -> None:
    rows = [
        {"name": "F1, macro", "value": 0.9, "target": 0.8, "ci": [0.8, 0.95]},
        {"name": "F1, macro", "value": 0.1},  # the first of a name stands
        {"Model": "base", "Acc.": 0.5, "Latency": "41 ms"},
        {"name": "loss", "Train": 1.0, "Valid": 1.3, "status": "ok"},
        "eval_loss",
        {},
    ]
    assert results({"metrics": rows})["metrics"] == {
        "f1_macro": {"value": 0.9, "ci_low": 0.8, "ci_high": 0.95},
        "base": {"acc": 0.5, "latency": {"value": 41, "text": "41 ms"}},
        "loss": {"train": 1.0, "valid": 1.3},
    }


def test_epochs_have_their_figures_too() -> None:
    epochs = {
        "best": {"valid": {"Epoch": 6, "Loss": 1.3}},
        "latest": {"epoch": 10, "loss": 1.4},
        "history": [{"epoch": 1}],
    }
    found = results({"epochs": epochs})
    assert found == {"epochs": {"best": {"valid": {"epoch": 6, "loss": 1.3}}, "latest": {"epoch": 10, "loss": 1.4}}}
    assert metrics(found)["epochs.best.valid.loss"].value == 1.3


def test_no_figures_are_no_results() -> None:
    assert results({}) == {}
    assert results({"metrics": ["eval_loss"], "epochs": {"best": None}}) == {}
