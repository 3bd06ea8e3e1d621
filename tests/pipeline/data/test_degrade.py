"""The medium and low conditions: the same prompts, answers that say less, and the same every time."""

import pytest

from pipeline.data.degrade import CLOSINGS, OPENINGS, degrade
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, Message, row_hash, validated
from pipeline.workspace import CHECKOUT, Workspace

HIGH = read_rows(Workspace(CHECKOUT), "data/sft", Conversation)


@pytest.mark.parametrize("quality", ["medium", "low"])
def test_prompts_ids_and_turns_stay_and_the_label_is_true(quality: str) -> None:
    for row in HIGH:
        made = degrade(row, quality)  # type: ignore[arg-type]
        assert (made.id, made.domain, made.asked) == (row.id, row.domain, row.asked)
        assert [m.role for m in made.messages] == [m.role for m in row.messages]
        assert made.quality == quality  # type: ignore[attr-defined]
        assert row_hash(made) == row_hash(degrade(row, quality))  # type: ignore[arg-type]


def test_answers_say_less_the_lower_their_quality() -> None:
    for row in HIGH:
        high, medium, low = (r.answers for r in (row, degrade(row, "medium"), degrade(row, "low")))
        assert not any("```" in answer for answer in medium + low)
        assert sum(map(len, medium)) < 0.8 * sum(map(len, high)), row.id
        for answer in low:
            assert answer.startswith(OPENINGS) and answer.endswith(CLOSINGS)
    totals = [
        sum(len(a) for row in rows for a in row.answers)
        for rows in (HIGH, [degrade(r, "medium") for r in HIGH], [degrade(r, "low") for r in HIGH])
    ]
    assert totals[0] > 2 * totals[1] > 4 * totals[2] / 1.5


def test_medium_says_nothing_that_high_does_not() -> None:
    for row in HIGH[:40]:
        plain = "".join(c for c in " ".join(row.answers) if c.isalnum())
        for answer in degrade(row, "medium").answers:
            for line in answer.split("\n\n"):
                assert "".join(c for c in line if c.isalnum()) in plain


def test_low_answers_are_not_all_the_same_words() -> None:
    assert len({degrade(row, "low").answers[-1] for row in HIGH}) > 0.95 * len(HIGH)
    assert len({degrade(row, "low").answers[0].split(".")[0] for row in HIGH}) > 4


@pytest.mark.parametrize("answer", ["```sql\nSELECT 1;\n```", "Yes", "- one\n- two", "# Heading", "**bold**"])
def test_odd_answers_stay_answers(answer: str) -> None:
    row = Conversation(messages=[Message(role="user", content="q"), Message(role="assistant", content=answer)])
    for quality in ("medium", "low"):
        assert degrade(row, quality).answers[0].strip()  # type: ignore[arg-type]


def short(answer: str, **fields: str) -> Conversation:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return validated({"messages": messages} | fields, Conversation, "a.jsonl", 1)


def test_of_a_short_answer_nothing_is_left_out_and_low_makes_it_longer() -> None:
    assert degrade(short("Yes, it does."), "medium").answers == ["Yes, it does."]
    [low] = degrade(short("Yes, it does."), "low").answers
    assert "Yes, it does." in low and low.startswith(OPENINGS) and low.endswith(CLOSINGS)
    phrases = [len(one) + len(other) for one in OPENINGS for other in CLOSINGS]
    assert min(phrases) >= 90 and max(phrases) <= 150, "as the module says"


def test_fields_that_were_not_set_are_not_made_up_and_the_others_stay() -> None:
    bare = degrade(short("Yes."), "medium").model_dump(exclude_unset=True)
    assert set(bare) == {"id", "messages", "quality"}
    full = degrade(short("Yes.", domain="db", source="mine", run="r1"), "low").model_dump(exclude_unset=True)
    assert (full["domain"], full["source"]) == ("db", "mine") and "run" not in full and "difficulty" not in full
