"""The end of service, and of a client that sends no whole request: what runs is answered, and nothing takes for ever."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from pipeline.chat import Chat
from pipeline.config import ServeConfig
from serving.front import connection
from serving.front.app import Usage, build_app
from serving.front.drain import DrainingServer
from tests.serving.front.scripted_engine import Scripted, unread

CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Why?"}]}
WORDS = "one two three four five six seven eight nine ten"


class Stage:
    def __init__(self, chat: Chat, pace: float, **options: Any) -> None:
        self.engine, self.usage = Scripted(chat, WORDS, pace=pace), Usage()
        app = build_app(self.engine, "scripted", ServeConfig(**options), self.usage)
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a client can fall behind
        self.listener.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        options: Any = {"http": connection.Connection, "ws": "none", "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(app, log_level="warning", **options)
        self.gate = app.state.gate
        self.server = DrainingServer(config, self.gate, self.engine)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def signal(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)

    def raw(self, *parts: bytes) -> bytes:
        """What comes of these, sent one after the other, until the server hangs up."""
        with socket.create_connection(self.listener.getsockname(), timeout=10) as client:
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def ask(self, stream: bool = False) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=10)

    def running(self, count: int) -> None:
        end = time.monotonic() + 5
        while self.engine.running != count:
            assert time.monotonic() < end
            time.sleep(0.005)


@contextmanager
def stage(chat: Chat, pace: float = 0.1, **options: Any) -> Iterator[tuple[Stage, ThreadPoolExecutor]]:
    made = Stage(chat, pace, **options)
    made.thread.start()
    while not made.server.started:
        time.sleep(0.01)
    try:
        with ThreadPoolExecutor(4) as clients:
            yield made, clients
    finally:
        made.server.should_exit = made.server.force_exit = True
        made.thread.join(10)
        made.listener.close()


def test_what_runs_is_answered_and_new_work_is_sent_elsewhere(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    with stage(chat) as (server, clients):
        whole, streamed = clients.submit(server.ask), clients.submit(server.ask, True)
        server.running(2)
        server.signal()
        time.sleep(0.2)
        ready, refused, health = (
            httpx.get(f"{server.address}/ready"), server.ask(), httpx.get(f"{server.address}/health"),
        )  # fmt: skip
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert health.status_code == 200
        assert whole.result().json()["choices"][0]["message"]["content"] == WORDS
        assert '"finish_reason":"stop"' in streamed.result().text
        server.thread.join(5)
        assert not server.thread.is_alive(), "it ends by itself when the last is answered"
    assert "2 requests are answered first" in capsys.readouterr().err
    assert (server.usage.requests, server.usage.cut_off, server.usage.refused) == (2, 0, 1)


def test_an_idle_server_ends_at_once(chat: Chat) -> None:
    with stage(chat, drain_timeout=60) as (server, _), httpx.Client() as kept:
        kept.get(f"{server.address}/health")  # a connection that stays open
        began = time.monotonic()
        server.signal()
        server.thread.join(5)
        assert not server.thread.is_alive()
        assert time.monotonic() - began < 1.5
        assert not server.engine.alive


@pytest.mark.parametrize("again", [False, True], ids=["after drain_timeout", "at a second signal"])
def test_what_does_not_end_is_ended_and_told(chat: Chat, again: bool) -> None:
    with stage(chat, pace=0.3, drain_timeout=60 if again else 0.5) as (server, clients):
        whole, streamed = clients.submit(server.ask), clients.submit(server.ask, True)
        server.running(2)
        time.sleep(0.4)  # the stream has begun
        server.signal()
        time.sleep(0.25)
        if again:
            server.signal()
        response = whole.result(timeout=3)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert "shutting_down" in streamed.result(timeout=3).text
        assert streamed.result().text.endswith("data: [DONE]\n\n")
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert server.engine.running == 0
    assert (server.usage.requests, server.usage.cut_off, server.usage.errors) == (2, 2, 0)


def test_a_client_that_does_not_read_holds_neither_a_slot_nor_the_server(chat: Chat) -> None:
    with stage(chat, pace=0, max_concurrent=1, drain_timeout=0.2) as (server, _):
        port = server.listener.getsockname()[1]
        with unread(port):
            assert server.ask().status_code == 200
            time.sleep(0.3)
            assert (server.gate.open, server.gate.running, server.gate.waiting) == (1, 0, 0)
            server.signal()
            server.thread.join(9)
            assert not server.thread.is_alive()


def test_a_server_whose_engine_has_ended_ends_too_and_says_how(chat: Chat) -> None:
    with stage(chat, drain_timeout=60) as (server, _):
        assert httpx.get(f"{server.address}/health").status_code == 200 and server.thread.is_alive()
        server.engine.ended, server.engine.alive = "killed", False
        server.thread.join(5)
        assert not server.thread.is_alive() and server.server.failure == "killed"


# ── A request's head ─────────────────────────────────────────────────────────────────────────────────────────────────

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("parts", "answers"),
    [((), 0), ((GET, b"X: 1\r\n", b"Y: 1\r\n"), 0), ((GET + b"\r\n", GET), 1), ((GET + b"\r\n" + GET,), 1)],
    ids=["none at all", "one that never ends", "the second one", "the second one, sent with the first"],
)
def test_who_sends_no_whole_head_is_sent_away(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, ...], answers: int
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.3)
    with stage(chat) as (server, _):
        server.server.config.timeout_keep_alive = 1
        assert server.raw(*parts).count(b"HTTP/1.1 200 OK") == answers


def test_a_slow_answer_is_not_a_slow_head(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT", 0.3)
    with stage(chat, pace=0.05) as (server, _):
        assert server.ask().json()["choices"][0]["message"]["content"] == WORDS


def test_a_request_for_a_websocket_is_a_plain_one_and_asks_for_no_library(
    chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    with stage(chat) as (server, _):
        asked = GET + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
        assert b"HTTP/1.1 200 OK" in server.raw(asked)
    assert "uvicorn[standard]" not in caplog.text
