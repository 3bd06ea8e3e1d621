"""The plan of an epoch: every row as often as its domain is sampled, the same for the same seed."""

import math
from collections import Counter
from itertools import chain
from typing import Any

import pytest

from pipeline.config import SftConfig
from pipeline.train.plan import (
    difficulty_rank,
    measured_after,
    orders,
    plan,
    rows_an_epoch,
    steps_an_epoch,
    steps_in_all,
)


def config(rows_a_step: int, epochs: float, **others: Any) -> SftConfig:
    return SftConfig(batch_size=rows_a_step, gradient_accumulation=1, epochs=epochs, **others)


def planned(
    rows: int, rows_a_step: int, epochs: float, seed: int, rank: list[int] | None = None, **others: Any
) -> list[list[int]]:
    """Of rows of one domain, `a`."""
    return plan(config(rows_a_step, epochs, **others), ["a"] * rows, seed, rank)


def epochs_of(steps: list[list[int]], rows: int, rows_a_step: int) -> list[list[int]]:
    """Row numbers as they come, an epoch a list."""
    per_epoch = math.ceil(rows / rows_a_step)
    return [list(chain(*steps[i : i + per_epoch])) for i in range(0, len(steps), per_epoch)]


@pytest.mark.parametrize(("rows", "rows_a_step"), [(1, 1), (7, 3), (8, 4), (3, 10), (100, 7)])
def test_every_row_is_met_once_an_epoch_and_only_the_last_step_is_short(rows: int, rows_a_step: int) -> None:
    epochs = epochs_of(planned(rows, rows_a_step, 3.0, seed=5), rows, rows_a_step)
    assert len(epochs) == 3
    for order in epochs:
        assert Counter(order) == Counter(range(rows))
    steps = planned(rows, rows_a_step, 1.0, seed=5)
    assert [len(step) for step in steps[:-1]] == [rows_a_step] * (len(steps) - 1)
    assert len(steps[-1]) == (rows % rows_a_step or rows_a_step)


def test_the_same_seed_gives_the_same_plan_and_another_seed_or_epoch_another_order() -> None:
    once = planned(50, 4, 2.0, seed=5)
    assert planned(50, 4, 2.0, seed=5) == once
    first, second = epochs_of(once, 50, 4)
    others = [list(chain(*planned(50, 4, 1.0, seed=seed))) for seed in (0, 1, 4, 6, 1_000_003 + 5)]
    orders = [first, second, list(range(50)), *others]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_plan_is_that_of_runs_begun_with_earlier_versions() -> None:
    """A resume goes on with the rows that the run began with."""
    assert planned(10, 4, 1.0, seed=42) == [[0, 3, 2, 7], [1, 4, 8, 6], [5, 9]]


def test_seeds_one_apart_do_not_share_an_epoch() -> None:
    epochs = [tuple(order) for seed in range(5) for order in epochs_of(planned(20, 4, 4.0, seed), 20, 4)]
    assert len(set(epochs)) == 20


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 5), (1.0, 10), (1.5, 15), (2.05, 21), (1.1, 11)])
def test_a_fraction_of_an_epoch_is_that_part_of_its_steps(epochs: float, steps: int) -> None:
    found = planned(40, 4, epochs, seed=5)
    assert len(found) == steps
    assert found == planned(40, 4, 3.0, seed=5)[:steps]  # the whole one goes on from there


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1.1, 50, 55), (0.07, 100, 7), (0.14, 50, 7), (2.2, 45, 99)])
def test_a_floats_noise_makes_no_step(epochs: float, rows: int, steps: int) -> None:
    assert math.ceil(epochs * rows) == steps + 1, "no noise here to show anything"
    assert steps_in_all(config(1, epochs), rows) == len(planned(rows, 1, epochs, seed=0)) == steps


@pytest.mark.parametrize("epochs", [1e-6, 0.011, 1.00001])
def test_the_smallest_part_of_a_step_is_a_step(epochs: float) -> None:
    assert steps_in_all(config(1, epochs), 100) == math.floor(100 * epochs) + 1


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 1.1, 2.5])
@pytest.mark.parametrize("sampling", [{}, {"a": 2.0}, {"a": 0.3, "b": 1.7}])
def test_there_are_as_many_steps_as_were_announced(rows: int, epochs: float, sampling: dict[str, float]) -> None:
    asked = SftConfig(batch_size=2, gradient_accumulation=8, epochs=epochs, domain_sampling=sampling)
    domains = ["a", "b", "c"] * rows
    met = rows_an_epoch(asked, domains)
    assert len(plan(asked, domains, seed=0)) == steps_in_all(asked, met)
    assert len(next(orders(asked, domains, seed=0))) == met


DOMAINS = ["often"] * 7 + ["seldom"] * 10 + ["plain"] * 13
SAMPLING = {"often": 2.5, "seldom": 0.25}


