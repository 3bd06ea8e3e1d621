"""Win-rate of one model's answers against another's on the same open questions, by one judge that was asked in both orders.

The unit is the question: the mean of both orders, 1, ¾, ½, ¼ or 0. The interval is Wilson's for scores with ties, Student's t
stands beside it; the test is the exact sign test on decisive questions. Questions of one family (their field `family`) are
not independent: their family is the unit. A question that lacks one of its two verdicts is unscored, and with what it could
have been the rate has bounds.

Before it runs it says the smallest difference that so many questions can show, and beside the judge it shows how the answers
fare when the longer simply wins, what would be left were both equally long, whether the order mattered, and what the judge
says of an answer beside itself.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from eval.judges.judge import Score, winner
from eval.statistics.agreement import Positions, on_decisive, positions
from eval.statistics.length_control import length_controlled
from pipeline import statistics
from pipeline.data.rows import Question
from pipeline.statistics import CONFIDENCE, Figure

USUAL_DEVIATION = 0.41  # of per-question scores, as measured in the field; only for planning n


@dataclass(frozen=True)
class Judged:
    """A judge's scores of one side, a question each, shown first and shown second; and of answers beside themselves."""

    shown_first: Sequence[Score]
    shown_second: Sequence[Score]
    itself: Sequence[float] = ()  # 1: the one shown first was better

    @property
    def scores(self) -> list[Score]:
        both = zip(self.shown_first, self.shown_second, strict=True)
        return [None if a is None or b is None else (a + b) / 2 for a, b in both]


@dataclass(frozen=True)
class Group:
    """The questions of one domain or difficulty. `holm_p`: of its sign test, for as many groups as there are."""

    rate: Figure
    holm_p: float


