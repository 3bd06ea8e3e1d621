"""The simplest judge reads the words of the key points, and no more than that, as it says itself."""

import pytest

from eval.judges import key_points
from eval.judges.judge import Duel
from pipeline.data.rows import Question


def question(*key_points: str, must_not: tuple[str, ...] = ()) -> Question:
    return Question(prompt="?", key_points=list(key_points), must_not=list(must_not))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", 0.0),
        ("Something else entirely", 0.0),
        ("UNIQUE index!", (1 + 0) / 2),
        ("A unique constraint", (1 / 2 + 0) / 2),
        ("the index is unique; retry with backoff", (1 + 2 / 3) / 2),
        ("unique index, retry, backoff, jitter", 1.0),
    ],
)
def test_score_is_the_mean_share_of_each_key_points_words(answer: str, expected: float) -> None:
    assert key_points.score(question("A unique index", "retry with backoff and jitter"), answer) == pytest.approx(
        expected
    )


def test_common_words_alone_earn_nothing() -> None:
    assert key_points.score(question("It must be an index"), "It must be the one that is not there") == 0.0


def test_key_point_without_content_words_does_not_count() -> None:
    assert key_points.score(question("It must be", "an index"), "index") == 1.0
    assert key_points.score(question("It must be"), "anything") == 0.0


def test_repeating_a_word_earns_nothing() -> None:
    assert key_points.score(question("unique index"), "index " * 50) == 0.5


@pytest.mark.parametrize("word", ["lower_email", "max-age", "1.5", "x-request-id", "postgresql"])
def test_names_and_numbers_are_words_whatever_stands_around_them(word: str) -> None:
    assert key_points.score(question(word), f"(`{word.upper()}`).") == 1.0


def test_judge_has_the_weaknesses_it_declares() -> None:
    point = question("replication lags", must_not=("replication never lags",))
    assert key_points.score(point, "replication never lags") == key_points.score(point, "replication lags") == 1.0
    assert key_points.score(question("a b2 c3 d4"), "b2 c3 d4 and much more") > key_points.score(
        question("a b2 c3 d4"), "b2"
    )
    assert "not meaning" in key_points.WEAKNESS and "longer" in key_points.WEAKNESS


@pytest.mark.parametrize(("first", "second", "expected"), [("index", "no", 1.0), ("no", "index", 0.0), ("x", "y", 0.5)])
def test_comparison_does_not_depend_on_the_order(first: str, second: str, expected: float) -> None:
    asked, judge = question("unique index"), key_points.judge()
    found = judge.judge([Duel(asked, first, second), Duel(asked, second, first)])
    assert [verdict.score for verdict in found] == [expected, 1 - expected]
    assert judge.order_blind and judge.limits == key_points.WEAKNESS


def test_reference_answers_beat_answers_to_other_questions() -> None:
    """The floor of use: on the shipped questions the judge knows an answer from one to another question."""
    from pipeline.data.read import read_rows
    from pipeline.workspace import CHECKOUT, Workspace

    rows = read_rows(Workspace(CHECKOUT), "data/eval/questions", Question)
    right = [key_points.score(q, q.reference or "") for q in rows]
    wrong = [key_points.score(q, other.reference or "") for q, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert sum(a > b for a, b in zip(right, wrong, strict=True)) == len(rows)
