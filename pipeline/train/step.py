"""What one optimiser step learns from, moves and costs: the figures of its line in `log.jsonl`.

    tokens               supervised tokens trained so far
    seconds              spent in steps so far: no validation, no saving
    tokens_per_second    supervised tokens of this step, by its wall clock from the first pass to the optimiser's step
    all_tokens_per_second   all of its tokens, without padding
    passes               forward passes it took
    memory_gb            the peak so far: what CUDA has allocated, or on a CPU the process's resident set
    gpu_…, energy_kwh    see `pipeline.train.telemetry.GpuSampler`
    grad_norm            L2 over the adapter, before clipping; by layer too, `other` is what stands outside the layers
    update_norm          ‖Δθ‖ / ‖θ‖ over the adapter's parameters; by layer too

It only reads: no figure changes what a step computes.
"""

import math
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from pipeline.train.telemetry import GpuSampler
from pipeline.train.trainer import Step, StepTrainer

NOTHING: Mapping[str, float] = {"tokens": 0, "seconds": 0.0}  # trained so far


class StepFigures(TrainerCallback):
    """`figures` are those of the last whole step."""

    def __init__(self, trainer: StepTrainer, before: Mapping[str, Any]) -> None:
        """`before`: the last step's line before a resume. A total that it lacks, an older one, is not told after it either."""
        self.trainer = trainer
        self.totals: dict[str, float] = {key: before[key] for key in NOTHING if key in before}
        self.figures: dict[str, Any] = {}
        self.learning_rate = 0.0
        self._before: dict[str, list[torch.Tensor]] = {}
        self._moved: dict[str, Any] = {}
        self._sampler = GpuSampler(before.get("energy_kwh", 0.0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._sampler.begin()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.learning_rate = float(lr_scheduler.get_last_lr()[0])
        self._before = {
            layer: [parameter.detach().float().clone() for parameter in trained]
            for layer, trained in self.trainer.trained.items()
        }

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        changes, sizes = {}, {}
        for layer, trained in self.trainer.trained.items():
            before = self._before.pop(layer)
            sizes[layer] = _norm(before)
            changes[layer] = _norm([p.detach().float() - b for p, b in zip(trained, before, strict=True)])
        self._moved = {
            "update_norm": short(math.hypot(*changes.values()) / (math.hypot(*sizes.values()) or 1.0)),
            "update_norm_by_layer": {layer: short(changes[layer] / (sizes[layer] or 1.0)) for layer in changes},
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step: Step = self.trainer.step
        seconds = time.perf_counter() - step.started
        learnt = 0 if step.trip else step.supervised
        for key, more in (("tokens", learnt), ("seconds", seconds)):
            if key in self.totals:
                self.totals[key] = round(self.totals[key] + more, 3)
        self.figures = {
            "grad_norm": short(step.grad_norm),
            **{name: short(value) for name, value in step.figures.items()},
            **self.totals,
            "tokens_per_second": round(step.supervised / seconds, 1),
            "all_tokens_per_second": round(step.tokens / seconds, 1),
            "passes": step.passes,
            "memory_gb": round(_peak_memory(args.device) / 1e9, 3),
            **self._sampler.read(),
            **self._moved,
            "grad_norm_by_layer": {layer: short(norm) for layer, norm in step.grad_norm_by_layer.items()},
        }


def _norm(tensors: list[torch.Tensor]) -> float:
    return torch.nn.utils.get_total_norm(tensors).item()


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def short(value: float) -> float:
    return float(f"{value:.6g}")
