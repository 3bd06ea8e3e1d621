"""What watches a training at work: its log, progress, guards, validation, stop requests and sealed checkpoints.

A line of `log.jsonl` is a step: {step, epoch, loss, learning_rate, grad_norm, tokens, …}, see `pipeline.train.step`; one that a
guard stopped has `trip`, `message` and `rows` too. Or it is a validation: {step, epoch, eval_loss, eval_loss_ci_low,
eval_loss_ci_high, …, eval_n}.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pipeline.config import DpoConfig, SftConfig
from pipeline.errors import Interrupted, StageFailed
from pipeline.progress import Progress, say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.stage import FEW_STEPS
from pipeline.train import checkpoints
from pipeline.train.guards import Guards, Trip
from pipeline.train.heldout import Measure, Pause, no_pause
from pipeline.train.plan import measured_after, steps_an_epoch
from pipeline.train.step import StepFigures, short
from pipeline.train.telemetry import Telemetry
from pipeline.train.trainer import Step, StepTrainer

LOG = "log.jsonl"
ROLLBACK = "rollback.pt"  # in a checkpoint: where the policy of that name goes back to


class Enough(Exception):
    """Early stopping had ended the run before it was resumed: no further step is taken."""


class Watch(TrainerCallback):
    """Sees every step, after `figures` has. Validates where the profile says so; `train` does it after the last step."""

    def __init__(
        self,
        record: Record,
        config: SftConfig | DpoConfig,
        trainer: StepTrainer,
        figures: StepFigures,
        ids: Sequence[str],
        rows: int,
        held_out: Measure | None,
        keep_best: Callable[[int], None],
        seal: Callable[[Path], None],
        telemetry: Telemetry,
    ) -> None:
        """`ids` are those of all rows; an epoch meets so many `rows`."""
        self.record, self.config, self.trainer, self.figures = record, config, trainer, figures
        self.ids, self.held_out, self.keep_best, self.seal, self.telemetry = ids, held_out, keep_best, seal, telemetry
        self.log = record.folder / LOG
        self.steps_an_epoch, self.measured_after = steps_an_epoch(config, rows), set(measured_after(config, rows))
        self.guards = Guards(
            config.guards,
            [line for line in items.read(self.log) if "loss" in line],
            curriculum=getattr(config, "curriculum", False),
            rows_differ=self.steps_an_epoch > 1,
        )
        self.progress: Progress | None = None
        self._point: dict[str, Any] = {}
        self._measured: tuple[int, list[Any]] | None = None  # the last step that was, and its values
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
            kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / ROLLBACK
            if kept.exists():
                self._point = torch.load(kept, map_location="cpu", weights_only=True)
            else:
                self._remember()
        self.progress = Progress(f"training {self.record.facts.stage}", state.max_steps, "step", done=state.global_step)
        self._lower_rate()  # by what the checkpoint was saved before
        self._validate_if_due(model, state, control)  # where the run stopped before it came to that
        if self.enough():
            raise Enough
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
        if self._asked_to_stop():
            control.should_save = True
            control.should_training_stop = True
        control.should_save = control.should_save and self.trainer.ranks.first

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._point:
            if state.global_step % self.config.save_steps == 0 and not self.guards.ruined:
                self._remember()
            torch.save(self._point, checkpoint / ROLLBACK)
        self.seal(checkpoint)
        checkpoints.forget_worse(Path(args.output_dir), self.validations())

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

    def _remember(self) -> None:
        """Where `rollback` goes back to: adapter and optimiser as at the last regular checkpoint, or at the start.

        A stop saves a checkpoint of its own. That is no such point, or a run that was stopped would roll back to another
        place than one that was not; so this point lies in every checkpoint.
        """
        trained = {n: p.detach().cpu().clone() for n, p in self.trainer.model.named_parameters() if p.requires_grad}
        optimizer = deepcopy(self.trainer.optimizer.state_dict())
        self._point = {"step": self.trainer.state.global_step, "adapter": trained, "optimizer": optimizer}

    def _roll_back(self) -> str:
        """The data goes on: the rows of this step are left out."""
        self._point = self.trainer.ranks.from_first(lambda: self._point)  # the others remember none: they do not save
        for name, parameter in self.trainer.model.named_parameters():
            if name in self._point["adapter"]:
                parameter.data.copy_(self._point["adapter"][name])
        self.trainer.optimizer.load_state_dict(deepcopy(self._point["optimizer"]))
        self.guards.rolled_back()
        step = self._point["step"]
        return (
            f"the adapter goes back to {f'step {step}' if step else 'where the run began'}, and its rows are left out"
        )

    def _of(self, trip: Trip, step: Step) -> dict[str, Any]:
        return {"trip": trip.kind, "message": trip.message, "rows": [self.ids[row] for row in step.rows]}

    # Validation

    def validate(self, model: Any, state: Any, pause: Pause = no_pause) -> list[Any]:
        """Measures the held-out rows, and logs what they come to unless this step's line is there. A value a row."""
        if self.held_out is None:
            return []
        if self._measured and self._measured[0] == state.global_step:
            return self._measured[1]
        epoch = f"epoch {self.epoch(state.global_step):g}"
        values = self.held_out.values(model, f"held-out rows, {epoch}", pause)
        figures = self.held_out.figures(values)
        if not self._validated(state.global_step):
            if figures["eval_loss"].value < min((v["eval_loss"] for v in self.validations()), default=math.inf):
                self.keep_best(state.global_step)
            line = self._line(state.global_step)
            for name, figure in figures.items():
                line |= {name: figure.value, f"{name}_ci_low": figure.ci_low, f"{name}_ci_high": figure.ci_high}
            self._write({k: v for k, v in line.items() if v is not None} | {"eval_n": len(values)})
        named = (f"{n.removeprefix('eval_').replace('_', ' ')} {f.text()}" for n, f in figures.items())
        say(f"{epoch}: held-out {', '.join(named)}")
        self._measured = state.global_step, values
        return values

    def enough(self) -> bool:
        """Whether early stopping has ended this run."""
        losses = [v["eval_loss"] for v in self.validations()]
        if not losses or not self.config.early_stopping:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.early_stopping

    def validations(self) -> list[dict[str, Any]]:
        """Those logged so far, with a finite loss."""
        return [line for line in items.read(self.log) if math.isfinite(line.get("eval_loss", math.inf))]

    def epoch(self, step: int) -> float:
        return round(step / self.steps_an_epoch, 4)

    def _validate_if_due(self, model: Any, state: Any, control: Any) -> None:
        """A stop request ends the measurement; it is made up for when the run goes on from here."""
        step = state.global_step
        due = step in self.measured_after
        if self.held_out is None or not due or self._validated(step) or self._asked_to_stop():
            return
        with suppress(Interrupted):
            self.validate(model, state, self._stop_if_asked)
            self._lower_rate()
            self._stop_early(control)
        if self._asked_to_stop():
            control.should_save = self.trainer.ranks.first
            control.should_training_stop = True

    def _lower_rate(self) -> None:
        """Only `reduce_on_plateau` wants to know."""
        if hasattr(self.trainer.lr_scheduler, "measured"):
            self.trainer.lr_scheduler.measured([line["eval_loss"] for line in self.validations()])

    def _stop_early(self, control: Any) -> None:
        if self.enough():
            say(f"stops early: the held-out loss was no lower the last {self.config.early_stopping} times")
            control.should_training_stop = True

    def _asked_to_stop(self) -> bool:
        """On any rank: all stop after the same step."""
        asked = next(filter(None, self.trainer.ranks.gather(self.record.stop.requested)), None)
        if asked:
            self.record.stop.requested = asked
        return asked is not None

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
