"""`aletheia review`: the plan in the record before the first vote, nothing told before it opens, then the result."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from eval.review import blind, session
from eval.review.session import Review
from pipeline.records.file import RecordFile
from pipeline.records.schema import Criterion, Facts, Verdict
from pipeline.workspace import Workspace
from tests.eval.review.reviewing import vote_on, write_answers

if TYPE_CHECKING:
    from tests.conftest import Said
    from tests.forked import Forked

    Aletheia = Callable[..., Said]

EXP = "EXP-2026-01-01-001"
PERSON = b"# mine\n experiment_id:   EXP-2026-01-01-001   # odd, and mine\n".replace(b"\n e", b"\ne")


@pytest.fixture
def record(workspace: Workspace) -> RecordFile:
    """An evaluation as it leaves one: answers of 20 prompts, all scored, and a criterion that only people can judge."""
    workspace.experiments.mkdir(exist_ok=True)
    file = RecordFile(workspace.experiments / f"{EXP}.yaml")
    file.path.write_bytes(PERSON)
    results = {"model": "tiny-merged", "against": "tiny", "win_rate": {"value": 0.75, "n": 20, "judge": "key points"}}
    criteria = [Criterion(criterion="human_review.share_of_wins > 0.5"), Criterion(criterion="win_rate > 0.5")]
    verdict = Verdict(frozen_at="2026-01-01T00:00:00Z", criteria=criteria)
    file.write(Facts(status="complete", stage="eval", profile_used="small", results=results, verdict=verdict))
    write_answers(file.folder / "answers.jsonl", 20, score=lambda i: float(i % 4 > 0), sft=lambda i: f"SFT {i}")
    return file


def review_of(record: RecordFile, against: str = "base", n: int | None = None) -> Review:
    rows = session.read_rows(record.folder / "answers.jsonl", against, "answers.jsonl")
    return Review(record.folder / "review" / against, rows, against, n)


def facts(record: RecordFile) -> Facts:
    found = record.facts()
    assert found
    return found


def test_a_review_from_its_first_page_to_its_end(
    workspace: Workspace, record: RecordFile, command: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = command("review", EXP, "--port", "0", "--n", "10", "--reviewer", "Anna")
    assert process.stdout and process.stderr
    address = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    noted = facts(record).data["human_review"]["base"]
    assert noted["planned"] == 10 and noted["commitment"] == blind.commitment(
        (record.folder / "review/base/key").read_bytes()
    )
    assert httpx.get(f"{address}api/review").json()["reviewer"] == "anna"
    state = httpx.post(f"{address}api/next", json={"reviewer": "anna"}).json()
    vote = {"reviewer": "anna", "seq": 0, "item": state["item"]["id"], "choice": "left"}
    assert httpx.post(f"{address}api/vote", json=vote).json()["done"] == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "" and "Traceback" not in err
    assert "10 prompts of 20; to show a difference at the end one side must win 10 of 10" in err
    assert err.rstrip().endswith("1 of 10 prompts are judged, and it may not be opened yet")


def address_of(process: "Forked") -> str:
    while not (said := (process.said / "out").read_text()).endswith("\n"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return said.strip()


def test_a_review_begun_anew_does_not_hide_the_one_before(
    workspace: Workspace, record: RecordFile, aletheia: "Aletheia", forked: Callable[..., "Forked"]
) -> None:
    commitments = []
    for _ in range(3):
        process = forked("review", EXP, "--port", "0", "--n", "8")
        assert httpx.get(address_of(process)).status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(30)
        assert process.returncode == 0
        commitments.append(facts(record).data["human_review"]["base"]["commitment"])
        if len(commitments) == 1:
            vote_on(review_of(record), "anna", lambda item: "model")
            assert aletheia(workspace, "review", EXP, "--result").code == 0
        if len(commitments) < 3:
            shutil.rmtree(record.folder / "review")
    plan = facts(record).data["human_review"]["base"]
    assert len(set(commitments)) == 3 and "opened" not in plan
    assert [one["commitment"] for one in plan["abandoned"]] == commitments[:2]
    assert plan["abandoned"][0]["opened"][0]["decided"] == 8


@pytest.mark.parametrize("against", ["id", "prompt", "model", "score", "../base"])
def test_who_gave_no_answers_is_not_reviewed(
    workspace: Workspace, record: RecordFile, aletheia: "Aletheia", against: str
) -> None:
    said = aletheia(workspace, "review", EXP, "--against", against, "--port", "0")
    assert said.code == 2 and f"holds no answers of `{against}` beside the model's; try base, sft" in said.err
    assert not (record.folder / "review").exists()


def test_until_it_opens_the_command_tells_nothing(
    workspace: Workspace, record: RecordFile, aletheia: "Aletheia"
) -> None:
    said = aletheia(workspace, "review", EXP, "--result")
    assert said.code == 2 and f"nobody has reviewed it; try aletheia review {EXP}" in said.err
    review = review_of(record)
    vote_on(review, "anna", lambda item: "model", most=5)
    before = record.path.read_bytes()
    for options in ((), ("--json",)):
        said = aletheia(workspace, "review", EXP, "--result", *options)
        assert said.code == 2 and said.out == "" and record.path.read_bytes() == before
        assert re.search(r"\d of 20 prompts are judged, and it may not be opened yet; try waiting", said.err)
        assert not re.search(r"win|tiny|model|better|share", said.err.replace(EXP, ""))
    assert aletheia(workspace, "review", EXP, "--json").code == 2
    assert aletheia(workspace, "review", EXP, "--open-early").code == 2


def test_an_early_look_is_possible_and_stands_in_the_record_for_ever(
    workspace: Workspace, record: RecordFile, aletheia: "Aletheia"
) -> None:
    review = review_of(record)
    assert "holds no vote yet" in aletheia(workspace, "review", EXP, "--result", "--open-early").err
    vote_on(review, "anna", lambda item: "model", most=5)
    decided = len(review.tally().verdicts)
    said = aletheia(workspace, "review", EXP, "--result", "--open-early")
    assert said.code == 0 and "before its plan allowed" in said.out
    (look,) = facts(record).data["human_review"]["base"]["opened"]
    assert look["early"] is True and look["decided"] == decided
    assert facts(record).results["human_review"]["share_of_wins"]["ci_low"] < 0.5
    assert "votes_after_opening" not in facts(record).results["human_review"]
    vote_on(review, "anna", lambda item: "model")
    assert aletheia(workspace, "review", EXP, "--result").code == 0
    looks = facts(record).data["human_review"]["base"]["opened"]
    assert [one.get("early") for one in looks] == [True, None]
    after = facts(record).results["human_review"]
    assert after["early_looks"] == 1 and after["votes_after_opening"] == len(review.store.read().lines) - 5


def test_the_result_is_printed_and_stands_below_the_line_while_all_above_stays(
    workspace: Workspace, record: RecordFile, aletheia: "Aletheia"
) -> None:
    review = review_of(record)

    def rate(item: blind.Item) -> dict[str, dict[str, int]]:
        return {"model": {"clarity": 5 - int(item.prompt[-1]) % 2}, "other": {"clarity": 2}}

    for name in ("anna", "bob"):
        vote_on(review, name, lambda item: "other" if item.prompt in ("q-3", "q-4") else "model", rate=rate)
    said = aletheia(workspace, "review", EXP, "--result")
    assert said.code == 0 and said.err == ""
    for words in (
        "tiny-merged against tiny, as people see it", "18 for tiny-merged, 2 for tiny, 0 ties", "0.900 [", ": better",
        "at the planned number of prompts", "clarity", "judge key points", "2, 40 votes", "left side",
    ):  # fmt: skip
        assert words in said.out
    assert not re.search("anna|bob", said.out + record.path.read_text())
    found = facts(record)
    stands = found.results["human_review"]
    assert stands["wins"] == 18 and stands["self_consistency"]["value"] == 1.0 and stands["agreement"]["value"] == 1.0
    assert stands["judges"]["key-points"]["with_people"]["same"]["n"] == 20
    assert found.verdict and [one.finding for one in found.verdict.judged] == ["supported", "inconclusive"]
    assert found.results["win_rate"]["value"] == 0.75 and found.status == "complete"
    assert record.path.read_bytes().startswith(PERSON) and record.read().edited is None and record.read().sealed
    checked = json.loads(aletheia(workspace, "exp", "verify", EXP, "--json").out)
    assert checked["counts"].get("FAILED", 0) == 0
    assert "human_review.share_of_wins" in aletheia(workspace, "exp", "show", EXP).out
    assert json.loads(aletheia(workspace, "review", EXP, "--result", "--json").out)["wins"] == 18


def test_another_pair_has_a_review_of_its_own(workspace: Workspace, record: RecordFile, aletheia: "Aletheia") -> None:
    vote_on(review_of(record, "sft", 8), "anna", lambda item: "model")
    said = aletheia(workspace, "review", EXP, "--against", "sft", "--result")
    assert said.code == 0 and "tiny-merged against sft" in said.out and "8 for tiny-merged, 0 for sft" in said.out
    found = facts(record)
    assert found.results["others"]["sft"]["human_review"]["wins"] == 8 and "human_review" not in found.results
    assert aletheia(workspace, "review", EXP, "--result").code == 2, "of this pair nothing was voted"


def test_what_cannot_be_reviewed_is_one_line(workspace: Workspace, record: RecordFile, aletheia: "Aletheia") -> None:
    def error(*words: str) -> str:
        said = aletheia(workspace, "review", *words, "--port", "0")
        assert said.code == 2 and said.out == "" and said.err.count("\n") == 1
        return said.err

    assert "there is no record `EXP-2026-01-01-009`" in error("EXP-2026-01-01-009")
    assert "holds no answers of `dpo` beside the model's; try base, sft" in error(EXP, "--against", "dpo")
    assert "a name has 1 to 60 visible characters" in error(EXP, "--reviewer", "x" * 61)
    assert "there are 20 prompts, not 21" in error(EXP, "--n", "21")
    (record.folder / "answers.jsonl").unlink()
    assert "has no answers.jsonl beside it" in error(EXP)
    assert not (record.folder / "review" / "dpo").exists()


def test_a_torn_line_is_told(workspace: Workspace, record: RecordFile, aletheia: "Aletheia", tmp_path: Path) -> None:
    review = review_of(record)
    vote_on(review, "anna", lambda item: "tie", most=3)
    with review.store.path.open("a") as out:
        out.write('{"at": "20')
    vote_on(review, "anna", lambda item: "tie")
    assert "torn by a crash, which nobody was told are kept: 5" in aletheia(workspace, "review", EXP, "--result").err
