"""Looking after every vote errs in at most 5 of 100 reviews, and what would err more is shown to."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.statistics.sequential import ENOUGH, log_e_value, may_open, share_of_wins

RUNS, VOTES = 4000, 400


def counts(share: float, reviewers: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Wins and losses `(RUNS, VOTES)` after each vote; several reviewers say the same of a prompt."""
    rng = np.random.default_rng(int(share * 100))
    won = (rng.random((RUNS, VOTES // reviewers)) < share).repeat(reviewers, axis=1)
    wins = won.cumsum(1)
    return wins, np.arange(1, wins.shape[1] + 1) - wins


def test_e_value_is_the_formula_by_hand() -> None:
    """B(1+3, 1+1)·2⁴ = 3!·1!/5!·16."""
    assert math.exp(log_e_value(3, 1)) == pytest.approx(0.8)
    assert log_e_value(0, 0) == 0
    assert log_e_value(5000, 0) > 3000, "and far evidence overflows nothing"


def test_a_look_after_every_vote_opens_at_most_5_of_100_reviews_of_equals() -> None:
    opened = (log_e_value(*counts(0.5)) >= ENOUGH).any(1)
    assert 0.005 < opened.mean() <= 0.05


def test_a_sign_test_after_every_vote_would_be_seen() -> None:
    """The planted fault: a test made for one look."""
    wins, losses = counts(0.5)
    p = 2 * stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5)
    assert (p < 0.05).any(1).mean() > 0.2


def test_several_reviewers_counted_as_so_many_prompts_would_be_seen() -> None:
    assert (log_e_value(*counts(0.5, reviewers=3)) >= ENOUGH).any(1).mean() > 0.1


def test_a_second_test_at_the_planned_end_would_err_more_often() -> None:
    wins, losses = counts(0.5)
    early = (log_e_value(wins, losses) >= ENOUGH).any(1)
    at_end = 2 * stats.binom.cdf(np.minimum(wins, losses)[:, -1], VOTES, 0.5) < 0.05
    assert (early | at_end).mean() > 0.05


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_interval_holds_the_truth_at_every_look_in_95_of_100_reviews(share: float) -> None:
    """`share_of_wins` gives the shares with log E below `ENOUGH`, as the next test shows."""
    assert (log_e_value(*counts(share), share) < ENOUGH).all(1).mean() >= 0.95


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (1, 0), (5, 5), (9, 2), (40, 0), (300, 260), (0, 40)])
def test_interval_ends_where_the_evidence_is_enough_and_leaves_out_one_half_just_then(wins: int, losses: int) -> None:
    share = share_of_wins(wins, losses)
    assert share.ci_low is not None and share.ci_high is not None
    for end, edge in ((share.ci_low, 0.0), (share.ci_high, 1.0)):
        assert end == edge or log_e_value(wins, losses, end) == pytest.approx(ENOUGH, abs=0.01)
    assert (share.ci_low > 0.5 or share.ci_high < 0.5) == (log_e_value(wins, losses) >= ENOUGH)
    mirrored = share_of_wins(losses, wins)
    assert (mirrored.ci_low, mirrored.ci_high) == pytest.approx((1 - share.ci_high, 1 - share.ci_low), abs=2e-6)


def test_a_clear_review_opens_long_before_its_end() -> None:
    """Seven wins of ten: half of the reviews need no more than 60 decisive votes."""
    opens = log_e_value(*counts(0.7)) >= ENOUGH
    assert opens[:, -1].mean() > 0.99
    assert np.median(opens.argmax(1)) < 60


def test_a_review_opens_when_enough_is_known_or_all_is_seen() -> None:
    assert not may_open(4, 2, 3, planned=50)
    assert may_open(12, 0, 3, planned=50)
    assert may_open(20, 18, 12, planned=50)
    assert not may_open(20, 18, 11, planned=50)


def test_no_decisive_vote_gives_no_share() -> None:
    with pytest.raises(ValueError, match="no decisive votes"):
        share_of_wins(0, 0)
