"""An OpenAI-compatible endpoint that judges by a rule, over a real socket, on nothing but what it is sent.

It finds the two answers by the mark of the request, as a careful reader would, and prefers the one with more MERIT in it. So
an answer that broke out of its place would change what it says.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

MERIT = "idempotent"


def answers_in(messages: list[dict[str, str]]) -> tuple[str, list[str]]:
    """The mark of the request, and what stands between the lines that hold it."""
    user = "\n\n".join(message["content"] for message in messages)
    found = re.search(r"the mark (\w+)", user)
    assert found
    mark = found[1]
    places = [rf"--- {mark} {name} begins ---\n(.*?)\n--- {mark} {name} ends ---" for name in
              ("the first answer", "the second answer")]  # fmt: skip
    return mark, [re.findall(place, user, re.DOTALL)[-1] for place in places]


def by_merit(messages: list[dict[str, str]]) -> tuple[str, str]:
    mark, (first, second) = answers_in(messages)
    merits = first.count(MERIT) - second.count(MERIT)
    return mark, "first" if merits > 0 else "second" if merits < 0 else "tie"


@dataclass
class Server:
    """`structured`: whether it takes a schema. `faults`: what it answers first, (status, content), one a request."""

    structured: bool = True
    cards: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "reader", "object": "model"}])
    faults: list[tuple[int, Any]] = field(default_factory=list)
    refuses: tuple[str, ...] = ()  # parameters
    aside: Callable[[str, list[str]], str] = lambda mark, answers: "One is better."
    always: tuple[int, Any] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.bodies.append(body)
        if self.always or self.faults:
            return self.always or self.faults.pop(0)
        if bad := next((name for name in self.refuses if name in body), None):
            instead = " Use max_completion_tokens." if bad == "max_tokens" else ""
            return 400, {"error": {"message": f"Unsupported parameter: {bad}.{instead}"}}
        if "response_format" in body and not self.structured:
            return 400, {"error": {"message": "response_format is not supported here"}}
        mark, word = by_merit(body["messages"])
        aside = self.aside(mark, answers_in(body["messages"])[1])
        if "response_format" in body:
            return 200, json.dumps({"reason": aside, "verdict": word})
        return 200, f"{aside}\nVERDICT {mark}: {word}"


@contextmanager
def listening(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.keys.append(self.headers.get("Authorization", ""))
            self._send(200, {"object": "list", "data": server.cards})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = server.answer(body)
            if status == 200 and (content is None or isinstance(content, str)):
                finish = "stop"
                if content and content.endswith("<cut>"):
                    content, finish = content.removesuffix("<cut>"), "length"
                message = {"role": "assistant", "content": content}
                content = {
                    "id": "1", "object": "chat.completion", "created": 1, "model": "reader",
                    "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }  # fmt: skip
            self._send(status, content)

        def _send(self, status: int, body: Any) -> None:
            sent = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            if status >= 400:
                self.send_header("x-should-retry", "true" if status >= 429 else "false")
                self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """`start(structured=False)`: a server that listens until the test ends."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(listening(Server(**options)))
