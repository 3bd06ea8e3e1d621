"""The figures of a step, on a model small enough to work them out by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.step import Feed, StepFigures

ARGUMENTS = SimpleNamespace(device=torch.device("cpu"))
TOKENS = [5, 7, 11, 13]


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


def take_step(step: StepFigures, model: Model, gradients: list[float], clip: float, batches: list[list[int]]) -> float:
    """One optimiser step as transformers' Trainer takes it: gradients clipped, then the hooks. Returns the whole norm."""

    def call(event: str) -> None:
        getattr(step, event)(ARGUMENTS, None, None, model=model)

    for batch in batches:
        step.feed([{"row": row} for row in batch])
    call("on_step_begin")
    for _ in batches[1:]:
        call("on_substep_end")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, value in zip(trained, gradients, strict=True):
        parameter.grad = torch.full_like(parameter, value)
    norm = torch.nn.utils.clip_grad_norm_(trained, clip).item()
    call("on_pre_optimizer_step")
    torch.optim.SGD(trained, lr=0.5).step()
    call("on_optimizer_step")
    call("on_step_end")
    return norm


@pytest.fixture
def step() -> StepFigures:
    return StepFigures(Feed(lambda features: features), TOKENS, {"step": 9, "tokens": 100, "seconds": 50.0})


@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_gradient_norms_by_layer_are_those_before_clipping(step: StepFigures, clip: float) -> None:
    norm = take_step(step, Model(), [1.0, 2.0, 3.0], clip, [[0]])
    found = step.grad_norm_by_layer(norm)
    assert list(found) == ["other", "layers.0", "layers.1"]
    assert [found[f"layers.{n}"] for n in (0, 1)] == pytest.approx(
        [2.0, 4.0], rel=1e-4
    )  # four of each: √(4·1²), √(4·2²)
    assert found["other"] == pytest.approx(3 * math.sqrt(2), rel=1e-4)
    assert math.hypot(*found.values()) == pytest.approx(norm, rel=1e-5)


def test_no_gradient_is_no_error(step: StepFigures) -> None:
    norm = take_step(step, Model(), [0.0, 0.0, 0.0], 1.0, [[0]])
    assert set(step.grad_norm_by_layer(norm).values()) == {0.0}


def test_update_norm_is_the_change_relative_to_what_it_was(step: StepFigures) -> None:
    """θ is 3, 4 and 12 with zeros: 13. Δθ is half of 1 in four places of the first layer: 1."""
    take_step(step, Model(), [1.0, 0.0, 0.0], 1e9, [[0]])
    assert step.figures["update_norm"] == pytest.approx(1 / 13, rel=1e-4)


def test_tokens_are_those_of_the_rows_of_every_pass_and_add_up(step: StepFigures) -> None:
    take_step(step, Model(), [0.1] * 3, 1.0, [[2], [0, 1]])
    assert step.rows == [2, 0, 1] and step.figures["tokens"] == 100 + 11 + 5 + 7
    step.feed([{"row": 3}])  # the loader is a batch ahead
    take_step(step, Model(), [0.1] * 3, 1.0, [[1]])
    assert step.rows == [3] and step.figures["tokens"] == 100 + 11 + 5 + 7 + 13


def test_totals_are_left_out_where_an_older_log_does_not_know_them() -> None:
    step = StepFigures(Feed(lambda features: features), TOKENS, {"step": 9, "loss": 2.0})
    take_step(step, Model(), [0.1] * 3, 1.0, [[0]])
    assert not {"tokens", "seconds"} & step.figures.keys() and step.figures["tokens_per_second"] > 0


def test_seconds_are_those_of_the_steps_alone(step: StepFigures, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 1002.0, 5000.0, 5001.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for total, pace in ((52.0, 2.5), (53.0, 5.0)):
        take_step(step, Model(), [0.1] * 3, 1.0, [[0]])
        assert step.figures["seconds"] == total and step.figures["tokens_per_second"] == pace


def test_what_another_loop_drew_is_not_taken_for_the_training_s(step: StepFigures) -> None:
    step.feed([{"row": 3}])
    step.on_train_begin(ARGUMENTS, None, None)
    take_step(step, Model(), [0.1] * 3, 1.0, [[0]])
    assert step.rows == [0]


def test_measuring_changes_neither_gradients_nor_weights(step: StepFigures) -> None:
    """Two models take the same step, one of them unwatched."""
    watched, plain = Model(), Model()
    take_step(step, watched, [1.0, 2.0, 3.0], 0.5, [[0]])
    silent: Any = SimpleNamespace(feed=lambda features: None)
    for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
        setattr(silent, event, lambda *_, **__: None)
    take_step(silent, plain, [1.0, 2.0, 3.0], 0.5, [[0]])
    for seen, unseen in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(seen, unseen)
        assert seen.grad is unseen.grad is None or torch.equal(seen.grad, unseen.grad)  # type: ignore[arg-type]
