"""What every judge has in common: it is shown two answers to one question, and says which is better, or neither.

    verdicts = judge.judge([Duel(question, first, second), …])

A judge says beside its name what it cannot tell. A verdict that could not be had is `unscored`: no loss, no tie, and not
left out (`eval/winrate/` gives the bounds). Whoever asks, asks in both orders, for many a judge likes what it reads first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.data.rows import Question

FIRST, SECOND, TIE = "first", "second", "tie"  # the verdicts that are offered
SCORES = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}  # of the side shown first
Score = float | None  # None: unscored


def winner(score: Score) -> Score:
    """1, ½ or 0 of a mean over both orders: what wins once and ties once has won."""
    return None if score is None else 0.5 if score == 0.5 else float(score > 0.5)


@dataclass(frozen=True)
class Duel:
    question: Question
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """`score` of the side shown first: 1, ½, 0, or None. `why` in a few words, of an unscored one what went wrong."""

    score: Score
    why: str = ""


@dataclass
class Spent:
    """What asking took. `cost` is None where no price is known; `kept`: verdicts taken from earlier runs, for nothing."""

    calls: int = 0
    kept: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None


class Judge(Protocol):
    name: str
    limits: str  # what it cannot tell: said wherever its rate is
    order_blind: bool  # scores each answer alone, so the order cannot matter
    spent: Spent

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict to each duel, in their order."""

    def forecast(self, duels: Sequence[Duel]) -> str:
        """What so many of that length will take; nothing to say: empty."""


@dataclass
class ByScore:
    """A judge that gives each answer a number by itself; the larger wins, by more than `margin`."""

    name: str
    limits: str
    score: Callable[[Question, str], float | None]
    margin: float = 1e-9  # no more than rounding
    order_blind: bool = True
    spent: Spent = field(default_factory=Spent)

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        return [self._verdict(self.score(d.question, d.first), self.score(d.question, d.second)) for d in duels]

    def _verdict(self, first: float | None, second: float | None) -> Verdict:
        if first is None or second is None:
            return Verdict(None, "an answer has no score")
        score = 0.5 if abs(first - second) <= self.margin else float(first > second)
        return Verdict(score, f"{first:.3g} against {second:.3g}")

    def forecast(self, duels: Sequence[Duel]) -> str:
        return ""
