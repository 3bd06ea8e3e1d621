"""What one optimiser step learns from, moves and costs: the figures of its line in `log.jsonl`.

    tokens               supervised tokens trained so far
    seconds              spent in steps so far: no validation, no saving
    tokens_per_second    those of this step, by its wall clock from the first pass to the optimiser's step
    memory_gb            the peak so far: what CUDA has allocated, or on a CPU the process's resident set
    update_norm          ‖Δθ‖ / ‖θ‖ over the adapter's parameters
    grad_norm_by_layer   L2, before clipping; `other` is what stands outside the layers

It only reads: no figure changes what a step computes.
"""

import math
import re
import resource
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

NOTHING: Mapping[str, float] = {"tokens": 0, "seconds": 0.0}  # trained so far
LAYER = re.compile(r"\blayers\.(\d+)\.")


class Feed:
    """A collator that remembers which rows it handed out, by their number in the dataset's column `row`."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate
        self.ahead: deque[list[int]] = deque()  # a batch each, oldest first: the loader is some ahead of the trainer

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        self.ahead.append([feature["row"] for feature in features])
        return self.collate(features)


class StepFigures(TrainerCallback):
    """`rows` are those of the step under way, `figures` those of the last whole step."""

    def __init__(self, feed: Feed, tokens_of_row: Sequence[int], before: Mapping[str, Any]) -> None:
        """`before`: the last step's line before a resume. A total that it lacks, an older one, is not told after it either."""
        self.feed, self.tokens_of_row = feed, tokens_of_row
        self.totals: dict[str, float] = {key: before[key] for key in NOTHING if key in before}
        self.rows: list[int] = []
        self.figures: dict[str, Any] = {}
        self._clipped: dict[str, float] = {}
        self._before: list[torch.Tensor] = []
        self._moved = self._started = 0.0

    def grad_norm_by_layer(self, grad_norm: float) -> dict[str, float]:
        """Of the last step. The hooks see gradients after clipping, which scales all alike: `grad_norm` is the whole before."""
        scale = grad_norm / (math.hypot(*self._clipped.values()) or 1.0)
        return {layer: _short(norm * scale) for layer, norm in self._clipped.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.feed.ahead.clear()  # of another loop, such as an evaluation

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows = []
        self._started = time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows += self.feed.ahead.popleft()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.rows += self.feed.ahead.popleft()
        gradients: dict[int, list[torch.Tensor]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                layer = LAYER.search(name)
                gradients[int(layer[1]) if layer else -1].append(parameter.grad)
        self._clipped = {f"layers.{n}" if n >= 0 else "other": _norm(gradients[n]) for n in sorted(gradients)}
        self._before = [parameter.detach().float().clone() for parameter in _trained(model)]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        pairs = zip(_trained(model), self._before, strict=True)
        change = _norm([parameter.detach().float() - before for parameter, before in pairs])
        self._moved = change / (_norm(self._before) or 1.0)
        self._before = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._started
        tokens = sum(self.tokens_of_row[row] for row in self.rows)
        for key, more in (("tokens", tokens), ("seconds", seconds)):
            if key in self.totals:
                self.totals[key] = round(self.totals[key] + more, 3)
        self.figures = {
            **self.totals,
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gb": round(_peak_memory(args.device) / 1e9, 3),
            "update_norm": _short(self._moved),
        }


def _trained(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _norm(tensors: list[torch.Tensor]) -> float:
    return torch.nn.utils.get_total_norm(tensors).item()


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _short(value: float) -> float:
    return float(f"{value:.6g}")
