"""A chat page at `/` and feedback at `/v1/feedback`, put around any server that speaks OpenAI's API.

    app = Page(build_app(…), feedback=record_folder / "feedback.jsonl", model="tiny-merged", api_key=key)
    vllm serve …  --middleware serving.page.page.PageOfEnvironment      (with PYTHONPATH=<checkout>)

Plain ASGI and the standard library alone, since vLLM's environment loads it. All other requests pass on untouched, but for
two rules. A body's length is said once: else a proxy before this server could see other requests than it does. And a
server without an API key that is reached at a loopback address answers to this machine's own names only. Else any web site
could point a name of its own at 127.0.0.1 (DNS rebinding) and use the model from a visitor's browser. With a key that gains
nothing: a foreign site has no key.

What the page may do is said by its content security policy: one script and one style sheet, named by their hashes, no
other address than the server's own, and no text ever parsed as markup (trusted types).
"""

import asyncio
import hmac
import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from serving.page import feedback
from serving.page.policy import page

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HERE = Path(__file__).parent
BODY_TIMEOUT = 30.0  # seconds for a feedback's body to arrive


class Page:
    """`feedback` is the file that ratings go to; `contract` the hash of the chat template, kept with each."""

    def __init__(self, app: App, *, feedback: Path, model: str, api_key: str | None = None, contract: str = "") -> None:
        self.app, self.feedback, self.model, self.contract = app, feedback, model, contract
        self._key = api_key.encode() if api_key else None
        self._page, headers = page(HERE)
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            what = "Content-Length and Transfer-Encoding together: a body's length is said once"
            await _refuse(send, 400, what, headers=[(b"connection", b"close")])
        elif self._key is None and not _named_as_local(scope):
            await _refuse(send, 403, "this server answers to localhost only; with an API key it answers to any name")
        elif scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            await _answer(send, 200, self._page, self._headers)  # of HEAD the server sends the headers alone
        elif scope["path"] == "/v1/feedback":
            await self._take(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["method"] != "POST":
            await _refuse(send, 405, "feedback is sent with POST", headers=[(b"allow", b"POST")])
        elif not self._knows(headers.get(b"authorization", b"")):
            await _refuse(
                send, 401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")],
            )  # fmt: skip
        elif headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            # a form of another site can send any other type unasked, but not this one
            await _refuse(send, 415, "the content type must be application/json")
        else:
            await self._keep(receive, send)

    async def _keep(self, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_body(receive), BODY_TIMEOUT)
            if body is None:
                return
            told = feedback.request(body)
            kept = await asyncio.to_thread(feedback.append, self.feedback, told, self.model, self.contract)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not arrive in {BODY_TIMEOUT:.0f} s")
        except _TooLarge:
            await _refuse(send, 413, f"feedback may have {feedback.MAX_BODY >> 20} MB")
        except feedback.Invalid as fault:
            await _refuse(send, 400, str(fault), param=fault.part)
        except OSError as error:
            await _refuse(send, 507, f"the feedback could not be kept: {error.strerror or error}")
        else:
            await _answer(send, 201, json.dumps({"id": kept, "object": "feedback"}).encode())

    def _knows(self, authorization: bytes) -> bool:
        """Whether the key is right; the time that takes does not tell how much of it is."""
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


class PageOfEnvironment(Page):
    """For `vllm serve --middleware`, which calls a class with the app alone."""

    def __init__(self, app: App) -> None:
        super().__init__(
            app,
            feedback=Path(os.environ["ALETHEIA_FEEDBACK"]),
            model=os.environ["ALETHEIA_MODEL"],
            api_key=os.environ.get("ALETHEIA_API_KEY"),
            contract=os.environ.get("ALETHEIA_CONTRACT", ""),
        )


class _TooLarge(Exception):
    pass


async def _body(receive: Receive) -> bytes | None:
    """Whole; None when the client has gone. Raises `_TooLarge`."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > feedback.MAX_BODY:
            raise _TooLarge
        if not message.get("more_body"):
            return body


def _named_as_local(scope: Scope) -> bool:
    """False when a loopback address was reached by a name that is not this machine's own. Only browsers matter: they send
    a name. 0.0.0.0 and the host name are ways to a server on all interfaces, and no other site can have them."""
    server = scope.get("server")
    if not server or not _is_loopback(server[0]):
        return True
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    return all(_is_loopback(name) or _is_own(name) for name in map(_name, hosts))


def _name(host: str) -> str:
    """Without the port: `localhost:8000`, `[::1]:8000`."""
    if host.startswith("["):
        name, _, port = host[1:].partition("]")
        return name if port[:1] in ("", ":") else ""
    return host.partition(":")[0]


def _is_own(name: str) -> bool:
    return name in ("0.0.0.0", "::") or name.lower().rstrip(".") == socket.gethostname().lower() != ""


def _is_loopback(name: str) -> bool:
    name = name.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


async def _refuse(
    send: Send,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """In OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    await _answer(send, status, json.dumps(body).encode(), headers or [])


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = headers or []
    if not any(name == b"content-type" for name, _ in headers):
        headers = [(b"content-type", b"application/json"), *headers]
    headers = [*headers, (b"content-length", str(len(body)).encode()), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
