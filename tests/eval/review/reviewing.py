"""A review served on a free port, a browser's tab on its page, and rows and votes to fill it with."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from eval.review import blind, session
from eval.review.server import build_app
from eval.review.session import Review
from tests.serving.page.browser import Tab

HOSTILE = (
    "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\n\n"
    "[click](javascript:document.title='run') [there](http://evil.example/a) ![seen](http://evil.example/p.png) &lt;b&gt;\n\n"
    "```\"><svg onload=document.title='run'>\n</pre></code><script>document.title='run'</script>\n```\n"
    "<iframe srcdoc=\"<script>top.document.title='run'</script>\"></iframe><style>*{display:none}</style>\n\n"
    "say \u202eevil\u202c\u200b \u0007 <http://evil.example/b>\n\n| a | b |\n|---|---|\n| <u>u</u> | `</td>` |\n"
)


def write_answers(path: Path, count: int = 12, **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    """`answers.jsonl`: what each says names it, and is as long as what the other says."""
    rows = [
        {"id": f"q-{i}", "prompt": f"Question {i}?", "model": f"OURS {i}", "base": f"BASE {i}"}
        | {key: make(i) for key, make in more.items()}
        for i in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def make_review(folder: Path, count: int = 12, n: int | None = None, each: int | None = None) -> Review:
    """A review of `count` prompts in `folder`, or the one that is there."""
    answers = folder / "answers.jsonl"
    if not answers.exists():
        write_answers(answers, count)
    return Review(folder / "review", session.read_rows(answers, "base", "answers.jsonl"), "base", n, each)


Decide = Callable[[blind.Item], str]  # `model`, `other`, or a choice that names no side


Rate = Callable[[blind.Item], dict[str, dict[str, int]]]  # by `model` and `other`


def vote_on(review: Review, reviewer: str, decide: Decide, most: int = 10**9, rate: Rate = lambda item: {}) -> int:
    """Votes as someone who knows whose answer is whose; how many."""
    queue = {item.id: item for item in review.queue(reviewer)}
    for done in range(most):
        state = review.state(reviewer)
        if state["item"] is None:
            return done
        item = queue[state["item"]["id"]]
        ratings = {choice(who, item): rated for who, rated in rate(item).items()}
        review.vote(session.line(reviewer, state["seq"], item.id, choice(decide(item), item), ratings, ""))
    return most


def choice(wanted: str, item: blind.Item) -> str:
    if wanted not in ("model", "other"):
        return wanted
    return "left" if (wanted == "model") == item.model_left else "right"


class Serving:
    def __init__(self, review: Review, reviewer: str = "", port: int = 0) -> None:
        config = uvicorn.Config(
            build_app(review, reviewer), port=port, log_level="error", lifespan="off", server_header=False
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()


class ReviewTab(Tab):
    """A tab with storage of its own, on the review's page."""

    READY = "!find('#work').hidden || !find('#name-form').hidden || !find('#done').hidden"

    def key(self, letter: str, repeat: bool = False) -> None:
        """One key, as a keyboard sends it; `repeat`: it is still held down."""
        code = ord(letter.upper())
        down = {"type": "keyDown", "key": letter, "text": letter, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", autoRepeat=repeat, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=letter, windowsVirtualKeyCode=code)

    @property
    def place(self) -> str:
        return str(self.run("find('#place').innerText"))

    def vote(self, letter: str) -> None:
        """Votes, and waits until the next one is shown."""
        before = self.place
        self.key(letter)
        self.wait(f"(find('#place').innerText !== {before!r} || !find('#done').hidden) && !find('#undo').disabled")
