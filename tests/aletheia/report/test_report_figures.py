"""How figures are written: to the digits that their interval leaves."""

import pytest

from aletheia.report import figures
from aletheia.report.figures import Row, rows
from pipeline.records.metrics import Metric
from tests.aletheia.report.conftest import change


@pytest.mark.parametrize(
    ("metric", "written"),
    [
        (Metric(5.433964, 5.345201, 5.522727), "5.434 [5.345, 5.523]"),
        (Metric(0.8, 0.626943, 0.904949), "0.80 [0.63, 0.90]"),
        (Metric(-28.63774, -62.93036, 5.65488), "-29 [-63, 6]"),
        (Metric(0.001878, -0.001315, 0.005072), "0.0019 [-0.0013, 0.0051]"),
        (Metric(1.0, 1.0, 1.0), "1 [1, 1]"),
        (Metric(37_500_000), "37,500,000"),
        (Metric(0.00012346), "0.0001235"),
        (Metric(1e300), "1e+300"),
        (Metric(1.0, -1e308, 1e308), "1 [-1e+308, 1e+308]"),
    ],
)
def test_a_figure_has_two_digits_of_half_its_interval(metric: Metric, written: str) -> None:
    assert figures.text(metric) == written


def test_a_change_is_one_row_and_stands_before_bare_numbers() -> None:
    found = rows({"training": {"steps": 54}, "eval_loss": change(2.0, 1.0) | {"unit": "nats a token"}})
    assert [row.name for row in found] == ["eval_loss", "training.steps"]
    first = found[0]
    assert (first.before and first.before.value, first.value.value, first.change and first.change.value) == (2, 1, -1)
    assert (first.unit, first.reading) == ("nats a token", "fell")


def test_an_interval_that_holds_0_shows_no_difference() -> None:
    assert Row("x", Metric(1.0), change=Metric(0.1, 0.0, 0.2)).reading == "no difference shown"
    assert Row("x", Metric(1.0), change=Metric(0.1, 0.01, 0.2)).reading == "rose"
    assert Row("x", Metric(1.0), change=Metric(0.1)).reading == ""


def test_the_strip_shows_on_which_side_of_0_an_interval_lies() -> None:
    strip = Row("x", Metric(1.0), change=Metric(-0.5, -0.6, -0.4)).strip
    assert strip is not None and strip["low"] < strip["value"] < strip["high"] < strip["zero"] <= 100
    assert Row("x", Metric(1.0), change=Metric(0.0, 0.0, 0.0)).strip is None
