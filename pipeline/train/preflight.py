"""What a training will need, predicted before anything is loaded or downloaded; and how it is to be computed.

    prediction = predict(job, "sft", Lengths.of(rows))    # UserError when it cannot fit even at one row
    prediction.setup.pass_tokens, .checkpointing, .quantization
    prediction.rows()                                     # --dry-run, config explain
    prediction.facts()                                    # results.training.predicted in the record
    prediction.against(memory_gb=…, seconds=…)            # afterwards

Memory comes from the model's shape (`footprint.py`), time from its work at the machine's pace (`machine.py`); both are
corrected by what past records of the same profile and stage measured on the same machine. GB are 10⁹ bytes.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.config import Cost, DpoConfig, SftConfig
from pipeline.errors import UserError
from pipeline.progress import duration
from pipeline.stage import FEW_STEPS, Job
from pipeline.train import footprint
from pipeline.train.checkpoints import computed, newest_sealed
from pipeline.train.fit import Lengths, Task, choose, gb
from pipeline.train.footprint import Setup, Shape
from pipeline.train.machine import Machine, Past, past, this_machine
from pipeline.train.plan import measured_after, steps_in_all

SHARE = 0.4  # of the matmul rate that a training is assumed to reach; a measured pace takes its place
CHECKPOINTS = 3  # at once: the last two, and the one being written
ADAPTERS = 3  # the kept one, the best or the last beside it, and one being written


@dataclass(frozen=True)
class Prediction:
    """What `predict` found. `seconds` are those of the steps, as the record measures them."""

    task: Task
    setup: Setup
    steps: int
    warmup_steps: int
    tokens: int
    supervised: int | None
    memory: dict[str, int]  # bytes by part, by the shape alone
    memory_basis: str
    flops: float  # of the steps
    rate: float | None  # FLOP/s
    rate_basis: str
    measuring: float  # FLOP of held-out rows and reference
    watts: float | None
    watts_basis: str
    prices: Cost

    @property
    def memory_bytes(self) -> float:
        """The peak, corrected by past records."""
        return sum(self.memory.values()) * self.task.correction

    @property
    def seconds(self) -> float | None:
        return self.flops / self.rate if self.rate else None

    @property
    def seconds_in_all(self) -> float | None:
        return (self.flops + self.measuring) / self.rate if self.rate else None

    @property
    def kwh(self) -> float | None:
        seconds = self.seconds_in_all
        return seconds * self.watts / 3.6e6 if seconds is not None and self.watts else None

    @property
    def cost(self) -> float | None:
        """As `pipeline.records.capture.Meter` reckons it; without the energy's price where that is not known."""
        if self.seconds_in_all is None:
            return None
        hours = self.seconds_in_all / 3600 if self.setup.device == "cuda" else 0.0
        return hours * self.prices.gpu_hour + (self.kwh or 0.0) * self.prices.kwh

    @property
    def disk(self) -> dict[str, int]:
        """Bytes. The merged model comes with another stage."""
        adapter = 4 * self.task.shape.trainable(self.task.lora)
        return {
            "checkpoints": CHECKPOINTS * 3 * adapter,  # with AdamW's two moments
            "adapters": ADAPTERS * adapter,
            "merged model": self.task.shape.parameters * footprint.BYTES[self.task.shape.stored],
        }

    def disk_needed(self) -> int:
        """Bytes, of the training alone."""
        return self.disk["checkpoints"] + self.disk["adapters"]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for a person."""
        about = "" if self.task.lengths.counted else "about "
        supervised = "" if self.supervised is None else f", {self.supervised:,} of them supervised"
        found = [
            *self.sampling(),
            ("steps", schedule(self.task.config, len(self.task.lengths.met))),
            ("tokens", f"{about}{self.tokens:,}{supervised}"),
            ("passes", self._passes()),
            ("memory", f"{gb(self.memory_bytes)} of {gb(self.task.machine.memory)} on {self.task.machine.name}"),
            ("memory by part", self._parts()),
            ("memory from", self.memory_basis),
            ("disk", f"{gb(self.disk_needed())} for checkpoints; a merged model {gb(self.disk['merged model'])} more"),
            ("time", self._time()),
        ]
        if self.kwh is not None:
            found.append(("energy", f"{self.kwh:.2g} kWh, {self.watts_basis}"))
        if self.cost is not None:
            found.append(("cost", f"{self.cost:.2g} {self.prices.currency}"))
        return found

    def sampling(self) -> list[tuple[str, str]]:
        """Empty where each row is met once an epoch."""
        sampled, lengths = self.task.config.domain_sampling, self.task.lengths
        factors = ", ".join(f"{domain} × {times:g}" for domain, times in sampled.items())
        rows = f"{factors}: an epoch meets {len(lengths.met)} rows, of {len(lengths.train)} to train"
        return [("sampling", rows)] if sampled else []

    def _passes(self) -> str:
        setup = self.setup
        how = [f"at most {setup.pass_tokens:,} tokens", setup.precision]
        how += [setup.quantization] * (setup.quantization != "none")
        return ", ".join(how + ["gradient checkpointing"] * setup.checkpointing)

    def _parts(self) -> str:
        """Those that show in GB."""
        return ", ".join(f"{name} {gb(size)}" for name, size in self.memory.items() if size >= 5e6)

    def _time(self) -> str:
        if self.seconds is None or self.seconds_in_all is None:
            return f"unknown: {self.rate_basis}"
        rest = self.seconds_in_all - self.seconds
        measuring = f" and {duration(rest)} to measure" if self.measuring else ""
        return f"about {duration(self.seconds)} of steps{measuring}, {self.rate_basis}"

    def facts(self) -> dict[str, Any]:
        """For the record: `results.training.predicted`. `pipeline.train.machine.past` reads from it."""
        return {
            "passes": self._passes(),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "memory_gb": _short(self.memory_bytes / 1e9),
            "memory_gb_by_shape": _short(sum(self.memory.values()) / 1e9),
            "memory_by_part": self._parts(),
            "memory_from": f"{self.memory_basis}; there were {gb(self.task.machine.memory)}",
            "disk_gb": _short(self.disk_needed() / 1e9),
            "flops": _short(self.flops),
            "seconds": _short(self.seconds),
            "seconds_measuring": _short(self.measuring / self.rate if self.rate else None),
            "time_from": self.rate_basis,
            "kwh": _short(self.kwh),
            "energy_from": self.watts_basis,
            "cost": _short(self.cost),
        }

    def against(
        self, memory_gb: float | None = None, seconds: float | None = None, disk_gb: float | None = None
    ) -> dict[str, dict[str, float | None]]:
        """Predicted, actual and their ratio, of each figure that was measured."""
        predicted = {"memory_gb": self.memory_bytes / 1e9, "seconds": self.seconds, "disk_gb": self.disk_needed() / 1e9}
        actual = {"memory_gb": memory_gb, "seconds": seconds, "disk_gb": disk_gb}
        return {
            name: {"predicted": _short(then), "actual": _short(now), "ratio": _short(now / then)}
            for name, now in actual.items()
            if now is not None and (then := predicted[name])
        }


def schedule(config: SftConfig | DpoConfig, rows: int) -> str:
    """Optimiser steps, the effective batch and warm-up of so many rows an epoch."""
    steps = steps_in_all(config, rows)
    few = f"; fewer than {FEW_STEPS} steps teach little: more rows or epochs, or a smaller batch"
    return (
        f"{steps} of {config.batch_size * config.gradient_accumulation} rows, "
        f"the first {_warmup_steps(config, steps)} warm up{few if steps < FEW_STEPS else ''}"
    )


def predict(
    job: Job, stage: str, lengths: Lengths, shape: Shape | None = None, machine: Machine | None = None
) -> Prediction:
    """Of a job's `sft` or `dpo`. Raises `UserError` when it cannot fit, or the base's configuration cannot be had."""

    def prediction() -> Prediction:
        task, known = _task(job, stage, lengths, shape, machine or this_machine(job.config.device))
        return _predicted(task, choose(task), job.config.cost, known)

    return job.ranks.from_first(prediction)  # all must choose alike


def check(job: Job, stage: str) -> None:
    """Before anything is downloaded. Raises `UserError` when not even one row would fit.

    A GPU that is wanted and is not there is left for `find_base` to say.
    """
    machine = this_machine(job.config.device)
    if machine.here:
        choose(_task(job, stage, Lengths([], counted=False), None, machine)[0])


def _task(job: Job, stage: str, lengths: Lengths, shape: Shape | None, machine: Machine) -> tuple[Task, list[Past]]:
    from pipeline.model import read_config

    profile = job.config
    if shape is None:
        shape = Shape.of(read_config(job.workspace, job.profile), profile.trust_remote_code)
    known = past(job.workspace, job.profile.id, stage, machine)
    ratios = [p.memory for p in known if p.memory is not None]
    task = Task(
        stage=stage,
        shape=shape,
        config=getattr(profile, f"{stage}_config"),
        lora=profile.sft_config,
        machine=machine,
        lengths=lengths,
        precision=profile.precision,
        quantization=_begun_with(job) or profile.quantization,
        correction=median(ratios) if ratios else 1.0,
        where=job.profile.shown,
    )
    return task, known


def _begun_with(job: Job) -> str | None:
    """The quantisation that a run to resume has trained on so far: what memory is free now may not change the model."""
    if not (job.resume and job.record):
        return None
    checkpoint = newest_sealed(job.workspace.checkpoints / job.record.id, aloud=False)
    return computed(checkpoint)["quantization"] if checkpoint else None


def _predicted(task: Task, setup: Setup, prices: Cost, known: list[Past]) -> Prediction:
    config, lengths, shape = task.config, task.lengths, task.shape
    epochs, an_epoch, rows = config.epochs, sum(lengths.met), len(lengths.met)
    steps = steps_in_all(config, rows)
    supervised = an_epoch if lengths.supervised is None else lengths.supervised
    share = supervised / (an_epoch or 1)
    flops = epochs * footprint.training_flops(shape, task.lora, setup, lengths.met, supervised)
    times = 2 + len(measured_after(config, rows))  # before the first step and after the last too
    held_out = footprint.forward_flops(shape, lengths.held_out, round(share * sum(lengths.held_out)))
    reference = isinstance(config, DpoConfig) and config.loss_type != "orpo"
    measuring = times * held_out + reference * footprint.forward_flops(
        shape, lengths.train, round(share * sum(lengths.train))
    )
    if getattr(config, "loss_type", "") == "kto":  # a forward a step more, its reference, and held-out pairs
        forward = epochs * footprint.forward_flops(shape, lengths.met, supervised)
        flops, measuring = flops + forward, measuring + forward + times * held_out
    rate, rate_basis = _rate(task, setup, known, flops / (epochs * (rows or 1)))
    watts = [p.watts for p in known if p.watts is not None]
    corrected = [p.id for p in known if p.memory is not None]
    by = f", × {task.correction:.2f} as measured in {_named(corrected)}" if corrected else ", not yet measured"
    assumed = "at the GPU's power limit" if setup.device == "cuda" else f"at {task.machine.watts or 0:.0f} W"
    return Prediction(
        task=task,
        setup=setup,
        steps=steps,
        warmup_steps=_warmup_steps(config, steps),
        tokens=round(epochs * an_epoch),
        supervised=None if lengths.supervised is None else round(epochs * lengths.supervised),
        memory=footprint.memory(shape, task.lora, setup),
        memory_basis=f"the model's shape{by}",
        flops=flops,
        rate=rate,
        rate_basis=rate_basis,
        measuring=measuring,
        watts=median(watts) if watts else task.machine.watts,
        watts_basis=f"at {median(watts):.0f} W as before" if watts else assumed,
        prices=prices,
    )


def _warmup_steps(config: SftConfig | DpoConfig, steps: int) -> int:
    """Rounded as transformers does it."""
    return math.ceil(steps * config.warmup_ratio)


def _rate(task: Task, setup: Setup, known: list[Past], flops_a_row: float) -> tuple[float | None, str]:
    """FLOP/s, and where it comes from."""
    rates = {p.id: p.rate or (flops_a_row / p.seconds_a_row if p.seconds_a_row else None) for p in known}
    measured = {name: rate for name, rate in rates.items() if rate}
    if measured:
        return median(measured.values()), f"at the pace of {_named(list(measured))}"
    rate = task.machine.rate(task.shape, {2: "bf16", 4: "fp32"}[setup.bytes])
    if rate is None:
        return None, "there is no such GPU here to measure"
    return (
        SHARE * rate,
        f"at {SHARE:.0%} of the measured matmul rate of {rate / 1e9:,.0f} GFLOP/s, assumed: no run was measured here yet",
    )


def check_disk(needed: int, folder: Path, what: str = "checkpoints") -> None:
    """Raises `UserError` when they do not fit on the disk that `folder` is, or will be, on."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{what} need {gb(needed)} and {gb(free)} are free",
            where=str(folder),
            remedy=f"freeing {gb(needed - free)}, or ALETHEIA_ROOT on another disk",
        )


def _named(ids: Sequence[str]) -> str:
    """`EXP-…-007 and 2 before it`."""
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} before it"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
