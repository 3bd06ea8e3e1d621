import math
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline import statistics
from pipeline.errors import UserError
from pipeline.records import criteria
from pipeline.records.schema import Criterion, Finding, Judged, Verdict

FIGURE = {"value": 5.0, "ci_low": 4.0, "ci_high": 6.0, "n": 100}
LOSS = {
    "eval_loss": {
        "before": {"value": 6.0, "ci_low": 5.0, "ci_high": 7.0, "n": 50},
        "after": {"value": 5.0, "ci_low": 4.2, "ci_high": 5.8, "n": 50},
        "delta": {"value": -1.0, "ci_low": -1.6, "ci_high": -0.4, "n": 50},
        "unit": "nats a token",
    },
    "training": {"steps": 12, "seconds": 3.5},
    "benchmarks": {"aletheia_choices": {"before": {"value": 0.3, "n": 8}, "after": FIGURE, "delta": FIGURE}},
}


def judged(criterion: str, results: dict[str, Any], **options: Any) -> Judged:
    verdict = Verdict(frozen_at="now", criteria=[Criterion(criterion=criterion, **options)])
    (one,) = criteria.judge(verdict, results).judged
    return one


def finding(criterion: str, results: dict[str, Any], **options: Any) -> Finding:
    return judged(criterion, results, **options).finding


@pytest.mark.parametrize(
    ("text", "path", "op", "number"),
    [
        ("eval_loss < 1.20", "eval_loss", "<", 1.2),
        ("eval_loss.delta.ci_high<0", "eval_loss.delta.ci_high", "<", 0.0),
        ("  a  >=  -2e-4\n", "a", ">=", -0.0002),
        ("eval.truthfulqa_mc2.delta.ci_low > -0.02", "eval.truthfulqa_mc2.delta.ci_low", ">", -0.02),
        ("acc-norm/5-shot == +.5", "acc-norm/5-shot", "==", 0.5),
        ("_x <= 3.", "_x", "<=", 3.0),
        ("größe < 1", "größe", "<", 1.0),
    ],
)
def test_a_metric_an_operator_and_a_number_are_a_criterion(text: str, path: str, op: str, number: float) -> None:
    parsed = criteria.parse(text)
    assert (parsed.path, parsed.op, parsed.number) == (path, op, number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eval_loss",
        "eval_loss <",
        "< 5",
        "5 > eval_loss",
        "eval_loss = 5",
        "eval_loss != 5",
        "eval_loss << 5",
        "eval_loss < 5 and margin > 0",
        "0 < eval_loss < 5",
        "eval_loss < nan",
        "eval_loss < inf",
        "eval_loss < 5%",
        "eval_loss < 1,2",
        "eval_loss < other_loss",
        "eval loss < 5",
        ".eval_loss < 5",
        "eval_loss. < 5",
        "abs(eval_loss) < 5",
        "eval_loss[0] < 5",
        "a" * 300 + " < 5",
        "x < 1e999",
        "x < " + "9" * 400,
        "x < 1e9999",
    ],
)
def test_anything_else_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        criteria.parse(text, "plan.yaml:3")
    assert str(refusal.value).startswith(f"plan.yaml:3: `{text[:80]}`")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {canary}') < 5",
        "x < __import__('pathlib').Path('{canary}').touch()",
        "x < (lambda: open('{canary}', 'w'))()",
        "$(touch {canary}) < 1",
        "`touch {canary}` < 1",
    ],
)
def test_a_criterion_is_never_evaluated_as_code(text: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UserError):
        criteria.parse(text.format(canary=canary))
    harmless = judged(text.format(canary=canary), {"x": 1.0})  # as a hostile record may have frozen it
    assert harmless.finding == "not evaluable"
    assert not canary.exists()


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("x < 6.1", "supported"),
        ("x < 6", "inconclusive"),  # the end itself is not below it
        ("x <= 6", "supported"),
        ("x < 5", "inconclusive"),
        ("x <= 4", "inconclusive"),
        ("x < 4", "refuted"),
        ("x < 3.9", "refuted"),
        ("x > 3.9", "supported"),
        ("x > 4", "inconclusive"),
        ("x >= 4", "supported"),
        ("x > 5.5", "inconclusive"),
        ("x >= 6", "inconclusive"),
        ("x > 6", "refuted"),
        ("x == 5", "not evaluable"),
        ("y < 5", "not evaluable"),
    ],
)
def test_the_whole_interval_decides(criterion: str, expected: Finding) -> None:
    assert finding(criterion, {"x": FIGURE}) == expected


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("x.ci_high < 6.1", "supported"),
        ("x.ci_high < 5", "inconclusive"),
        ("x.ci_high < 4", "refuted"),
        ("x.ci_low > 3.9", "supported"),
        ("x.ci_low > 4.5", "inconclusive"),
        ("x.ci_low > 6", "refuted"),
        ("x.ci_low < 4.5", "supported"),  # asks only that it be possible
        ("x.ci_low < 4", "refuted"),
        ("x.ci_high > 5.9", "supported"),
        ("x.ci_high > 6", "refuted"),
        ("x.ci_high == 6", "not evaluable"),
        ("bare.ci_low > 1", "not evaluable"),
        ("ci_low > 1", "not evaluable"),
    ],
)
def test_an_end_of_the_interval_may_be_named(criterion: str, expected: Finding) -> None:
    assert finding(criterion, {"x": FIGURE, "bare": 3}) == expected


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("eval_loss < 6", "supported"),  # of a change: the value after
        ("eval_loss.after < 6", "supported"),
        ("eval_loss.before > 5", "inconclusive"),
        ("eval_loss.delta < 0", "supported"),
        ("eval_loss.delta.ci_high < -0.5", "inconclusive"),
        ("training.steps >= 12", "supported"),
        ("steps > 12", "refuted"),  # `training` may be left out
        ("aletheia_choices > 3", "supported"),  # and `benchmarks`
        ("benchmarks.aletheia_choices.delta.ci_low > 3", "supported"),
    ],
)
def test_figures_are_found_by_dotted_path(criterion: str, expected: Finding) -> None:
    assert finding(criterion, LOSS) == expected


