"""Around vLLM's server, inside its process: what this project's own server also asks of a request, and the record's counts.

    python -m vllm.entrypoints.openai.api_server …  --middleware serving.vllm_backend.guard.Guard   (with PYTHONPATH=<checkout>)

vLLM has a dozen more ways to generate, passes over what it does not know, and answers who names no model from the base below
the adapters. Here: the promised paths alone; the API key on each, since vLLM asks for it below /v1 only; a body of limited
size, checked by the types of `serving/front/protocol.py`; a model by name; no special token in a message, where it would forge
a turn; and nothing new while the server ends, when vLLM still says that it is ready, and fails. vLLM is given what was
checked, not what was sent. The models are listed here, the one that was asked for first.
Plain ASGI, pydantic and the standard library alone, since vLLM's environment loads it.
"""

import asyncio
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from serving.front.protocol import SHUTTING_DOWN, ApiError, parsed
from serving.vllm_backend.asked import GENERATING, TAKEN, Asked

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")  # what a supervisor polls; the page, which asks for the key itself, is around this
ENDING_TOO = ("/health", "/metrics")  # answered to the end
MODELS = "/v1/models"
METHODS = {**dict.fromkeys((*OPEN, "/metrics", MODELS), "GET"), **dict.fromkeys(TAKEN, "POST")}
TOKENS = {"prompt_tokens": "vllm:prompt_tokens", "completion_tokens": "vllm:generation_tokens"}
WRITE_EVERY = 1.0  # seconds, at most
BODY_TIMEOUT = 60.0  # seconds for a body to arrive
REWRITTEN = (b"content-type", b"content-length", b"transfer-encoding")


class Guard:
    """Reads ALETHEIA_API_KEY; ALETHEIA_MODELS, a JSON list of names, and ALETHEIA_CONTEXT, in tokens; ALETHEIA_MAX_BODY, in
    bytes; ALETHEIA_RESERVED, a JSON list of the special tokens; ALETHEIA_COUNTS, the file that the counts go to;
    ALETHEIA_ENDING, a file that is there once the server is to end, and ALETHEIA_DRAIN, the seconds that it then has."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._key = os.environ.get("ALETHEIA_API_KEY", "").encode()
        self._models: list[str] = json.loads(os.environ["ALETHEIA_MODELS"])
        self._context = int(os.environ["ALETHEIA_CONTEXT"])
        self._most = int(os.environ["ALETHEIA_MAX_BODY"])
        self._reserved: list[str] = json.loads(os.environ["ALETHEIA_RESERVED"])
        self._file = Path(os.environ["ALETHEIA_COUNTS"])
        self._ending, self._drain = Path(os.environ["ALETHEIA_ENDING"]), os.environ["ALETHEIA_DRAIN"]
        self._began = int(time.time())
        self._counts = {"requests": 0, "refused": 0, "errors": 0}
        self._written = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, self._until_shutdown(receive), send)
        elif scope["type"] != "http":  # a browser could send no key with it, and any site may open one
            await send({"type": "websocket.close", "code": 1008})
        else:
            counted = scope["path"] in GENERATING
            try:
                await self._answer(scope, receive, self._counting(send) if counted else send)
            except Exception:  # answered with a 500 further out
                self._counts["errors"] += counted
                raise
            finally:
                if counted and time.monotonic() - self._written > WRITE_EVERY:
                    self._write()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            self._admit(scope)
            if path == MODELS:
                return await _send(send, 200, {"object": "list", "data": [self._card(name) for name in self._models]})
            if path.startswith(f"{MODELS}/"):
                return await _send(send, 200, self._card(path.removeprefix(f"{MODELS}/")))
            if path == "/ready":  # vLLM listens when its model is there
                scope = dict(scope) | {"path": "/health", "raw_path": b"/health"}
            if kind := TAKEN.get(path):
                body = await self._read(scope, receive)
                if body is None:
                    return None  # the client has left
                scope, receive = _given(self._checked(kind, body), scope, receive)
        except ApiError as refusal:
            return await _send(send, refusal.status, refusal.body, refusal.headers)
        return await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Raises `ApiError` without the key, while the server ends, and for what this server has not."""
        path = scope["path"]
        if path not in OPEN and not self._knows(scope):
            what = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if path not in ENDING_TOO and self._ending.exists():
            what, wait = "the server is shutting down", {"Retry-After": self._drain}
            raise ApiError(503, what, code=SHUTTING_DOWN, headers=wait)
        method = "GET" if path.startswith(f"{MODELS}/") else METHODS.get(path)
        if method is None:
            raise ApiError(404, f"this server has no {path}")
        if scope["method"] != method:
            raise ApiError(405, f"{path} is asked with {method}", headers={"Allow": method})

    def _knows(self, scope: Scope) -> bool:
        """Whether the key is right; the time that takes does not tell how much of it is."""
        if not self._key:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, whole; None when the client leaves before that. Raises `ApiError`."""
        # a page of another site can send any other type unasked, but not this one
        sent_as = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0]
        if sent_as.strip().lower() != b"application/json":
            raise ApiError(415, "the content type must be application/json")
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._most:
                        what = f"the body has more than the {self._most:,} bytes that one may have"
                        raise ApiError(413, what, code="body_too_large")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {BODY_TIMEOUT:.0f} s") from None
        return bytes(body)

    def _checked(self, kind: type[Asked], body: bytes) -> bytes:
        """The request as vLLM is to see it. Raises `ApiError`."""
        request = parsed(kind, body)
        if request.model is not None:
            self._check_model(request.model)
        messages = getattr(request, "messages", None) or []
        if token := next((token for m in messages for token in self._reserved if token in m.content), None):
            what = f"messages hold the special token {token}, which would forge a turn"
            raise ApiError(400, what, param="messages")
        return json.dumps(request.model_dump(exclude_unset=True, by_alias=True)).encode()

    def _check_model(self, name: str) -> None:
        if name not in self._models:
            known = ", ".join(f"`{model}`" for model in self._models)
            what = f"the model `{name}` does not exist; this server has {known}"
            raise ApiError(404, what, param="model", code="model_not_found")

    def _card(self, name: str) -> dict[str, Any]:
        """Raises `ApiError` for one that is not there."""
        self._check_model(name)
        card = {"id": name, "object": "model", "created": self._began, "owned_by": "aletheia"}
        return card | {"max_model_len": self._context}

    def _counting(self, send: Send) -> Send:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                refused = status < 500 or status == 503
                self._counts["requests" if status < 400 else "refused" if refused else "errors"] += 1
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


def _given(body: bytes, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """The request with this body; then what else comes."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in REWRITTEN]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        return next(given, None) or await receive()

    return dict(scope) | {"headers": headers}, again


async def _send(send: Send, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    body = json.dumps(value).encode()
    told = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    raw = [(name.lower().encode(), text.encode()) for name, text in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


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
