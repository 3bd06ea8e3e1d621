"""Which rows each optimiser step learns from: fixed by seed and epoch before anything is trained.

A resumed run therefore goes on with the very rows that an uninterrupted one would have met.
"""

import math
import random
from collections.abc import Sequence

DIFFICULTIES = ("beginner", "intermediate", "expert")


def plan(rows: int, rows_a_step: int, epochs: float, seed: int, rank: Sequence[int] | None = None) -> list[list[int]]:
    """A list of row numbers a step. `rank`: a curriculum; within an epoch lower ones come first, else all are mixed."""
    per_epoch = math.ceil(rows / rows_a_step)
    steps: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        order = list(range(rows))
        random.Random(seed * 1_000_003 + epoch).shuffle(order)
        if rank is not None:
            order.sort(key=rank.__getitem__)  # stable: alike ones stay mixed
        steps += [order[i : i + rows_a_step] for i in range(0, rows, rows_a_step)]
    return steps[: math.ceil(per_epoch * epochs)]


def difficulty_rank(difficulties: Sequence[str | None]) -> list[int]:
    """Rows that name no difficulty, or another, stand in the middle."""
    return [DIFFICULTIES.index(d) if d in DIFFICULTIES else 1 for d in difficulties]
