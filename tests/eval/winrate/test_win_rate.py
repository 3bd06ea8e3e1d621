"""A win-rate with its interval, its controls, and no "better" that a coin could have given."""

from collections.abc import Sequence
from math import comb

import pytest

from eval.judges.judge import Score
from eval.winrate.win_rate import Judged, WinRate, planned_precision, win_rate
from pipeline import statistics
from pipeline.data.rows import Question

GOOD, POOR, LONG_POOR = "unique", "banana", "banana, banana and banana"
SHORT = "no"


def question(number: int = 0, **fields: str) -> Question:
    return Question.model_validate({"id": f"q{number}", "prompt": "?", "key_points": ["unique index"]} | fields)


def judged(scores: Sequence[Score], itself: Sequence[float] = ()) -> Judged:
    """By a judge that says the same in both orders."""
    return Judged(scores, scores, itself)


def rate(wins: int, losses: int, ties: int = 0, unscored: int = 0, good: str = GOOD, poor: str = POOR) -> WinRate:
    ours = [good] * wins + [poor] * losses + [good] * (ties + unscored)
    theirs = [poor] * wins + [good] * losses + [good] * (ties + unscored)
    scores: list[Score] = [1.0] * wins + [0.0] * losses + [0.5] * ties + [None] * unscored
    return win_rate([question(i) for i in range(len(ours))], ours, theirs, judged(scores))


def test_rate_counts_a_tie_as_half() -> None:
    result = rate(wins=6, losses=2, ties=4)
    assert (result.wins, result.ties, result.losses, result.unscored) == (6, 4, 2, 0)
    assert result.scores == [1.0] * 6 + [0.0] * 2 + [0.5] * 4
    assert result.rate == statistics.rate([1.0] * 6 + [0.0] * 2 + [0.5] * 4)
    assert result.rate.value == pytest.approx(8 / 12, abs=1e-6)
    assert result.p_value == pytest.approx(2 * (comb(8, 6) + comb(8, 7) + comb(8, 8)) / 2**8)
    assert result.worst is result.best is None


def test_students_t_stands_beside_the_interval() -> None:
    from scipy import stats

    result = rate(wins=6, losses=2, ties=4)
    low, high = stats.t.interval(0.95, 11, 8 / 12, stats.sem(result.scores))
    assert result.students_t is not None
    assert (result.students_t.ci_low, result.students_t.ci_high) == pytest.approx((low, high), abs=1e-6)


def test_swapping_the_sides_mirrors_everything() -> None:
    one, other = rate(wins=9, losses=1, ties=2), rate(wins=1, losses=9, ties=2)
    assert one.rate and other.rate and one.rate.value == pytest.approx(1 - other.rate.value, abs=1e-6)
    assert one.p_value == pytest.approx(other.p_value)
    assert (one.verdict, other.verdict) == ("more wins by this judge", "fewer wins by this judge")


@pytest.mark.parametrize("n", range(1, 13))
def test_fair_coin_is_called_a_difference_in_at_most_one_of_twenty_runs(n: int) -> None:
    """Exact, over all outcomes of n decisive questions."""
    called = [rate(wins, n - wins).verdict != "no difference shown" for wins in range(n + 1)]
    assert sum(comb(n, wins) for wins in range(n + 1) if called[wins]) / 2**n <= 0.05
    assert any(called) == (n >= 6), "and enough wins are called a difference"


def test_all_ties_show_no_difference() -> None:
    result = rate(wins=0, losses=0, ties=5)
    assert result.rate and (result.rate.value, result.p_value, result.verdict) == (0.5, 1.0, "no difference shown")
    assert result.agrees_with_longest is None


def test_wins_that_length_alone_would_have_given_show_no_quality() -> None:
    result = rate(wins=12, losses=1, good=GOOD + " and then some more words", poor=POOR)
    assert result.verdict == "more wins, as by length alone: no quality shown"
    assert result.agrees_with_longest is not None and result.agrees_with_longest.value == 1.0


def test_wins_against_longer_answers_are_this_judges_own() -> None:
    result = rate(wins=12, losses=1, poor=LONG_POOR)
    assert result.verdict == "more wins by this judge"
    assert result.longest_wins.value == pytest.approx(1 / 13, abs=1e-6)
    assert result.agrees_with_longest is not None and result.agrees_with_longest.value == 0.0


# ── Both orders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_score_is_the_mean_of_both_orders_and_a_question_without_one_of_them_is_unscored() -> None:
    both = Judged([1.0, 1.0, 1.0, 0.5, None, 1.0, None], [1.0, 0.5, 0.0, 0.0, 1.0, None, None])
    assert both.scores == [1.0, 0.75, 0.5, 0.25, None, None, None]
    result = win_rate([question(i) for i in range(7)], [GOOD] * 7, [POOR] * 7, both)
    assert (result.wins, result.ties, result.losses, result.unscored) == (2, 1, 1, 3)
    assert result.rate is not None and (result.rate.value, result.rate.n) == (0.625, 4)


