"""What watches a trainer at work: its log, progress, finite losses, validation, stop requests and sealed checkpoints.

A line of `log.jsonl` is a step: {step, loss, learning_rate, grad_norm, tokens, …, epoch}, see `pipeline.step`; or a
validation: {step, epoch, eval_loss, eval_loss_ci_low, eval_loss_ci_high, …, eval_n}.
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pipeline.errors import Interrupted, StageFailed
from pipeline.heldout import Measure, Pause, no_pause
from pipeline.progress import Progress, say
from pipeline.records import items
from pipeline.records.find import sha256
from pipeline.records.lifecycle import Record
from pipeline.stage import FEW_STEPS
from pipeline.step import StepFigures

LOG = "log.jsonl"
SEAL = "sealed.json"


class Watch(TrainerCallback):
    """Sees every step, after `step` has. Validates after each whole epoch but the last, which `train` does itself."""

    def __init__(
        self, record: Record, step: StepFigures, ids: list[str], held_out: Measure | None, each_epoch: bool
    ) -> None:
        self.record, self.step, self.ids = record, step, ids
        self.held_out, self.each_epoch = held_out, each_epoch
        self.progress: Progress | None = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.__exit__(*error)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.max_steps < FEW_STEPS:
            say(
                f"note: {state.max_steps} steps teach little (under {FEW_STEPS}): more rows or epochs, or a smaller batch"
            )
        self.progress = Progress(f"training {self.record.facts.stage}", state.max_steps, "step", done=state.global_step)
        self._after_epoch(model, state, control)  # where the run stopped before it came to that
        self.progress.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the trainer's own summary of its run
        by_layer = self.step.grad_norm_by_layer(logs["grad_norm"])
        logs = {k: v for k, v in logs.items() if k != "num_tokens"}  # trl's count starts anew at a resume
        self._write({"step": state.global_step, **logs, **self.step.figures, "grad_norm_by_layer": by_layer})
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs[name]):
                raise StageFailed(
                    f"{name} is {logs[name]} at step {state.global_step}",
                    step=state.global_step,
                    rows=[self.ids[row] for row in self.step.rows],
                    remedy="a lower learning_rate, or bf16 in place of fp16",
                )
        if self.progress:
            self.progress.note = f"loss {logs['loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress:
            self.progress.advance(state.global_step)
        if self.record.stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._after_epoch(model, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The seal is written last: a checkpoint without one, or whose files differ, is torn."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != SEAL]
        seal = {str(p.relative_to(checkpoint)): sha256(p) for p in files}
        (checkpoint / SEAL).write_text(json.dumps(seal, indent=1))

    def validate(self, model: Any, state: Any, pause: Pause = no_pause) -> list[float]:
        """Measures the held-out rows, and logs what they come to unless this step's line is there. A value a row."""
        if self.held_out is None:
            return []
        epoch = f"epoch {state.epoch:g}"
        values = self.held_out.values(model, f"held-out rows, {epoch}", pause)
        figures = self.held_out.figures(values)
        if not self._validated(state.global_step):
            line: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
            for name, figure in figures.items():
                line |= {name: figure.value, f"{name}_ci_low": figure.ci_low, f"{name}_ci_high": figure.ci_high}
            self._write({k: v for k, v in line.items() if v is not None} | {"eval_n": len(values)})
        named = (f"{n.removeprefix('eval_').replace('_', ' ')} {f.text()}" for n, f in figures.items())
        say(f"{epoch}: held-out {', '.join(named)}")
        return values

    def _after_epoch(self, model: Any, state: Any, control: Any) -> None:
        """A stop request ends the measurement; it is made up for when the run goes on from here."""
        whole = state.global_step > 0 and float(state.epoch).is_integer()
        if not (self.each_epoch and whole and state.global_step < state.max_steps):
            return
        if self.record.stop.requested or self._validated(state.global_step):
            return
        with suppress(Interrupted):
            self.validate(model, state, self._stop_if_asked)
        if self.record.stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def _stop_if_asked(self) -> None:
        if self.record.stop.requested:
            raise Interrupted("a stop between two batches")

    def _validated(self, step: int) -> bool:
        return any("eval_loss" in line and line.get("step") == step for line in items.read(self.record.folder / LOG))

    def _write(self, line: dict[str, Any]) -> None:
        with (self.record.folder / LOG).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
