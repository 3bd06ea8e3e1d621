"""The trainer of SFT and DPO: transformers' `Trainer`, whose every batch is one whole optimiser step.

A step's rows are laid into forward passes (`pipeline.passes`), their gradients added up, looked at by the guards
(`pipeline.guards`), and only then does the optimiser step. How many passes there are never changes what is learnt: the
loss is the mean over the step's supervised tokens or pairs. When memory runs out nothing has been updated yet: the same
step is taken again in smaller passes.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer

from pipeline.errors import StageFailed
from pipeline.guards import Trip
from pipeline.head import bare, token_log_probs
from pipeline.passes import Pass, Row, lay, supervised
from pipeline.progress import say

LAYER = re.compile(r"\b(layers\.\d+)\.")


class StepLoss(Protocol):
    """The loss of one step's rows, pass by pass."""

    def part(self, log_probs: torch.Tensor, batch: Pass) -> torch.Tensor:
        """This pass's share of the step's mean; `log_probs` (trained,) are the pass's trained tokens', in nats."""

    def figures(self) -> dict[str, float]:
        """For the log, after all passes."""


@dataclass
class Execution:
    """How steps are computed. Nothing here changes what they learn."""

    pass_tokens: int
    packed: bool
    checkpointing: bool = False  # of gradients: activations are computed again
    compute: torch.dtype | None = None  # autocast's; None: as the weights are
    pad_id: int = 0
    out_of_memory: list[dict[str, int]] = field(default_factory=list)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.compute) if self.compute else nullcontext()


@dataclass
class Step:
    """What the step under way, or the last one, learnt from, and how it went."""

    rows: list[int]
    loss: float = math.nan
    grad_norm: float = math.nan  # before clipping
    grad_norm_by_layer: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # without padding
    supervised: int = 0
    passes: int = 0
    started: float = 0.0
    trip: Trip | None = None


class StepTrainer(Trainer):
    """`steps`: row numbers a step, of `rows`. `look` sees each step before the optimiser does; None from it: go on."""

    def __init__(
        self,
        *,
        rows: Sequence[Row],
        steps: Sequence[list[int]],
        step_loss: Callable[[list[int]], StepLoss],
        execution: Execution,
        neftune_alpha: float | None = None,
        plateau: bool = False,
        **given: Any,
    ) -> None:
        super().__init__(train_dataset=steps, **given)
        self.rows, self.steps, self.step_loss, self.execution = rows, steps, step_loss, execution
        self.plateau = plateau
        self.look: Callable[[Step], Trip | None] = lambda step: None
        self.step = Step([])
        self._pass: Pass | None = None
        if neftune_alpha:
            bare(self.model).get_input_embeddings().register_forward_hook(self._noise(neftune_alpha))

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=lambda steps: steps[0])

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the base class counts padded batches

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self.plateau:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = WarmupThenPlateau(optimizer or self.optimizer, warmup)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: list[int], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over a step's rows. Its gradients are dropped when a guard trips and the policy is to go on."""
        model.train()
        rows = [self.rows[i] for i in inputs]
        self.step = Step(inputs, supervised=sum(map(supervised, rows)), started=time.perf_counter())
        noise = torch.get_rng_state(), torch.cuda.get_rng_state_all() if self.args.device.type == "cuda" else []
        while (loss := self._gradients(model, rows)) is None:
            self._smaller(model, rows)
            torch.set_rng_state(noise[0])  # the same dropout as the first time
            if noise[1]:
                torch.cuda.set_rng_state_all(noise[1])
        self.step.loss = loss.item()
        self._note_gradients(model)
        self.step.trip = None if self._overflown() else self.look(self.step)
        if self.step.trip:
            self._leave_out(model)
        return loss

    def _gradients(self, model: Any, rows: Sequence[Row]) -> torch.Tensor | None:
        """Adds up the gradients of all passes and returns the step's loss; None when memory ran out."""
        how = self.execution
        batches = lay(rows, how.pass_tokens, how.packed, how.pad_id)
        losses = self.step_loss(self.step.rows)
        total = torch.zeros((), device=self.args.device)
        try:
            for batch in batches:
                self._pass = batch
                batch = batch.to(self.args.device)
                with how.autocast(self.args.device):
                    log_probs = token_log_probs(model, batch)
                loss = losses.part(log_probs, batch)
                self.accelerator.backward(loss)
                total += loss.detach()
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # a CPU's
                raise
            return None
        self.step.figures = losses.figures()
        self.step.tokens, self.step.passes = sum(batch.tokens for batch in batches), len(batches)
        return total

    def _smaller(self, model: Any, rows: Sequence[Row]) -> None:
        """Half the tokens a pass. Raises `StageFailed` when each row already has a pass of its own."""
        how, step = self.execution, self.state.global_step + 1
        model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(len(batch.rows) for batch in lay(rows, how.pass_tokens, how.packed, how.pad_id))
        if largest == 1:
            raise StageFailed(
                "out of memory with one row in a pass",
                step=step,
                remedy="gradient_checkpointing: true, quantization: nf4, or a smaller max_length",
            )
        before, how.pass_tokens = how.pass_tokens, how.pass_tokens // 2
        how.out_of_memory.append({"step": step, "pass_tokens": how.pass_tokens})
        say(f"\nout of memory at step {step}: taken again with {how.pass_tokens} tokens a pass in place of {before}")

    def _note_gradients(self, model: Any) -> None:
        gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[layer_of(name)].append(parameter.grad)
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0
        norms = {layer: torch.nn.utils.get_total_norm(found).item() / scale for layer, found in gradients.items()}
        self.step.grad_norm_by_layer = norms
        self.step.grad_norm = math.hypot(*norms.values())

    def _leave_out(self, model: Any) -> None:
        """Without gradients the optimiser moves nothing; fp16's scaler wants some, and skips a step of infinite ones."""
        if self.accelerator.scaler is None:
            model.zero_grad()
            return
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.inf)

    def _overflown(self) -> bool:
        """fp16 alone: the scale was too high. The scaler skips such a step by itself and lowers it."""
        scaled = self.accelerator.scaler is not None and math.isfinite(self.step.loss)
        return scaled and not math.isfinite(self.step.grad_norm)

    def _noise(self, alpha: float) -> Callable[..., Any]:
        """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise on the embeddings, by each document's own length."""

        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if not module.training or self._pass is None:
                return output
            if self._pass.documents is None:
                lengths = self._pass.attention_mask.sum(1)  # type: ignore[union-attr]
                length = lengths[:, None].expand(output.shape[:2])
            else:
                sizes = torch.tensor([sum(document) for document in self._pass.documents])
                length = sizes.repeat_interleave(sizes)[None]
            bound = alpha / (length.to(output.device) * output.shape[-1]).sqrt()
            noise: torch.Tensor = torch.empty_like(output).uniform_(-1, 1) * bound[..., None].to(output.dtype)
            return output + noise

        return add


class WarmupThenPlateau(LambdaLR):
    """Rises for `warmup` steps; then every measured loss that is no lower than the lowest takes the rate to a tenth."""

    def __init__(self, optimizer: Any, warmup: int) -> None:
        self.factor, self.lowest = 1.0, math.inf
        super().__init__(optimizer, lambda step: min(1.0, step / max(warmup, 1)) * self.factor)

    def measured(self, loss: float) -> None:
        self.factor *= 1.0 if loss < self.lowest else 0.1
        self.lowest = min(loss, self.lowest)


def layer_of(parameter: str) -> str:
    """`layers.7`, or `other` for what stands outside the layers."""
    found = LAYER.search(parameter)
    return found[1] if found else "other"
