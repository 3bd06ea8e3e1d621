"""How a training is computed so that it fits: tokens a pass, gradient checkpointing, quantisation.

    setup = choose(Task(stage, shape, config, lora, machine, lengths, …))    # UserError with remedies when nothing fits

Nothing chosen here changes what is learnt, but quantisation, which is chosen only where the profile says `auto`.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from pipeline.config import DpoConfig, LoraConfig, SftConfig
from pipeline.errors import UserError
from pipeline.train import footprint
from pipeline.train.footprint import Setup, Shape
from pipeline.train.machine import Machine

ENOUGH = 1024  # tokens a pass: with fewer a GPU waits for its memory, and recomputing in larger passes is no slower
STEP = 256  # a pass that memory limits is a multiple of this
CHARACTERS = 3.5  # a token, where none have been counted


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row as it is laid into a pass (`pipeline.train.passes.size`): a pair's prompt stands once."""

    train: Sequence[int]
    held_out: Sequence[int] = ()
    supervised: int | None = None  # of the rows that an epoch meets, in all
    counted: bool = True  # False: estimated
    epoch: Sequence[int] | None = None  # numbers of the training rows that an epoch meets; None: each once

    @classmethod
    def of(cls, train: Sequence[Any], held_out: Sequence[Any] = (), epoch: Sequence[int] | None = None) -> Self:
        """Of encoded rows, or of pairs of them."""
        from pipeline.train.passes import size, supervised

        met = train if epoch is None else [train[row] for row in epoch]
        learnt = sum(map(supervised, met))
        return cls([size(row) for row in train], [size(row) for row in held_out], learnt, epoch=epoch)

    @classmethod
    def guessed(cls, train: Iterable[Any], held_out: Iterable[Any] = (), epoch: Sequence[int] | None = None) -> Self:
        """Of rows as read, by their characters."""

        def tokens(row: Any) -> int:
            return math.ceil(sum(len(text) for text in (*row.asked, *row.answers)) / CHARACTERS)

        lengths = [tokens(row) for row in train], [tokens(row) for row in held_out]
        return cls(*lengths, counted=False, epoch=epoch)

    @property
    def met(self) -> Sequence[int]:
        """Of the rows that an epoch meets."""
        return self.train if self.epoch is None else [self.train[row] for row in self.epoch]


@dataclass(frozen=True)
class Task:
    """What is to be trained, and on what: all that the choice of how depends on."""

    stage: str  # sft | dpo
    shape: Shape
    config: SftConfig | DpoConfig
    lora: LoraConfig
    machine: Machine
    lengths: Lengths
    precision: str = "auto"
    quantization: str = "auto"
    correction: float = 1.0  # of memory, by past records
    where: str = ""  # the profile, for errors

    @property
    def longest(self) -> int:
        """Tokens of the longest row; where none have been counted, of the longest there may be."""
        sides = 2 if self.stage == "dpo" else 1
        return (
            max(self.lengths.train) if self.lengths.counted and self.lengths.train else sides * self.config.max_length
        )

    @property
    def most(self) -> int:
        """Tokens that a pass is given at most: no more than a step has."""
        if self.config.pass_tokens:
            return max(self.config.pass_tokens, self.longest)
        rows = self.config.batch_size * self.config.gradient_accumulation
        wanted = self.config.batch_size * self.config.max_length
        if self.lengths.counted:
            step = sorted(self.lengths.train)[-rows:]
            wanted = min(wanted, sum(step) if self.config.packing else len(step) * self.longest)
        return max(wanted, self.longest)

    def needs(self, setup: Setup, pass_tokens: int | None = None) -> int:
        """Bytes."""
        if pass_tokens is not None:
            setup = replace(setup, pass_tokens=pass_tokens)
        return round(sum(footprint.memory(self.shape, self.lora, setup).values()) * self.correction)

    def setups(self) -> Iterator[Setup]:
        """What the profile leaves open, the best first, each with the smallest pass that holds every row."""
        auto = self.config.gradient_checkpointing == "auto"
        for quantization in ("none", "nf4") if self.quantization == "auto" else (self.quantization,):
            for checkpointing in (False, True) if auto else (self.config.gradient_checkpointing is True,):
                yield Setup(
                    device=self.machine.device,
                    precision=self.computed_in,
                    quantization=quantization,
                    checkpointing=checkpointing,
                    pass_tokens=self.most if self.config.pass_tokens else self.longest,
                    packed=self.config.packing,
                    pairs=self.stage == "dpo",
                )

    def changed(self, changes: dict[str, Any]) -> "Task":
        """As it would be with other values in the profile, by key."""
        lengths, longest = self.lengths, changes.get("max_length")
        if longest and lengths.counted:
            lengths = replace(lengths, train=[n for n in lengths.train if n <= longest] or [longest], epoch=None)
        own = {key: value for key, value in changes.items() if key in ("precision", "quantization")}
        inner = {key: value for key, value in changes.items() if key not in own}
        config, lora = self.config.model_copy(update=inner), self.lora.model_copy(update=inner)
        return replace(self, config=config, lora=lora, lengths=lengths, **own)

    @property
    def computed_in(self) -> str:
        """bf16 | fp16 | fp32."""
        auto = "bf16" if self.machine.device == "cuda" else self.shape.stored
        return auto if self.precision == "auto" else self.precision


