"""Votes on disk: none lost, none counted twice, whoever crashes, resends, undoes or votes in two tabs."""

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from eval.review import session, store
from eval.review.session import Review
from eval.review.store import Line, Stale
from pipeline.workspace import CHECKOUT
from tests.eval.review.reviewing import make_review, vote_on


def next_line(review: Review, reviewer: str = "anna", choice: str = "left") -> Line:
    state = review.state(reviewer)
    return session.line(reviewer, state["seq"], state["item"]["id"], choice, {}, "")


def test_a_vote_sent_twice_counts_once_and_another_tab_is_told(tmp_path: Path) -> None:
    review = make_review(tmp_path)
    first = next_line(review)
    review.vote(first)
    review.vote(replace(first, at=session.now()))  # the answer was lost on its way, and the page sends again
    assert len(review.store.read().lines) == 1
    for other in (
        replace(first, choice="right"),
        replace(first, comment="no"),
        replace(first, seq=1),
        replace(first, seq=9),
    ):
        with pytest.raises(Stale):
            review.vote(other)
    assert [line.choice for line in review.store.read().lines] == ["left"]
    with pytest.raises(Stale):  # not the item that is next
        review.vote(replace(next_line(review), item="0" * 16))


def test_two_people_and_two_tabs_at_once_keep_one_line_each(tmp_path: Path) -> None:
    make_review(tmp_path)

    def person(name: str) -> int:
        return vote_on(make_review(tmp_path), name, lambda item: "model")

    def tab(choice: str) -> bool:
        try:
            make_review(tmp_path).vote(line[choice])
        except Stale:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(person, ["a", "b", "c", "d"])) == [13] * 4
        line = {choice: next_line(make_review(tmp_path), "e", choice) for choice in ("left", "right", "tie", "bad")}
        assert sum(pool.map(tab, line)) == 1
    told = make_review(tmp_path).store.read()
    assert len(told.lines) == 4 * 13 + 1 and not told.torn
    assert all([line.seq for line in told.of(name)] == list(range(13)) for name in "abcd")


def test_undo_is_a_line_that_takes_the_last_vote_back(tmp_path: Path) -> None:
    review = make_review(tmp_path)
    ratings = {"left": {"clarity": 4}}
    first = next_line(review)
    review.vote(first)
    second = next_line(review)
    review.vote(replace(second, choice="bad", ratings=ratings, comment="both wrong"))
    review.undo("anna", 2)
    review.undo("anna", 2)  # sent again
    state = review.state("anna")
    assert state["item"]["id"] == second.item and state["done"] == 1 and state["seq"] == 3
    assert state["undone"] == {"choice": "bad", "ratings": ratings, "comment": "both wrong"}
    review.undo("anna", 3)
    assert review.state("anna")["item"]["id"] == first.item and review.state("anna")["done"] == 0
    with pytest.raises(Stale):
        review.undo("anna", 4)  # nothing stands
    with pytest.raises(Stale):
        review.undo("anna", 1)  # another tab is further
    review.vote(next_line(review, choice="right"))
    told = review.store.read()
    assert [line.choice for line in told.lines] == ["left", "bad", "undo", "undo", "right"]
    assert [line.choice for line in store.standing(told.lines).values()] == ["right"]
    assert review.tally().votes[0].line.choice == "right" and len(review.tally().votes) == 1
    assert review.state("anna")["undone"] is None


def test_whatever_of_the_last_line_a_crash_left_the_others_stand_and_the_next_is_kept(tmp_path: Path) -> None:
    review = make_review(tmp_path)
    vote_on(review, "anna", lambda item: "tie", most=3)
    path = review.store.path
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in (start, start + 1, start + 40, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        told = review.store.read()
        kept = 3 if end == len(whole) - 1 else 2  # there is all of it but the line's end
        assert len(told.lines) == kept and told.torn == ([4] if start < end < len(whole) - 1 else [])
        vote_on(review, "anna", lambda item: "tie", most=3 - kept + 1)
        assert [line.seq for line in review.store.read().lines] == [0, 1, 2, 3]
        assert review.store.read().torn == told.torn


@pytest.mark.parametrize("line", ["[]", "null", "{}", '{"seq": "0"}', '"x"', "\x00", "[" * 100_000], ids=range(7))
def test_a_line_that_nobody_wrote_is_passed_over_and_told(tmp_path: Path, line: str) -> None:
    review = make_review(tmp_path)
    vote_on(review, "anna", lambda item: "tie", most=2)
    with review.store.path.open("a") as out:
        out.write(line + "\n")
    vote_on(review, "anna", lambda item: "tie", most=1)
    told = review.store.read()
    assert told.torn == [4] and [line.seq for line in told.lines] == [0, 1, 2]


def test_a_full_disk_keeps_nothing_of_the_vote_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    review = make_review(tmp_path)
    vote_on(review, "anna", lambda item: "tie", most=2)
    before = review.store.path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            review.vote(next_line(review))
    assert review.store.path.read_bytes() == before
    review.vote(next_line(review))


VOTER = """
import sys
from pathlib import Path
from eval.review import session
folder = Path(sys.argv[1])
review = session.Review(folder / "review", session.read_rows(folder / "answers.jsonl", "base", ""), "base")
while True:
    state = review.state("anna")
    review.vote(session.line("anna", state["seq"], state["item"]["id"], "left", {}, ""))
    print(state["seq"] + 1, flush=True)
"""


def test_a_process_killed_at_any_moment_has_kept_all_that_it_acknowledged(tmp_path: Path) -> None:
    make_review(tmp_path, 100)
    with subprocess.Popen(
        [sys.executable, "-c", VOTER, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().splitlines()]
    review = make_review(tmp_path, 100)
    told = review.store.read()
    assert acknowledged[-1] <= len(told.lines) <= acknowledged[-1] + 1
    vote_on(review, "anna", lambda item: "left", most=1)
    assert len(review.store.read().lines) == len(told.lines) + 1


def test_no_line_of_the_file_names_a_contestant_but_the_plan(tmp_path: Path) -> None:
    review = make_review(tmp_path)
    vote_on(review, "anna", lambda item: "model")
    lines = review.store.path.read_text().splitlines()
    assert json.loads(lines[0])["against"] == "base"
    assert not any(word in line for line in lines[1:] for word in ("model", "base", "OURS", "BASE", "q-"))