def test_a_pipeline_experiments_criteria_name_its_stages() -> None:
    results = {"sft": {"eval_loss": FIGURE}, "eval": LOSS}
    assert finding("sft.eval_loss < 7", results) == "supported"
    assert finding("eval.eval_loss.delta.ci_high < 0", results) == "supported"
    assert finding("eval.aletheia_choices.delta.ci_low > 4.5", results) == "inconclusive"
    missing = judged("eval_loss < 5", results)
    assert missing.finding == "not evaluable"
    assert "sft.eval_loss" in missing.why


def test_a_number_without_interval_is_compared_as_it_is() -> None:
    assert finding("steps == 12", LOSS) == "supported"
    assert finding("steps < 12", LOSS) == "refuted"
    assert finding("x < 5", {"x": {"value": 3.0, "n": 1}}) == "inconclusive"  # n says that it is uncertain


@pytest.mark.parametrize(
    ("criterion", "value", "low", "high"),
    [("x < 5.5", 5.0, 4.0, 6.0), ("x > 0", 0.3, -0.1, 0.6), ("x < 5", 5.2, 4.7, 5.7), ("x >= 1", 0.9, 0.2, 1.3)],
)
def test_n_needed_is_the_first_n_at_which_the_interval_no_longer_holds_the_number(
    criterion: str, value: float, low: float, high: float
) -> None:
    n = 40
    one = judged(criterion, {"x": {"value": value, "ci_low": low, "ci_high": high, "n": n}})
    assert one.finding == "inconclusive"
    assert one.n_needed is not None
    assert str(one.n_needed) in one.why

    def at(rows: int) -> Finding:  # as wide as it would be, were the value to stay
        narrowing = math.sqrt(n / rows)
        ends = {"ci_low": value - (value - low) * narrowing, "ci_high": value + (high - value) * narrowing}
        return finding(criterion, {"x": {"value": value, "n": rows} | ends})

    assert at(one.n_needed) in ("supported", "refuted")
    assert at(one.n_needed - 1) == "inconclusive"


