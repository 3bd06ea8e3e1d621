"""`aletheia chat` as people use it: from a pipe, and in a terminal with its keys."""

import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aletheia.chat import visible
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation
from pipeline.workspace import CHECKOUT, Workspace
from tests.serving.page.scripted import TERMINAL, Serving

if TYPE_CHECKING:
    from tests.conftest import Said

KEY = "s3cret"
Pipe = Callable[..., "Said"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("served") / "EXP-2026-01-01-001" / "feedback.jsonl")
    yield serving
    serving.stop()


@pytest.fixture
def pipe(
    aletheia: "Callable[..., Said]", workspace: Workspace, served: Serving, monkeypatch: pytest.MonkeyPatch
) -> Pipe:
    """`pipe("a lock?")`: `echo "a lock?" | aletheia chat`."""

    def run(question: str, *options: str, endpoint: str = "") -> "Said":
        monkeypatch.setattr("sys.stdin", io.StringIO(question))
        return aletheia(workspace, "chat", "--endpoint", endpoint or f"{served.address}v1", *options)

    return run


# ── from a pipe ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_answer_stands_alone_on_stdout_and_all_of_stdin_is_the_question(pipe: Pipe, served: Serving) -> None:
    said = pipe("what is\n  a lock?\n", "--system", "Be brief.")
    assert (said.code, said.out, said.err) == (0, "A lock.\n", "")
    assert served.script.asked[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what is\n  a lock?"},
    ]


def test_without_a_server_one_line_says_how_to_start_one(pipe: Pipe) -> None:
    said = pipe("a lock?", endpoint="http://127.0.0.1:9/v1")
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(r"error: http://127\.0\.0\.1:9/v1: no server answers; try `aletheia serve` .*\n", said.err)


def test_an_address_needs_neither_its_scheme_nor_v1(pipe: Pipe, served: Serving) -> None:
    for endpoint in (served.address, served.address.removeprefix("http://"), f"{served.address[7:]}v1"):
        said = pipe("a lock?", endpoint=endpoint)
        assert (said.code, said.out, said.err) == (0, "A lock.\n", "")


def test_an_address_where_no_api_is_says_which_is_meant(pipe: Pipe, served: Serving) -> None:
    said = pipe("a lock?", endpoint=f"{served.address}api")
    assert (said.code, said.out) == (2, "")
    assert said.err.endswith("shows no models here; try --endpoint http://HOST:PORT/v1\n") and said.err.count("\n") == 1


def test_a_key_that_no_request_can_hold_is_one_line(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", "sch\u00fcssel")
    said = pipe("a lock?")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1) and "error: ALETHEIA_API_KEY: " in said.err


def test_nothing_to_ask_is_an_error(pipe: Pipe, served: Serving) -> None:
    before = len(served.script.asked)
    said = pipe(" \n")
    assert (said.code, said.out) == (2, "") and "no question" in said.err and len(served.script.asked) == before


def test_a_model_that_the_server_has_not_is_named_with_one_that_it_has(pipe: Pipe) -> None:
    said = pipe("a lock?", "--model", "gpt")
    assert (said.code, said.out) == (2, "") and "no model `gpt`; try --model tiny-merged" in said.err


def test_the_key_comes_from_the_environment_and_is_never_shown(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = Serving(tmp_path / "feedback.jsonl", KEY)
    try:
        for key in ("", "wr0ng"):
            monkeypatch.setenv("ALETHEIA_API_KEY", key)
            said = pipe("a lock?", endpoint=f"{locked.address}v1")
            assert said.code == 2 and "does not take this API key; try ALETHEIA_API_KEY=" in said.err
            assert said.err.count("\n") == 1 and "wr0ng" not in said.err
        monkeypatch.setenv("ALETHEIA_API_KEY", KEY)
        said = pipe("a lock?", endpoint=f"{locked.address}v1")
        assert (said.code, said.out, said.err) == (0, "A lock.\n", "")
    finally:
        locked.stop()


@pytest.mark.parametrize(
    ("question", "out", "told"),
    [
        ("error", "", "the queue is full; try again in 2 s"),
        ("breaks", "Half", "generation failed: no memory"),
        ("ends early", "Half", "the connection ended in the middle of the answer"),
    ],
)
def test_an_error_is_one_line_and_what_came_before_it_is_not_lost(
    pipe: Pipe, question: str, out: str, told: str
) -> None:
    said = pipe(question)
    assert (said.code, said.out.strip()) == (2, out) and told in said.err and said.err.count("\n") == 1


def test_a_cut_answer_is_said_to_be_one(pipe: Pipe) -> None:
    said = pipe("cut")
    assert (said.code, said.out) == (0, "A lock.\n") and "cut at the limit" in said.err


def test_a_terminal_obeys_nothing_that_a_model_says(pipe: Pipe) -> None:
    said = pipe("terminal")
    assert said.code == 0
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]", said.out
    )
    assert r"\x1b]0;run\x07\x1b[31mred\x9b1A \u202eevil\u202c" in said.out
    assert said.out.endswith("naïve 你好 👩\u200d💻\n\tend\n")
    assert visible(TERMINAL) + "\n" == said.out