@dataclass(frozen=True)
class WinRate:
    """`rate` with its interval, the counts behind it, and the controls. It is None where no question is scored."""

    scores: list[Score]
    rate: Figure | None
    students_t: Figure | None
    wins: int
    ties: int
    losses: int
    unscored: int
    p_value: float
    worst: Figure | None  # were the unscored all lost, and all won; None where there are none
    best: Figure | None
    positions: Positions | None
    against_itself: Figure | None
    longest_wins: Figure
    at_equal_length: Figure | None
    agrees_with_longest: Figure | None
    by_domain: dict[str, Group] = field(default_factory=dict)
    by_difficulty: dict[str, Group] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Outside the noise, whatever the unscored were, and whether mere length would have said the same."""
        if self.rate is None:
            return "no verdict could be read: nothing shown"
        side = _side(self.rate)
        if side == 0 or self.p_value >= 1 - CONFIDENCE:  # both: the interval is no exact test
            return "no difference shown"
        if self.unscored and not _side(self.worst) == _side(self.best) == side:
            return f"no difference shown: the {self.unscored} unscored could undo it"
        word = "more wins" if side > 0 else "fewer wins"
        if _side(self.longest_wins) != side:
            return f"{word} by this judge"
        if self.at_equal_length and _side(self.at_equal_length) == side:
            return f"{word} by this judge, at equal length too"
        return f"{word}, as by length alone: no quality shown"

    @property
    def notes(self) -> list[str]:
        """What a reader of the rate must know beside it."""
        notes = []
        if self.unscored and self.worst and self.best:
            ends = f"{self.worst.ci_low or self.worst.value:.3f} to {self.best.ci_high or self.best.value:.3f}"
            notes.append(f"{self.unscored} of {len(self.scores)} unscored: with them, anything from {ends}")
        if self.positions and self.positions.p_value < 1 - CONFIDENCE:
            first = self.positions.favoured_first > self.positions.favoured_second
            notes.append(
                f"the judge prefers what it reads {'first' if first else 'second'}; asked in both orders, "
                f"it says the same of {self.positions.consistent.value:.0%}"
            )
        if side := _side(self.against_itself):
            notes.append(f"of an answer and itself it prefers the {'first' if side > 0 else 'second'}")
        return notes


def planned_precision(questions: Sequence[Question]) -> str:
    """What to say before the run; of each family as if its questions were one."""
    n, families = len(questions), families_of(questions)
    units = len(set(families)) if families else n
    least = statistics.smallest_difference(units, USUAL_DEVIATION)
    asked = f"{n} questions" if units == n else f"{n} questions of {units} families"
    return f"{asked} can show a win-rate that differs from 0.5 by {least:.2f} or more (80 % power)"


def win_rate(
    questions: Sequence[Question], answers: Sequence[str], opponents: Sequence[str], judged: Judged
) -> WinRate:
    """`judged`: the answers' scores against the opponents'. Raises ValueError when they do not belong together."""
    if not len(questions) == len(answers) == len(opponents) == len(judged.shown_first):
        raise ValueError("one answer of each side to every question, and its scores")
    families = families_of(questions)
    longest = [_longer(a, o) for a, o in zip(answers, opponents, strict=True)]
    scores = judged.scores
    scored = [i for i, score in enumerate(scores) if score is not None]
    own, clusters = [s for s in scores if s is not None], families and [families[i] for i in scored]
    unscored, wins, losses = len(scores) - len(own), sum(s > 0.5 for s in own), sum(s < 0.5 for s in own)
    lengths = [float(len(answers[i]) - len(opponents[i])) for i in scored]
    worst, best = _bounds(scores, families) if unscored else (None, None)
    return WinRate(
        scores=scores,
        rate=statistics.rate(own, clusters) if own else None,
        students_t=statistics.mean(own, clusters) if own else None,
        wins=wins,
        ties=len(own) - wins - losses,
        losses=losses,
        unscored=unscored,
        p_value=_sign_test(own, clusters),
        worst=worst,
        best=best,
        positions=_positions(judged, scored) if own else None,
        against_itself=statistics.rate(judged.itself) if judged.itself else None,
        longest_wins=statistics.rate(longest, families),
        at_equal_length=length_controlled(_units(own, clusters), _units(lengths, clusters)) if own else None,
        agrees_with_longest=on_decisive([winner(s) for s in scores], longest),
        by_domain=_groups(scores, [q.domain for q in questions], families),
        by_difficulty=_groups(scores, [q.difficulty for q in questions], families),
    )


def families_of(questions: Sequence[Question]) -> list[Hashable] | None:
    """By their field `family`, such as one text asked in several ways; a question without one is alone. None: all are."""
    named = [(question.model_extra or {}).get("family") for question in questions]
    if not any(named):
        return None
    return [("family", str(name)) if name else ("alone", i) for i, name in enumerate(named)]


def _bounds(scores: Sequence[Score], families: Sequence[Hashable] | None) -> tuple[Figure, Figure]:
    """Were all that are unscored lost, and were all won."""
    if families is None:
        own = [score for score in scores if score is not None]
        return statistics.bounds(own, len(scores) - len(own))
    lost, won = ([each if score is None else score for score in scores] for each in (0.0, 1.0))
    return statistics.rate(lost, families), statistics.rate(won, families)


def _sign_test(scores: Sequence[float], families: Sequence[Hashable] | None) -> float:
    means = _units(scores, families)
    return statistics.sign_test(sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means))


def _units(values: Sequence[float], families: Sequence[Hashable] | None) -> list[float]:
    """The values, or each family's mean, in the order in which they begin."""
    if families is None:
        return list(values)
    found: dict[Hashable, list[float]] = defaultdict(list)
    for value, family in zip(values, families, strict=True):
        found[family].append(value)
    return [fmean(members) for members in found.values()]


def _positions(judged: Judged, scored: Sequence[int]) -> Positions:
    first, second = ([side[i] for i in scored] for side in (judged.shown_first, judged.shown_second))
    return positions([s for s in first if s is not None], [s for s in second if s is not None])


def _groups(scores: Sequence[Score], names: Sequence[str], families: Sequence[Hashable] | None) -> dict[str, Group]:
    """By name; none where there is no more than one."""
    rates: dict[str, Figure] = {}
    p_values: dict[str, float] = {}
    for name in sorted(set(names)):
        members = [(score, i) for i, score in enumerate(scores) if names[i] == name and score is not None]
        if members:
            own = [score for score, _ in members]
            clusters = families and [families[i] for _, i in members]
            rates[name], p_values[name] = statistics.rate(own, clusters), _sign_test(own, clusters)
    if len(rates) < 2:
        return {}
    return {name: Group(rates[name], round(p, 4)) for name, p in sorted(statistics.holm(p_values).items())}


def _side(rate: Figure | None) -> int:
    """1 above one half, −1 below, 0 where the interval does not say."""
    if rate is None or rate.ci_low is None or rate.ci_high is None:
        return 0
    return int(rate.ci_low > 0.5) - int(rate.ci_high < 0.5)


def _longer(answer: str, opponent: str) -> float:
    return 0.5 if len(answer) == len(opponent) else float(len(answer) > len(opponent))
