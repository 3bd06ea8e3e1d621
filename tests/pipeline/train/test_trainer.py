"""A step of the trainer: the same whatever passes it is taken in, and nothing is learnt from one that went wrong."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from little import VOCABULARY, little_model, pair, plain_log_probs, sequence, trainable
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from pipeline.config import DpoConfig, Guards
from pipeline.encoded import Encoded
from pipeline.errors import StageFailed
from pipeline.train import attention, objective, trainer
from pipeline.train.guards import Guards as Guard
from pipeline.train.guards import Trip
from pipeline.train.head import bare
from pipeline.train.objective import PreferenceLoss, SupervisedLoss
from pipeline.train.passes import Pass, Row, lay, supervised
from pipeline.train.trainer import Execution, Step, StepTrainer, WarmupThenPlateau, trained_by_layer

EXACT = 1e-10
SOURCE = random.Random(0)
ROWS = [sequence(SOURCE, *turns) for turns in ([(3, 6)], [(2, 1)], [(2, 3), (4, 5)], [(5, 12)], [(1, 4)])]
PAIRS = [pair(SOURCE, *lengths) for lengths in ((5, 4, 6), (6, 7, 1), (1, 2, 3), (3, 3, 9), (2, 8, 2))]
ALL = list(range(5))
REFERENCE = [(-4.0 - n, -5.0 + n) for n in ALL]
Make = Callable[..., StepTrainer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(
        rows: Sequence[Row] = ROWS,
        *,
        packed: bool = True,
        pass_tokens: int = 10_000,
        steps: Sequence[list[int]] = (ALL,),
        model: Any = None,
        weights: Sequence[float] | None = None,
        arguments: dict[str, Any] | None = None,
        **options: Any,
    ) -> StepTrainer:
        model = model or little_model()
        attention.install(bare(model))
        tokens, weight = [supervised(row) for row in rows], weights or [1.0] * len(rows)
        quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        given = quiet | {"use_cpu": True, "remove_unused_columns": False, "lr_scheduler_type": "constant"}
        return StepTrainer(
            model=model,
            rows=rows,
            steps=steps,
            step_loss=options.pop("step_loss", lambda step: SupervisedLoss(step, tokens, weight)),
            execution=Execution(pass_tokens, packed),
            args=TrainingArguments(output_dir=str(tmp_path), num_train_epochs=1, **given | (arguments or {})),
            **options,
        )

    return made


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainable(model) if p.grad is not None])


def take(of: StepTrainer, rows: list[int] = ALL) -> tuple[float, Tensor]:
    """A step's loss and gradient, with a generator that always stands at the same place."""
    of.model.zero_grad()
    torch.manual_seed(3)
    loss = of.training_step(of.model, rows)
    assert loss.item() == pytest.approx(of.step.loss)
    return of.step.loss, gradient(of.model)


def tokens_for(passes: int, rows: Sequence[Row], packed: bool) -> int:
    return next(tokens for tokens in range(1, 1000) if len(lay(rows, tokens, packed)) == passes)


def apart(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> float:
    """Relative: of loss or gradient, whichever is the further."""
    return max(abs(one[0] - other[0]) / abs(other[0]), float((one[1] - other[1]).norm() / other[1].norm()))


# One step, whatever its passes


def one_big_batch(model: Any, rows: Sequence[Encoded]) -> tuple[float, Tensor]:
    """The mean cross-entropy over all supervised tokens, as transformers computes it from labels."""
    model.eval()
    bare(model).set_attn_implementation("sdpa")
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (longest - len(row.ids)) for row in rows])
    logits = model(input_ids=ids).logits[:, :-1]
    loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable(model))])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_step_is_one_big_batch_in_however_many_passes(passes: int, packed: bool, make: Make) -> None:
    of = make(packed=packed, pass_tokens=tokens_for(passes, ROWS, packed))
    found = take(of)
    assert of.step.passes == passes and of.step.supervised == sum(map(supervised, ROWS))
    assert apart(found, one_big_batch(of.model, ROWS)) < 1e-6  # its loss is held in float32
    assert apart((1.0, found[1]), (1.0, one_big_batch(of.model, ROWS)[1])) < EXACT


