"""The page and what it asks, on 127.0.0.1 alone.

    POST api/next  {"reviewer"}                                                            what is to be judged next
    POST api/vote  {"reviewer", "seq", "item", "choice", "ratings", "comment"}             … once this is kept
    POST api/undo  {"reviewer", "seq"}                                                     … once the last is taken back

Nothing here tells who is left or right, or what was voted so far: results are the command's (`aletheia review --result`).
Whoever can reach the address can vote under any name; another web site cannot, for its requests have another origin.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from eval.review import session, store
from eval.review.session import Review
from pipeline.errors import UserError
from serving.front.limits import read_body
from serving.front.protocol import ApiError, parsed
from serving.page.policy import page

HERE = Path(__file__).parent
HOST = "127.0.0.1"
MAX_BODY = 64 << 10  # bytes
Stars = Annotated[int, Field(ge=1, le=5)]


class Who(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reviewer: Annotated[str, Field(max_length=10 * session.NAME)]


class Undo(Who):
    seq: Annotated[int, Field(ge=0)]


class Vote(Undo):
    item: str
    choice: store.Choice
    ratings: dict[store.Side, dict[store.Rating, Stars]] = {}
    comment: Annotated[str, Field(max_length=session.COMMENT)] = ""


def build_app(review: Review, reviewer: str = "") -> FastAPI:
    """`reviewer`: the name that the page begins with; without one it asks."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    text, headers = page(HERE)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, {"Connection": "close"} if error.status == 413 else None)

    @app.get("/")
    async def index() -> Response:
        return Response(text, headers=headers | {"x-content-type-options": "nosniff"})

    @app.get("/api/review")
    async def about() -> JSONResponse:
        return _answer({"reviewer": reviewer, "ratings": store.RATINGS})

    @app.post("/api/next")
    async def following(request: Request) -> JSONResponse:
        asked = parsed(Who, await _body(request))
        return await _state(_name(asked))

    @app.post("/api/vote")
    async def vote(request: Request) -> JSONResponse:
        told = parsed(Vote, await _body(request))
        ratings = {
            str(side): {str(name): n for name, n in rated.items()} for side, rated in told.ratings.items() if rated
        }
        line = session.line(_name(told), told.seq, told.item, told.choice, ratings, told.comment.strip())
        await _keep(lambda: review.vote(line))
        return await _state(line.reviewer)

    @app.post("/api/undo")
    async def undo(request: Request) -> JSONResponse:
        told = parsed(Undo, await _body(request))
        name = _name(told)
        await _keep(lambda: review.undo(name, told.seq))
        return await _state(name)

    async def _state(name: str) -> JSONResponse:
        return _answer(await run_in_threadpool(review.state, name))

    return app


def listen(port: int) -> socket.socket:
    """Raises `UserError` where the port is taken."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(f"port {port}: {why}", where=HOST, remedy="--port 0, which takes a free one") from None


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM, which uvicorn passes on once the requests at hand are answered."""
    import uvicorn

    from serving.front.connection import Connection

    options = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, http=Connection, ws="none", lifespan="off",
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    uvicorn.Server(options).run(sockets=[listener])


async def _body(request: Request) -> bytes:
    """Of our own page alone: another site's form cannot send this type, nor this origin. Raises `ApiError`."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "this came from another site")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    return await read_body(request, MAX_BODY)


def _name(asked: Who) -> str:
    try:
        return session.name_of(asked.reviewer)
    except ValueError as error:
        raise ApiError(400, str(error), param="reviewer") from None


async def _keep(write: Callable[[], None]) -> None:
    try:
        await run_in_threadpool(write)
    except store.Stale:
        raise ApiError(409, "something else was kept under this name since, perhaps from another tab") from None
    except OSError as error:
        raise ApiError(507, f"the vote could not be kept: {error.strerror or error}") from None


def _answer(values: dict[str, Any]) -> JSONResponse:
    return JSONResponse(values, headers={"cache-control": "no-store", "x-content-type-options": "nosniff"})
