"""An engine that says what a test wrote, at its pace, and keeps count: for what a real model does too rarely or too fast.

And the front over it, without a socket.
"""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.testclient import TestClient

from pipeline.chat import Chat
from pipeline.config import ServeConfig
from serving.engine import Answer, Sampling, TokenScore
from serving.front.app import Usage, build_app

QUESTION = [{"role": "user", "content": "Why is it slow?"}]
CHAT: dict[str, Any] = {"model": "scripted", "messages": QUESTION}
TEXT: dict[str, Any] = {"model": "scripted", "prompt": "def read(path):"}
LAVISH = TEXT | {
    "prompt": [1000] * 2000,
    "echo": True,
    "logprobs": 5,
    "max_tokens": 0,
    "n": 8,
    "stream": True,
}  # 500 kB
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Scripted:
    """`serving.engine.Engine`. Says `text`, one token every `pace` seconds; then ends, or raises `fails`."""

    chat: Chat
    text: str = "one two three"
    pace: float = 0.0
    fails: Exception | None = None
    context: int = 2048
    precision: str = "float32"
    ended: str = "it was told to end"
    after: str | None = None  # what greedy decoding says after a prompt that is scored
    alive: bool = False
    running: int = 0
    most: int = 0  # running at once
    asked: list[tuple[list[int], Sampling]] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)

    def start(self) -> None:
        self.alive = True

    def stop(self) -> None:
        self.alive = False

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        self.asked.append((list(prompt), sampling))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            said = self.ids(self.text.replace("SEED", str(sampling.seed)))
            tokens = said[: sampling.max_tokens]
            told = sampling.top_logprobs
            scores = [] if told is None else [self.score_of(token, told) for token in tokens]
            for n in range(1, len(tokens) + 1):
                await asyncio.sleep(self.pace)
                reason = "stop" if tokens == said else "length"
                yield Answer(tokens[:n], None if n < len(tokens) or self.fails else reason, scores[:n])
            if self.fails:
                raise self.fails
            if not tokens:
                yield Answer([], "stop")
        finally:
            self.running -= 1

    async def score(self, tokens: Sequence[int], top: int) -> list[TokenScore | None]:
        self.scored.append(list(tokens))
        await asyncio.sleep(self.pace)
        if self.fails:
            raise self.fails
        scores: list[TokenScore | None] = [None, *(self.score_of(token, top) for token in tokens[1:])]
        if self.after:
            [likeliest] = self.ids(self.after)
            scores[-1] = TokenScore(-9.0, {likeliest: -0.5, 7: -2.0})
        return scores

    def score_of(self, token: int, top: int) -> TokenScore:
        """An even token is the likeliest one; beside an odd one, the even one below it is likelier."""
        logprob = -1.0 - token / 1000
        likelier = {token: logprob} if token % 2 == 0 else {token - 1: logprob + 0.5, token: logprob}
        return TokenScore(logprob, dict(list(likelier.items())[:top]))


def over(engine: Any, usage: Usage | None = None, key: str | None = None, **options: Any) -> TestClient:
    app = build_app(engine, "scripted", ServeConfig(**options), usage or Usage(), key)
    return TestClient(app, raise_server_exceptions=False)


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def content(parts: list[Any], index: int = 0) -> str:
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json", response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def unread(port: int) -> socket.socket:
    """A client that asks for more than sockets hold, and reads no further than the answer's begin."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    body = json.dumps(LAVISH).encode()
    head = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert connection.recv(15) == b"HTTP/1.1 200 OK"
    return connection