def test_a_mean_over_passes_of_their_own_means_would_be_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault of gradient accumulation."""

    def part(self: SupervisedLoss, log_probs: Tensor, batch: Pass) -> Tensor:
        return -log_probs.mean() / 2

    monkeypatch.setattr(objective.SupervisedLoss, "part", part)
    of = make(pass_tokens=tokens_for(2, ROWS, packed=True))
    assert apart(take(of), one_big_batch(of.model, ROWS)) > 0.01


def pair_loss(step: list[int]) -> PreferenceLoss:
    tokens = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in PAIRS]
    return PreferenceLoss(step, DpoConfig(), tokens, [1.0] * 5, REFERENCE)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_step_of_pairs_is_their_mean_in_however_many_passes(passes: int, packed: bool, make: Make) -> None:
    of = make(PAIRS, packed=packed, pass_tokens=tokens_for(passes, PAIRS, packed), step_loss=pair_loss)
    found = take(of)
    assert of.step.passes == passes and of.step.figures.keys() >= {"rewards/margins"}
    sums = torch.stack([each.sum() for each in plain_log_probs(of.model, [side for both in PAIRS for side in both])])
    margin = sums[::2] - sums[1::2] - torch.tensor([chosen - rejected for chosen, rejected in REFERENCE])
    loss = -F.logsigmoid(0.1 * margin).mean()
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable(of.model))])
    assert found[0] == pytest.approx(loss.item(), rel=1e-6)
    assert apart((1.0, found[1]), (1.0, by_hand)) < EXACT


def test_a_domain_of_weight_two_is_its_rows_twice(make: Make) -> None:
    weighted = take(make(weights=[1.0, 2.0, 1.0, 2.0, 1.0], pass_tokens=20))
    repeated = take(make([*ROWS, ROWS[1], ROWS[3]], pass_tokens=25), [*ALL, 5, 6])
    assert apart(weighted, repeated) < 1e-6
    assert apart(weighted, take(make())) > 0.01


def test_gradient_checkpointing_changes_nothing(make: Make) -> None:
    right, of = take(make(PAIRS, step_loss=pair_loss)), make(PAIRS, step_loss=pair_loss)
    bare(of.model).gradient_checkpointing_enable()
    calls: list[int] = []
    for number, layer in enumerate(bare(of.model).get_decoder().layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    assert apart(take(of), right) < EXACT
    assert calls == [0, 1, 1, 0]  # computed again on the way back


def test_gradient_norms_are_those_before_clipping_by_layer(make: Make) -> None:
    of = make(arguments={"max_grad_norm": 1e-3})
    _, whole = take(of)
    step = of.step
    assert step.grad_norm == pytest.approx(whole.norm().item()) and step.grad_norm > 0.1
    assert list(step.grad_norm_by_layer) == ["layers.0", "layers.1"]
    of_first = [p.grad for name, p in of.model.named_parameters() if ".layers.0." in name and p.grad is not None]
    expected = math.sqrt(sum(g.square().sum().item() for g in of_first))
    assert step.grad_norm_by_layer["layers.0"] == pytest.approx(expected)


def test_trained_parameters_stand_under_their_layer_and_others_under_other(make: Make) -> None:
    of = make()
    found = trained_by_layer(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 2), "model": of.model}))
    assert list(found) == ["other", "layers.0", "layers.1"]
    assert sum(map(len, found.values())) == 2 + len(trainable(of.model)) and len(found["other"]) == 2


# Out of memory

ON_A_CPU = (
    "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(ON_A_CPU)]
DROPOUT = {"lora_dropout": 0.5}


def fail(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, Pass], bool], error: Exception) -> list[int]:
    """The error where `when(number of the pass, pass)`; returns how many passes were begun, as they are."""
    begun: list[int] = []
    honest = trainer.token_log_probs

    def log_probs(model: Any, batch: Pass) -> Tensor:
        begun.append(len(begun) + 1)
        if when(begun[-1], batch):
            raise error
        return honest(model, batch)

    monkeypatch.setattr(trainer, "token_log_probs", log_probs)
    return begun


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu"])
def test_out_of_memory_in_a_pass_takes_the_same_step_again_in_smaller_ones(
    error: Exception, make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = tokens_for(2, ROWS, packed=True)
    untroubled = take(make(pass_tokens=tokens // 2, model=little_model(adapter=DROPOUT)))
    of = make(pass_tokens=tokens, model=little_model(adapter=DROPOUT))
    had_gradients: list[bool] = []

    def second(number: int, batch: Pass) -> bool:
        had_gradients.append(any(p.grad is not None for p in trainable(of.model)))
        return number == 2

    fail(monkeypatch, second, error)
    troubled = take(of)
    assert had_gradients[:3] == [False, True, False]  # dropped, and not added to
    assert apart(troubled, untroubled) < EXACT
    how = of.execution
    assert how.pass_tokens == tokens // 2
    assert how.out_of_memory == [{"step": 1, "pass_tokens": tokens // 2}]
    assert f"out of memory at step 1: taken again with {tokens // 2} tokens a pass" in capfd.readouterr().err
    assert of.step.passes == len(lay(ROWS, tokens // 2, packed=True)) > 2


def test_other_dropout_the_second_time_would_be_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_for(2, ROWS, packed=True)
    untroubled = take(make(pass_tokens=tokens // 2, model=little_model(adapter=DROPOUT)))
    of = make(pass_tokens=tokens, model=little_model(adapter=DROPOUT))
    fail(monkeypatch, lambda number, _: number == 2, OUT_OF_MEMORY[0])
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert apart(take(of), untroubled) > 0.01


def test_passes_are_halved_until_they_fit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, of = take(make()), make()
    fail(monkeypatch, lambda _, batch: len(batch.rows) > 1, OUT_OF_MEMORY[0])
    assert apart(take(of), expected) < 1e-6
    assert of.step.passes == len(ROWS) and len(of.execution.out_of_memory) > 3


def test_out_of_memory_with_one_row_a_pass_ends_the_run_with_a_remedy(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = make(pass_tokens=1)
    fail(monkeypatch, lambda number, _: number == 2, OUT_OF_MEMORY[0])
    with pytest.raises(StageFailed, match=r"one row in a pass; try .*gradient_checkpointing: true") as failed:
        take(of)
    assert failed.value.step == 1 and of.execution.out_of_memory == []
    assert all(p.grad is None for p in trainable(of.model))


def test_another_error_is_not_taken_for_out_of_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = fail(monkeypatch, lambda number, _: number == 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        take(make(pass_tokens=1))
    assert begun == [1, 2]


# NEFTune


@pytest.mark.parametrize("packed", [True, False])
def test_neftune_noise_is_bounded_by_each_documents_own_length_and_absent_in_eval(packed: bool, make: Make) -> None:
    alpha, rows = 5.0, [sequence(random.Random(0), (2, answer)) for answer in (2, 60, 14)]
    of = make(rows, packed=packed, neftune_alpha=alpha)
    embedding = bare(of.model).get_input_embeddings()
    noise: list[Tensor] = []
    embedding.register_forward_hook(
        lambda m, ids, output: noise.append((output - F.embedding(ids[0], m.weight)).detach())
    )
    of.training_step(of.model, [0, 1, 2])
    (batch,) = lay(rows, 10_000, packed)
    lengths = [len(rows[row].ids) for row in batch.rows]
    (drawn,) = noise
    documents = (
        drawn[0].split(lengths) if packed else [row[:length] for row, length in zip(drawn, lengths, strict=True)]
    )
    for document, length in zip(documents, lengths, strict=True):
        bound = alpha / math.sqrt(length * drawn.shape[-1])
        assert 0.8 * bound < document.abs().max() <= bound  # by the whole pass's length it would be a fraction
        assert abs(document.mean()) < 0.2 * bound
    of.model.eval()
    with torch.no_grad():
        bare(of.model)(input_ids=torch.tensor([rows[2].ids]))
    assert not noise[1].any()


def test_without_neftune_there_is_no_noise(make: Make) -> None:
    assert apart(take(make()), take(make(neftune_alpha=None))) == 0.0
    assert apart(take(make()), take(make(neftune_alpha=5.0))) > 0.01


# What the optimiser never sees


class Before(TrainerCallback):
    """Whether each step moved a weight, and whether it touched the optimiser's state."""

    def __init__(self, of: StepTrainer) -> None:
        self.of, self.moved, self.touched = of, [], []
        self.kept: Any = None

    def _state(self) -> tuple[list[Tensor], list[Tensor]]:
        optimizer = self.of.optimizer.state_dict()["state"]
        held = [v.clone() for each in optimizer.values() for v in each.values()]
        return [p.detach().clone() for p in trainable(self.of.model)], held

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.kept = self._state()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        for found, before, now in zip((self.moved, self.touched), self.kept, self._state(), strict=True):
            found.append(
                len(before) != len(now) or any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
            )


