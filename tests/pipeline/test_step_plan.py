"""The plan of an epoch: every row once, the same for the same seed."""

import math
from collections import Counter
from itertools import chain

import pytest

from pipeline.config import SftConfig
from pipeline.plan import difficulty_rank, plan
from pipeline.stage import steps_in_all


def epochs_of(steps: list[list[int]], rows: int, rows_a_step: int) -> list[list[int]]:
    """Row numbers as they come, an epoch a list."""
    per_epoch = math.ceil(rows / rows_a_step)
    return [list(chain(*steps[i : i + per_epoch])) for i in range(0, len(steps), per_epoch)]


@pytest.mark.parametrize(("rows", "rows_a_step"), [(1, 1), (7, 3), (8, 4), (3, 10), (100, 7)])
def test_every_row_is_met_once_an_epoch_and_only_the_last_step_is_short(rows: int, rows_a_step: int) -> None:
    epochs = epochs_of(plan(rows, rows_a_step, 3.0, seed=5), rows, rows_a_step)
    assert len(epochs) == 3
    for order in epochs:
        assert Counter(order) == Counter(range(rows))
    steps = plan(rows, rows_a_step, 1.0, seed=5)
    assert [len(step) for step in steps[:-1]] == [rows_a_step] * (len(steps) - 1)
    assert len(steps[-1]) == (rows % rows_a_step or rows_a_step)


def test_the_same_seed_gives_the_same_plan_and_another_seed_or_epoch_another_order() -> None:
    once = plan(50, 4, 2.0, seed=5)
    assert plan(50, 4, 2.0, seed=5) == once
    first, second = epochs_of(once, 50, 4)
    others = [list(chain(*plan(50, 4, 1.0, seed=seed))) for seed in (0, 1, 4, 6, 1_000_003 + 5)]
    orders = [first, second, list(range(50)), *others]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_seeds_one_apart_do_not_share_an_epoch() -> None:
    epochs = [tuple(order) for seed in range(5) for order in epochs_of(plan(20, 4, 4.0, seed), 20, 4)]
    assert len(set(epochs)) == 20


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 5), (1.0, 10), (1.5, 15), (2.05, 21), (1.1, 11)])
def test_a_fraction_of_an_epoch_is_that_part_of_its_steps(epochs: float, steps: int) -> None:
    found = plan(40, 4, epochs, seed=5)
    assert len(found) == steps
    assert found == plan(40, 4, 3.0, seed=5)[:steps]  # the whole one goes on from there


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 1.1, 2.5])
def test_there_are_as_many_steps_as_were_announced(rows: int, epochs: float) -> None:
    config = SftConfig(batch_size=2, gradient_accumulation=8, epochs=epochs)
    assert len(plan(rows, 16, epochs, seed=0)) == steps_in_all(config, rows)


def test_a_curriculum_goes_from_easy_to_hard_and_mixes_what_is_alike() -> None:
    rank = difficulty_rank(["expert", "beginner", None, "intermediate", "beginner", "hard", "expert", "beginner"])
    assert rank == [2, 0, 1, 1, 0, 1, 2, 0]
    orders = set()
    for seed in range(20):
        for order in epochs_of(plan(8, 3, 2.0, seed, rank), 8, 3):
            assert [rank[row] for row in order] == sorted(rank)
            assert sorted(order) == list(range(8))
            orders.add(tuple(order))
    assert len(orders) > 20  # of 216
