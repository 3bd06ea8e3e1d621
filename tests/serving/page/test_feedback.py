"""The feedback file: whole lines whatever happens, wrong ones refused by name, torn ones passed over aloud."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.workspace import CHECKOUT
from serving.page import feedback
from serving.page.feedback import Feedback, Invalid

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a lock?"}]
TOLD = {"messages": ASKED, "answer": "A thing.", "rating": "down", "text": "Says nothing."}


def told(**changes: Any) -> Feedback:
    return feedback.request(json.dumps(TOLD | changes).encode())


def kept(path: Path) -> list[Feedback | Invalid]:
    return [one for _, one in feedback.read(path)]


def in_another_process(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    start = (
        "import json, os, sys; from pathlib import Path\nfrom serving.page import feedback\npath = Path(sys.argv[1])\n"
    )
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, arguments)], cwd=CHECKOUT)


def test_what_was_told_is_read_again_with_time_model_and_contract(tmp_path: Path) -> None:
    path = tmp_path / "EXP-1" / "feedback.jsonl"
    first = feedback.append(path, told(), "tiny-merged", "c0ffee")
    feedback.append(path, told(rating="up", text=None, model="tiny-sft", completion_id="chatcmpl-1"), "tiny-merged", "")
    one, two = kept(path)
    assert isinstance(one, Feedback) and isinstance(two, Feedback)
    assert (one.messages, one.answer, one.rating, one.text) == (tuple(ASKED), "A thing.", "down", "Says nothing.")
    assert (one.id, one.model, one.contract) == (first, "tiny-merged", "c0ffee") and one.time.endswith("+00:00")
    assert (two.model, two.completion_id, two.text, two.contract) == ("tiny-sft", "chatcmpl-1", "", "")
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rating": "sideways"}, "rating"),
        ({"rating": None}, "rating"),
        ({"rating": 1}, "rating"),
        ({"answer": " \n"}, "answer"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "What?"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": ASKED * 501}, "messages"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages.0.content"),
        ({"messages": [ASKED[1], ASKED[1]]}, "messages"),
        ({"messages": [ASKED[1], *ASKED]}, "messages"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": "x"}, ASKED[1]]}, "messages"),
        ({"text": "x" * 20_001}, "text"),
        ({"model": "x" * 201}, "model"),
        ({"better": {}}, "better"),
        ({"stars": 5}, "stars"),
        ({"contract": "c0ffee"}, "contract"),
        ({"id": "fb-1"}, "id"),
        ({"time": "2026-01-01"}, "time"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(Invalid) as fault:
        told(**changes)
    assert fault.value.part == part and str(fault.value).startswith(f"{part}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_what_is_no_object_of_json_is_refused(body: bytes) -> None:
    with pytest.raises(Invalid):
        feedback.request(body)


def test_a_conversation_of_several_turns_is_taken() -> None:
    turns = [*ASKED, {"role": "assistant", "content": "A mutex."}, {"role": "user", "content": "And?"}]
    assert [told(messages=m).messages for m in (turns, turns[1:])] == [tuple(turns), tuple(turns[1:])]


def test_the_id_of_a_completion_may_stand_for_its_prompt() -> None:
    assert told(messages=None, completion_id="chatcmpl-1").messages == ()


def test_half_a_character_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="surrogate"):
        feedback.append(tmp_path / "f.jsonl", told(answer="\ud83d"), "m", "")
    assert not (tmp_path / "f.jsonl").exists()


def test_a_line_break_of_any_script_stays_within_its_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\r\nfour\x0b"
    feedback.append(tmp_path / "f.jsonl", told(text=text), "m", "")
    assert [one.text for one in kept(tmp_path / "f.jsonl") if isinstance(one, Feedback)] == [text]


def test_two_writers_at_once_leave_every_line_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    code = """
for number in range(60):
    answer = f"{sys.argv[2]}-{number}-" + "x" * (number * 700)
    body = {"messages": [{"role": "user", "content": "?"}], "answer": answer, "rating": "up"}
    feedback.append(path, feedback.request(json.dumps(body).encode()), "m", "")
"""
    writers = [in_another_process(code, path, name) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    answers = [one.answer for one in kept(path) if isinstance(one, Feedback)]
    expected = {f"{name}-{number}-" + "x" * (number * 700) for name in "ab" for number in range(60)}
    assert len(answers) == 120 and set(answers) == expected


def test_a_writer_killed_in_mid_line_costs_nobody_elses_line(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    feedback.append(path, told(answer="first"), "m", "")
    code = """
def killed(file, data, offset):
    real(file, data[: len(data) // 2], offset)
    os.kill(os.getpid(), 9)
real, os.pwrite = os.pwrite, killed
feedback.append(path, feedback.Feedback("torn", "up"), "m", "")
"""
    assert in_another_process(code, path).wait(timeout=60) == -9
    assert not path.read_bytes().endswith(b"\n"), "the fault is planted"
    feedback.append(path, told(answer="third"), "m", "")
    first, torn, third = kept(path)
    assert isinstance(first, Feedback) and isinstance(third, Feedback)
    assert (first.answer, third.answer) == ("first", "third")
    assert isinstance(torn, Invalid) and "not whole" in str(torn)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    feedback.append(path, told(answer="first"), "m", "")
    before = path.read_bytes()
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50,) * 2)
try:
    feedback.append(path, feedback.Feedback("x" * 5000, "up"), "m", "")
except OSError as error:
    sys.exit(7)
"""
    assert in_another_process(code, path).wait(timeout=60) == 7
    assert path.read_bytes() == before


def test_the_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.jsonl"
    feedback.append(path, told(), "m", "")
    monkeypatch.setattr(feedback, "MAX_FILE", os.stat(path).st_size + 10)
    with pytest.raises(OSError, match="full"):
        feedback.append(path, told(), "m", "")
    assert len(kept(path)) == 1


def test_a_line_that_a_person_broke_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    feedback.append(path, told(), "m", "")
    with path.open("a") as out:
        out.write('\n{"rating": "up"}\n[1]\n')
    feedback.append(path, told(), "m", "")
    lines = list(feedback.read(path))
    assert [number for number, _ in lines] == [1, 3, 4, 5]
    assert [isinstance(one, Invalid) for _, one in lines] == [False, True, True, False]
