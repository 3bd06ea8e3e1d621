"""`aletheia data feedback`: which ratings make pairs, which do not and why, and that none is written twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.data.read import read_rows
from pipeline.data.rows import PreferencePair
from pipeline.workspace import Workspace
from serving.page import feedback
from serving.page.feedback import NAME

if TYPE_CHECKING:
    from tests.conftest import Said

RECORD, OTHER = "EXP-2026-01-01-001", "EXP-2026-01-02-001"
TARGET = "data/dpo/feedback.jsonl"
Rate = Callable[..., str]
Make = Callable[..., "Said"]


@pytest.fixture
def rate(workspace: Workspace) -> Rate:
    """`rate("What?", "An answer.", "down", better="…")`: kept as the server keeps it; returns its id."""

    def keep(question: str, answer: str, rating: str, record: str = RECORD, **more: Any) -> str:
        values = {"messages": [{"role": "user", "content": question}], "answer": answer, "rating": rating} | more
        told = feedback.request(json.dumps(values).encode())
        return feedback.append(workspace.experiments / record / NAME, told, f"model-of-{record[-6:-4]}", "c0ffee")

    return keep


@pytest.fixture
def make(aletheia: "Callable[..., Said]", workspace: Workspace) -> Make:
    def run(*arguments: str, to: str = TARGET) -> "Said":
        return aletheia(workspace, "data", "feedback", *arguments, "--to", str(workspace.root / to))

    return run


def pairs(workspace: Workspace, name: str = TARGET) -> list[tuple[str, str, str]]:
    rows = read_rows(workspace, name, PreferencePair)
    return [(row.prompt[-1].content, row.chosen[0].content, row.rejected[0].content) for row in rows]


def test_up_over_down_of_one_prompt_and_a_correction_over_what_it_corrects(
    rate: Rate, make: Make, workspace: Workspace
) -> None:
    ids = [
        rate("Lock?", "Good.", "up", text="Short."),
        rate("Lock?", "Bad.", "down", OTHER, text="Wrong."),
        rate("Latch?", "Poor.", "down", better="Rich."),
        rate("Fence?", "Fine.", "up"),
        rate("Gate?", "No.", "down"),
        rate("Door?", "No.", "down"),
    ]
    said = make()
    assert (said.code, said.out) == (0, f"{TARGET}\n")
    assert pairs(workspace) == [("Lock?", "Good.", "Bad."), ("Latch?", "Rich.", "Poor.")]
    first, second = map(json.loads, (workspace.root / TARGET).read_text().splitlines())
    assert first["records"] == [RECORD, OTHER] and first["feedback"] == ids[:2]
    assert first["comments"] == ["Short.", "Wrong."] and first["models"] == ["model-of-01", "model-of-02"]
    assert second["records"] == [RECORD] and second["feedback"] == ids[2:3] and second["contracts"] == ["c0ffee"]
    assert second["id"].startswith("feedback-") and second["domain"] == "feedback"
    assert "6 ratings: 2 pairs written" in said.err
    assert "no pair from 1 rating: no other answer to its prompt was rated down" in said.err
    assert "no pair from 2 ratings: no other answer to its prompt was rated up" in said.err
    assert f"aletheia data check {TARGET}" in said.err


def test_they_pass_the_gate(rate: Rate, make: Make, workspace: Workspace, aletheia: "Callable[..., Said]") -> None:
    talk = [("system", "Be brief."), ("user", "Lock?"), ("assistant", "A thing."), ("user", "What thing?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    rate("", "One that keeps others out.", "up", messages=messages)
    rate("", "I do not know what you mean by that.", "down", messages=messages)
    assert make().code == 0
    assert aletheia(workspace, "data", "check", TARGET).code == 0
    assert [m.role for m in read_rows(workspace, TARGET, PreferencePair)[0].prompt] == [role for role, _ in talk]


def test_a_prompt_weighs_by_its_answers_and_not_by_their_square(rate: Rate, make: Make, workspace: Workspace) -> None:
    for number in range(4):
        rate("Lock?", f"Good {number}.", "up")
    for number in range(3):
        rate("Lock?", f"Bad {number}.", "down")
    make()
    found = pairs(workspace)
    assert len(found) == 4
    assert {chosen for _, chosen, _ in found} == {f"Good {n}." for n in range(4)}
    assert {rejected for _, _, rejected in found} == {f"Bad {n}." for n in range(3)}


def test_an_answer_rated_up_and_down_makes_no_pair_and_is_named(rate: Rate, make: Make, workspace: Workspace) -> None:
    rate("Lock?", "Disputed.", "up")
    rate("Lock?", " Disputed.\n", "down")
    rate("Lock?", "Bad.", "down")
    rate("Latch?", "Poor.", "down", better="Rich.")
    said = make()
    assert pairs(workspace) == [("Latch?", "Rich.", "Poor.")]
    assert f"rated up and down: experiments/{RECORD}/{NAME}:1 and experiments/{RECORD}/{NAME}:2" in said.err
    assert "no pair from 2 ratings: one answer was rated up and down" in said.err


def test_the_last_word_on_a_completion_counts(rate: Rate, make: Make, workspace: Workspace) -> None:
    rate("Lock?", "An answer.", "up", completion_id="c1")
    rate("Lock?", "An answer.", "down", completion_id="c1", text="On second thoughts.")
    rate("Lock?", "Another.", "up", completion_id="c2")
    said = make()
    assert pairs(workspace) == [("Lock?", "Another.", "An answer.")]
    assert "rated up and down" not in said.err and "no pair from 1 rating: it was rated again" in said.err


def test_a_completions_id_finds_its_prompt_and_one_that_nothing_tells_is_counted(
    rate: Rate, make: Make, workspace: Workspace
) -> None:
    rate("Lock?", "An answer.", "up", completion_id="c1")
    rate("", "An answer.", "down", completion_id="c1", messages=None, better="A better one.")
    rate("", "Lost.", "down", completion_id="c9", messages=None)
    said = make()
    assert pairs(workspace) == [("Lock?", "A better one.", "An answer.")]
    assert "no pair from 1 rating: nothing tells its prompt" in said.err


def test_an_id_that_stands_beside_two_prompts_tells_neither(rate: Rate, make: Make, workspace: Workspace) -> None:
    rate("Lock?", "An answer.", "up", completion_id="c1")
    rate("Latch?", "An answer.", "up", completion_id="c1")
    rate("", "Bad.", "down", completion_id="c1", messages=None, better="Good.")
    rate("Gate?", "Poor.", "down", completion_id="c1", better="Rich.")
    said = make()
    assert pairs(workspace) == [("Gate?", "Rich.", "Poor.")]
    assert f"{NAME}:3: `c1` is the completion of several prompts" in said.err
    assert "no pair from 1 rating: its completion_id stands beside several prompts" in said.err


def test_what_makes_no_right_row_is_named(rate: Rate, make: Make, workspace: Workspace) -> None:
    rate("Lock?", "Same.", "down", better=" Same. ")
    twice = feedback.Feedback("An answer.", "down", ({"role": "user", "content": "a"},) * 2, better="Another.")
    feedback.append(workspace.experiments / RECORD / NAME, twice, "m", "")  # as before a server refused it
    rate("Latch?", "Poor.", "down", better="Rich.")
    said = make()
    assert pairs(workspace) == [("Latch?", "Rich.", "Poor.")]
    assert f"{NAME}:1: chosen and rejected are the same text" in said.err and f"{NAME}:2: " in said.err
    assert "no pair from 2 ratings: it makes no right row" in said.err


def test_a_torn_line_is_passed_over_aloud(rate: Rate, make: Make, workspace: Workspace) -> None:
    path = workspace.experiments / RECORD / NAME
    rate("Lock?", "Poor.", "down", better="Rich.")
    path.write_bytes(path.read_bytes() + path.read_bytes()[:40])
    said = make()
    assert said.code == 0 and len(pairs(workspace)) == 1
    assert f"passed over: experiments/{RECORD}/{NAME}:2: is not whole JSON" in said.err


def test_a_file_that_is_there_is_refused_or_added_to_and_nothing_stands_twice(
    rate: Rate, make: Make, workspace: Workspace
) -> None:
    rate("Lock?", "Poor.", "down", better="Rich.")
    assert make().code == 0
    path = workspace.root / TARGET
    path.write_text(path.read_text().rstrip("\n"))  # an editor left the last line open
    before = path.read_text()
    refused = make()
    assert refused.code == 2 and "is there already; try --add" in refused.err and path.read_text() == before
    rate("Latch?", "Poor.", "down", better="Rich.")
    added = make("--add")
    assert added.code == 0 and "1 pair written, 1 stood there already" in added.err
    assert pairs(workspace) == [("Lock?", "Rich.", "Poor."), ("Latch?", "Rich.", "Poor.")]
    assert make("--add").code == 0 and len(pairs(workspace)) == 2


def test_what_is_read_can_be_chosen(rate: Rate, make: Make, workspace: Workspace, tmp_path: Path) -> None:
    rate("Lock?", "Poor.", "down", better="Rich.")
    rate("Latch?", "Poor.", "down", OTHER, better="Rich.")
    assert make(OTHER, to="one.jsonl").code == 0 and pairs(workspace, "one.jsonl")[0][0] == "Latch?"
    copy = tmp_path / "mine.jsonl"
    copy.write_bytes((workspace.experiments / RECORD / NAME).read_bytes())
    assert make(str(copy), to="two.jsonl").code == 0
    [row] = map(json.loads, (workspace.root / "two.jsonl").read_text().splitlines())
    assert "records" not in row and len(row["feedback"]) == 1
    assert make("EXP-2026-09-09-009", to="three.jsonl").code == 2


def test_without_a_pair_there_is_no_file(rate: Rate, make: Make, workspace: Workspace) -> None:
    nothing = make()
    assert nothing.code == 2 and "no record holds feedback yet" in nothing.err
    rate("Lock?", "Fine.", "up")
    said = make()
    assert (said.code, said.out) == (2, "") and "1 rating, and none gives a pair" in said.err
    assert not (workspace.root / TARGET).exists()
    assert make(to="data/dpo/feedback.txt").code == 2