def test_a_domains_rows_are_met_as_often_as_it_says() -> None:
    asked = config(4, 1.0, domain_sampling=SAMPLING)
    found = orders(asked, DOMAINS, seed=3)
    met: Counter[int] = Counter()
    for epoch in range(1, 41):
        order = next(found)
        assert len(order) == rows_an_epoch(asked, DOMAINS) == 18 + 2 + 13
        times = Counter(order)
        met += times
        assert Counter(DOMAINS[row] for row in order) == {"often": 18, "seldom": 2, "plain": 13}
        assert {times[row] for row in range(7)} == {2, 3}
        assert all(times[row] <= 1 for row in range(7, 17))
        assert all(times[row] == 1 for row in range(17, 30))
        if epoch % 5 == 0:  # of the ten, two an epoch: all of them before any one again
            assert {met[row] for row in range(7, 17)} == {epoch // 5}
    assert max(met[row] for row in range(7)) - min(met[row] for row in range(7)) == 1


def test_sampled_rows_are_drawn_by_seed_and_epoch() -> None:
    asked = config(4, 1.0, domain_sampling={"seldom": 0.5})
    drawn = [frozenset(next(orders(asked, DOMAINS, seed))) for seed in range(20)]
    assert len(set(drawn)) > 15
    first, second, third = (frozenset(order) for order, _ in zip(orders(asked, DOMAINS, 0), range(3), strict=False))
    assert first != second and first != third
    assert first | second >= set(range(7, 17))


def test_a_domain_of_few_rows_is_never_lost() -> None:
    assert rows_an_epoch(config(1, 1.0, domain_sampling={"a": 0.01}), ["a", "a", "b"]) == 2


@pytest.mark.parametrize("rows_a_step", [1, 2, 4, 8])
def test_no_row_stands_twice_in_a_step_and_its_times_are_spread_over_the_epoch(rows_a_step: int) -> None:
    """Three times in 13 or more steps: about a third of an epoch apart."""
    domains = ["a"] * 10 + ["b"] * 75
    for seed in range(50):
        steps = plan(config(rows_a_step, 1.0, domain_sampling={"a": 3.0}), domains, seed)
        assert all(len(set(step)) == len(step) for step in steps)
        for row in range(10):
            first, second, third = (n for n, step in enumerate(steps) if row in step)
            assert min(second - first, third - second) > len(steps) / 6


@pytest.mark.parametrize(("rows_a_step", "times"), [(2, 2.0), (10, 2.0), (25, 2.0), (32, 3.0), (25, 4.0)])
def test_no_row_stands_twice_in_a_step_of_few_large_ones(rows_a_step: int, times: float) -> None:
    """More steps than times, however few."""
    domains = ["a"] * 20 + ["b"] * 40
    for seed in range(100):
        steps = plan(config(rows_a_step, 1.0, domain_sampling={"a": times}), domains, seed)
        assert sum(map(len, steps)) == 20 * times + 40 and len(steps) > times
        assert all(len(set(step)) == len(step) <= rows_a_step for step in steps)


def test_a_sampled_curriculum_still_goes_from_easy_to_hard() -> None:
    domains, rank = ["a", "b"] * 12, [0, 1, 2, 2] * 6
    steps = plan(config(3, 1.0, domain_sampling={"a": 2.0}), domains, 1, rank)
    met = [rank[row] for row in chain(*steps)]
    assert met == sorted(met) and Counter(met) == {0: 12, 1: 6, 2: 18}


def test_a_curriculum_goes_from_easy_to_hard_and_mixes_what_is_alike() -> None:
    rank = difficulty_rank(["expert", "beginner", None, "intermediate", "beginner", "hard", "expert", "beginner"])
    assert rank == [2, 0, 1, 1, 0, 1, 2, 0]
    orders = set()
    for seed in range(20):
        for order in epochs_of(planned(8, 3, 2.0, seed, rank), 8, 3):
            assert [rank[row] for row in order] == sorted(rank)
            assert sorted(order) == list(range(8))
            orders.add(tuple(order))
    assert len(orders) > 20  # of 216


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [10, 20]),  # 25 steps: the last is no measurement on the way
        ({"evaluate_each_epoch": False}, []),
        ({"evaluate_steps": 8}, [8, 10, 16, 20, 24]),
        ({"evaluate_steps": 5}, [5, 10, 15, 20]),
        ({"evaluate_each_epoch": False, "evaluate_steps": 25}, []),
        ({"domain_sampling": {"a": 2.0}}, [20, 40]),
    ],
)
def test_held_out_rows_are_measured_where_the_profile_says(settings: dict[str, Any], expected: list[int]) -> None:
    asked = config(4, 2.5, **settings)
    rows = rows_an_epoch(asked, ["a"] * 40)
    assert measured_after(asked, rows) == expected
    assert steps_an_epoch(asked, rows) == (20 if "domain_sampling" in settings else 10)
