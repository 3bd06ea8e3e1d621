"""A request's answer on its way to the client: whole or as a stream of events, until it is done, late, or nobody waits."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serving.front.generation import Generator, Order, Piece
from serving.front.protocol import SHUTTING_DOWN, ApiError, StreamOptions
from serving.front.text import Token
from serving.front.wording import Wording

HEADERS = [  # of a stream: proxies are to pass each event on at once
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Reply(Response):
    """Takes the order's places in the queue when it is called, and gives them back however it ends.

    Nothing is sent before the first token, so that an error until then has its true status; a later one is told in the
    stream. Raises `ApiError` in place of an answer.
    """

    def __init__(
        self,
        generator: Generator,
        order: Order,
        wording: Wording,
        *,
        model: str,
        stream: StreamOptions | None,  # None: whole
        began: float,
    ) -> None:
        super().__init__()
        self._generator, self._order, self._wording, self._stream = generator, order, wording, stream
        self._gate, self._metrics, self._began = generator.gate, generator.metrics, began
        self._head = {"id": f"{wording.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._counts = [0] * order.count  # tokens of each answer
        self._opened: set[int] = set()  # of a stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        usage = self._metrics.usage
        with self._gate.request(self._order.count) as places:
            usage.requests += 1
            pieces = self._generator.pieces(self._order, places, self._began)
            sending = self._send_events(pieces, send) if self._stream else self._send(pieces, scope, receive, send)
            work, gone = asyncio.create_task(sending), asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    await work
                else:
                    usage.cut_off += 1
            except asyncio.CancelledError:
                usage.cut_off += 1
                raise
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)

    async def _send(self, pieces: AsyncGenerator[Piece], scope: Scope, receive: Receive, send: Send) -> None:
        texts, reasons = [""] * self._order.count, [""] * self._order.count
        tokens: list[list[Token]] = [[] for _ in texts]
        try:
            async with self._gate.in_time(), aclosing(pieces):
                async for piece in pieces:
                    self._counts[piece.index] = piece.count
                    texts[piece.index] += piece.text
                    tokens[piece.index] += piece.tokens
                    reasons[piece.index] = piece.finish_reason or ""
        except ApiError as error:
            self._count(error)
            raise
        choices = [
            {"index": index, **self._wording.whole(text, tokens[index]), "finish_reason": reasons[index]}
            for index, text in enumerate(texts)
        ]
        body = self._head | {"object": self._wording.object, "choices": choices, "usage": self._usage()}
        self._metrics.whole.observe(time.monotonic() - self._began)
        await JSONResponse(body)(scope, receive, send)

    async def _send_events(self, pieces: AsyncGenerator[Piece], send: Send) -> None:
        started = False
        try:
            async with self._gate.in_time(), aclosing(pieces):
                async for piece in pieces:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                        started = True
                    await send(_events(*self._parts(piece)))
            if self._stream and self._stream.include_usage:
                await send(_events(self._part([], self._usage())))
            self._metrics.whole.observe(time.monotonic() - self._began)
        except ApiError as error:
            self._count(error)
            if not started:
                raise
            await send(_events(error.body))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _parts(self, piece: Piece) -> Iterator[dict[str, Any]]:
        options, usage = self._stream, None
        self._counts[piece.index] = piece.count
        if options and options.continuous_usage_stats:
            usage = _tokens(len(self._order.prompt(piece.index).ids), piece.count)
        opening = self._wording.opening() if piece.index not in self._opened else None
        self._opened.add(piece.index)
        if opening:
            yield self._part([{"index": piece.index, **opening, "finish_reason": None}], usage)
        part = self._wording.part(piece.text, piece.tokens)
        yield self._part([{"index": piece.index, **part, "finish_reason": piece.finish_reason}], usage)

    def _part(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        part = self._head | {"object": self._wording.part_object, "choices": choices}
        told = usage or (self._stream and self._stream.include_usage)  # then it is null until the last part
        return part | {"usage": usage} if told else part

    def _usage(self) -> dict[str, int]:
        return _tokens(self._order.prompt_tokens, sum(self._counts))

    def _count(self, error: ApiError) -> None:
        """Each request taken on ends in one way."""
        usage, error.counted = self._metrics.usage, True
        if error.status == 504:
            usage.timed_out += 1
        elif error.code == SHUTTING_DOWN:
            usage.cut_off += 1
        elif error.status >= 500:
            usage.errors += 1
        else:  # only the engine could tell
            usage.requests -= 1
            usage.refused += 1


def _tokens(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _events(*bodies: dict[str, Any]) -> dict[str, Any]:
    """In ASCII: some clients split lines at U+2028 and the like."""
    data = "".join(f"data: {json.dumps(body, separators=(',', ':'))}\n\n" for body in bodies)
    return {"type": "http.response.body", "body": data.encode(), "more_body": True}


async def _gone(receive: Receive) -> None:
    """Ends when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