def test_n_needed_holds_for_rows_that_are_drawn() -> None:
    """Of many draws of that many rows, about half decide it: the interval's end then lies about at the number."""
    draw = random.Random(1)
    pilot = [draw.gauss(0.5, 2.0) for _ in range(30)]
    shift = 0.5 - sum(pilot) / 30
    pilot = [value + shift for value in pilot]
    one = judged("x > 0", {"x": statistics.mean(pilot).model_dump()})
    assert one.n_needed is not None
    deviation = math.sqrt(sum((value - 0.5) ** 2 for value in pilot) / 29)
    draws = [[draw.gauss(0.5, deviation) for _ in range(one.n_needed)] for _ in range(100)]
    decided = sum(finding("x > 0", {"x": statistics.mean(rows).model_dump()}) == "supported" for rows in draws)
    assert 30 <= decided <= 75


@pytest.mark.parametrize(
    "figure",
    [
        {"value": 5.0, "ci_low": 4.0, "ci_high": 6.0},  # n unknown
        {"value": 5.5, "ci_low": 4.0, "ci_high": 6.0, "n": 10},  # no distance to close
        {"value": 5.5 + 1e-9, "ci_low": 4.0, "ci_high": 6.0, "n": 10},  # would need more rows than there are
        {"value": 5.0, "ci_low": 4.0, "ci_high": 6.0, "n": 10**300},
        {"value": 5.0, "ci_low": 4.0, "ci_high": 6.0, "n": -3},
        {"value": 5.5 + 1e-15, "ci_low": -1e190, "ci_high": 1e190, "n": 10},
    ],
)
def test_where_no_n_would_decide_it_none_is_named(figure: dict[str, Any]) -> None:
    one = judged("x < 5.5", {"x": figure})
    assert (one.finding, one.n_needed) == ("inconclusive", None)
    assert "no n is known" in one.why


def test_fewer_rows_than_min_n_decide_nothing() -> None:
    few = judged("x < 9", {"x": FIGURE}, min_n=101)
    assert (few.finding, few.n_needed) == ("inconclusive", 101)
    assert few.why == "n is 100, min_n asks for 101"
    assert finding("x < 9", {"x": FIGURE}, min_n=100) == "supported"
    assert "not known" in judged("x < 9", {"x": 3}, min_n=1).why


@pytest.mark.parametrize(
    ("wanted", "overall"),
    [
        (["x < 9"], "supported"),
        (["x < 9", "x < 5"], "inconclusive"),
        (["x < 5", "nowhere < 5"], "not evaluable"),
        (["x < 9", "nowhere < 5", "x < 5", "x < 1"], "refuted"),
        ([], None),
    ],
)
def test_the_worst_finding_is_the_verdict(wanted: list[str], overall: Finding | None) -> None:
    verdict = Verdict(frozen_at="now", criteria=[Criterion(criterion=text) for text in wanted])
    assert criteria.judge(verdict, {"x": FIGURE}).finding == overall


def test_a_refuted_guardrail_refutes_the_whole_whatever_the_primary_says() -> None:
    wanted = [Criterion(criterion="x < 9"), Criterion(criterion="latency < 1", role="guardrail")]
    verdict = criteria.judge(Verdict(frozen_at="now", criteria=wanted), {"x": FIGURE, "latency": 2.0})
    assert [(one.role, one.finding) for one in verdict.judged] == [("primary", "supported"), ("guardrail", "refuted")]
    assert verdict.finding == "refuted"


HOSTILE: list[Any] = [
    None,
    "5",
    True,
    [1, 2],
    {},
    math.nan,
    math.inf,
    10**400,
    {"value": math.nan, "ci_low": 1, "ci_high": 2, "n": 5},
    {"value": "5", "ci_low": 1, "ci_high": 2},
    {"value": None},
    {"before": 1, "after": {"value": [1]}},
    {"x": {"x": {"x": None}}},
]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_what_is_no_figure_is_not_evaluable(value: Any) -> None:
    assert finding("x < 5", {"x": value}) == "not evaluable"
    assert finding("x.y.ci_low < 5", {"x": value, 3: {None: value}}) == "not evaluable"  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "ends",
    [{"ci_low": math.nan, "ci_high": 6.0}, {"ci_low": 4.0, "ci_high": math.inf}, {"ci_low": 4.0}, {"ci_high": "6"}],
)
def test_half_an_interval_is_none(ends: dict[str, Any]) -> None:
    assert finding("x < 9", {"x": {"value": 5.0, "n": 10} | ends}) == "inconclusive"
    assert finding("x.ci_high < 9", {"x": {"value": 5.0} | ends}) == "not evaluable"


