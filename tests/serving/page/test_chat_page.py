"""The page and /v1/feedback around any ASGI app: what they let through, what they refuse, and what they keep."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.workspace import CHECKOUT
from serving.page import feedback, page
from serving.page.page import Page

KEY = "s3cret-é"
TOLD = {"messages": [{"role": "user", "content": "What is a lock?"}], "answer": "A thing.", "rating": "up"}
JSON = ("content-type", "application/json")


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]  # type: ignore[no-any-return]


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """The server that the page is put around: says that it was reached, and by which body."""
    body = (await receive())["body"] if scope["type"] == "http" else b""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"inner " + body})


def ask(
    app: Any,
    method: str,
    path: str,
    body: bytes | Sequence[bytes] = b"",
    *headers: tuple[str, str],
    host: str = "127.0.0.1:8000",
    server: tuple[str, int] = ("127.0.0.1", 8000),
    gone: bool = False,
) -> Response | None:
    """One request as a server hands it on, its body in the parts given; `gone`: the client leaves before the last one."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"host", host.encode()), *((name.encode(), value.encode()) for name, value in headers)],
        "server": server,
        "client": ("203.0.113.9", 50001),
    }
    parts = [body] if isinstance(body, bytes) else list(body)
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1:] = [{"type": "http.disconnect"}] if gone else [messages[-1] | {"more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    if not sent:
        return None
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert found.get("content-length", str(len(sent[1]["body"]))) == str(len(sent[1]["body"]))
    return Response(sent[0]["status"], found, sent[1]["body"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "EXP-2026-01-01-001" / "feedback.jsonl"


@pytest.fixture
def app(file: Path) -> Page:
    return Page(inner, feedback=file, model="tiny-merged", contract="c0ffee")


@pytest.fixture
def locked(file: Path) -> Page:
    return Page(inner, feedback=file, model="tiny-merged", api_key=KEY)


def told(**changes: Any) -> bytes:
    return json.dumps(TOLD | changes).encode()


def post(app: Any, body: Any = None, *headers: tuple[str, str], **options: Any) -> Response:
    response = ask(app, "POST", "/v1/feedback", told() if body is None else body, *(headers or [JSON]), **options)
    assert response is not None
    return response


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Elements(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {"script": "", "style": ""}
        self._open = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_the_page_runs_its_own_script_and_loads_nothing(app: Page) -> None:
    response = ask(app, "GET", "/")
    assert response and response.status == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    elements = Elements(response.body.decode())
    policy = {
        name: value
        for name, _, value in (d.strip().partition(" ") for d in response.headers["content-security-policy"].split(";"))
    }
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(elements.inside[kind].encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'" and len(elements.inside[kind]) > 500
        assert [tag for tag, _ in elements.found].count(kind) == 1
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["require-trusted-types-for"] == "'script'"
    for tag, attributes in elements.found:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") or name in ("src", "srcset", "action", "style") for name in attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"https?://|@import|url\(", response.body.decode())
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", elements.inside["script"])


def test_all_else_passes_on(app: Page, locked: Page) -> None:
    for one in (app, locked):
        for method, path in [
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/"),
            ("GET", "/health"),
        ]:
            response = ask(one, method, path, b"body")
            assert response and (response.status, response.body) == (299, b"inner body")
    reached = []

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    asyncio.run(Page(lifespan, feedback=app.feedback, model="m")({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert reached == ["lifespan"]


# ── feedback ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_feedback_is_kept_with_the_model_and_without_an_address(app: Page, file: Path) -> None:
    body = told(text="Good.", better="A better thing.")
    response = post(app, [body[:10], body[10:30], body[30:]])
    assert response.status == 201
    [(_, kept)] = feedback.read(file)
    assert isinstance(kept, feedback.Feedback)
    assert json.loads(response.body) == {"id": kept.id, "object": "feedback"}
    assert (kept.model, kept.contract, kept.better) == ("tiny-merged", "c0ffee", "A better thing.")
    assert "203.0.113" not in file.read_text() and "client" not in file.read_text()


def test_without_the_key_nothing_is_kept(locked: Page, file: Path) -> None:
    for header in (None, "Bearer", "Bearer ", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer s3cret"):
        response = post(locked, None, JSON, *([("authorization", header)] if header else []))
        assert (response.status, response.error["code"]) == (401, "invalid_api_key")
        assert KEY not in response.body.decode()
    assert not file.exists()
    assert post(locked, None, JSON, ("authorization", f"bearer {KEY}")).status == 201
    shown = ask(locked, "GET", "/")
    assert shown and shown.status == 200 and b"tiny-merged" not in shown.body and KEY.encode() not in shown.body


@pytest.mark.parametrize(
    "kind",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=application/json"],
)
def test_what_a_form_of_another_site_can_send_is_refused(app: Page, file: Path, kind: str | None) -> None:
    response = post(app, None, *([("content-type", kind)] if kind is not None else [("x", "y")]))
    assert response.status == 415 and not file.exists()
    assert post(app, None, ("content-type", "Application/JSON; charset=utf-8")).status == 201


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
@pytest.mark.parametrize("server", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_name_of_another_site_reaches_nothing_on_loopback(app: Page, file: Path, host: str, server: str) -> None:
    for method, path in [
        ("GET", "/"),
        ("POST", "/v1/feedback"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
    ]:
        response = ask(app, method, path, told(), JSON, host=host, server=(server, 8000))
        assert response and response.status == 403 and "localhost" in response.error["message"]
    assert not file.exists()


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "localhost.:80", "a.localhost", "127.0.0.1", "127.9.9.9:1", "[::1]:8000"]
)
def test_loopbacks_own_names_do(app: Page, host: str) -> None:
    assert post(app, host=host).status == 201


@pytest.mark.parametrize("name", ["0.0.0.0", "[::]", "its own"])
def test_names_that_no_other_site_can_have_do_too(app: Page, name: str) -> None:
    """So one opens a server on all interfaces."""
    own = socket.gethostname() if name == "its own" else name
    assert post(app, host=f"{own}:8000", server=("127.0.1.1", 8000)).status == 201
    assert post(app, host=f"{own}.evil.example:8000").status == 403


def test_a_body_whose_length_is_said_twice_is_refused_and_ends_the_connection(app: Page, file: Path) -> None:
    for path in ("/v1/feedback", "/v1/chat/completions"):
        lengths = ("content-length", "4"), ("transfer-encoding", "chunked")
        response = ask(app, "POST", path, told(), JSON, *lengths)
        assert response and (response.status, response.headers["connection"]) == (400, "close")
    assert not file.exists()


def test_any_name_does_with_a_key_or_from_the_network(app: Page, locked: Page) -> None:
    assert post(locked, None, JSON, ("authorization", f"Bearer {KEY}"), host="chat.example").status == 201
    assert post(app, host="chat.example", server=("192.0.2.7", 8000)).status == 201


def test_what_is_wrong_is_told_in_openais_shape(app: Page, file: Path) -> None:
    response = post(app, told(rating="sideways"))
    assert response.status == 400
    assert response.error == {
        "message": "rating: must be `up` or `down`", "type": "invalid_request_error", "param": "rating", "code": None,
    }  # fmt: skip
    assert post(app, b"{").status == 400
    wrong = ask(app, "GET", "/v1/feedback")
    assert wrong and (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert not file.exists()


def test_a_body_that_is_too_large_is_refused_while_it_comes(app: Page, file: Path) -> None:
    parts = [b"x" * (1 << 20)] * 100
    response = post(app, parts)
    assert response.status == 413 and not file.exists()


def test_a_client_that_goes_in_mid_body_leaves_nothing(app: Page, file: Path) -> None:
    assert ask(app, "POST", "/v1/feedback", [told(), b""], JSON, gone=True) is None
    assert not file.exists()


def test_a_body_that_never_comes_is_not_waited_for(app: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BODY_TIMEOUT", 0.05)
    sent = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/feedback",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(app(scope, never, send))
    assert sent[0]["status"] == 408


def test_what_cannot_be_kept_is_not_said_to_be(app: Page, file: Path) -> None:
    file.parent.parent.mkdir(exist_ok=True)
    file.parent.write_text("a file where the record's folder should be")
    assert post(app).status == 507


# ── in another environment ───────────────────────────────────────────────────────────────────────────────────────────


def test_it_needs_nothing_but_the_standard_library_and_takes_its_settings_from_the_environment(tmp_path: Path) -> None:
    """As vLLM loads it: a class, by its name, called with the app alone; -S leaves site-packages out."""
    code = """
import importlib, inspect, sys
sys.path.insert(0, sys.argv[1])
module, name = "serving.page.page.PageOfEnvironment".rsplit(".", 1)
found = getattr(importlib.import_module(module), name)
assert inspect.isclass(found)
app = found("app")
print(app.model, app.contract, app.feedback, app._knows(b"Bearer k"), app._knows(b"Bearer n"))
"""
    environment = {
        "ALETHEIA_FEEDBACK": str(tmp_path / "f.jsonl"), "ALETHEIA_MODEL": "tiny", "ALETHEIA_CONTRACT": "c0ffee",
        "ALETHEIA_API_KEY": "k",
    }  # fmt: skip
    run: Callable[..., Any] = subprocess.run
    said = run([sys.executable, "-S", "-c", code, str(CHECKOUT)], env=environment, capture_output=True, text=True)
    assert said.stdout.split() == ["tiny", "c0ffee", str(tmp_path / "f.jsonl"), "True", "False"], said.stderr