# ── in a terminal ────────────────────────────────────────────────────────────────────────────────────────────────────


class Terminal:
    """`aletheia chat` with a terminal of its own, as a person sees it."""

    def __init__(self, root: Path, *options: str, stdout: int | None = None) -> None:
        self.end, its = pty.openpty()
        termios.tcsetwinsize(its, (24, 500))  # a long line stays one

        def take_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(its, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "aletheia.cli", "chat", *options],
            cwd=CHECKOUT,
            env=os.environ | {"ALETHEIA_ROOT": str(root), "TERM": "dumb"},
            stdin=its,
            stdout=its if stdout is None else stdout,
            stderr=its,
            preexec_fn=take_the_terminal,
        )
        os.close(its)
        self.seen = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """What came up to and with `text`."""
        stop = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.end], [], [], stop - time.monotonic())[0], f"never {text!r} in {self.seen!r}"
            self.seen += os.read(self.end, 4096).decode()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def ask(self, line: str, answer: str) -> str:
        self.type(line + "\n")
        self.until(line)  # its echo
        said = self.until(answer)
        self.until("> ")
        return said


@pytest.fixture
def terminal(served: Serving, workspace: Workspace) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(**options: int) -> Terminal:
        started.append(Terminal(workspace.root, "--endpoint", f"{served.address}v1", **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.end)


def test_a_conversation_its_commands_and_its_keys(
    terminal: Callable[..., Terminal], served: Serving, workspace: Workspace
) -> None:
    person = terminal()
    assert "tiny-merged at http://127.0.0.1" in person.until("> ")
    person.ask("/up", "there is no answer yet to rate")
    person.ask("a lock?", "A lock.")
    person.ask("and now?", "A lock.")
    assert [m["content"] for m in served.script.asked[-1]["messages"]] == ["a lock?", "A lock.", "and now?"]

    served.script.left.clear()
    person.type("long\n")
    person.until("on and on and ")
    person.type("\x03")
    person.until("(stopped)")
    person.until("> ")
    assert served.script.left.wait(10), "the connection is closed, and with it the server's slot freed"
    person.type("\x03")
    person.until("(Ctrl-D leaves)")
    person.until("> ")

    person.ask("/new", "a new conversation")
    person.ask("/system Be brief.", "told that first")
    person.ask("once more", "A lock.")
    assert [m["role"] for m in served.script.asked[-1]["messages"]] == ["system", "user"]
    person.ask("/down Says nothing.", "kept")
    rated = served.kept()[-1]
    assert (rated.rating, rated.text, rated.answer, rated.completion_id) == (
        "down",
        "Says nothing.",
        "A lock.",
        "chatcmpl-7",
    )
    assert [m["content"] for m in rated.messages] == ["Be brief.", "once more"]
    person.ask("breaks", "error: ")
    person.ask("/nonsense", "there is no /nonsense")
    person.ask("/etc/passwd holds what?", "A lock.")

    target = workspace.root / "talk.jsonl"
    person.ask(f"/save {workspace.root}/none/talk.jsonl", "No such file")
    person.ask(f"/save {target}", "saved to")
    person.ask(f"/save {target}", "saved to")
    lines = target.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["messages"][0] == {"role": "system", "content": "Be brief."}
    assert read_rows(workspace, "talk.jsonl", Conversation)[0].answers[0] == "A lock."
    person.type("\x04")
    assert person.process.wait(timeout=20) == 0


def test_where_stdout_is_a_file_it_holds_the_answers_alone(
    terminal: Callable[..., Terminal], workspace: Workspace
) -> None:
    path = workspace.root / "answers.txt"
    with path.open("wb") as out:
        person = terminal(stdout=out.fileno())
    person.until("> ")
    person.type("a lock?\n")
    person.until("> ")
    person.type("\x04")
    assert person.process.wait(timeout=20) == 0 and path.read_text() == "A lock.\n"