TRIP = Trip("gradient_spike", "planted", "nothing")
DECAY = {"weight_decay": 0.1, "learning_rate": 1e-2}  # with a momentum, all that moves a weight without a gradient


@pytest.mark.parametrize("gradients_are_left_at_zero", [False, True])
def test_a_step_that_trips_touches_neither_weights_nor_optimiser(
    gradients_are_left_at_zero: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: gradients of 0 in place of none, with which AdamW moves by its momentum."""
    of = make(steps=[[0, 1], [2], [3], [4]], arguments=DECAY)
    looked: list[Step] = []

    def look(step: Step) -> Trip | None:
        looked.append(step)
        return TRIP if step.rows == [3] else None

    of.look, seen = look, Before(of)
    of.add_callback(seen)
    if gradients_are_left_at_zero:
        monkeypatch.setattr(of.model, "zero_grad", lambda: torch.nn.Module.zero_grad(of.model, set_to_none=False))
    of.train()
    assert [step.rows for step in looked] == [[0, 1], [2], [3], [4]]
    assert seen.moved == seen.touched == [True, True, gradients_are_left_at_zero, True]
    assert [step.trip for step in looked] == [None, None, TRIP, None]


def test_a_guard_that_stops_the_run_does_so_before_anything_has_moved(make: Make) -> None:
    of = make(arguments=DECAY)
    before = [p.detach().clone() for p in trainable(of.model)]

    def look(step: Step) -> None:
        assert math.isfinite(step.loss) and step.grad_norm > 0
        raise StageFailed("planted")

    of.look = look
    with pytest.raises(StageFailed):
        of.train()
    assert all(torch.equal(one, other) for one, other in zip(before, trainable(of.model), strict=True))


def test_a_loss_that_is_no_number_is_seen_by_the_guards_and_leaves_no_trace(make: Make) -> None:
    class Loss(SupervisedLoss):
        def part(self, log_probs: Tensor, batch: Pass) -> Tensor:
            return super().part(log_probs, batch) * (math.nan if self.rows == [1] else 1.0)

    of = make(steps=[[0], [1], [2]], step_loss=lambda step: Loss(step, [supervised(r) for r in ROWS], [1.0] * 5))
    found = guarded(of)
    result = of.train()
    assert [trip and trip.kind for trip in found] == [None, "loss_not_finite", None]
    assert math.isfinite(result.training_loss) and all(p.isfinite().all() for p in trainable(of.model))


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_in_which_nothing_is_supervised_trips_the_guard_for_it(packed: bool, make: Make) -> None:
    of = make([sequence(SOURCE, (5, 0)), sequence(SOURCE, (3, 0)), ROWS[0]], packed=packed, steps=[[0, 1], [2]])
    found = guarded(of)
    of.train()
    assert [trip and trip.kind for trip in found] == ["nothing_supervised", None]


def guarded(of: StepTrainer) -> list[Trip | None]:
    """What the guards say, step by step."""
    guards, found = Guard(Guards()), list[Trip | None]()

    def look(step: Step) -> Trip | None:
        number = len(found) + 1
        trip = guards.before_update(step=number, loss=step.loss, grad_norm=step.grad_norm, supervised=step.supervised)
        found.append(trip)
        return trip

    of.look = look
    return found


# The plateau's schedule


def test_the_rate_rises_and_falls_to_a_tenth_at_every_measurement_without_progress() -> None:
    schedule = plateau(warmup=2)
    assert rates(schedule, 3) == pytest.approx([0.0, 0.5, 1.0])
    schedule.measured([2.0, 1.5])
    assert rates(schedule, 2) == pytest.approx([1.0, 1.0])
    schedule.measured([2.0, 1.5, 1.5])
    assert rates(schedule, 2)[1] == pytest.approx(0.1)
    schedule.measured([2.0, 1.5, 1.5, 1.6])
    assert rates(schedule, 2)[1] == pytest.approx(0.01)
    schedule.measured([2.0, 1.5, 1.5, 1.6, 1.4])
    assert rates(schedule, 2) == pytest.approx([0.01, 0.01])


def test_the_plateaus_schedule_goes_on_from_its_state(tmp_path: Path) -> None:
    """As transformers keeps it: through torch.save and back, without unpickling anything else."""
    first = plateau(warmup=2)
    rates(first, 4)
    first.measured([1.0, 1.0])
    rates(first, 1)
    torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    resumed = plateau(warmup=2)
    schedule, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(schedule)
    for each in (first, resumed):
        each.measured([1.0, 1.0, 1.0])  # no lower than the lowest before
    expected = rates(first, 3)
    assert rates(resumed, 3) == expected and expected[-1] == pytest.approx(0.01)


def plateau(warmup: int) -> WarmupThenPlateau:
    return WarmupThenPlateau(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), warmup)


def rates(schedule: WarmupThenPlateau, steps: int) -> list[float]:
    """Those of the next steps, the one now set first."""
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_the_trainer_takes_the_plateaus_schedule_with_its_warm_up(make: Make) -> None:
    of = make(steps=[[0]] * 10, plateau=True, arguments={"warmup_steps": 0.3})
    of.create_optimizer()
    schedule = of.create_scheduler(10)
    assert isinstance(schedule, WarmupThenPlateau) and of.lr_scheduler is schedule
    peak = of.args.learning_rate
    assert rates(schedule, 5) == pytest.approx([0, peak / 3, 2 * peak / 3, peak, peak])
