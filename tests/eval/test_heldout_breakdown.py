"""Figures taken apart: what each part says is its own rows', and many parts do not make a finding."""

import math
import random

import pytest
from scipy import stats

from eval import breakdown
from pipeline import statistics
from pipeline.statistics import Figure


def test_perplexity_is_exp_of_the_loss_and_its_ratio_is_paired() -> None:
    before, after = [2.0, 3.0, 4.0], [1.8, 2.7, 3.9]
    change = statistics.paired(before, after)
    found = breakdown.perplexity(change)
    assert found["before"].value == pytest.approx(math.exp(3.0)) and found["after"].n == 3
    ratio = found["ratio"]
    assert ratio.value == pytest.approx(math.exp(-0.2), abs=1e-6)
    assert ratio.ci_high == pytest.approx(math.exp(change.delta.ci_high or 0), abs=1e-6)


def test_a_perplexity_beyond_all_numbers_has_no_interval() -> None:
    figure = Figure(value=3.0, ci_low=-900.0, ci_high=900.0, n=2)
    found = breakdown.perplexity(statistics.Change(before=figure, after=figure, delta=figure))
    assert (found["after"].ci_low, found["after"].ci_high) == (None, None)
    assert found["after"].value == pytest.approx(math.exp(3))


def test_every_token_alike_is_the_pooled_mean() -> None:
    found = breakdown.by_token([2.0, 1.0], [1.0, 1.0], [30, 10])
    assert found.before.value == (2.0 * 30 + 10) / 40 and found.delta.value == -0.75
    alike = breakdown.by_token([2.0, 1.0, 3.0], [1.0, 1.5, 1.0], [7, 7, 7])  # rows of one length: the plain mean's
    assert alike == statistics.paired([2.0, 1.0, 3.0], [1.0, 1.5, 1.0])


def test_every_token_alike_is_the_mean_over_tokens_with_rows_as_families() -> None:
    draw = random.Random(3)
    tokens = [draw.randint(2, 40) for _ in range(20)]
    before, after = ([draw.gauss(5, 1) for _ in tokens] for _ in range(2))
    deltas = [(a - b, row, n) for row, (b, a, n) in enumerate(zip(before, after, tokens, strict=True))]
    each_token = [(delta, row) for delta, row, n in deltas for _ in range(n)]
    expected = statistics.mean([delta for delta, _ in each_token], families=[row for _, row in each_token])
    found = breakdown.by_token(before, after, tokens).delta
    assert found.n == 20, "rows, not tokens"
    assert found.model_dump(exclude={"n"}) == pytest.approx(expected.model_dump(exclude={"n"}), abs=2e-6)


def test_each_domain_has_its_own_rows_and_its_adjusted_p() -> None:
    groups = ["b", "a", "b", "a", "b", "a", "c"]
    before, after = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 5.0], [0.5, 2.1, 0.6, 1.9, 0.4, 2.05, 4.0]
    found = breakdown.changes_by(groups, before, after)
    assert list(found) == ["a", "b", "c"]
    assert found["b"]["delta"]["value"] == pytest.approx(-0.5) and found["b"]["delta"]["n"] == 3
    p = [stats.ttest_rel(before[i::2][:3], after[i::2][:3]).pvalue for i in (0, 1)]
    assert found["b"]["holm_p"] == pytest.approx(min(1, 2 * p[0]), abs=1e-4)
    assert found["a"]["holm_p"] == pytest.approx(p[1], abs=1e-4)
    assert "holm_p" not in found["c"] and "ci_low" not in found["c"]["delta"], "one row says nothing"
    assert breakdown.told(found, True) == "no difference shown: a (n = 3), c (n = 1); better: b (n = 3)"


def test_ten_domains_of_noise_show_nothing() -> None:
    """Of 200 evaluations without any difference, at most a few name a domain; unadjusted, a third would."""
    draw, named, unadjusted = random.Random(11), 0, 0
    groups = [f"domain {i % 10}" for i in range(120)]
    for _ in range(200):
        found = breakdown.changes_by(groups, [0.0] * 120, [draw.gauss(0, 1) for _ in groups])
        named += "better" in breakdown.told(found, True) or "worse" in breakdown.told(found, True)
        unadjusted += any(f["delta"]["ci_low"] > 0 or f["delta"]["ci_high"] < 0 for f in found.values())
    assert named <= 18 < 50 < unadjusted


def test_shares_by_fault_count_what_rose() -> None:
    found = breakdown.shares_by(["x", "y", "x", "x", "y"], [0.3, -0.1, 0.2, -0.4, 0.0])
    assert (found["x"]["value"], found["x"]["n"]) == (pytest.approx(2 / 3, abs=1e-6), 3)
    assert found["y"]["value"] == 0.0
    assert found["x"]["holm_p"] == found["y"]["holm_p"] == 1.0
