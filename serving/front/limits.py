"""Who may come in, and how many at once: the API key, the size of a body, the queue, the time, and the end of service."""

import asyncio
import hmac
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import ServeConfig
from serving.front.metrics import Metrics
from serving.front.protocol import SHUTTING_DOWN, ApiError

BODY_TIMEOUT = 60.0  # seconds for a body to arrive
RECENT = 50  # answers whose times tell when a place will be free
LEFT = 499  # nginx's status of a client that left; nobody receives it


@dataclass
class Places:
    """Of one request: its answers that are not done yet."""

    count: int


class Gate:
    """The queue in front of the engine. Each answer takes a place: `n` of a prompt, and each prompt of several."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.running = 0  # answers
        self.ready = self.draining = False
        self._taken = self._open = 0  # places; requests
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._timers: set[asyncio.Timeout] = set()
        self._end = math.inf  # of the draining, in the loop's time

    @property
    def waiting(self) -> int:
        return self._taken - self.running

    @contextmanager
    def request(self, answers: int) -> Iterator[Places]:
        """Places for all answers of a request. Raises `ApiError`: 503 while draining, 429 when the queue is full."""
        if self.draining:
            raise self.closed()
        most = self.config.max_concurrent + self.config.max_waiting
        if answers > most:
            raise ApiError(400, f"{answers} answers in one request; this server takes {most} at a time")
        if self._taken + answers > most:
            raise ApiError(
                429, f"{self._taken} answers are generated or wait, of {most} that may; {answers} more are too many",
                code="rate_limit_exceeded", headers={"Retry-After": str(self._retry_after())},
            )  # fmt: skip
        self._taken += answers
        self._open += 1
        places = Places(answers)
        try:
            yield places
        finally:
            self._open -= 1
            self._taken -= places.count

    @asynccontextmanager
    async def slot(self, places: Places) -> AsyncIterator[None]:
        """One answer's turn, first come first served; with its end the place is another's."""
        try:
            async with self._slots:
                self.running += 1
                began = time.monotonic()
                try:
                    yield
                finally:
                    self.running -= 1
                    self._recent.append(time.monotonic() - began)
        finally:
            places.count -= 1
            self._taken -= 1

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises `ApiError` after request_timeout: 504; or 503 once draining has taken drain_timeout."""
        try:
            async with asyncio.timeout(self.config.request_timeout) as timer:
                self._timers.add(timer)
                if self.draining:
                    timer.reschedule(min(self._end, timer.when() or self._end))
                try:
                    yield
                finally:
                    self._timers.discard(timer)
        except TimeoutError:
            if asyncio.get_running_loop().time() >= self._end:
                raise self.closed() from None
            what = f"the answer took longer than the {self.config.request_timeout:g} s that a request may"
            raise ApiError(504, what, code="timeout") from None

    def drain(self, seconds: float | None = None) -> None:
        """From now on nothing is taken on, and what runs has so long to end (drain_timeout). Called in the loop's thread."""
        self.draining = True
        seconds = self.config.drain_timeout if seconds is None else seconds
        self._end = min(self._end, asyncio.get_running_loop().time() + seconds)
        for timer in self._timers:
            timer.reschedule(min(self._end, timer.when() or self._end))

    @property
    def drained(self) -> bool:
        """Nothing runs any more, or it does not heed its end: a client that does not read."""
        late = asyncio.get_running_loop().time() - self._end
        return self.draining and (self._open == 0 or late > 1)

    @property
    def open(self) -> int:
        """Requests that are being answered."""
        return self._open

    def closed(self) -> ApiError:
        seconds = math.ceil(max(self.config.drain_timeout, 1))
        return ApiError(503, "the server is shutting down", code=SHUTTING_DOWN, headers={"Retry-After": str(seconds)})

    def _retry_after(self) -> int:
        """Seconds until those who wait now, and one more, have had their turn, as far as recent answers tell."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return max(1, math.ceil(mean * (self.waiting + 1) / self.config.max_concurrent))


class Door:
    """Around the app: the API key (compared in constant time), no new work while draining, and a count of each answer.

    `endpoints` are counted by their path, all others as one.
    """

    OPEN = ("/health", "/ready")  # without a key, and while draining

    def __init__(
        self, app: ASGIApp, gate: Gate, metrics: Metrics, api_key: str | None, endpoints: Collection[str]
    ) -> None:
        self._app, self._gate, self._metrics, self._endpoints = app, gate, metrics, endpoints
        self._key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if refusal := self._refusal(scope):
                self._metrics.usage.refused += 1
                response = JSONResponse(refusal.body, refusal.status, refusal.headers)
                await response(scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        except Exception:
            status = status or 500  # sent by the layer around this one
            raise
        finally:
            path = scope["path"]
            self._metrics.answered[path if path in self._endpoints else "other", status or LEFT] += 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in self.OPEN:
            return None
        if self._key is not None and not self._knows(scope):
            what = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            return ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._gate.draining and scope["path"] != "/metrics":
            return self._gate.closed()
        return None

    def _knows(self, scope: Scope) -> bool:
        """Whether the key is right; the time that takes does not tell how much of it is."""
        assert self._key is not None
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


async def read_body(http: Request, limit: int) -> bytes:
    """Whole, `limit` bytes at most, counted as they come. Raises `ApiError`: 413, or 408 when it does not arrive."""
    too_large = ApiError(413, f"the body has more than the {limit:,} bytes that one may have", code="body_too_large")
    told = http.headers.get("content-length", "")
    if told.isdecimal() and (len(told) > 18 or int(told) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in http.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive in {BODY_TIMEOUT:.0f} s") from None
    return bytes(body)
