"""How a training went: judged by its log, with no rise and no advice where the log shows none."""

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.records.file import RecordFile
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

Run = Callable[..., "Said"]
Write = Callable[..., RecordFile]
EXP = "EXP-2026-01-01-001"
A_EPOCH = 10  # steps
CONFIGURATION = {"sft_config": {"learning_rate": 2e-4, "epochs": 4.0, "evaluate_each_epoch": True}}


def steps(epochs: int = 4, **changed: Callable[[int], Any]) -> list[dict[str, Any]]:
    """A training that falls evenly, each value as `changed` says of its step."""
    usual: dict[str, Callable[[int], Any]] = {
        "loss": lambda step: 6.0 - step * 0.05,
        "grad_norm": lambda step: 0.3,
        "learning_rate": lambda step: 2e-4,
        "tokens_per_second": lambda step: 900.0,
    }
    return [
        {"step": step, "epoch": step / A_EPOCH} | {name: value(step) for name, value in (usual | changed).items()}
        for step in range(1, epochs * A_EPOCH + 1)
    ]


def validations(values: Sequence[float], half: float | None = 0.05) -> list[dict[str, Any]]:
    """One an epoch; `half`: of the interval."""
    ends = [{} if half is None else {"eval_loss_ci_low": v - half, "eval_loss_ci_high": v + half} for v in values]
    return [
        {"step": (i + 1) * A_EPOCH, "epoch": float(i + 1), "eval_loss": v, "eval_n": 25, **e}
        for i, (v, e) in enumerate(zip(values, ends, strict=True))
    ]


@pytest.fixture
def analyzed(aletheia: Run, place: Workspace, write_record: Write) -> Callable[..., tuple[str, dict[str, Any]]]:
    """The page and the JSON of a training with this log."""

    def analyze(log: list[Any], **facts: Any) -> tuple[str, dict[str, Any]]:
        write_record(place, EXP, {"configuration": CONFIGURATION} | facts, log=log)
        said, data = aletheia(place, "exp", "analyze", EXP), aletheia(place, "exp", "analyze", EXP, "--json")
        assert (said.code, data.code) == (0, 0), said.err
        return said.out, json.loads(data.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    return analyze


def advice(data: dict[str, Any]) -> list[str]:
    return [each["what"] for each in data["what_to_try"]]


def test_a_training_where_all_is_well_gets_no_advice(analyzed: Any) -> None:
    page, data = analyzed(steps() + validations([5.8, 5.75, 5.73, 5.72]))
    assert data["what_to_try"] == []
    assert data["seen"] == []
    assert page.rstrip().endswith("what to try         nothing stands out")


def test_the_table_has_train_valid_with_interval_and_gap_an_epoch(analyzed: Any) -> None:
    page, data = analyzed(steps(2) + validations([5.8, 5.7]))
    lines = page.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("epochs"))
    header, first, second = lines[begin : begin + 3]
    assert header.split()[-1] == "gap"
    assert first.split() == ["1", "1–10", "5.725", "5.8", "[5.75,", "5.85]", "n=25", "+0.075"]
    assert second.split() == ["2", "11–20", "5.225", "5.7", "[5.65,", "5.75]", "n=25", "+0.475"]
    assert [epoch["train"] for epoch in data["epochs"]] == pytest.approx([5.725, 5.225])
    assert data["epochs"][1]["gap"] == pytest.approx(0.475)


def test_best_and_latest_epoch_are_named_for_train_and_valid(analyzed: Any) -> None:
    page, data = analyzed(steps(3, loss=lambda step: 5.0 + abs(step - 15) / 10) + validations([5.3, 5.0, 5.5]))
    assert data["train"] == {"best_epoch": 2, "latest_epoch": 3}
    assert (data["valid"]["best"]["epoch"], data["valid"]["latest"]["epoch"]) == (2.0, 3.0)
    assert "best in epoch 2 (5.25), latest 3 (6.05)" in page
    assert "best at step 20 (5 [4.95, 5.05] n=25), latest at step 30 (5.5 [5.45, 5.55] n=25)" in page