def choose(task: Task) -> Setup:
    """Tokens a pass, gradient checkpointing and quantisation that fit, as far as the profile leaves them open.

    Raises `UserError` when not even one row fits, with the three cheapest remedies that would make it fit.
    """
    if chosen := _fitting(task):
        return chosen
    *_, leanest = task.setups()
    machine = task.machine
    raise UserError(
        f"{task.stage}: a row of {task.longest:,} tokens needs {gb(task.needs(leanest))} and "
        f"{machine.name} has {gb(machine.memory)}",
        where=task.where,
        remedy=" or ".join(_remedies(task)) or f"a smaller base_model, or a device with {gb(task.needs(leanest))}",
    )


def _fitting(task: Task) -> Setup | None:
    """Without checkpointing a pass must be worth it; it costs less than 4-bit weights, which are not quite the model."""
    auto = task.config.gradient_checkpointing == "auto"
    for setup in task.setups():
        smallest, most = setup.pass_tokens, task.most
        fit = bisect_right(range(smallest, most + 1), task.machine.memory, key=partial(task.needs, setup))
        if not fit:
            continue
        tokens = smallest + fit - 1
        if tokens < most:
            tokens = max(smallest, tokens // STEP * STEP)
        if tokens >= min(ENOUGH, most) or setup.checkpointing or not auto:
            return replace(setup, pass_tokens=tokens)
    return None


def _remedies(task: Task) -> list[str]:
    """The cheapest three, in quality first and then in speed; several together only where none alone is enough."""
    config = task.config
    known: list[dict[str, Any]] = []
    if config.pass_tokens and config.pass_tokens > task.longest:
        known.append({"pass_tokens": None})
    if config.gradient_checkpointing is False:
        known.append({"gradient_checkpointing": True})
    if task.computed_in == "fp32":
        known.append({"precision": "bf16"})
    if task.quantization in ("none", "int8"):
        known.append({"quantization": "nf4"})
    together = {key: value for changes in known for key, value in changes.items()}
    shorter = range(128, min(config.max_length, task.longest), 128)
    lower = [2**n for n in range((task.lora.lora_rank - 1).bit_length())] if task.stage == "sft" else []
    found = [
        *(_remedy(task, changes) for changes in known),
        _largest(task, "max_length", shorter, {}),
        _largest(task, "lora_rank", lower, {}),
    ]
    if not any(found):
        found = [_remedy(task, together) or _largest(task, "max_length", shorter, together)]
    return [text for text in found if text][:3]


def _remedy(task: Task, changes: dict[str, Any]) -> str | None:
    """How it is set, and what it then needs; None where it would not fit."""
    changed = task.changed(changes)
    setup = _fitting(changed)
    if setup is None:
        return None
    keys = [
        f"{'' if key in ('precision', 'quantization') else f'{task.stage}_config.'}{key}={_yaml(value)}"
        for key, value in changes.items()
    ]
    lost = len(task.lengths.train) - len(changed.lengths.train)
    rejects = f", rejects {lost} of {len(task.lengths.train)} rows" if lost else ""
    return f"{' with '.join(keys)} ({gb(changed.needs(setup))}{rejects})"


def _largest(task: Task, key: str, values: Sequence[int], others: dict[str, Any]) -> str | None:
    """The remedy with the largest of `values`, which ascend, that fits."""
    fit = bisect_left(values, True, key=lambda value: _fitting(task.changed({**others, key: value})) is None)
    return _remedy(task, {**others, key: values[fit - 1]}) if fit else None


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def gb(size: float) -> str:
    """`17.3 GB` of bytes; 10⁹ each."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2f} GB"
