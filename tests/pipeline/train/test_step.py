"""The figures of a step: on a model small enough to work them out by hand, and in a real training."""

import json
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from little import little_model, sequence
from transformers import TrainerCallback, TrainingArguments

from pipeline.train import attention
from pipeline.train.head import bare
from pipeline.train.objective import SupervisedLoss
from pipeline.train.passes import supervised
from pipeline.train.step import NOTHING, StepFigures
from pipeline.train.trainer import Execution, Step, StepTrainer, trained_by_layer

ARGUMENTS = SimpleNamespace(device=torch.device("cpu"))
SCHEDULE = SimpleNamespace(get_last_lr=lambda: [0.25])


class Model(torch.nn.Module):
    """Two layers, a head, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(2)])
        self.head = torch.nn.Linear(2, 1, bias=False)
        self.frozen = torch.nn.Parameter(torch.full((3,), 100.0), requires_grad=False)
        weights = {self.layers[0]: [[3, 0], [0, 4]], self.layers[1]: [[0, 0], [12, 0]], self.head: [[0, 0]]}
        for module, values in weights.items():
            module.weight.data = torch.tensor(values, dtype=torch.float32)


def take_step(figures: StepFigures, model: Model, gradients: list[float], step: Step | None = None) -> dict[str, Any]:
    """One optimiser step with the calls that transformers' Trainer makes. `step`: what was learnt from."""
    figures.trainer.trained = trained_by_layer(model)
    figures.trainer.step = step or Step([0], supervised=5, tokens=9, passes=1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, value in zip(trained, gradients, strict=True):
        parameter.grad = torch.full_like(parameter, value)
    figures.on_pre_optimizer_step(ARGUMENTS, None, None, model=model, lr_scheduler=SCHEDULE)
    torch.optim.SGD(trained, lr=0.5).step()
    figures.on_optimizer_step(ARGUMENTS, None, None, model=model)
    figures.on_step_end(ARGUMENTS, None, None, model=model)
    return figures.figures


def new(before: dict[str, Any] | None = None) -> StepFigures:
    trainer: Any = SimpleNamespace(step=Step([]), trained={})
    return StepFigures(trainer, NOTHING if before is None else before)


def test_update_norm_is_the_change_relative_to_what_it_was_in_all_and_by_layer() -> None:
    """θ is 3 and 4, 12, and nothing: 13. Δθ is half of 1 in four places of the first layer: 1; and of 2 in the head's two."""
    found = take_step(new(), Model(), [1.0, 0.0, 2.0])
    head = math.sqrt(2)
    assert found["update_norm"] == pytest.approx(math.hypot(1, head) / 13, rel=1e-4)
    assert found["update_norm_by_layer"] == pytest.approx(
        {"layers.0": 1 / 5, "layers.1": 0.0, "other": head},
        rel=1e-4,  # what was nothing has nothing to be relative to
    )


def test_gradient_norms_and_the_losss_own_figures_are_those_of_the_step() -> None:
    step = Step(
        [0], grad_norm=5.0, grad_norm_by_layer={"layers.0": 3.0, "other": 4.0}, figures={"rewards/margins": 0.5}
    )
    found = take_step(new(), Model(), [1.0] * 3, step)
    assert found["grad_norm"] == 5.0 and found["grad_norm_by_layer"] == {"layers.0": 3.0, "other": 4.0}
    assert found["rewards/margins"] == 0.5


def test_the_rate_is_that_of_this_update() -> None:
    figures = new()
    take_step(figures, Model(), [0.1] * 3)
    assert figures.learning_rate == 0.25


def test_tokens_add_up_and_go_on_from_those_before_a_resume() -> None:
    figures = new({"step": 9, "tokens": 100, "seconds": 50.0})
    assert take_step(figures, Model(), [0.1] * 3, Step([2], supervised=11))["tokens"] == 111
    assert take_step(figures, Model(), [0.1] * 3, Step([0, 1], supervised=12))["tokens"] == 123


def test_a_step_that_tripped_taught_nothing() -> None:
    figures, trip = new(), SimpleNamespace(kind="gradient_spike")
    take_step(figures, Model(), [0.1] * 3, Step([0], supervised=11))
    tripped: Any = Step([1], supervised=12, trip=trip)  # type: ignore[arg-type]
    assert take_step(figures, Model(), [0.0] * 3, tripped)["tokens"] == 11
    assert figures.figures["update_norm"] == 0.0


def test_totals_are_left_out_where_an_older_log_does_not_know_them() -> None:
    found = take_step(
        new({"step": 9, "loss": 2.0}), Model(), [0.1] * 3, Step([0], supervised=5, started=time.perf_counter())
    )
    assert not {"tokens", "seconds"} & found.keys() and found["tokens_per_second"] > 0


def test_seconds_are_those_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, clock = new({"tokens": 0, "seconds": 50.0}), iter([1002.0, 5001.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for started, total, pace in ((1000.0, 52.0, 2.5), (5000.0, 53.0, 5.0)):
        found = take_step(figures, Model(), [0.1] * 3, Step([0], supervised=5, tokens=10, passes=3, started=started))
        assert found["seconds"] == total and found["passes"] == 3
        assert found["tokens_per_second"] == pace and found["all_tokens_per_second"] == 2 * pace


def test_a_line_of_figures_can_be_written_and_memory_is_a_process_s() -> None:
    found = take_step(new(), Model(), [math.nan] * 3, Step([0], grad_norm=math.nan, supervised=5))
    json.dumps(found)
    assert 0.05 < found["memory_gb"] < 100


def test_measuring_changes_neither_gradients_nor_weights() -> None:
    """Two models take the same step, one of them unwatched."""
    watched, plain = Model(), Model()
    take_step(new(), watched, [1.0, 2.0, 3.0])
    silent: Any = SimpleNamespace(trainer=SimpleNamespace(), figures={})
    for event in ("on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
        setattr(silent, event, lambda *_, **__: None)
    take_step(silent, plain, [1.0, 2.0, 3.0])
    for seen, unseen in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(seen, unseen)
        assert seen.grad is unseen.grad is None or torch.equal(seen.grad, unseen.grad)  # type: ignore[arg-type]


def test_in_a_training_each_step_has_its_figures(tmp_path: Path) -> None:
    """Three steps of which the first is warm-up: its rate is 0, so it moves nothing."""
    rows = [sequence(random.Random(n), (2, 3 + n)) for n in range(5)]
    model = little_model()
    attention.install(bare(model))
    tokens = [supervised(row) for row in rows]
    trainer = StepTrainer(
        model=model,
        rows=rows,
        steps=[[0, 1], [4, 2], [3]],
        step_loss=lambda step: SupervisedLoss(step, tokens, [1.0] * 5),
        execution=Execution(10, packed=True),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            warmup_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant_with_warmup",
            max_grad_norm=1e-4,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
    )
    figures, lines = StepFigures(trainer, NOTHING), list[dict[str, Any]]()

    class Log(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            lines.append({"learning_rate": figures.learning_rate, **figures.figures})

    trainer.add_callback(figures)
    trainer.add_callback(Log())
    trainer.train()
    assert [line["learning_rate"] for line in lines] == [0.0, 1e-2, 1e-2]
    assert [line["update_norm"] > 0 for line in lines] == [False, True, True]
    assert [line["tokens"] for line in lines] == [3 + 4, 3 + 4 + 7 + 5, 3 + 4 + 7 + 5 + 6]
    assert [line["passes"] for line in lines] == [2, 2, 1]
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"] < lines[2]["seconds"]
    for line in lines:
        assert line["grad_norm"] > 0.01  # before it is clipped to 1e-4
        assert math.hypot(*line["grad_norm_by_layer"].values()) == pytest.approx(line["grad_norm"], rel=1e-4)
        assert list(line["grad_norm_by_layer"]) == list(line["update_norm_by_layer"]) == ["layers.0", "layers.1"]