def test_a_judge_that_always_likes_the_first_shows_nothing_and_is_told() -> None:
    n = 12
    result = win_rate(
        [question(i) for i in range(n)], [GOOD] * n, [POOR] * n, Judged([1.0] * n, [0.0] * n, itself=[1.0] * n)
    )
    assert result.rate and (result.rate.value, result.verdict) == (0.5, "no difference shown")
    assert result.positions and (result.positions.favoured_first, result.positions.consistent.value) == (n, 0.0)
    assert result.against_itself and result.against_itself.value == 1.0
    assert result.notes == [
        "the judge prefers what it reads first; asked in both orders, it says the same of 0%",
        "of an answer and itself it prefers the first",
    ]


def test_a_judge_without_a_favourite_place_needs_no_note() -> None:
    n = 12
    result = win_rate([question(i) for i in range(n)], [GOOD] * n, [POOR] * n, judged([1.0] * n, [0.5] * n))
    assert result.notes == [] and result.positions and result.positions.consistent.value == 1.0


# ── Unscored ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unscored_are_neither_lost_nor_tied_nor_forgotten() -> None:
    result = rate(wins=9, losses=0, unscored=3)
    assert result.rate and (result.rate.n, result.rate.value) == (9, 1.0)
    assert result.worst == statistics.rate([1.0] * 9 + [0.0] * 3)
    assert result.best == statistics.rate([1.0] * 12)
    assert "3 of 12 unscored" in result.notes[0]


@pytest.mark.parametrize(
    ("unscored", "verdict"),
    [(1, "more wins by this judge"), (4, "no difference shown: the 4 unscored could undo it")],
    ids=["few", "many"],
)
def test_a_difference_stands_only_where_the_unscored_could_not_undo_it(unscored: int, verdict: str) -> None:
    assert rate(wins=14, losses=2, unscored=unscored, poor=LONG_POOR).verdict == verdict


def test_a_judge_that_gave_no_verdict_at_all_shows_nothing() -> None:
    result = rate(wins=0, losses=0, unscored=5)
    assert (result.rate, result.students_t, result.positions) == (None, None, None)
    assert result.verdict == "no verdict could be read: nothing shown"
    assert result.worst and result.best and (result.worst.value, result.best.value) == (0.0, 1.0)


# ── Families, domains ────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_question_asked_in_eight_ways_is_one_sample() -> None:
    """8 wins on one family and 1 on each of two others: 10 questions, and 3 things known."""
    scores = [1.0] * 10
    alike = [question(i, family="upsert") for i in range(8)] + [question(8), question(9)]
    apart = [question(i) for i in range(10)]
    clustered, plain = (win_rate(rows, [SHORT] * 10, [POOR] * 10, judged(scores)) for rows in (alike, apart))
    assert plain.verdict == "more wins by this judge"
    assert clustered.verdict == "no difference shown"
    assert clustered.p_value == pytest.approx(2 / 2**3)
    assert clustered.rate == statistics.rate(scores, ["upsert"] * 8 + ["a", "b"])


def test_rates_by_domain_are_adjusted_for_their_number() -> None:
    domains = ["sql"] * 8 + ["git"] * 8
    rows = [question(i, domain=name, difficulty="expert") for i, name in enumerate(domains)]
    scores: list[Score] = [1.0] * 8 + [1.0, 0.0] * 3 + [0.5, None]
    result = win_rate(rows, [SHORT] * 16, [POOR] * 16, judged(scores))
    assert {name: (g.rate.value, g.rate.n) for name, g in result.by_domain.items()} == {
        "sql": (1.0, 8), "git": (0.5, 7),
    }  # fmt: skip
    assert result.by_domain["sql"].holm_p == pytest.approx(2 * 2 / 2**8, abs=1e-4)
    assert result.by_domain["git"].holm_p == 1.0
    assert result.by_difficulty == {}, "one alone is the rate itself"


# ── What does not belong together, and before the run ────────────────────────────────────────────────────────────────


def test_one_question_shows_nothing() -> None:
    result = rate(wins=1, losses=0)
    assert result.rate and (result.rate.value, result.rate.n) == (1.0, 1)
    assert result.verdict == "no difference shown"


def test_answers_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one answer of each side"):
        win_rate([question()], [GOOD], [], judged([1.0]))
    with pytest.raises(ValueError, match="and its scores"):
        win_rate([question()], [GOOD], [POOR], judged([1.0, 1.0]))


def test_precision_is_said_before_the_run() -> None:
    said = planned_precision([question()] * 30)
    assert said == "30 questions can show a win-rate that differs from 0.5 by 0.21 or more (80 % power)"
    families = [question(i, family=f"f{i // 3}") for i in range(90)]
    assert planned_precision(families) == said.replace("30 questions", "90 questions of 30 families")
