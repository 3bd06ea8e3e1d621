"""Planted strengths are found, and their intervals cover them, with ties, both orders and prompts judged many times."""

from collections.abc import Iterator
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from eval.statistics.bradley_terry import Ranking, Vote, rank
from pipeline.statistics import Figure

STRENGTHS = {"merged": 0.8, "dpo": 0.1, "sft": -0.2, "base": -0.7}


def votes(rng: np.random.Generator, prompts: int, tie: float, consistent: float = 0.7) -> Iterator[Vote]:
    """Every pair on every prompt in both orders; with this chance the second verdict is the first."""
    pairs = list(combinations(STRENGTHS, 2))
    odds = np.array([
        [np.exp(STRENGTHS[a]), tie * np.exp((STRENGTHS[a] + STRENGTHS[b]) / 2), np.exp(STRENGTHS[b])] for a, b in pairs
    ])  # fmt: skip
    below = (odds / odds.sum(1, keepdims=True)).cumsum(1)[:, :2]
    drawn = (rng.random((2, prompts, len(pairs), 1)) > below).sum(3)
    drawn[1] = np.where(rng.random(drawn[0].shape) < consistent, *drawn)
    for prompt in range(prompts):
        for (a, b), once, again in zip(pairs, *(1 - drawn[:, prompt] / 2), strict=True):
            yield Vote(a, b, float(once), prompt)
            yield Vote(b, a, float(1 - again), prompt)


@cache
def rankings(prompts: int, tie: float) -> list[Ranking]:
    rng = np.random.default_rng(prompts)
    return [rank(list(votes(rng, prompts, tie))) for _ in range(300)]


def covers(figure: Figure, truth: float) -> bool:
    return figure.ci_low is not None and figure.ci_high is not None and figure.ci_low <= truth <= figure.ci_high


@pytest.mark.parametrize(("prompts", "tie"), [(20, 0.6), (40, 0.0)], ids=["20 with ties", "40 without"])
def test_planted_strengths_are_found_and_covered_in_93_to_97_of_100_runs(prompts: int, tie: float) -> None:
    """As far as 300 runs of four strengths, or of six pairs, tell."""
    found = rankings(prompts, tie)
    for name, strength in STRENGTHS.items():
        assert np.mean([r.strengths[name].value for r in found]) == pytest.approx(strength, abs=0.06)
    strengths = [covers(r.strengths[name], truth) for r in found for name, truth in STRENGTHS.items()]
    pairs = [
        covers(r.wins[a, b], 1 / (1 + np.exp(STRENGTHS[b] - STRENGTHS[a])))
        for r in found
        for a, b in combinations(STRENGTHS, 2)
    ]
    assert 0.93 <= np.mean(strengths) <= 0.97
    assert 0.93 <= np.mean(pairs) <= 0.97


def test_each_order_taken_for_a_prompt_of_its_own_would_be_seen() -> None:
    """The planted fault: with verdicts that agree in both orders the intervals are too narrow."""
    rng = np.random.default_rng(1)
    truth, hits = 1 / (1 + np.exp(-0.7)), []
    for _ in range(150):
        apart = [vote._replace(prompt=i) for i, vote in enumerate(votes(rng, 20, 0.6, consistent=1.0))]
        hits.append(covers(rank(apart).wins["merged", "dpo"], truth))
    assert np.mean(hits) < 0.9


def test_two_contestants_without_ties_have_the_share_of_wins() -> None:
    found = rank([Vote("a", "b", float(i < 70), i) for i in range(100)])
    assert found.wins["a", "b"].value == pytest.approx(0.7, abs=0.002), "the prior pulls by so much"
    assert found.strengths["a"].value == pytest.approx(np.log(7 / 3) / 2, abs=0.01)
    one, other = found.wins["a", "b"], found.wins["b", "a"]
    assert one.ci_low is not None and other.ci_high is not None
    assert other.ci_high == pytest.approx(1 - one.ci_low, abs=2e-6)


def test_ties_pull_strengths_together_no_more_than_they_should() -> None:
    """Davidson's: with wins 60, ties 60, losses 15 the odds of a win stay 4 to 1."""
    scores = [1.0] * 60 + [0.5] * 60 + [0.0] * 15
    found = rank([Vote("a", "b", score, i) for i, score in enumerate(scores)])
    assert found.wins["a", "b"].value == pytest.approx(0.8, abs=0.003)


def test_order_of_the_votes_and_of_their_sides_changes_nothing() -> None:
    given = list(votes(np.random.default_rng(5), 12, 0.5))
    turned = [Vote(v.second, v.first, 1 - v.score, f"prompt {v.prompt}") for v in reversed(given)]
    one, other = rank(given), rank(turned)
    assert list(one.strengths) == list(other.strengths) == sorted(one.strengths, key=lambda x: -one.strengths[x].value)
    for name, figure in one.strengths.items():
        assert figure.model_dump() == pytest.approx(other.strengths[name].model_dump(), abs=2e-6)
    assert sum(figure.value for figure in one.strengths.values()) == pytest.approx(0, abs=1e-5)


def test_a_contestant_that_won_all_has_a_wide_interval_and_no_infinite_strength() -> None:
    won_all = rank([Vote(a, b, 1.0, i) for a, b in combinations("abc", 2) for i in range(10)])
    won = won_all.wins["a", "b"]
    assert won.ci_low is not None and won.ci_high is not None
    assert 0.2 < won.ci_low < 0.8 < won.value < won.ci_high
    assert abs(won_all.strengths["a"].value) < 10


def test_contestants_that_are_compared_by_way_of_others_are_ranked() -> None:
    chain = rank([Vote(a, b, float(i % 4 > 0), i) for a, b in ("ab", "bc") for i in range(40)])
    assert list(chain.strengths) == ["a", "b", "c"]
    assert chain.wins["a", "c"].value == pytest.approx(0.9, abs=0.005), "odds of 3 twice are odds of 9"


def test_one_prompt_gives_no_interval() -> None:
    assert rank([Vote("a", "b", 1.0, 0), Vote("b", "a", 0.0, 0)]).wins["a", "b"].ci_low is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "no votes"),
        ([Vote("a", "b", 0.7, 0)], "a vote of 0.7"),
        ([Vote("a", "a", 1.0, 0)], "a against itself"),
        ([Vote("a", "b", 1.0, 0), Vote("c", "d", 1.0, 1)], "never compared"),
    ],
    ids=["none", "no score", "itself", "two groups"],
)
def test_what_cannot_be_ranked_is_refused(given: list[Vote], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rank(given)