def test_a_rise_outside_the_noise_is_told_with_its_step_and_what_to_set(analyzed: Any) -> None:
    page, data = analyzed(steps() + validations([5.5, 5.2, 5.4, 5.6]))
    assert data["valid"]["risen"] is True
    assert "validation loss has risen since step 20\n" in page
    assert advice(data) == ["fewer epochs", "a lower rate", "more rows"]
    assert "    --set sft_config.epochs=2\n" in page
    assert "    --set sft_config.learning_rate=0.0001\n" in page


def test_a_rise_inside_the_noise_is_none(analyzed: Any) -> None:
    page, data = analyzed(steps() + validations([5.5, 5.2, 5.22, 5.24]))
    assert data["valid"]["risen"] is False
    assert "the latest is not distinguishable from its best\n" in page
    assert "has risen" not in page
    assert data["what_to_try"] == []


def test_without_an_interval_a_rise_cannot_be_told(analyzed: Any) -> None:
    page, data = analyzed(steps() + validations([5.5, 5.2, 5.4, 5.6], half=None))
    assert data["valid"]["risen"] is None
    assert "the latest has no interval, so that it cannot be told from its best" in page
    assert "has risen" not in page


def test_a_validation_that_still_falls_at_the_end_asks_for_more_epochs(analyzed: Any) -> None:
    page, data = analyzed(steps() + validations([5.8, 5.6, 5.4, 5.2]))
    assert advice(data) == ["more epochs"]
    assert "--set sft_config.epochs=5" in page
    assert "the latest: no rise" in page


def test_a_log_without_validations_says_that_overfitting_cannot_be_told(analyzed: Any) -> None:
    page, data = analyzed(steps(), configuration={"sft_config": {"epochs": 4.0}})
    assert "not in the log: whether it overfits cannot be told" in page
    assert advice(data) == ["validation after each epoch"]
    assert "--set sft_config.evaluate_each_epoch=true" in page
    assert analyzed(steps())[1]["what_to_try"] == []  # it was asked for: no setting brings it
    page, data = analyzed(steps(), data={"train": {"rows": 9}, "held_out": {"rows": 0}})
    assert advice(data) == ["held-out rows"]
    assert "--set training_data.validation.fraction=0.1" in page


def test_gradient_spikes_are_listed_by_step(analyzed: Any) -> None:
    page, data = analyzed(
        steps(grad_norm=lambda step: 3.0 if step in (17, 31) else 0.3) + validations([5.8, 5.75, 5.73, 5.72])
    )
    assert data["gradient_spikes"] == [17, 31]
    assert "gradient norm over 5 × its running median: steps 17, 31\n" in page
    assert advice(data) == ["a lower rate"]


def test_a_train_loss_that_does_not_fall_asks_for_a_higher_rate(analyzed: Any) -> None:
    page, data = analyzed(
        steps(loss=lambda step: 5.0 - 0.0005 * step + 0.1 * (-1) ** step) + validations([5.8, 5.75, 5.73, 5.72])
    )
    assert data["train_loss_falls"] is False
    assert "train loss: no fall shown over all 40 steps" in page
    assert "--set sft_config.learning_rate=0.0006" in page


def test_a_train_loss_that_levels_out_is_told(analyzed: Any) -> None:
    page, data = analyzed(steps(loss=lambda step: max(5.0, 6.0 - step * 0.1)) + validations([5.8, 5.75, 5.73, 5.72]))
    assert data["level_since"] == 28
    assert "train loss: level since step 28" in page


def test_steps_without_a_rate_are_told_beyond_the_first_of_a_warm_up(analyzed: Any) -> None:
    _, data = analyzed(
        steps(learning_rate=lambda step: 0.0 if step == 1 else 1e-4) + validations([5.8, 5.75, 5.73, 5.72])
    )
    assert (data["without_rate"], data["seen"]) == ([1], [])
    page, data = analyzed(steps(learning_rate=lambda step: 0.0 if step <= 12 else 1e-4))
    assert "learning rate 0, where nothing is learnt: steps 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 … 12 in all" in page
    assert "a shorter warm-up" in advice(data)


def test_a_drop_in_throughput_is_told(analyzed: Any) -> None:
    page, _ = analyzed(steps(tokens_per_second=lambda step: 900.0 if step < 25 else 500.0))
    assert "throughput fell from 900 to 500 tokens a second" in page


