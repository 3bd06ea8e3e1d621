"""Which rows each optimiser step learns from: fixed by seed and epoch before anything is trained.

A resumed run therefore goes on with the very rows that an uninterrupted one would have met. How many rows and steps an
epoch has, and where held-out rows are measured, is said here alone.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice

from pipeline.config import DpoConfig, SftConfig, TrainingConfig

DIFFICULTIES = ("beginner", "intermediate", "expert")


def rows_an_epoch(config: TrainingConfig, domains: Sequence[str]) -> int:
    """How many rows an epoch meets, of rows of these domains."""
    return sum(_drawn(config, domain, len(rows)) for domain, rows in _by_domain(domains).items())


def steps_an_epoch(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps that `rows` an epoch give."""
    return math.ceil(rows / (config.batch_size * config.gradient_accumulation))


def steps_in_all(config: SftConfig | DpoConfig, rows: int) -> int:
    """Optimiser steps of the whole training. A part of an epoch is rounded up to whole steps."""
    steps = steps_an_epoch(config, rows) * config.epochs
    return math.ceil(steps * (1 - 1e-9))  # 1.1 × 50 is 55, not the 55.000000000000007 that a float makes of it


def measured_after(config: SftConfig | DpoConfig, rows: int) -> list[int]:
    """The steps before the last after which held-out rows are measured; they are after the last step too."""
    every = (steps_an_epoch(config, rows) if config.evaluate_each_epoch else None, config.evaluate_steps)
    return [step for step in range(1, steps_in_all(config, rows)) if any(n and step % n == 0 for n in every)]


def orders(config: TrainingConfig, domains: Sequence[str], seed: int) -> Iterator[list[int]]:
    """Row numbers in the order in which each epoch meets them, without end.

    `domain_sampling` 1.5 meets each row of the domain once and half of them twice, those that were met least so far; the
    seed decides between them. The times of one row are spread evenly over the epoch.
    """
    groups = _by_domain(domains)
    met = [0] * len(domains)
    for epoch in count():
        dice = random.Random(seed * 1_000_003 + epoch)
        times = [0] * len(domains)
        for domain, rows in groups.items():
            whole, more = divmod(_drawn(config, domain, len(rows)), len(rows))
            again = sorted(dice.sample(rows, len(rows)), key=met.__getitem__)[:more] if more else []
            for row in rows:
                times[row] = whole
            for row in again:
                times[row] += 1
        met = [before + now for before, now in zip(met, times, strict=True)]
        mixed = [row for row, n in enumerate(times) if n]
        dice.shuffle(mixed)
        spread = [
            ((place / len(mixed) + time) / times[row], row)
            for place, row in enumerate(mixed)
            for time in range(times[row])
        ]
        yield [row for _, row in sorted(spread)]


def plan(
    config: SftConfig | DpoConfig, domains: Sequence[str], seed: int, rank: Sequence[int] | None = None
) -> list[list[int]]:
    """A list of row numbers a step. `rank`: a curriculum; within an epoch lower ones come first, else all are mixed."""
    steps: list[list[int]] = []
    for order in islice(orders(config, domains, seed), math.ceil(config.epochs)):
        if rank is not None:
            order.sort(key=rank.__getitem__)  # stable: alike ones stay mixed
        steps += _in_steps(order, config.batch_size * config.gradient_accumulation)
    return steps[: steps_in_all(config, rows_an_epoch(config, domains))]


def difficulty_rank(difficulties: Sequence[str | None]) -> list[int]:
    """Rows that name no difficulty, or another, stand in the middle."""
    return [DIFFICULTIES.index(d) if d in DIFFICULTIES else 1 for d in difficulties]


def _by_domain(domains: Sequence[str]) -> dict[str, list[int]]:
    found = defaultdict(list)
    for row, domain in enumerate(domains):
        found[domain].append(row)
    return found


def _drawn(config: TrainingConfig, domain: str, rows: int) -> int:
    """How many rows of a domain that has so many an epoch meets: at least one, else the domain would be lost in silence."""
    return max(1, round(rows * config.domain_sampling.get(domain, 1.0)))


def _in_steps(order: Sequence[int], size: int) -> list[list[int]]:
    """Steps of `size` rows, in order. A row that a step has already goes into the next that has room and lacks it."""
    steps: list[list[int]] = [[] for _ in range(math.ceil(len(order) / size))]
    first = 0  # that has room
    for row in order:
        lacking = (step for step in range(first, len(steps)) if len(steps[step]) < size and row not in steps[step])
        steps[next(lacking, first)].append(row)
        while first < len(steps) and len(steps[first]) == size:
            first += 1
    return steps
