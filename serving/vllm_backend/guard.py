"""Around vLLM's server, inside its process: what this project's own server also asks of a request, and the record's counts.

    python -m vllm.entrypoints.openai.api_server …  --middleware serving.vllm_backend.guard.Guard   (with PYTHONPATH=<checkout>)

The API key on every path: vLLM asks for its own below /v1 alone, while /invocations generates too and /metrics and /tokenize
answer. A body of limited size. No special token in a message, where it would forge a turn. Plain ASGI and the standard
library alone, since vLLM's environment loads it.
"""

import asyncio
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/ready")  # the page, which asks for the key itself, and what a supervisor polls
COUNTED = ("/v1/chat/completions", "/v1/completions")
TOKENS = {"prompt_tokens": "vllm:prompt_tokens", "completion_tokens": "vllm:generation_tokens"}
WRITE_EVERY = 1.0  # seconds, at most
BODY_TIMEOUT = 60.0  # seconds for a body to arrive


class Refusal(Exception):
    """A request that vLLM is not to see. In OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        self.status = status
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        headers += [(b"www-authenticate", b"Bearer")] if self.status == 401 else []
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class Guard:
    """Reads ALETHEIA_API_KEY; ALETHEIA_MAX_BODY, in bytes; ALETHEIA_RESERVED, a JSON list of the special tokens; and
    ALETHEIA_COUNTS, the file that the counts go to."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._key = os.environ.get("ALETHEIA_API_KEY", "").encode()
        self._most = int(os.environ["ALETHEIA_MAX_BODY"])
        self._reserved: list[str] = json.loads(os.environ["ALETHEIA_RESERVED"])
        self._file = Path(os.environ["ALETHEIA_COUNTS"])
        self._counts = {"requests": 0, "refused": 0, "errors": 0}
        self._written = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, self._until_shutdown(receive), send)
        elif scope["type"] != "http":  # a browser could send no key with it, and any site may open one
            await send({"type": "websocket.close", "code": 1008})
        else:
            counted = scope["path"] in COUNTED
            try:
                await self._pass_on(scope, receive, self._counting(send) if counted else send)
            except Exception:  # answered with a 500 further out
                self._counts["errors"] += counted
                raise
            finally:
                if counted and time.monotonic() - self._written > WRITE_EVERY:
                    self._write()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in OPEN and scope["method"] != "OPTIONS" and not self._knows(scope):
                what = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                raise Refusal(401, what, "invalid_api_key")
            if scope["path"] == "/ready":  # vLLM listens when its model is there
                scope = dict(scope) | {"path": "/health", "raw_path": b"/health"}
            if scope["method"] == "POST" and scope["path"] != "/v1/feedback":  # which the page limits itself
                receive = await self._read(receive)
        except Refusal as refusal:
            await refusal.send(send)
        else:
            await self.app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        """Whether the key is right; the time that takes does not tell how much of it is."""
        if not self._key:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    async def _read(self, receive: Receive) -> Receive:
        """Reads the body whole and looks at it; gives it out again, and then what else comes. Raises `Refusal`."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._most:
                        what = f"the body has more than the {self._most:,} bytes that one may have"
                        raise Refusal(413, what, "body_too_large")
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive in {BODY_TIMEOUT:.0f} s") from None
        if token := next((token for text in _said(body) for token in self._reserved if token in text), None):
            what = f"messages hold the special token {token}, which would forge a turn"
            raise Refusal(400, what, param="messages")
        given = iter([{"type": "http.request", "body": bytes(body), "more_body": more}])

        async def again() -> Message:
            return next(given, None) or await receive()

        return again

    def _counting(self, send: Send) -> Send:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                self._counts["requests" if status < 400 else "refused" if status < 500 else "errors"] += 1
            await send(message)

        return counting

    def _until_shutdown(self, receive: Receive) -> Receive:
        async def watching() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._write()
            return message

        return watching

    def _write(self) -> None:
        """Whole or not at all: the reader may come at any time."""
        self._written = time.monotonic()
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._counts | _tokens()), "utf-8")
        partial.replace(self._file)


def _said(body: bytes | bytearray) -> Iterator[str]:
    """Every text below `messages`, however it is shaped; what is no JSON, vLLM refuses."""
    try:
        waiting = [json.loads(body)["messages"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()


def _tokens() -> dict[str, int]:
    """From vLLM's own metrics in this process; nothing where it keeps none."""
    try:
        from prometheus_client import REGISTRY  # type: ignore[import-not-found]
    except ImportError:
        return {}
    sums = {
        family.name: sum(sample.value for sample in family.samples if sample.name == f"{family.name}_total")
        for family in REGISTRY.collect()
        if family.name in TOKENS.values()
    }
    return {name: int(sums[metric]) for name, metric in TOKENS.items() if metric in sums}
