"""What an evaluation is said to show: never more than its intervals and controls allow."""

import math
from typing import Any

import pytest

from eval.page.claims import NOTHING, Claim, claims, rows_that_decide
from pipeline import statistics
from pipeline.statistics import Figure
from tests.eval.page.facts import change, figure, results, win_rate


def of(found: dict[str, Any]) -> dict[str, Claim]:
    return {claim.path: claim for claim in claims(found)}


def test_better_worse_and_unknown_are_told_apart_whichever_way_is_better() -> None:
    found = {path: claim.verdict for path, claim in of(results()).items()}
    assert found == {
        "eval_loss": "better",
        "win_rate": "better",
        "benchmarks.aletheia_choices": "better",
        "stops_by_itself": "worse",
        "preference_accuracy": NOTHING,
        "end_of_turn.surprise": NOTHING,
        "end_of_turn.at_end": NOTHING,
        "end_of_turn.inside": NOTHING,
        "technical.change.parses": NOTHING,
        "structure.repeated": NOTHING,
        "structure.loops": NOTHING,
        "benchmarks.hellaswag": NOTHING,
        "benchmarks.odd_metric": "higher",  # nobody knows which way is better
        "answer_tokens": "higher",
        "structure.with_code": "higher",
    }


@pytest.mark.parametrize("path", ["eval_loss", "stops_by_itself", "benchmarks.aletheia_choices", "win_rate"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_inside_its_noise_is_never_better_or_worse(path: str, sign: int) -> None:
    """Planted: each figure once, as far from 0 as its interval just does not reach."""
    found = results()
    planted = win_rate(0.5 + sign * 0.079) if path == "win_rate" else change(0.5, 0.5 + sign * 0.079, 0.08)
    if path.startswith("benchmarks."):
        planted |= {"metric": "acc"}
        found["benchmarks"] = {path.partition(".")[2]: planted}
    else:
        found[path] = planted
    assert of(found)[path].verdict == NOTHING


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sign_test_p": 0.07}, "sign test"),
        ({"base_against_itself": figure(0.6, 0.05)}, "prefers an answer to itself"),
        ({"if_unscored_lost": figure(0.52, 0.09), "if_unscored_won": figure(0.7, 0.09)}, "without a verdict"),
        ({"longest_wins": figure(0.8, 0.05), "at_equal_length": figure(0.55, 0.09)}, "not shown at equal length"),
        ({"longest_wins": figure(0.8, 0.05)}, "cannot be told apart"),
    ],
    ids=["sign test", "against itself", "unscored", "length", "length alone"],
)
def test_a_win_rate_that_its_controls_doubt_is_no_finding(more: dict[str, Any], why: str) -> None:
    claim = of({"win_rate": win_rate(**more)})["win_rate"]
    assert claim.verdict == NOTHING and why in claim.open and claim.rows_needed is None


def test_controls_that_hold_leave_a_win_rate_standing() -> None:
    asked_twice = {"base_against_itself": figure(0.6, 0.05), "positions": {"consistent": figure(0.8, 0.05)}}
    equal = {"longest_wins": figure(0.8, 0.05), "at_equal_length": figure(0.6, 0.05)}
    for more in (asked_twice, equal, {"if_unscored_lost": figure(0.6, 0.08), "if_unscored_won": figure(0.64, 0.08)}):
        assert of({"win_rate": win_rate(**more)})["win_rate"].verdict == "better"


def test_an_adjusted_p_outweighs_an_interval() -> None:
    found = change(0.4, 0.6, 0.19, metric="acc", holm_p=0.2)
    claim = of({"benchmarks": {"one_of_many": found}})["benchmarks.one_of_many"]
    assert claim.change.verdict(False) == "better" and claim.verdict == NOTHING and "Holm" in claim.open


def test_the_n_that_would_decide_is_rows_needed_from_the_rows_own_spread() -> None:
    """Of figures that `statistics` itself made: the standard deviation that it had is found again."""
    deltas = [0.3, -0.2, 0.1, 0.4, -0.3, 0.2, 0.0, -0.1, 0.25, 0.05] * 3
    average = sum(deltas) / 30
    deviation = math.sqrt(sum((d - average) ** 2 for d in deltas) / 29)
    delta = statistics.mean(deltas)
    assert rows_that_decide(delta) == pytest.approx(statistics.rows_needed(average, deviation), rel=1e-4)
    before = [0.0] * 30
    claim = of({"eval_loss": statistics.as_record(statistics.paired(before, deltas))})["eval_loss"]
    assert claim.verdict == NOTHING and claim.open == f"about {rows_that_decide(delta):,} rows would decide it"


@pytest.mark.parametrize(
    ("delta", "says"),
    [
        (Figure(value=0.1, n=1), "1 row is too few"),
        (Figure(value=0.1, ci_low=-1.0, ci_high=1.2, n=4), "4 rows are too few"),
        (Figure(value=0.0, n=50), "all rows alike"),
        (Figure(value=0.0, ci_low=-0.1, ci_high=0.1, n=50), "so near to none"),
        (Figure(value=1e-9, ci_low=-0.1, ci_high=0.1, n=50), "so near to none"),
    ],
    ids=["one row", "four rows", "alike", "zero", "next to zero"],
)
def test_where_no_n_can_be_named_it_is_said_why(delta: Figure, says: str) -> None:
    found = {"before": figure(0.5, 0.1), "after": figure(0.5, 0.1), "delta": delta.model_dump(exclude_none=True)}
    claim = of({"stops_by_itself": found})["stops_by_itself"]
    assert claim.rows_needed is None and says in claim.open


def test_people_outrank_nobody_and_name_their_own_n() -> None:
    review = {"share_of_wins": figure(0.58, 0.12, 60), "decisive_needed": 210, "wins": 35, "losses": 25}
    claim = of({"human_review": review})["human_review.share_of_wins"]
    assert (claim.verdict, claim.rows_needed) == (NOTHING, 210)


def test_a_change_that_nobody_knows_is_neither_better_nor_worse() -> None:
    found = of({"new_part": {"depth": change(1.0, 2.0, unit="storeys"), "note": "x"}})
    assert found["new_part.depth"].verdict == "higher" and found["new_part.depth"].unit == "storeys"


@pytest.mark.parametrize(
    "odd",
    [None, 3, "text", [], [1, 2], {}, {"value": "x"}, {"before": 1, "after": {}, "delta": None}, float("nan"), True,
     {"value": float("inf"), "n": 3}, {"value": 10**400, "n": 3}, {"before": {"value": 1, "n": -1}, "after": 1, "delta": 2}],
    ids=str,
)  # fmt: skip
def test_results_of_another_shape_are_passed_over(odd: Any) -> None:
    for key in results():
        assert key not in of(results() | {key: odd})


@pytest.mark.parametrize("wins", [27, 29, 31, 20])
def test_so_many_prompts_decide_a_win_rate_four_times_of_five(wins: int) -> None:
    """Of 50 prompts now; the power at the n that the page names, exactly."""
    from scipy.stats import binom

    rate = statistics.proportion(wins, 50)
    (claim,) = claims({"win_rate": statistics.as_record(rate)})
    n = claim.rows_needed
    assert n
    shown = [side for k in range(n + 1) if (side := statistics.proportion(k, n)).ci_low is not None]
    decided = [k for k, share in enumerate(shown) if (share.ci_low or 0) > 0.5 or (share.ci_high or 1) < 0.5]
    assert 0.77 < float(binom.pmf(decided, n, rate.value).sum()) < 0.84
