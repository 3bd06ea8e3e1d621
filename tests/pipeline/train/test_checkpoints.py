"""What a resume goes on from: the model as it was trained so far, its end if it had come to one, its own best adapter."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import Interrupted, UserError
from pipeline.records.find import records
from pipeline.records.lifecycle import Record
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train import checkpoints, heldout, preflight
from pipeline.train.machine import Machine
from pipeline.train.trainer import Execution, StepTrainer
from pipeline.workspace import Workspace
from tests.pipeline.train.test_preflight import LENGTHS, SHAPE

HELD_OUT = ("training_data.validation.fraction=0.3", "sft_config.epochs=4.0", "sft_config.save_steps=1")


def lines(record: Record) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (record.folder / "log.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def checkpoint(folder: Path, step: int, quantization: str = "none") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in checkpoints.NEEDED:
        (path / name).write_text(f"{name} at {step}")
    checkpoints.seal(path, Execution(512, packed=True), quantization, 1, {"seed": 1})
    return path


@pytest.mark.parametrize(("begun", "memory"), [("nf4", 10**12), ("none", 80 * 10**6)])
def test_a_resume_keeps_the_quantization_that_auto_chose(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, begun: str, memory: int
) -> None:
    """More memory or less: the model that is trained stays the same, or the resume is refused."""
    interrupted = run_interrupted(job("quantization=auto"), monkeypatch, at=1)
    checkpoint(interrupted, 99, begun)
    file, _ = next(records(small_talk))
    again = job("quantization=auto", resume=True, record=file)
    machine = Machine("cuda", "a card", memory, here=False)
    needed = preflight.predict(again, "sft", LENGTHS, SHAPE, replace(machine, memory=10**12))
    assert needed.setup.quantization == begun
    if memory < needed.memory_bytes:
        with pytest.raises(UserError, match="and a card has"):
            preflight.predict(again, "sft", LENGTHS, SHAPE, machine)
        assert (
            preflight.predict(replace(again, resume=False), "sft", LENGTHS, SHAPE, machine).setup.quantization == "nf4"
        )


def run_interrupted(asked: Job, monkeypatch: pytest.MonkeyPatch, at: int) -> Path:
    """Stops in step `at`, as by SIGTERM. Returns where its checkpoints lie."""
    honest = StepTrainer._gradients

    def gradients(self: StepTrainer, model: Any, rows: Any) -> Any:
        if self.state.global_step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, model, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "_gradients", gradients)
        with pytest.raises(Interrupted):
            run_stage(Sft, asked)
    file, _ = next(records(asked.workspace))
    return asked.workspace.checkpoints / file.id


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Held-out losses of the measurements to come; once they are used up, it is measured."""
    honest, losses = heldout.losses, list[float]()

    def measured(model: Any, encoded: Any, *given: Any) -> list[float]:
        return [losses.pop(0)] * len(encoded) if losses else honest(model, encoded, *given)

    monkeypatch.setattr(heldout, "losses", measured)
    return losses


class Killed(BaseException):
    """In the place of SIGKILL: nothing that handles errors sees it coming."""


