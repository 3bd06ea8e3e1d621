"""Guards: held, regressed or not known, and what each does to a record's verdict."""

from typing import Any

import pytest

from eval.benchmarks import guards
from eval.benchmarks.guards import Loss
from pipeline import statistics
from pipeline.records import criteria
from pipeline.records.schema import Criterion, Finding, Verdict

MARGIN = 0.05


def loss(gained: int, lost: int, n: int, lower_is_better: bool | None = False) -> Loss:
    """A guard of 0/1 items: so many gained and lost of n, all others right before and after."""
    before = [0.0] * gained + [1.0] * (n - gained)
    after = [1.0] * gained + [0.0] * lost + [1.0] * (n - gained - lost)
    return Loss(statistics.paired(before, after, shares=True), statistics.sign_test(gained, lost), lower_is_better)


def finding(*losses: Loss) -> list[str]:
    found = guards.judge({f"guard{i}": each for i, each in enumerate(losses)}, MARGIN, {})
    return [task["finding"] for task in found["tasks"].values()]


def test_no_large_loss_is_left_possible() -> None:
    assert finding(loss(gained=5, lost=5, n=1000)) == ["held"]


def test_a_loss_beyond_chance_is_a_regression() -> None:
    assert finding(loss(gained=0, lost=12, n=100)) == ["regressed"]


def test_a_sure_loss_that_is_within_the_margin_holds() -> None:
    sure = loss(gained=0, lost=20, n=2000)
    assert sure.p < 0.001 and finding(sure) == ["held"]


def test_few_items_show_nothing_and_say_how_many_would() -> None:
    found = guards.judge({"guard": loss(gained=1, lost=1, n=20)}, MARGIN, {})["tasks"]["guard"]
    assert found["finding"] == "not known" and found["n_needed"] > 20
    n = found["n_needed"]
    # with as many of each outcome, the interval no longer holds the margin; with a tenth fewer it does
    shares = [loss(gained=round(k * 0.05), lost=round(k * 0.05), n=k).change.delta.ci_low for k in (n, round(0.8 * n))]
    assert shares[0] is not None and shares[1] is not None
    assert shares[0] > -MARGIN > shares[1] - 0.005


def test_a_gain_never_regresses_and_what_is_lower_is_better_is_turned() -> None:
    assert finding(loss(gained=12, lost=0, n=100)) == ["held"]
    assert finding(loss(gained=12, lost=0, n=100, lower_is_better=True)) == ["regressed"]
    assert finding(loss(gained=12, lost=0, n=100, lower_is_better=None)) == ["not known"]


def test_one_of_many_guards_regresses_only_beyond_the_chance_of_many() -> None:
    """6 of 6 are p = 0.031: alone a regression, among 20 guards the luck of one."""
    alone = loss(gained=0, lost=6, n=60)
    quiet = [loss(gained=1, lost=1, n=60)] * 19
    assert finding(alone) == ["regressed"]
    assert finding(alone, *quiet)[0] == "not known"


@pytest.mark.parametrize(
    ("losses", "missing", "primary", "overall"),
    [
        ([loss(5, 5, 1000)], {}, [], "supported"),
        ([loss(5, 5, 1000)], {}, ["eval_loss < 2"], "supported"),
        ([loss(0, 12, 100)], {}, [], "refuted"),
        ([loss(0, 12, 100), loss(5, 5, 1000)], {}, ["eval_loss < 2"], "refuted"),
        ([loss(1, 1, 20)], {}, [], "inconclusive"),
        ([loss(1, 1, 20)], {}, ["eval_loss < 2"], "supported"),
        ([loss(5, 5, 1000)], {"hellaswag": "no data"}, [], "inconclusive"),
        ([loss(0, 12, 100)], {"hellaswag": "no data"}, ["eval_loss < 2"], "refuted"),
    ],
    ids=[
        "held",
        "held and more",
        "regressed",
        "one regressed",
        "not known",
        "not known, but more",
        "one missing",
        "both",
    ],
)
def test_a_regressed_guard_refutes_the_record_whatever_else_it_shows(
    losses: list[Loss], missing: dict[str, str], primary: list[str], overall: Finding
) -> None:
    results: dict[str, Any] = {"eval_loss": {"value": 1.0, "ci_low": 0.9, "ci_high": 1.1, "n": 50}}
    results["guards"] = guards.judge({f"guard{i}": each for i, each in enumerate(losses)}, MARGIN, missing)
    frozen = Verdict(
        frozen_at="2026-01-01T00:00:00Z",
        criteria=[Criterion(criterion=text) for text in primary],
        of_profile=[Criterion(criterion=guards.CRITERION, role="guardrail")],
    )
    assert criteria.judge(frozen, results).finding == overall


def test_what_has_not_held_is_told_and_why() -> None:
    found = guards.judge({"a": loss(0, 12, 100), "b": loss(5, 5, 1000)}, MARGIN, {"c": "no data"})
    [lost, missing] = guards.told(found)
    assert lost.startswith("guard a: regressed (−0.12, p 0.00098 among the guards")
    assert missing == "guard c: not known (no data)"
    assert guards.told(guards.judge({"b": loss(5, 5, 1000)}, MARGIN, {})) == ["guards held: b"]


def test_without_spread_nothing_is_known() -> None:
    still = Loss(statistics.paired([2.0, 3.0], [2.0, 3.0]), 1.0, False)
    one = Loss(statistics.paired([2.0], [1.0]), 1.0, False)
    assert finding(still, one) == ["not known", "not known"]
