"""The forest plot: right is better, 0 is where it says, each unit on its own axis."""

import pytest

from eval.page.claims import SHARE, Claim
from eval.page.forest import panels
from pipeline.statistics import Change, Figure


def claim(name: str, delta: float, half: float | None, lower_is_better: bool | None, unit: str = SHARE) -> Claim:
    ends = {} if half is None else {"ci_low": delta - half, "ci_high": delta + half}
    figure = Figure(value=0.5, n=9)
    return Claim(
        name, name, unit, lower_is_better, Change(before=figure, after=figure, delta=Figure(value=delta, n=9, **ends))
    )


def test_better_lies_right_of_zero_whichever_way_is_better() -> None:
    (panel,) = panels([claim("up", 0.2, 0.1, False), claim("down", -0.2, 0.1, True), claim("worse", 0.1, 0.02, True)])
    up, down, worse = panel.marks
    assert (up.at, up.low, up.high) == (down.at, down.low, down.high) and up.low is not None and worse.high is not None
    assert worse.high < panel.zero < up.low < up.at
    assert panel.unit == "percentage points"


def test_places_are_true_to_scale() -> None:
    (panel,) = panels([claim("a", 0.4, 0.1, False), claim("b", -0.1, None, False)])
    a, b = panel.marks
    assert (a.at - panel.zero) == pytest.approx(4 * (panel.zero - b.at), abs=0.1) and b.low is None
    ticks = dict((label, at) for at, label in panel.ticks)
    assert ticks["0"] == pytest.approx(panel.zero, abs=0.01) and {"+20", "+40"} <= set(ticks)
    assert all(0 <= at <= 100 for at in ticks.values())


def test_units_do_not_share_an_axis_and_no_direction_is_not_drawn() -> None:
    found = panels([claim("loss", -0.2, 0.1, True, "nats"), claim("rate", 0.1, 0.2, False), claim("kind", 3, 1, None)])
    assert [(p.unit, [m.claim.name for m in p.marks]) for p in found] == [
        ("nats", ["loss"]),
        ("percentage points", ["rate"]),
    ]


def test_nothing_but_zeros_is_no_plot() -> None:
    assert panels([claim("none", 0.0, None, True)]) == []
