"""Length and domain: what a set gives away besides its content."""

import random

import numpy as np
import pytest

from pipeline.gate.bias import auc, paired_auc, small_domains


def by_definition(chosen: list[int], rejected: list[int]) -> float:
    won = sum((c > r) + (c == r) / 2 for c in chosen for r in rejected)
    return won / len(chosen) / len(rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([5], [5], 0.5), ([1, 3], [2], 0.5), ([2, 2, 3], [2, 1], 5 / 6)],
)
def test_auc_is_the_chance_that_chosen_is_longer(chosen: list[int], rejected: list[int], wanted: float) -> None:
    assert auc(chosen, rejected) == pytest.approx(wanted)


def test_auc_equals_its_definition_and_sides_are_symmetric() -> None:
    rng = random.Random(1)
    for _ in range(20):
        chosen = [rng.randrange(30) for _ in range(rng.randrange(1, 80))]
        rejected = [rng.randrange(30) for _ in range(rng.randrange(1, 80))]
        assert auc(chosen, rejected) == pytest.approx(by_definition(chosen, rejected))
        assert auc(chosen, rejected) + auc(rejected, chosen) == pytest.approx(1)


def test_auc_of_a_million_lengths_is_exact() -> None:
    assert auc(np.arange(1_000_000) + 0.5, np.arange(1_000_000)) == pytest.approx(0.5 + 0.5e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [([2, 3], [1, 2], 1.0), ([1, 2], [1, 3], 0.25), ([4, 4], [4, 4], 0.5), ([0.5], [1.5], 0.0)],
)
def test_paired_auc_is_the_share_of_pairs(chosen: list[float], rejected: list[float], wanted: float) -> None:
    assert paired_auc(chosen, rejected) == pytest.approx(wanted)


def test_bias_within_pairs_shows_where_prompts_differ_much() -> None:
    rejected = [100 * n for n in range(50)]
    chosen = [length + 1 for length in rejected]
    assert paired_auc(chosen, rejected) == 1 and auc(chosen, rejected) < 0.52


def test_sides_that_cannot_be_compared_are_refused() -> None:
    for measure in (auc, paired_auc):
        with pytest.raises(ValueError):
            measure([], [])
    with pytest.raises(ValueError, match="2 chosen and 1 rejected"):
        paired_auc([1, 2], [1])


def test_small_domains_are_named_with_rows_and_even_share() -> None:
    counts = {"databases": 100, "devops": 90, "api": 9, "performance": 1}
    assert small_domains(counts, 0.25) == [("performance", 1, 50.0), ("api", 9, 50.0)]


@pytest.mark.parametrize(
    "counts",
    [{}, {"unknown": 10}, {"one": 3}, {"one": 30, "two": 30}, {"one": 100, "two": 100, "unknown": 1}, {"one": 0}],
)
def test_balanced_and_unnamed_domains_are_not_found(counts: dict[str, int]) -> None:
    assert small_domains(counts, 0.25) == []


def test_rows_without_a_domain_do_not_raise_the_even_share() -> None:
    assert small_domains({"one": 30, "two": 30, "unknown": 10_000}, 1.0) == []


def test_domain_at_the_share_is_not_small() -> None:
    assert small_domains({"one": 75, "two": 25}, 0.5) == []
    assert small_domains({"one": 76, "two": 24}, 0.5) == [("two", 24, 50.0)]
