"""The gradient check passes on what we train with, and catches what it is there for: each fault is planted once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from aletheia.check import app
from pipeline.config import DpoConfig
from pipeline.errors import StageFailed
from pipeline.train import gradient_check, head, objective, passes, preference
from pipeline.train.gradient_check import Checked, check_gradients
from pipeline.train.passes import Pass, Row

LOSSES = {"sft", "sigmoid + sft", *get_args(DpoConfig.model_fields["loss_type"].annotation)}
PREFERENCES = LOSSES - {"sft"}
Fault = Callable[[pytest.MonkeyPatch], None]


def wrong(found: Sequence[Checked]) -> set[tuple[str, str]]:
    return {(checked.loss, checked.forward) for checked in found if not checked.ok}


def test_every_loss_passes_packed_and_padded_with_room_to_spare() -> None:
    state = torch.get_rng_state()
    found = check_gradients()
    assert {(c.loss, c.forward) for c in found} == {(loss, way) for loss in LOSSES for way in ("packed", "padded")}
    assert len(found) == 2 * len(LOSSES)
    assert all(c.relative_error < 1e-6 for c in found)
    assert all(c.parameters > 500 for c in found)
    assert torch.get_rng_state().equal(state)


@dataclass(frozen=True)
class Differenced:
    """The plain side of the check, with nothing planted: every loss, and its slopes along the directions."""

    losses: torch.Tensor
    slopes: dict[str, torch.Tensor]


def plain_losses(model: Any, sequences: Sequence[Any], cases: Sequence[Any]) -> torch.Tensor:
    with torch.no_grad():
        answers = gradient_check._plainly(model, sequences)
        return torch.stack([case.formula(answers[case.sequences]) for case in cases])


@pytest.fixture(scope="module")
def differenced() -> Differenced:
    honest, found = gradient_check._differences, list[Differenced]()

    def differences(model: Any, tensors: Any, directions: Any, sequences: Any, cases: Any) -> dict[str, torch.Tensor]:
        losses = plain_losses(model, sequences, cases)
        found.append(Differenced(losses, honest(model, tensors, directions, sequences, cases)))
        return found[-1].slopes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_check, "_differences", differences)
        assert not wrong(check_gradients())
    return found[0]


def turn_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = preference.losses
    monkeypatch.setattr(preference, "losses", lambda *given: -honest(*given))


def forget_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = preference.losses

    def losses(config: DpoConfig, *given: Any) -> Any:
        return honest(config.model_copy(update={"beta": 1.0}), *given)

    monkeypatch.setattr(preference, "losses", losses)


def forget_ktos_reference_point(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = preference.losses
    monkeypatch.setattr(preference, "losses", lambda config, known, kl: honest(config, known))


def relaid(monkeypatch: pytest.MonkeyPatch, alter: Callable[[Pass], Pass]) -> None:
    def lay(rows: Sequence[Row], pass_tokens: int, packed: bool, pad_id: int = 0) -> list[Pass]:
        return [alter(batch) for batch in passes.lay(rows, pass_tokens, packed, pad_id)]

    monkeypatch.setattr(gradient_check, "lay", lay)


def train_a_token_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, which in training is the end-of-turn."""

    def alter(batch: Pass) -> Pass:
        return replace(
            batch, predicted_at=batch.predicted_at[:-1], targets=batch.targets[:-1], sequence=batch.sequence[:-1]
        )

    relaid(monkeypatch, alter)


def predict_from_the_token_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    relaid(monkeypatch, lambda batch: replace(batch, predicted_at=batch.predicted_at + 1))


def let_documents_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    relaid(monkeypatch, lambda batch: replace(batch, documents=batch.documents and ((batch.tokens, 0, 0),)))


def double_the_heads_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of backward alone: every loss is right."""
    honest = head._FrozenHead.backward

    def backward(ctx: Any, *gradients: Any) -> Any:
        found, *nothing = honest(ctx, *gradients)
        return 2 * found, *nothing

    monkeypatch.setattr(head._FrozenHead, "backward", staticmethod(backward))


def average_over_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic of gradient accumulation: each pass's own mean, and those averaged."""
    honest = objective.SupervisedLoss.part

    def part(self: Any, log_probs: Any, batch: Pass) -> Any:
        rows = [self.rows[i] for i in batch.rows]
        whole, here = (sum(self.weights[r] * self.supervised[r] for r in some) for some in (self.rows, rows))
        return honest(self, log_probs, batch) * whole / here / 2

    monkeypatch.setattr(objective.SupervisedLoss, "part", part)


def every(losses: set[str], *forwards: str) -> set[tuple[str, str]]:
    return {(loss, forward) for loss in losses for forward in forwards}


@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (turn_the_sign, every(PREFERENCES, "packed", "padded")),
        (forget_beta, every(PREFERENCES, "packed", "padded")),
        (forget_ktos_reference_point, every({"kto"}, "packed", "padded")),
        (train_a_token_too_few, every(LOSSES, "packed", "padded")),
        (predict_from_the_token_itself, every(LOSSES, "packed", "padded")),
        (let_documents_see_each_other, every(LOSSES, "packed")),
        (double_the_heads_gradient, every(LOSSES, "packed")),
        (average_over_passes, every({"sft"}, "packed", "padded")),
    ],
)
def test_a_planted_fault_is_caught_where_it_is_and_nowhere_else(
    plant: Fault, caught: set[tuple[str, str]], differenced: Differenced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain side takes two thirds of the time and no fault may reach it: its losses are seen to be the honest ones."""

    def differences(model: Any, tensors: Any, directions: Any, sequences: Any, cases: Any) -> dict[str, torch.Tensor]:
        assert torch.equal(plain_losses(model, sequences, cases), differenced.losses)
        return differenced.slopes

    plant(monkeypatch)
    monkeypatch.setattr(gradient_check, "_differences", differences)
    assert wrong(check_gradients()) == caught


def test_a_gradient_that_is_no_number_fails() -> None:
    assert not Checked("sft", "packed", 1, float("nan")).ok


def test_the_command_prints_a_table_and_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "check_gradients", lambda: [Checked("sft", "packed", 1024, 2.5e-9)])
    said = CliRunner().invoke(app, ["gradients"])
    assert said.exit_code == 0
    assert said.stdout.splitlines() == [
        "loss  forward  parameters checked  relative error  ok",
        "sft   packed   1,024               2.5e-09         yes",
    ]


def test_the_command_fails_and_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Checked("sft", "packed", 1024, 0.5), Checked("ipo", "padded", 1024, 2.5e-9)]
    monkeypatch.setattr(gradient_check, "check_gradients", lambda: found)
    said = CliRunner().invoke(app, ["gradients", "--json"])
    assert isinstance(said.exception, StageFailed) and said.exception.exit_code == 1
    assert "sft (packed)" in str(said.exception) and "ipo" not in str(said.exception)
    assert [row["ok"] for row in json.loads(said.stdout)] == [False, True]
