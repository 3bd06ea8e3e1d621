"""Promise 6, guards fire: what a trip does in a real training; the best adapter beside the last; a disk that is full."""

import json
import math
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.records.file import RecordFile
from pipeline.records.find import records
from pipeline.records.lifecycle import Record
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train.checkpoints import newest_sealed
from pipeline.train.preflight import check_disk
from pipeline.train.trainer import StepTrainer
from pipeline.workspace import Workspace

POISONED = 3  # the step whose gradients are


def lines(record: Record) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (record.folder / "log.jsonl").read_text("utf-8").splitlines()]


def weights(record: Record, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(record.output / name / "adapter_model.safetensors")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one step is no number, and so are its gradients."""
    honest = StepTrainer._gradients

    def gradients(self: StepTrainer, model: Any, rows: Any) -> Any:
        loss = honest(self, model, rows)
        if self.state.global_step + 1 == POISONED and loss is not None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
            return loss * math.nan
        return loss

    monkeypatch.setattr(StepTrainer, "_gradients", gradients)


@pytest.mark.usefixtures("poisoned")
def test_a_loss_that_is_no_number_stops_the_run_with_its_rows_and_keeps_the_batch(
    small_talk: Workspace, job: Callable[..., Job]
) -> None:
    with pytest.raises(StageFailed, match=rf"the loss is nan at step {POISONED}; the batch is kept in "):
        run_stage(Sft, job())
    file, facts = next(records(small_talk))
    assert facts.status == "failed" and facts.failure is not None and facts.failure.step == POISONED
    kept = json.loads((file.folder / f"tripped-step-{POISONED}.json").read_text("utf-8"))
    assert [row["id"] for row in kept["rows"]] == facts.failure.rows
    assert all(len(row["tokens"][0]) == len(row["labels"][0]) for row in kept["rows"])
    (trip,) = facts.results["training"]["trips"]
    assert (trip["step"], trip["trip"], trip["rows"]) == (POISONED, "loss_not_finite", facts.failure.rows)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_policy_that_goes_on_leaves_the_rows_out_and_says_so(
    small_talk: Workspace, job: Callable[..., Job], policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_stage(Sft, job(f"sft_config.guards.policy={policy}", "sft_config.save_steps=100"))
    steps = [line for line in lines(record) if "loss" in line]
    assert [line["step"] for line in steps if "trip" in line] == [POISONED]
    assert steps[POISONED - 1]["update_norm"] == 0 or policy == "rollback"
    assert steps[POISONED - 1]["tokens"] == steps[POISONED - 2]["tokens"]  # nothing was learnt from them
    assert all(math.isfinite(line["loss"]) for line in steps if "trip" not in line)
    assert all(torch.isfinite(tensor).all() for tensor in weights(record).values())
    assert [trip["step"] for trip in record.facts.results["training"]["trips"]] == [POISONED]
    said = "back to where the run began" if policy == "rollback" else "its rows are left out"
    assert said in capsys.readouterr().err


def test_a_rollback_takes_adapter_and_optimiser_back_to_the_last_checkpoint(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, torch.Tensor] = {}
    honest = StepTrainer._gradients

    def gradients(self: StepTrainer, model: Any, rows: Any) -> Any:
        step = self.state.global_step + 1
        seen[step] = torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])
        loss = honest(self, model, rows)
        return loss * math.inf if step == 4 and loss is not None else loss

    monkeypatch.setattr(StepTrainer, "_gradients", gradients)
    run_stage(Sft, job("sft_config.guards.policy=rollback", "sft_config.save_steps=2"))
    assert torch.equal(seen[5], seen[3]) and not torch.equal(seen[4], seen[3])  # as after step 2


def test_a_rollback_after_a_stop_goes_back_to_where_it_would_have_without(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop saves a checkpoint of its own, which is no place to go back to: neither for the start nor for step 4."""
    honest = StepTrainer._gradients
    stops: list[int] = []

    def gradients(self: StepTrainer, model: Any, rows: Any) -> Any:
        step = self.state.global_step + 1
        loss = honest(self, model, rows)
        if step in stops:
            stops.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * math.nan if step in (3, 7) and loss is not None else loss

    monkeypatch.setattr(StepTrainer, "_gradients", gradients)
    settings = ("sft_config.guards.policy=rollback", "sft_config.save_steps=4", "sft_config.epochs=2.0")
    whole = run_stage(Sft, job(*settings))
    stops += [2, 5]
    for resume in (False, True):
        with pytest.raises(Interrupted):
            run_stage(Sft, job(*settings, resume=resume))
    resumed = run_stage(Sft, job(*settings, resume=True))
    assert [line["loss"] for line in lines(resumed) if "trip" not in line] == [
        line["loss"] for line in lines(whole) if "trip" not in line
    ]
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_a_rollback_goes_back_to_before_an_update_that_ruined_the_adapter(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update of many times the adapter in step 3: the checkpoints after it, which are whole, are no place to go back to."""
    at: dict[int, torch.Tensor] = {}
    honest = StepTrainer._gradients

    def gradients(self: StepTrainer, model: Any, rows: Any) -> Any:
        step, optimizer = self.state.global_step + 1, self.optimizer
        at[step] = torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])
        for group in optimizer.param_groups:
            group["lr"] = 3.0 if step == 3 and not tripped() else 1e-5
        return honest(self, model, rows)

    def tripped() -> bool:
        return any(
            "trip" in json.loads(line) for log in small_talk.experiments.glob("*/log.jsonl") for line in log.open()
        )

    monkeypatch.setattr(StepTrainer, "_gradients", gradients)
    settings = ("sft_config.guards.policy=rollback", "sft_config.save_steps=2", "sft_config.epochs=3.0")
    record = run_stage(Sft, job(*settings, "sft_config.warmup_ratio=0.0"))
    first = next(line["step"] for line in lines(record) if "trip" in line)
    assert first > 4 and not torch.equal(at[5], at[3])
    assert torch.equal(at[first + 1], at[3])  # as after step 2, though checkpoint-4 is newer


def test_too_many_trips_stop_the_run_all_the_same(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = StepTrainer._gradients
    monkeypatch.setattr(StepTrainer, "_gradients", lambda self, model, rows: honest(self, model, rows) * math.nan)
    with pytest.raises(StageFailed, match=r"at step 3, after 2 others; the batch is kept"):
        run_stage(Sft, job("sft_config.guards.policy=skip", "sft_config.guards.most_trips=2"))


def test_an_adapter_that_does_not_move_fails_the_run(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = StepTrainer._note_gradients

    def note(self: StepTrainer) -> None:
        honest(self)
        self.model.zero_grad()

    monkeypatch.setattr(StepTrainer, "_note_gradients", note)
    with pytest.raises(StageFailed, match="the adapter did not change in 5 steps in a row"):
        run_stage(Sft, job("sft_config.warmup_ratio=0.0"))


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_weights_that_are_no_numbers_after_the_last_step_fail_the_run(
    small_talk: Workspace, job: Callable[..., Job], policy: str
) -> None:
    """Nothing planted: a rate that overflows float32 in the only step, whose loss and gradient are sound."""
    one_step = ("sft_config.batch_size=10", "sft_config.epochs=1.0", "sft_config.save_steps=1")
    absurd = ("sft_config.learning_rate=1e39", "sft_config.warmup_ratio=0.0", f"sft_config.guards.policy={policy}")
    with pytest.raises(StageFailed, match=r"the update of step 1 is (inf|nan) of the adapter"):
        run_stage(Sft, job(*one_step, *absurd))
    file, facts = next(records(small_talk))
    assert facts.status == "failed" and not list((small_talk.checkpoints / file.id).glob("*/adapter_model.safetensors"))


HELD_OUT = ("training_data.validation.fraction=0.3", "sft_config.epochs=4.0")


@pytest.fixture
def worse_after_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses as of a run that overfits: the second epoch's is the lowest. Those after it are measured."""
    from pipeline.train import heldout

    honest, planted = heldout.losses, [9.0, 5.0, 4.0, 4.5, 4.6]

    def losses(model: Any, encoded: Any, *given: Any) -> list[float]:
        return [planted.pop(0)] * len(encoded) if planted else honest(model, encoded, *given)

    monkeypatch.setattr(heldout, "losses", losses)


@pytest.mark.usefixtures("worse_after_two")
def test_the_best_adapter_is_kept_beside_the_last(small_talk: Workspace, job: Callable[..., Job]) -> None:
    record = run_stage(Sft, job(*HELD_OUT))
    training = record.facts.results["training"]
    assert (training["best"]["epoch"], training["latest"]["epoch"]) == (2.0, 4.0)
    best, last = weights(record, "adapter-best"), weights(record)
    assert any(not torch.equal(best[name], last[name]) for name in last)
    assert {a.path.split("/")[2] for a in RecordFile(record.file.path).facts().artifacts} == {"adapter", "adapter-best"}  # type: ignore[union-attr]


@pytest.mark.usefixtures("worse_after_two")
def test_keep_best_makes_it_the_adapter_and_measures_that_one(small_talk: Workspace, job: Callable[..., Job]) -> None:
    record = run_stage(Sft, job(*HELD_OUT, "sft_config.keep=best"))
    assert record.facts.results["training"]["kept"]["epoch"] == 2.0
    kept, last = weights(record), weights(record, "adapter-last")
    assert any(not torch.equal(kept[name], last[name]) for name in last)
    assert record.facts.results["eval_loss"]["after"]["value"] not in (4.0, 4.6)  # measured once more, on the kept one


@pytest.mark.usefixtures("worse_after_two")
def test_early_stopping_ends_the_run_when_the_held_out_loss_no_longer_falls(
    small_talk: Workspace, job: Callable[..., Job]
) -> None:
    record = run_stage(Sft, job(*HELD_OUT, "sft_config.early_stopping=1"))
    assert record.facts.status == "complete"
    assert [line["epoch"] for line in lines(record) if "eval_loss" in line] == [1.0, 2.0, 3.0]


def test_a_disk_too_small_is_told_before_the_training(small_talk: Workspace) -> None:
    with pytest.raises(UserError, match=r"checkpoints need .* GB and .* free; try freeing"):
        check_disk(10**18, small_talk.checkpoints)


def test_a_disk_that_is_full_in_a_save_leaves_the_checkpoint_before_it(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses to write files over a size from the second save on."""
    honest = StepTrainer._save_checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save(self: StepTrainer, *given: Any) -> None:
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            honest(self, *given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(StepTrainer, "_save_checkpoint", save)
    try:
        with pytest.raises(BaseException, match=r"(?i)file too large|os error 27|error 27"):
            run_stage(Sft, job("sft_config.save_steps=2"))
    finally:
        signal.signal(signal.SIGXFSZ, before)
    file, facts = next(records(small_talk))
    assert facts.status == "failed"
    whole = newest_sealed(small_talk.checkpoints / file.id)
    assert whole is not None and whole.name == "checkpoint-2"
    monkeypatch.undo()
    resumed = run_stage(Sft, job(resume=True))
    assert resumed.facts.status == "complete" and os.path.isdir(resumed.output / "adapter")
