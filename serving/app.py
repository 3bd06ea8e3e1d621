"""The engine over HTTP: /health, /v1/models, /v1/chat/completions and /v1/completions, in OpenAI's shapes.

Streaming and not, `stop`, `temperature`, `top_p`, `max_tokens`. No API key and no limits on bodies or the queue yet, which
is why the server binds to 127.0.0.1 unless told otherwise.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pipeline.errors import UserError
from serving.engine import Engine, Sampling
from serving.protocol import ApiError, ChatRequest, CompletionRequest, Request


@dataclass
class Usage:
    """What the server has done, for the record."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: int = 0
    refused: int = 0
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Piece:
    """A part of an answer's text; the last has the finish reason and the number of tokens."""

    text: str
    finish_reason: str | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Shape:
    """How one endpoint words an answer: whole, and in parts."""

    prefix: str
    object: str
    chunk_object: str
    opening: dict[str, Any]
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    part=lambda text: {"delta": {"content": text} if text else {}},
)
COMPLETION = Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    opening={},
    whole=lambda text: {"text": text},
    part=lambda text: {"text": text},
)


def build_app(engine: Engine, model_name: str, default_max_tokens: int, usage: Usage) -> FastAPI:
    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(lifespan=running, title="Aletheia", docs_url=None, redoc_url=None)
    tokenizer = engine.chat.tokenizer

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "failed"}, status_code=200 if engine.alive else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        card = {"id": model_name, "object": "model", "created": int(usage.started), "owned_by": "aletheia"}
        return {"object": "list", "data": [card | {"max_model_len": engine.context}]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Any:
        reserved = engine.chat.reserved_in(request.messages)
        if reserved:
            raise ApiError(
                400, f"messages hold the special token {reserved}, which would forge a turn", param="messages"
            )
        try:
            prompt = engine.chat.prompt(request.messages)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        wanted = request.max_completion_tokens or request.max_tokens
        return await respond(request, http, prompt, wanted, CHAT)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Any:
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = tokenizer(prompt)["input_ids"]
        if not prompt or not all(0 <= token < len(tokenizer) for token in prompt):
            raise ApiError(400, "prompt must be text or token ids of this model, and not empty", param="prompt")
        return await respond(request, http, prompt, request.max_tokens, COMPLETION)

    async def respond(
        request: Request, http: HttpRequest, prompt: list[int], max_tokens: int | None, shape: Shape
    ) -> Any:
        if request.model != model_name:
            raise ApiError(
                404, f"the model `{request.model}` does not exist; this server has `{model_name}`",
                param="model", code="model_not_found",
            )  # fmt: skip
        room = engine.context - len(prompt)
        wanted = max_tokens if max_tokens is not None else min(default_max_tokens, max(room, 0))
        if room < max(wanted, 1):
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and {wanted} were asked for; the context holds {engine.context}",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        usage.requests += 1
        pieces = _pieces(engine, prompt, Sampling(wanted, request.temperature, request.top_p), request.stops, usage)
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        if request.stream:
            with_usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(
                _events(pieces, shape, head, len(prompt), with_usage, usage), media_type="text/event-stream"
            )
        text, last = "", Piece("")
        async for last in pieces:
            text += last.text
            if await http.is_disconnected():  # nobody waits for the answer: its slot is another's
                await pieces.aclose()
                return Response(status_code=499)
        choice = shape.whole(text) | {"index": 0, "finish_reason": last.finish_reason, "logprobs": None}
        return head | {"object": shape.object, "choices": [choice], "usage": _usage(len(prompt), last.tokens)}

    @app.exception_handler(ApiError)
    async def api_error(_: Any, error: ApiError) -> JSONResponse:
        usage.refused += 1
        return JSONResponse(error.body, status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        return await api_error(_, _validation_error(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Any, error: HTTPException) -> JSONResponse:
        return await api_error(_, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def failed(_: Any, error: Exception) -> JSONResponse:
        usage.errors += 1
        return JSONResponse(ApiError(500, f"generation failed: {error}").body, status_code=500)

    return app


async def _pieces(
    engine: Engine, prompt: list[int], sampling: Sampling, stops: list[str], usage: Usage
) -> AsyncGenerator[Piece]:
    """The answer's text in parts that are safe to send: no half character, and nothing that may begin a stop string."""
    usage.prompt_tokens += len(prompt)
    sent, answer = "", None
    held_back = max((len(stop) for stop in stops), default=1) - 1
    answers = engine.generate(prompt, sampling)
    try:
        async for answer in answers:
            text = engine.chat.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            cut = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=-1)
            if cut >= 0:
                yield Piece(text[len(sent) : cut], "stop", len(answer.tokens))
                return
            if answer.finish_reason:
                yield Piece(text[len(sent) :], answer.finish_reason, len(answer.tokens))
                return
            safe = text[: len(text) - held_back] if held_back else text
            if not text.endswith("\ufffd") and len(safe) > len(sent):
                yield Piece(safe[len(sent) :])
                sent = safe
    finally:
        usage.completion_tokens += len(answer.tokens) if answer else 0
        await answers.aclose()


async def _events(
    pieces: AsyncIterator[Piece], shape: Shape, head: dict[str, Any], prompt_tokens: int, with_usage: bool, usage: Usage
) -> AsyncIterator[str]:
    """Server-sent events. An error after the first byte can only be told inside the stream, and is."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(head | {'object': shape.chunk_object} | body, ensure_ascii=False)}\n\n"

    def choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"choices": [delta | {"index": 0, "finish_reason": finish_reason, "logprobs": None}]}

    last = Piece("")
    try:
        if shape.opening:
            yield event(choice(shape.opening))
        async for last in pieces:
            if last.text:
                yield event(choice(shape.part(last.text)))
        yield event(choice(shape.part(""), last.finish_reason))
        if with_usage:
            yield event({"choices": [], "usage": _usage(prompt_tokens, last.tokens)})
    except Exception as error:
        usage.errors += 1
        yield f"data: {json.dumps(ApiError(500, f'generation failed: {error}').body)}\n\n"
    yield "data: [DONE]\n\n"


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    members = () if first["type"] == "extra_forbidden" else ("str", "list[str]", "list[int]")  # pydantic's, of unions
    where = ".".join(str(part) for part in first["loc"][1:] if part not in members)
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"this server does not know or support `{where}`", param=where, code="unsupported_parameter"
        )
    if first["type"] == "missing":
        return ApiError(400, f"`{where or 'the body'}` is missing", param=where or None)
    return ApiError(400, f"{where}: {what}" if where else what, param=where or None)
