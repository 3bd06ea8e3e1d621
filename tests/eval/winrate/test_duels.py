"""Every pair before every judge in both orders, and back into scores of the right side."""

from collections.abc import Sequence

import pytest

from eval.judges.judge import ByScore, Duel, Spent, Verdict
from eval.winrate.duels import ITSELF, ask, forecast, pairs_of
from pipeline.data.rows import Question

QUESTIONS = [Question(id=f"q{i}", prompt=f"{i}?", key_points=["k"], domain="ab"[i % 2]) for i in range(6)]
TEXTS = {"base": ["b" * 2] * 6, "model": ["m" * i for i in range(6)], "sft": ["s" * 3] * 6}


class Biased:
    """A rule of the text alone, and of the place where the texts are equally long."""

    name, limits, order_blind = "biased", "likes the first", False

    def __init__(self, unread: Sequence[str] = ()) -> None:
        self.spent, self.asked, self.unread = Spent(), list[Duel](), unread

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        self.asked = list(duels)
        return [self._verdict(duel) for duel in duels]

    def _verdict(self, duel: Duel) -> Verdict:
        if duel.question.id in self.unread and len(duel.first) >= len(duel.second):
            return Verdict(None, "not read")
        return Verdict(float(len(duel.first) >= len(duel.second)), f"{len(duel.first)} and {len(duel.second)}")

    def forecast(self, duels: Sequence[Duel]) -> str:
        return f"{len(duels)} calls, {sum(len(d.first) + len(d.second) for d in duels)} letters"


def test_each_meets_each_and_the_judged_model_is_named_first() -> None:
    assert pairs_of(["base", "model"]) == [("model", "base")]
    assert pairs_of(["base", "model", "sft"]) == [("model", "base"), ("model", "sft"), ("base", "sft")]


def test_scores_are_of_the_side_that_is_named_whatever_place_it_had() -> None:
    said = ask(Biased(), QUESTIONS, TEXTS)
    judged = said.judged("model", "base")
    assert list(judged.shown_first) == [0, 0, 1, 1, 1, 1]
    assert list(judged.shown_second) == [0, 0, 0, 1, 1, 1]
    assert judged.scores == [0, 0, 0.5, 1, 1, 1]
    assert said.judged("base", "sft").scores == [0.0] * 6


def test_the_base_meets_itself_in_one_order() -> None:
    judge = Biased()
    said = ask(judge, QUESTIONS, TEXTS)
    assert list(said.judged("model", "base").itself) == [1.0] * 6
    assert list(said.judged("model", "sft").itself) == []
    assert len(judge.asked) == 3 * 2 * 6 + 6
    many = [Question(id=f"q{i}", prompt="?", key_points=["k"]) for i in range(90)]
    ask(judge, many, {"base": ["b"] * 90, "model": ["m"] * 90})
    assert 2 * 90 + ITSELF / 2 < len(judge.asked) <= 2 * 90 + ITSELF


def test_rows_say_who_was_shown_where_and_why() -> None:
    rows = list(ask(Biased(unread=["q5"]), QUESTIONS, TEXTS).rows())
    assert len(rows) == 3 * 6 + 6
    assert rows[2] == {
        "id": "q2", "judge": "biased", "model": "model", "against": "base",
        "shown_first": 1.0, "shown_second": 0.0, "score": 0.5, "why": ["2 and 2", "2 and 2"],
    }  # fmt: skip
    assert (rows[5]["shown_first"], rows[5]["shown_second"], rows[5]["score"]) == (None, 1.0, None)
    assert rows[-1]["model"] == rows[-1]["against"] == "base" and rows[-1]["score"] is None


def test_three_are_ranked_by_what_can_be_compared() -> None:
    assert ask(Biased(), QUESTIONS, {name: TEXTS[name] for name in ("base", "model")}).ranking() is None
    ranking = ask(Biased(), QUESTIONS, TEXTS).ranking()
    assert ranking is not None and list(ranking.strengths)[-1] == "base"
    assert ranking.wins["sft", "base"].value > 0.8
    assert {figure.n for figure in ranking.strengths.values()} == {6}
    alone = ByScore("none", "", lambda question, answer: None)
    assert ask(alone, QUESTIONS, TEXTS).ranking() is None


def test_questions_of_one_family_are_one_in_the_ranking() -> None:
    alike = [question.model_copy(update={}) for question in QUESTIONS]
    alike = [Question.model_validate(q.model_dump() | {"family": f"f{i % 3}"}) for i, q in enumerate(alike)]
    ranking = ask(Biased(), alike, TEXTS).ranking()
    assert ranking is not None and {figure.n for figure in ranking.strengths.values()} == {3}


@pytest.mark.parametrize(
    ("names", "duels"), [(["base", "model"], 18), (["base", "model", "sft"], 42)], ids=["two", "three"]
)
def test_forecast_is_of_as_many_duels_as_are_asked(names: list[str], duels: int) -> None:
    judge = Biased()
    assert forecast(judge, QUESTIONS, names, "x" * 10) == f"{duels} calls, {duels * 20} letters"
    ask(judge, QUESTIONS, {name: TEXTS[name] for name in names})
    assert len(judge.asked) == duels
