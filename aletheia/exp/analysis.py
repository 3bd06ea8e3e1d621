"""What a training's log shows: epochs, whether validation rose, and what stands out. Nothing is read or printed here.

A rise is called one only where the latest validation's interval lies above the best value; a train loss counts as
falling where the slope's 95 % interval (least squares over the steps) lies below 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from pipeline.records.metrics import Metric, as_metric

SPIKE = 5.0  # times the running median of the gradient norm
RUNNING = 50  # steps before, that the median is taken over
ENOUGH = 5  # values that a mean or median needs, twice as many a trend
LITTLE = 0.05  # of the train loss's fall, in the last third of the steps
HUGE = 1e30
SLOWER = 0.7  # of the throughput at the beginning


@dataclass(frozen=True)
class Step:
    step: int
    epoch: float
    finite: bool
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Validation:
    step: int
    epoch: float
    loss: Metric
    accuracy: Metric | None  # of preferences: DPO's


@dataclass(frozen=True)
class Epoch:
    """`train` is the mean loss of its steps, taken while the model still learnt."""

    epoch: int
    first_step: int
    last_step: int
    train: float | None
    valid: Validation | None

    @property
    def gap(self) -> float | None:
        return None if self.train is None or self.valid is None else self.valid.loss.value - self.train


@dataclass(frozen=True)
class Log:
    steps: list[Step]
    validations: list[Validation]
    unplaced: int = 0  # lines with a loss, and without step or epoch

    @cached_property
    def epochs(self) -> list[Epoch]:
        by_epoch: dict[int, list[Step]] = {}
        for step in self.steps:
            by_epoch.setdefault(_epoch(step.epoch), []).append(step)
        valid = {_epoch(v.epoch): v for v in self.validations}
        found = []
        for epoch, steps in sorted(by_epoch.items()):
            losses = [s.loss for s in steps if s.loss is not None]
            train = fmean(losses) if losses else None
            found.append(Epoch(epoch, steps[0].step, steps[-1].step, train, valid.get(epoch)))
        return found

    @property
    def best_train(self) -> Epoch | None:
        return min((e for e in self.epochs if e.train is not None), key=lambda e: e.train or 0, default=None)

    @property
    def best_valid(self) -> Validation | None:
        return min(self.validations, key=lambda v: v.loss.value, default=None)

    @property
    def latest_valid(self) -> Validation | None:
        return self.validations[-1] if self.validations else None

    @property
    def risen(self) -> bool | None:
        """Whether validation lies above its best; None where there is no interval to tell by."""
        best, latest = self.best_valid, self.latest_valid
        if best is None or latest is None or latest.loss.value <= best.loss.value:
            return False
        return None if latest.loss.ci_low is None else latest.loss.ci_low > best.loss.value

    @property
    def still_falling(self) -> bool:
        """The validation before the latest lies above the latest's interval."""
        if len(self.validations) < 2 or self.validations[-1].loss.ci_high is None:
            return False
        return self.validations[-2].loss.value > self.validations[-1].loss.ci_high

    @property
    def not_finite(self) -> list[int]:
        return [s.step for s in self.steps if not s.finite]

    @property
    def without_rate(self) -> list[int]:
        return [s.step for s in self.steps if s.learning_rate == 0]

    @property
    def spikes(self) -> list[int]:
        norms = [(s.step, s.grad_norm) for s in self.steps if s.grad_norm is not None]
        before = [[norm for _, norm in norms[max(0, i - RUNNING) : i]] for i in range(len(norms))]
        both = zip(norms, before, strict=True)
        return [step for (step, norm), b in both if len(b) >= ENOUGH and norm > SPIKE * median(b)]

    @cached_property
    def falls(self) -> bool | None:
        """Whether the train loss falls; None for too few steps to tell."""
        return _falls(self.steps)

    @property
    def level_since(self) -> int | None:
        """The first step of the last third, when that third brought next to nothing of the whole run's fall."""
        losses = [(s.step, s.loss) for s in self.steps if s.loss is not None]
        third = len(losses) // 3
        if third < ENOUGH or not self.falls:
            return None
        parts = losses[:third], losses[third:-third], losses[-third:]
        first, middle, last = (fmean(loss for _, loss in part) for part in parts)
        return losses[-third][0] if middle - last < LITTLE * (first - last) else None

    @property
    def idle(self) -> list[int]:
        """Steps without a rate, where they are more than the one that a warm-up begins with."""
        found = self.without_rate
        return found if len(found) > max(1, 0.05 * len(self.steps)) else []

    @property
    def throughput(self) -> tuple[float, float] | None:
        """Tokens a second at the beginning and the end (medians of the quarters), where it dropped."""
        rates = [s.tokens_per_second for s in self.steps if s.tokens_per_second is not None]
        quarter = len(rates) // 4
        if quarter < ENOUGH:
            return None
        begin, end = median(rates[:quarter]), median(rates[-quarter:])
        return (begin, end) if end < SLOWER * begin else None


def parse(lines: Sequence[dict[str, Any]]) -> Log:
    """The lines of `log.jsonl`, whatever they hold; of a step taken again after a resume the later counts."""
    steps: dict[int, Step] = {}
    validations: dict[int, Validation] = {}
    unplaced = 0
    for line in lines:
        if not {"loss", "eval_loss"} & line.keys():
            continue  # the trainer's summary at the end of an older log
        step, epoch, loss = _number(line, "step"), _number(line, "epoch"), _measured(line, "eval_loss")
        if step is None or epoch is None or ("loss" not in line and loss is None):
            unplaced += 1
        elif loss is not None:
            accuracy = _measured(line, "eval_preference_accuracy")
            validations[int(step)] = Validation(int(step), epoch, loss, accuracy)
        else:
            names = ("loss", "grad_norm", "learning_rate", "tokens_per_second")
            values = [_number(line, name) for name in names]
            finite = all(value is not None for name, value in zip(names, values, strict=True) if name in line)
            steps[int(step)] = Step(int(step), epoch, finite, *values)
    return Log([steps[s] for s in sorted(steps)], [validations[s] for s in sorted(validations)], unplaced)


def _falls(steps: Sequence[Step]) -> bool | None:
    points = [(s.step, s.loss) for s in steps if s.loss is not None]
    if len(points) < 2 * ENOUGH:
        return None
    from scipy import stats

    line = stats.linregress([step for step, _ in points], [loss for _, loss in points])
    half = float(stats.t.ppf(0.975, len(points) - 2)) * float(line.stderr)
    return float(line.slope) + half < 0


def _measured(line: dict[str, Any], name: str) -> Metric | None:
    value, n = _number(line, name), _number(line, "eval_n")
    if value is None:
        return None
    low, high = (_number(line, f"{name}_{end}") for end in ("ci_low", "ci_high"))
    return Metric(value, low, high, None if n is None else int(n))


def _number(line: dict[str, Any], name: str) -> float | None:
    """None also for what is so large that its sum would overflow: it is as good as infinite."""
    found = as_metric(line.get(name))
    return None if found is None or abs(found.value) > HUGE else found.value


def _epoch(done: float) -> int:
    """Epochs count from 1: what was done at 0.11 and at 1.0 is the first."""
    return max(1, math.ceil(done - 1e-6))