def test_a_run_that_had_stopped_early_and_was_killed_before_its_end_stays_stopped(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, planted: list[float]
) -> None:
    asked = (*HELD_OUT, "sft_config.early_stopping=1")
    planted += [9.0, 5.0, 4.0, 4.5]
    whole = run_stage(Sft, job(*asked))
    planted += [9.0, 5.0, 4.0, 4.5]

    def cut_off(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("pipeline.train.training._best_or_last", cut_off)
        run_stage(Sft, job(*asked))
    planted += [9.0]
    resumed = run_stage(Sft, job(*asked, resume=True))
    assert [line["epoch"] for line in lines(resumed) if "eval_loss" in line] == [1.0, 2.0, 3.0]
    assert [line["step"] for line in lines(resumed)] == [line["step"] for line in lines(whole)]
    after, before = weights(resumed.output / "adapter"), weights(whole.output / "adapter")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("setting", ["early_stopping=1", "schedule=reduce_on_plateau"])
def test_a_stop_in_the_measurement_that_decides_changes_nothing(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, planted: list[float], setting: str
) -> None:
    """Stopped while it measures, resumed, cut off before the next save, and resumed once more."""
    asked = (*HELD_OUT[:2], "sft_config.save_steps=100", f"sft_config.{setting}")
    losses = [9.0, 5.0, 4.0, 4.5, 4.6]
    planted += losses
    whole = run_stage(Sft, job(*asked))
    planted.clear()
    honest = heldout.losses
    planted += losses[:3]

    def stopped(model: Any, encoded: Any, *given: Any) -> list[float]:
        if len(planted) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            given[-1]()  # as before each pass
        return honest(model, encoded, *given)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(heldout, "losses", stopped)
        run_stage(Sft, job(*asked))
    planted += [9.0, *losses[3:]]

    def cut_off(self: StepTrainer, model: Any, rows: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(StepTrainer, "_gradients", cut_off)  # one that has stopped early takes no further step
        run_stage(Sft, job(*asked, resume=True))
    if next(records(small_talk))[1].status != "complete":
        planted.clear()
        planted += [9.0, *losses[4:]]
        run_stage(Sft, job(*asked, resume=True))
    resumed, _ = next(records(small_talk))
    assert lines_of(small_talk, resumed.id) == lines_of(small_talk, whole.id)
    after, before = (weights(small_talk.checkpoints / name / "adapter") for name in (resumed.id, whole.id))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_of_an_earlier_version_can_be_gone_on_from(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    (path / checkpoints.EXECUTION).write_text('{"pass_tokens": 512, "packed": true}')
    assert checkpoints.computed(path) == {"pass_tokens": 512, "packed": True, "quantization": None, "ranks": 1}


def test_a_best_that_came_after_the_checkpoint_is_forgotten_with_its_steps(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, planted: list[float]
) -> None:
    """On a GPU the same step need not come out the same: the second epoch is the best, killed, and then it is not."""
    asked = (*HELD_OUT[:2], "sft_config.save_steps=3", "sft_config.keep=best")
    planted += [9.0, 5.0, 4.0]
    steps = StepTrainer._gradients

    def cut_off(self: StepTrainer, model: Any, rows: Any) -> Any:
        if len([v for v in lines_of(small_talk) if "eval_loss" in v]) == 2:
            raise Killed
        return steps(self, model, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StepTrainer, "_gradients", cut_off)
        run_stage(Sft, job(*asked))
    file, _ = next(records(small_talk))
    output = small_talk.checkpoints / file.id
    first, second = sorted(output.glob(f"{checkpoints.BEST}-*"), key=checkpoints.step_of)
    resumed_from = checkpoints.newest_sealed(output)
    assert resumed_from and checkpoints.step_of(first) <= checkpoints.step_of(resumed_from) < checkpoints.step_of(
        second
    )
    best = weights(first)
    planted += [9.0, 6.0, 7.0, 8.0]  # before, and the epochs that are still to come
    resumed = run_stage(Sft, job(*asked, resume=True))
    assert resumed.facts.results["training"]["kept"]["step"] == checkpoints.step_of(first)
    kept = weights(resumed.output / "adapter")
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert not list(output.glob("checkpoint-*")) and not list(output.glob(f"{checkpoints.BEST}*"))


def lines_of(workspace: Workspace, name: str | None = None) -> list[dict[str, Any]]:
    """Of a record, else the newest; but what the clock says."""
    file = next(file for file, _ in records(workspace) if name in (None, file.id))
    log = file.folder / "log.jsonl"
    found = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    known = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss")
    return [{key: line[key] for key in known if key in line} for line in found]


def test_the_best_as_of_each_checkpoint_stays_and_no_other(tmp_path: Path) -> None:
    for step in (10, 30):
        checkpoint(tmp_path, step)
    for step in (5, 8, 20, 25, 35, 40):
        checkpoints.best_at(tmp_path, step).mkdir()
    losses = {5: 3.0, 8: 2.5, 20: 2.0, 25: 2.2, 35: 1.0, 40: 1.5}
    checkpoints.forget_worse(tmp_path, [{"step": step, "eval_loss": loss} for step, loss in losses.items()])
    assert {checkpoints.step_of(path) for path in tmp_path.glob(f"{checkpoints.BEST}-*")} == {8, 20, 35}


def test_a_run_cut_off_in_the_closing_of_its_record_still_has_its_checkpoint(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Record, "judge", cut_off)
        run_stage(Sft, job("sft_config.save_steps=1"))
    file, facts = next(records(small_talk))
    assert facts.status != "complete" and checkpoints.newest_sealed(small_talk.checkpoints / file.id)
    resumed = run_stage(Sft, job("sft_config.save_steps=1", resume=True))
    assert not list(resumed.output.glob("checkpoint-*"))


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a copy that a person made": lambda folder: (folder / "checkpoint-99-backup").mkdir(),
    "a best adapter that a person copied": lambda folder: (folder / "adapter-best-mine").mkdir(),
    "a file of such a name": lambda folder: (folder / "checkpoint-99").write_text("notes"),
    "a seal that is no table": lambda folder: (checkpoint(folder, 99) / checkpoints.SEAL).write_text("[]"),
    "a seal over nothing": lambda folder: (checkpoint(folder, 99) / checkpoints.SEAL).write_text("{}"),
    "a seal without the optimiser": lambda folder: without(checkpoint(folder, 99), "optimizer.pt"),
}


def without(path: Path, name: str) -> None:
    sealed = json.loads((path / checkpoints.SEAL).read_text())
    del sealed[name]
    (path / checkpoints.SEAL).write_text(json.dumps(sealed))


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_whole_checkpoint_is_none_and_what_a_person_put_there_stays(tmp_path: Path, what: str) -> None:
    whole = checkpoint(tmp_path, 4)
    HOSTILE[what](tmp_path)
    assert checkpoints.newest_sealed(tmp_path) == whole
    left = {path.name for path in tmp_path.iterdir()} & {"checkpoint-99-backup", "adapter-best-mine"}
    checkpoints.forget(tmp_path)
    assert not whole.exists() and left <= {path.name for path in tmp_path.iterdir()}
