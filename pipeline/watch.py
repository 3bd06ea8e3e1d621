"""What watches a training at work: its log, progress, guards, validation, stop requests and sealed checkpoints.

A line of `log.jsonl` is a step: {step, epoch, loss, learning_rate, grad_norm, tokens, …}, see `pipeline.step`; one that a
guard stopped has `trip`, `message` and `rows` too. Or it is a validation: {step, epoch, eval_loss, eval_loss_ci_low,
eval_loss_ci_high, …, eval_n}.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from pipeline import yamlio
from pipeline.config import TrainingConfig
from pipeline.errors import Interrupted, StageFailed
from pipeline.guards import Guards, Trip
from pipeline.heldout import Measure, Pause, no_pause
from pipeline.progress import Progress, say
from pipeline.records import items
from pipeline.records.find import sha256
from pipeline.records.lifecycle import Record
from pipeline.stage import FEW_STEPS
from pipeline.step import StepFigures, short
from pipeline.telemetry import Telemetry
from pipeline.trainer import Step, StepTrainer

LOG = "log.jsonl"
SEAL = "sealed.json"
EXECUTION = "execution.json"  # in a checkpoint: how its steps were computed


class Watch(TrainerCallback):
    """Sees every step, after `figures` has. Validates where the profile says so; `train` does it after the last step."""

    def __init__(
        self,
        record: Record,
        config: TrainingConfig,
        trainer: StepTrainer,
        figures: StepFigures,
        ids: Sequence[str],
        held_out: Measure | None,
        keep_best: Callable[[], None],
        telemetry: Telemetry,
    ) -> None:
        self.record, self.config, self.trainer, self.figures = record, config, trainer, figures
        self.ids, self.held_out, self.keep_best, self.telemetry = ids, held_out, keep_best, telemetry
        self.log = record.folder / LOG
        self.steps_an_epoch = math.ceil(len(ids) / (config.batch_size * config.gradient_accumulation))
        self.guards = Guards(config.guards, [line for line in items.read(self.log) if "loss" in line])
        self.progress: Progress | None = None
        self._start: dict[str, torch.Tensor] = {}
        trainer.look = self.look

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.__exit__(*error)

    # Steps

    def look(self, step: Step) -> Trip | None:
        """Before the optimiser steps. Raises `StageFailed` where the policy is to stop."""
        number = self.trainer.state.global_step + 1
        trip = self.guards.before_update(
            step=number, loss=step.loss, grad_norm=step.grad_norm, supervised=step.supervised
        )
        if trip is None:
            return None
        kept = self._keep_batch(number, trip, step)
        trips = 1 + sum("trip" in line for line in items.read(self.log))
        policy = self.config.guards.policy
        if policy == "stop" or trips > self.config.guards.most_trips:
            self._write({**self._line(number), "loss": step.loss, "grad_norm": step.grad_norm, **self._of(trip, step)})
            often = f", after {trips - 1} others" if policy != "stop" else ""
            raise StageFailed(
                f"{trip.message}{often}; the batch is kept in {kept}",
                step=number,
                rows=[self.ids[row] for row in step.rows],
                remedy=trip.remedy,
            )
        done = self._roll_back() if policy == "rollback" else "its rows are left out"
        say(f"\nguard: {trip.message}; {done}; the batch is kept in {kept}")
        return trip

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.max_steps < FEW_STEPS:
            say(
                f"note: {state.max_steps} steps teach little (under {FEW_STEPS}): more rows or epochs, or a smaller batch"
            )
        if self.config.guards.policy == "rollback":
            self._start = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.progress = Progress(f"training {self.record.facts.stage}", state.max_steps, "step", done=state.global_step)
        self._validate_if_due(model, state, control)  # where the run stopped before it came to that
        self.progress.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, number = self.trainer.step, state.global_step
        tripped = self._of(step.trip, step) if step.trip else {}
        line = {**self._line(number), "loss": short(step.loss), "learning_rate": self.figures.learning_rate}
        self._write({**line, **self.figures.figures, **tripped})
        if self.progress:
            self.progress.note = f"loss {step.loss:.3f}"
            self.progress.advance(number)
        if not step.trip:
            dead = self.guards.after_update(
                step=number,
                loss=step.loss,
                grad_norm=step.grad_norm,
                update_norm=self.figures.figures["update_norm"],
                learning_rate=self.figures.learning_rate,
            )
            if dead:
                rows = [self.ids[row] for row in step.rows]
                raise StageFailed(dead.message, step=number, rows=rows, remedy=dead.remedy)
        self._validate_if_due(model, state, control)
        if self.record.stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The seal is written last: a checkpoint without one, or whose files differ, is torn."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        how = self.trainer.execution
        (checkpoint / EXECUTION).write_text(json.dumps({"pass_tokens": how.pass_tokens, "packed": how.packed}))
        (checkpoint / "configuration.yaml").write_text(yamlio.dump(self.record.facts.configuration), "utf-8")
        files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != SEAL]
        seal = {str(p.relative_to(checkpoint)): sha256(p) for p in files}
        unsealed = checkpoint / f".{SEAL}"
        unsealed.write_text(json.dumps(seal, indent=1))
        os.replace(unsealed, checkpoint / SEAL)

    def _keep_batch(self, number: int, trip: Trip, step: Step) -> str:
        """The rows of a step that a guard stopped, as they were trained: ids, tokens, what was supervised."""
        path = self.record.folder / f"tripped-step-{number}.json"
        rows = []
        for row in step.rows:
            given = self.trainer.rows[row]
            sides = given if isinstance(given, tuple) else (given,)
            rows.append({"id": self.ids[row], "tokens": [s.ids for s in sides], "labels": [s.labels for s in sides]})
        kept = {"step": number, "trip": trip.kind, "loss": step.loss, "grad_norm": step.grad_norm, "rows": rows}
        path.write_text(json.dumps(kept) + "\n", "utf-8")
        return self.record.workspace.shown(path)

    def _roll_back(self) -> str:
        """Adapter and optimiser as at the last whole checkpoint, or at the start. The data goes on: its rows are left out."""
        optimizer, model = self.trainer.optimizer, self.trainer.model
        checkpoint = newest_sealed(Path(self.trainer.args.output_dir))
        if checkpoint is None:
            for name, parameter in model.named_parameters():
                if name in self._start:
                    parameter.data.copy_(self._start[name])
            optimizer.optimizer.state.clear()
            return "the adapter goes back to where the run began, and its rows are left out"
        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        state = torch.load(checkpoint / "optimizer.pt", map_location=self.trainer.args.device, weights_only=True)
        optimizer.load_state_dict(state)
        return f"the adapter goes back to {checkpoint.name}, and its rows are left out"

    def _of(self, trip: Trip, step: Step) -> dict[str, Any]:
        return {"trip": trip.kind, "message": trip.message, "rows": [self.ids[row] for row in step.rows]}

    # Validation

    def validate(self, model: Any, state: Any, pause: Pause = no_pause) -> list[Any]:
        """Measures the held-out rows, and logs what they come to unless this step's line is there. A value a row."""
        if self.held_out is None:
            return []
        epoch = f"epoch {self.epoch(state.global_step):g}"
        values = self.held_out.values(model, f"held-out rows, {epoch}", pause)
        figures = self.held_out.figures(values)
        if not self._validated(state.global_step):
            if figures["eval_loss"].value < min((v["eval_loss"] for v in self.validations()), default=math.inf):
                self.keep_best()
            line = self._line(state.global_step)
            for name, figure in figures.items():
                line |= {name: figure.value, f"{name}_ci_low": figure.ci_low, f"{name}_ci_high": figure.ci_high}
            self._write({k: v for k, v in line.items() if v is not None} | {"eval_n": len(values)})
        named = (f"{n.removeprefix('eval_').replace('_', ' ')} {f.text()}" for n, f in figures.items())
        say(f"{epoch}: held-out {', '.join(named)}")
        return values

    def validations(self) -> list[dict[str, Any]]:
        """Those logged so far, with a finite loss."""
        return [line for line in items.read(self.log) if math.isfinite(line.get("eval_loss", math.inf))]

    def epoch(self, step: int) -> float:
        return round(step / self.steps_an_epoch, 4)

    def _validate_if_due(self, model: Any, state: Any, control: Any) -> None:
        """A stop request ends the measurement; it is made up for when the run goes on from here."""
        step = state.global_step
        each = (self.steps_an_epoch if self.config.evaluate_each_epoch else None, self.config.evaluate_steps)
        due = 0 < step < state.max_steps and any(n and step % n == 0 for n in each)
        if self.held_out is None or not due or self.record.stop.requested or self._validated(step):
            return
        with suppress(Interrupted):
            self.validate(model, state, self._stop_if_asked)
            self._lower_rate()
            self._stop_early(control)
        if self.record.stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def _lower_rate(self) -> None:
        """Only `reduce_on_plateau` wants to know."""
        if hasattr(self.trainer.lr_scheduler, "measured") and (measured := self.validations()):
            self.trainer.lr_scheduler.measured(measured[-1]["eval_loss"])

    def _stop_early(self, control: Any) -> None:
        losses = [v["eval_loss"] for v in self.validations()]
        if not losses or not self.config.early_stopping:
            return
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best >= self.config.early_stopping:
            say(f"stops early: {since_best} measurements without a lower held-out loss")
            control.should_training_stop = True

    def _stop_if_asked(self) -> None:
        if self.record.stop.requested:
            raise Interrupted("a stop between two batches")

    def _validated(self, step: int) -> bool:
        return any("eval_loss" in line and line.get("step") == step for line in items.read(self.log))

    def _line(self, step: int) -> dict[str, Any]:
        return {"step": step, "epoch": self.epoch(step)}

    def _write(self, line: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        self.telemetry.write(line)


def newest_sealed(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and whole; torn ones are passed over, aloud."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        try:
            sealed = json.loads((checkpoint / SEAL).read_text())
            if all(sha256(checkpoint / name) == digest for name, digest in sealed.items()):
                return checkpoint
        except (OSError, ValueError):
            pass
        say(f"note: {checkpoint.name} is torn and passed over")
    return None