def test_few_steps_are_told(analyzed: Any) -> None:
    configuration = {"sft_config": {"epochs": 1.0, "learning_rate": 1e-4}}
    page, data = analyzed(steps(1) + validations([5.8]), configuration=configuration)
    assert advice(data) == ["more steps"]
    assert "--set sft_config.epochs=2" in page
    assert "the only one: whether it rose cannot be told" in page


def test_a_step_that_was_not_finite_is_named(analyzed: Any) -> None:
    log = [*steps(2), {"step": 21, "epoch": 2.1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.0001}]
    page, data = analyzed(log, status="failed")
    assert data["not_finite"] == [21]
    assert "loss or gradient not finite: step 21\n" in page
    assert "the run is failed: this is what its log holds so far" in page
    assert advice(data)[0] == "a lower rate"


def test_a_dpo_s_preference_accuracy_stands_beside_its_loss(analyzed: Any) -> None:
    log = validations([0.6, 0.5])
    log[1] |= {
        "eval_preference_accuracy": 0.8,
        "eval_preference_accuracy_ci_low": 0.6,
        "eval_preference_accuracy_ci_high": 0.9,
    }
    page, _ = analyzed(steps(2) + log, stage="dpo")
    assert "0.8 [0.6, 0.9] n=25" in page


def test_a_step_taken_again_after_a_resume_counts_once(analyzed: Any) -> None:
    _, data = analyzed([*steps(1), {"step": 10, "epoch": 1.0, "loss": 1.0}])
    assert data["steps"] == 10
    assert data["epochs"][0]["train"] == pytest.approx((sum(6.0 - s * 0.05 for s in range(1, 10)) + 1.0) / 10)


def test_a_torn_last_line_is_passed_over_aloud(aletheia: Run, place: Workspace, write_record: Write) -> None:
    write_record(place, EXP, {}, log=[*steps(1), '{"step": 11, "lo'])
    said = aletheia(place, "exp", "analyze", EXP)
    assert said.code == 0
    assert "log.jsonl: line 11 is torn or no JSON object, and passed over" in said.err
    assert ", 10 steps, 1 epochs begun" in said.out


def test_odd_lines_are_analyzed_without_a_traceback(analyzed: Any) -> None:
    odd: list[Any] = [
        "[]", "null", {"loss": 1}, {"step": "x", "epoch": 1, "loss": 2}, {"step": 3, "epoch": None, "eval_loss": 1},
        {"step": 41, "epoch": 5, "loss": [1], "grad_norm": "x"}, {"step": 42, "epoch": 1e308, "loss": 1e308},
        {"step": 43, "epoch": -7, "loss": 1e29, "tokens_per_second": -1}, {"step": 10**400, "epoch": 1, "loss": 1},
        {"step": 44, "epoch": 2, "eval_loss": 1.0, "eval_loss_ci_low": "x", "eval_n": [1]},
        {"step": 45, "epoch": 2, "eval_loss": {"value": 3}, "eval_n": 1e20},
    ]  # fmt: skip
    page, _ = analyzed(steps() + odd, configuration={"sft_config": [1]}, data={"held_out": 3})
    assert "5 lines of the log without step, epoch or figure were passed over" in page


@pytest.mark.parametrize(
    ("facts", "log", "error"),
    [
        (
            {"stage": "eval"},
            None,
            f"experiments/{EXP}.yaml: is no training but of stage eval; only sft and dpo have a log",
        ),
        ({}, None, f"experiments/{EXP}.yaml: its log experiments/{EXP}/log.jsonl is not there"),
        ({}, [], f"experiments/{EXP}/log.jsonl: holds no step yet"),
        (None, None, f"experiments/{EXP}.yaml: is a plan: nothing has run"),
    ],
)
def test_what_has_no_log_to_judge_is_one_line(
    aletheia: Run, place: Workspace, write_record: Write, facts: Any, log: Any, error: str
) -> None:
    write_record(place, EXP, facts, log=log)
    said = aletheia(place, "exp", "analyze", EXP)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: {error}")
    assert len(said.err.splitlines()) == 1
