"""The trainer of SFT and DPO: transformers' `Trainer`, whose every batch is one whole optimiser step.

A step's rows are laid into forward passes (`pipeline.train.passes`), their gradients added up, looked at by the guards
(`pipeline.train.guards`), and only then does the optimiser step. How many passes there are never changes what is learnt: the
loss is the mean over the step's supervised tokens or pairs. When memory runs out nothing has been updated yet: the same
step is taken again in smaller passes. Of several ranks (`pipeline.train.ranks`) each takes its share of the rows; all look at
the same sums.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer

from pipeline.errors import StageFailed
from pipeline.progress import say
from pipeline.train.guards import Trip
from pipeline.train.head import bare, token_log_probs
from pipeline.train.passes import Pass, Row, lay, out_of_memory, size, supervised
from pipeline.train.ranks import Ranks

LAYER = re.compile(r"\b(layers\.\d+)\.")


class StepLoss(Protocol):
    """The loss of one step's rows, pass by pass."""

    def part(self, log_probs: torch.Tensor, batch: Pass) -> torch.Tensor:
        """This pass's share of the step's mean; `log_probs` (trained,) are the pass's trained tokens', in nats."""

    def figures(self) -> dict[str, float]:
        """For the log, after all passes: means over the rows that they held, of which there is at least one."""


@dataclass
class Execution:
    """How steps are computed. Nothing here changes what they learn."""

    pass_tokens: int
    packed: bool
    checkpointing: bool = False  # of gradients: activations are computed again
    compute: torch.dtype | None = None  # autocast's; None: as the weights are
    pad_id: int = 0
    out_of_memory: list[dict[str, Any]] = field(default_factory=list)

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


@dataclass(frozen=True)
class Share:
    """How the passes of one rank's share of a step went."""

    rows: int
    tokens: int
    passes: int
    largest: int  # rows of its largest pass
    out_of_memory: bool
    figures: dict[str, float]


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
        ranks: Ranks | None = None,
        **given: Any,
    ) -> None:
        super().__init__(train_dataset=steps, **given)
        self.rows, self.steps, self.step_loss, self.execution = rows, steps, step_loss, execution
        self.plateau, self.ranks = plateau, ranks or Ranks()
        self.ranks.copy_first(self.model.parameters())
        self.trained = trained_by_layer(self.model)
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
        if not model.training:
            model.train()
        rows = [self.rows[i] for i in inputs]
        self.step = Step(inputs, supervised=sum(map(supervised, rows)), started=time.perf_counter())
        noise = torch.get_rng_state(), torch.cuda.get_rng_state_all() if self.args.device.type == "cuda" else []
        while (loss := self._gradients(model, rows)) is None:
            torch.set_rng_state(noise[0])  # the same dropout as the first time
            if noise[1]:
                torch.cuda.set_rng_state_all(noise[1])
        self.step.loss = loss.item()
        self._note_gradients()
        self.step.trip = None if self._overflown() else self.look(self.step)
        if self.step.trip:
            self._leave_out(model)
        return loss

    def _gradients(self, model: Any, rows: Sequence[Row]) -> torch.Tensor | None:
        """Adds up the gradients of all passes, of all ranks, and returns the step's loss; None when memory ran out."""
        how, device = self.execution, self.args.device
        mine = self.ranks.share(rows, size)
        batches = lay([rows[place] for place in mine], how.pass_tokens, how.packed, how.pad_id)
        losses = self.step_loss(self.step.rows)
        total = torch.zeros((), device=device)
        full = False
        try:
            with self.ranks.own_noise(device):
                for batch in batches:
                    self._pass = batch = replace(batch, rows=tuple(mine[row] for row in batch.rows))
                    batch = batch.to(device)
                    with how.autocast(device):
                        log_probs = token_log_probs(model, batch)
                    loss = losses.part(log_probs, batch)
                    self.accelerator.backward(loss)
                    total += loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            full = True
        share = Share(
            rows=len(mine),
            tokens=sum(batch.tokens for batch in batches),
            passes=len(batches),
            largest=max((len(batch.rows) for batch in batches), default=0),
            out_of_memory=full,
            figures=losses.figures() if mine and not full else {},
        )
        shares = self.ranks.gather(share)  # before any gradient is sent: a rank that failed has none
        if any(share.out_of_memory for share in shares):
            self._smaller(model, alone=any(share.out_of_memory and share.largest == 1 for share in shares))
            return None
        self.step.tokens, self.step.passes = sum(s.tokens for s in shares), sum(s.passes for s in shares)
        self.step.figures = mean_figures(shares)
        return self.ranks.add_up(total, model.parameters())

    def _smaller(self, model: Any, alone: bool) -> None:
        """Half the tokens a pass. Raises `StageFailed` where memory ran out with each row `alone` in its pass."""
        how, step = self.execution, self.state.global_step + 1
        model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        if alone:
            raise StageFailed(
                "out of memory with one row in a pass",
                step=step,
                remedy="gradient_checkpointing: true, quantization: nf4, or a smaller max_length",
            )
        before, how.pass_tokens = how.pass_tokens, how.pass_tokens // 2
        how.out_of_memory.append({"step": step, "pass_tokens": how.pass_tokens})
        say(f"\nout of memory at step {step}: taken again with {how.pass_tokens} tokens a pass in place of {before}")

    def _note_gradients(self) -> None:
        found = {layer: [p.grad for p in trained if p.grad is not None] for layer, trained in self.trained.items()}
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0
        norms = {layer: torch.nn.utils.get_total_norm(some).item() / scale for layer, some in found.items() if some}
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
        self.factor = 1.0
        super().__init__(optimizer, lambda step: min(1.0, step / max(warmup, 1)) * self.factor)

    def measured(self, losses: Sequence[float]) -> None:
        """`losses`: all so far. What a checkpoint remembers may lack the last one."""
        self.factor, lowest = 1.0, math.inf
        for loss in losses:
            self.factor *= 1.0 if loss < lowest else 0.1
            lowest = min(loss, lowest)


def mean_figures(shares: Sequence[Share]) -> dict[str, float]:
    """Over all rows of the step."""
    taken = [share for share in shares if share.rows]
    rows = sum(share.rows for share in taken)
    names = taken[0].figures if taken else {}
    return {name: sum(share.rows / rows * share.figures[name] for share in taken) for name in names}


def trained_by_layer(model: Any) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters that are trained, of `layers.7` and so on, and of `other` what stands outside the layers."""
    found: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = LAYER.search(name)
            found[layer[1] if layer else "other"].append(parameter)
    return found