def test_what_is_observed_is_told_with_interval_and_n() -> None:
    one = judged("x < 4.5", {"x": FIGURE})
    assert one.observed == "5 [4, 6] n=100"
    assert one.why.startswith("the interval holds 4.5; about 401 rows would decide it")
    assert judged("y < 4.5", {"x": FIGURE}).observed == "nothing"


def test_a_persons_criteria_are_lines_or_mappings() -> None:
    wanted = criteria.read(["a < 1", {"criterion": "b > 2", "role": "guardrail", "min_n": 50}])
    assert wanted == [Criterion(criterion="a < 1"), Criterion(criterion="b > 2", role="guardrail", min_n=50)]
    assert criteria.read(None) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("a < 1", "plan.yaml:7: success_criteria: is no list"),
        (["a < 1", "b"], "plan.yaml:9: success_criteria[2]: `b` is no criterion"),
        (["a < 1", 5], "plan.yaml:9: success_criteria[2]: "),
        (["a < 1", {"criterion": "b < 1", "rôle": "primary"}], "plan.yaml:9: success_criteria[2]: rôle: "),
        (["a < 1", {"criterion": "b < 1", "role": "main"}], "plan.yaml:9: success_criteria[2]: role: "),
        (["a < 1", {"role": "primary"}], "plan.yaml:9: success_criteria[2]: criterion: "),
        (["a < 1", {"criterion": "b < 1", "min_n": "many"}], "plan.yaml:9: success_criteria[2]: min_n: "),
    ],
)
def test_a_mistake_in_them_names_its_place(values: Any, told: str) -> None:
    lines = {("success_criteria",): 7, ("success_criteria", 0): 8, ("success_criteria", 1): 9}
    with pytest.raises(UserError) as error:
        criteria.read(values, "plan.yaml", lines)
    assert str(error.value).startswith(told)


def test_what_changed_after_the_start_is_told_however_small() -> None:
    def wanted(*texts: str, **options: Any) -> list[Criterion]:
        return [Criterion(criterion=text, **options) for text in texts]

    assert criteria.changes(wanted("a < 1", "b > 2"), wanted("b  >  2.0", "a<1")) == []
    assert criteria.changes(wanted("a < 1.2000001"), wanted("a < 1.2")) == [
        "taken out: a < 1.2000001",
        "added: a < 1.2",
    ]
    assert criteria.changes(wanted("a < 1"), wanted("a < 1", role="guardrail", min_n=5)) == [
        "taken out: a < 1",
        "added: a < 1 (guardrail, min_n 5)",
    ]


@pytest.mark.parametrize(
    ("guardrail", "finding"),
    [
        ("latency < 9", "supported"),
        ("latency < 1", "refuted"),
        ("gone < 1", "not evaluable"),
        ("noise < 0.5", "supported"),
    ],
)
def test_a_guardrail_can_only_take_away_and_decides_nothing_where_it_is_inconclusive(
    guardrail: str, finding: str
) -> None:
    wanted = [Criterion(criterion="x < 9"), Criterion(criterion=guardrail, role="guardrail")]
    results = {"x": 1, "latency": 5, "noise": {"value": 0.4, "ci_low": 0.2, "ci_high": 0.6, "n": 9}}
    verdict = criteria.judge(Verdict(frozen_at="then", criteria=wanted), results)
    assert verdict.finding == finding
    assert len(verdict.judged) == 2  # shown, whatever it decides


def test_an_inconclusive_primary_criterion_is_not_made_up_for_by_a_guardrail() -> None:
    wanted = [Criterion(criterion="noise < 0.5"), Criterion(criterion="x < 9", role="guardrail")]
    results = {"x": 1, "noise": {"value": 0.4, "ci_low": 0.2, "ci_high": 0.6, "n": 9}}
    assert criteria.judge(Verdict(frozen_at="then", criteria=wanted), results).finding == "inconclusive"
