"""Key figures: shown with their uncertainty, whatever shape the results have."""

from aletheia.summary import figures, seconds, took
from pipeline.records.schema import Facts


def test_figures_are_shown_with_their_interval_and_n() -> None:
    figure = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 8}
    change = {"before": {"value": 2.0, "n": 8}, "after": {"value": 1.5, "n": 8}, "delta": figure | {"value": -0.5}}
    facts = Facts(
        status="complete", stage="eval", profile="p", results={"eval_loss": change, "preference_accuracy": figure}
    )
    assert figures(facts) == [
        "held-out loss 2.00 → 1.50, change -0.50 [+0.25, +0.75] n=8",
        "held-out preference accuracy 0.50 [0.25, 0.75] n=8, chance 0.50",
        "better in 1, worse in 0, not known of 1",
    ]


def test_a_figure_without_an_interval_says_how_few_rows_there_were() -> None:
    facts = Facts(status="complete", stage="eval", profile="p", results={"preference_accuracy": {"value": 1.0, "n": 1}})
    assert figures(facts) == ["held-out preference accuracy 1.00 (n = 1), chance 0.50"]


def test_an_evaluation_ends_with_what_it_shows() -> None:
    change = {"before": {"value": 2.0, "n": 8}, "after": {"value": 1.5, "n": 8}}
    results = {
        "eval_loss": change | {"delta": {"value": -0.5, "ci_low": -0.7, "ci_high": -0.3, "n": 8}},
        "stops_by_itself": change | {"delta": {"value": -0.5, "ci_low": -0.7, "ci_high": -0.3, "n": 8}},
        "answer_tokens": change | {"delta": {"value": -0.5, "ci_low": -0.7, "ci_high": -0.3, "n": 8}},
        "guards": {"tasks": {"hellaswag": {"finding": "regressed"}, "mmlu": {"finding": "held"}}},
        "win_rate_unknown": {"unscored": 8},
    }
    shown = figures(Facts(status="complete", stage="eval", profile="p", results=results))
    assert shown[-1] == "better in 1, worse in 1, not known of 0"
    assert "guard hellaswag: regressed" in shown and not any("mmlu" in line for line in shown)
    assert "win-rate unknown: no verdict could be read" in shown


def test_a_control_is_named_as_one() -> None:
    change = {end: {"value": 1.0, "n": 1} for end in ("before", "after", "delta")}
    facts = Facts(
        status="complete", stage="sft", profile="p",
        configuration={"sft_config": {"shuffle_answers": True}}, results={"eval_loss": change},
    )  # fmt: skip
    assert figures(facts)[0].endswith("(control: answers shuffled)")


def test_results_of_another_shape_are_named_as_such() -> None:
    for results in ({"eval_loss": 3}, {"benchmarks": []}, {"preference_accuracy": {"value": 10**400, "n": 1}}):
        facts = Facts(status="complete", stage="eval", profile="p", results=results)
        assert [line.split(" (")[0] for line in figures(facts)] == ["results of another shape"]


def test_a_time_that_is_no_number_is_none() -> None:
    for value in (None, "long", float("nan"), float("inf"), 10**400, [1], True):
        facts = Facts(status="complete", stage="eval", profile="p", resources={"wall_seconds": value})
        assert (seconds(facts), took(facts)) == (None, "")
    facts = Facts(status="complete", stage="eval", profile="p", resources={"wall_seconds": 61})
    assert (seconds(facts), took(facts)) == (61.0, "1 min 01 s")
