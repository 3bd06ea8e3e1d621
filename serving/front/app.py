"""A model over HTTP, as OpenAI's clients and lm-eval ask for it; the same for every engine (`serving/engine.py`).

    app = build_app(engine, "tiny-merged", config.serve_config, Usage(), api_key=None)

/v1/chat/completions, /v1/completions, /v1/models   OpenAI's
/tokenize, /detokenize, /tokenizer_info             vLLM's
/health, /ready, /metrics                           alive; taking requests; Prometheus

Not there: tools, images, structured output, penalties. They are refused by name.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pipeline.config import ServeConfig
from pipeline.data.rows import Message
from pipeline.errors import UserError
from serving.engine import Engine, Sampling
from serving.front import protocol
from serving.front.generation import Generator, Order, Prompt
from serving.front.limits import LEFT, Door, Gate, read_body
from serving.front.metrics import CONTENT_TYPE, Metrics, Usage
from serving.front.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from serving.front.reply import Reply
from serving.front.text import Vocabulary
from serving.front.wording import ChatWording, CompletionWording, Wording

T = TypeVar("T")
M = TypeVar("M", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
LONG = 20_000  # characters; what takes longer to tokenise does so in a thread, and others are served meanwhile


def build_app(
    engine: Engine, model_name: str, config: ServeConfig, usage: Usage, api_key: str | None = None
) -> FastAPI:
    """`app.state.gate` is what `serving.front.drain.DrainingServer` asks."""
    front = Front(engine, model_name, config, usage)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        front.gate.ready = True
        try:
            yield
        finally:
            engine.stop()

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.gate = front.gate
    for path, (method, handler) in front.endpoints.items():
        methods = [method, "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, handler, methods=methods, response_model=None)
    app.add_middleware(
        Door, gate=front.gate, metrics=front.metrics, api_key=api_key, endpoints=frozenset(front.endpoints)
    )
    app.add_exception_handler(ApiError, front.refused)
    app.add_exception_handler(HTTPException, front.no_such_endpoint)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=LEFT))
    app.add_exception_handler(Exception, front.failed)
    return app


class Front:
    """The endpoints of one model."""

    def __init__(self, engine: Engine, model: str, config: ServeConfig, usage: Usage) -> None:
        self.engine, self.model, self.config, self.usage = engine, model, config, usage
        self.gate, self.metrics = Gate(config), Metrics(usage)
        self.vocabulary = Vocabulary(engine.chat.tokenizer)
        self.generator = Generator(engine, self.vocabulary, self.gate, self.metrics)
        self.endpoints: dict[str, tuple[str, Callable[..., Any]]] = {
            "/v1/chat/completions": ("POST", self.chat_completions),
            "/v1/completions": ("POST", self.completions),
            "/v1/models": ("GET", self.models),
            "/v1/models/{name:path}": ("GET", self.one_model),
            "/tokenize": ("POST", self.tokenize),
            "/detokenize": ("POST", self.detokenize),
            "/tokenizer_info": ("GET", self.tokenizer_info),
            "/health": ("GET", self.health),
            "/ready": ("GET", self.ready),
            "/metrics": ("GET", self.prometheus),
        }

    # ── Generation ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def chat_completions(self, http: Request) -> Response:
        request, began = await self._read(http, ChatRequest)
        prompt = Prompt(await self._rendered(request.messages))
        return self._reply(request, [prompt], ChatWording(self.vocabulary, request.top), "messages", began)

    async def completions(self, http: Request) -> Response:
        request, began = await self._read(http, CompletionRequest)
        prompts = [await self._prompt(prompt, request.echo) for prompt in request.prompt]
        return self._reply(request, prompts, CompletionWording(self.vocabulary, request.top), "prompt", began)

    def _reply(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        wording: Wording,
        param: str,
        began: float,
    ) -> Reply:
        longest = max(len(prompt.ids) for prompt in prompts)
        room, wanted = self.engine.context - longest, request.wanted_tokens
        if wanted is None:
            wanted = max(min(self.config.max_tokens, room), 1)
        if wanted > room:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens and {wanted} were asked for; the context holds {self.engine.context}",
                param=param,
                code="context_length_exceeded",
            )
        if not self.engine.alive:
            raise ApiError(503, "the model's engine has ended")
        completion = isinstance(request, CompletionRequest)
        order = Order(
            prompts,
            request.n,
            Sampling(wanted, request.temperature, request.top_p, request.seed, request.top),
            request.stop,
            echo=isinstance(request, CompletionRequest) and request.echo,
            continues=completion,
        )
        stream = (request.stream_options or StreamOptions()) if request.stream else None
        return Reply(self.generator, order, wording, model=self.model, stream=stream, began=began)

    # ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def tokenize(self, http: Request) -> Response:
        request, _ = await self._read(http, TokenizeRequest)
        if request.messages is not None:
            ids = await self._rendered(request.messages, request.add_generation_prompt)
        else:
            assert request.prompt is not None
            ids = await self._tokenized(request.prompt, request.add_special_tokens is not False)
        pieces = self.vocabulary.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": self.engine.context, "tokens": ids, "token_strs": pieces}
        return JSONResponse(answer)

    async def detokenize(self, http: Request) -> Response:
        request, _ = await self._read(http, DetokenizeRequest)
        self._check_ids(request.tokens, "tokens")
        return JSONResponse({"prompt": await _apart(len(request.tokens), self.vocabulary.decode, request.tokens)})

    async def tokenizer_info(self) -> Response:
        """What lm-eval's remote tokenizer reads."""
        tokenizer = self.vocabulary.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return JSONResponse({"tokenizer_class": type(tokenizer).__name__} | {n: getattr(tokenizer, n) for n in names})

    async def _prompt(self, prompt: str | list[int], echo: bool) -> Prompt:
        if isinstance(prompt, str):
            ids = await self._tokenized(prompt)
            if not ids:
                raise ApiError(400, "the prompt has no tokens", param="prompt")
            return Prompt(ids, prompt)
        self._check_ids(prompt, "prompt")
        return Prompt(prompt, self.vocabulary.decode(prompt) if echo else "")

    async def _tokenized(self, text: str, special: bool = True) -> list[int]:
        tokenize = self.vocabulary.tokenizer
        encoded = await _apart(len(text), lambda: tokenize(text, add_special_tokens=special))
        ids: list[int] = encoded["input_ids"]
        return ids

    async def _rendered(self, messages: Sequence[Message], generation_prompt: bool = True) -> list[int]:
        return await _apart(sum(len(m.content) for m in messages), self._render, messages, generation_prompt)

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> list[int]:
        """As in training. Raises `ApiError` for what would forge a turn, or what the template refuses."""
        chat = self.engine.chat
        if reserved := chat.reserved_in(messages):
            what = f"messages hold the special token {reserved}, which would forge a turn"
            raise ApiError(400, what, param="messages")
        try:
            if generation_prompt:
                return chat.prompt(messages)
            turns = [{"role": m.role, "content": m.content} for m in messages]
            ids: list[int] = chat.tokenizer.apply_chat_template(turns, return_dict=False)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        except Exception as error:  # a template is a program of its own
            raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from None
        return ids

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocabulary.size):
            what = f"the {param} must be token ids of this model, 0 to {self.vocabulary.size - 1}"
            raise ApiError(400, what, param=param)

    # ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self.model, "object": "model", "created": int(self.usage.started), "owned_by": "aletheia"}
        return card | {"max_model_len": self.engine.context, "precision": self.engine.precision}  # both not OpenAI's

    async def health(self) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, status_code=200 if alive else 503)

    async def ready(self) -> Response:
        gate = self.gate
        if gate.ready and self.engine.alive and not gate.draining:
            return JSONResponse({"status": "ready"})
        what = "draining" if gate.draining else "failed" if gate.ready else "starting"
        return JSONResponse({"status": what}, status_code=503)

    async def prometheus(self) -> Response:
        return PlainTextResponse(self.metrics.text(self.gate.running, self.gate.waiting), media_type=CONTENT_TYPE)

    # ── What both ways have in common ────────────────────────────────────────────────────────────────────────────────

    async def _read(self, http: Request, kind: type[M]) -> tuple[M, float]:
        """The request, and when it was there whole. Raises `ApiError`."""
        # a page of another site can send any other type unasked, but not this one
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the content type must be application/json")
        body = await read_body(http, int(self.config.max_body_mb * 1e6))
        began = time.monotonic()
        request = protocol.parsed(kind, body)
        if request.model is not None:
            self._check_model(request.model)
        return request, began

    def _check_model(self, name: str) -> None:
        if name != self.model:
            what = f"the model `{name}` does not exist; this server has `{self.model}`"
            raise ApiError(404, what, param="model", code="model_not_found")

    async def refused(self, _: Request, error: Any) -> Response:
        self.usage.refused += not error.counted
        return JSONResponse(error.body, error.status, error.headers)

    async def no_such_endpoint(self, http: Request, error: Any) -> Response:
        return await self.refused(http, ApiError(error.status_code, str(error.detail), headers=error.headers))

    async def failed(self, _: Request, error: Exception) -> Response:
        """A fault of the server: its traceback follows on stderr."""
        self.usage.errors += 1
        return JSONResponse(ApiError(500, f"a fault of the server: {type(error).__name__}").body, 500)


async def _apart(size: int, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.to_thread(work, *arguments) if size > LONG else work(*arguments)
