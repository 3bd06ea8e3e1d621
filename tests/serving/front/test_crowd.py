"""Many at once, late, slow and gone: over sockets, with an engine whose answers take as long as the test says."""

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from pipeline.chat import Chat
from pipeline.config import ServeConfig
from serving.front import limits
from serving.front.app import Usage, build_app
from tests.serving.front.scripted_engine import CHAT, CHATS, Scripted, content, error_of, events
from tests.serving.in_process import serving


class Scene:
    """A server whose engine never ends by itself, and clients of it."""

    def __init__(self, chat: Chat, pace: float = 60.0, text: str = "word " * 500, **options: Any) -> None:
        self.engine, self.usage = Scripted(chat, text, pace=pace), Usage()
        self.app = build_app(self.engine, "scripted", ServeConfig(**options), self.usage)
        self.gate = self.app.state.gate

    async def until(self, running: int, waiting: int = 0) -> None:
        """Raises where it never comes to that."""
        async with asyncio.timeout(5):
            while (self.engine.running, self.gate.running, self.gate.waiting) != (running, running, waiting):
                await asyncio.sleep(0.005)


def play(scene: Scene, act: Any) -> None:
    with serving(scene.app) as address:

        async def playing() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=address.removesuffix("/v1"), timeout=10, limits=limits) as http:
                await act(http)

        asyncio.run(asyncio.wait_for(playing(), 30))


def test_so_many_run_so_many_wait_and_more_are_told_when_to_come_again(chat: Chat) -> None:
    scene = Scene(chat, max_concurrent=2, max_waiting=1)

    async def act(http: httpx.AsyncClient) -> None:
        held = [asyncio.create_task(http.post(CHATS, json=CHAT | {"n": n})) for n in (1, 2)]
        await scene.until(2, 1)
        for request in (CHAT, CHAT | {"stream": True}):
            response = await http.post(CHATS, json=request)
            assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
            assert int(response.headers["retry-after"]) >= 1
        assert (await http.get("/ready")).status_code == 200
        metrics = (await http.get("/metrics")).text
        assert "aletheia_running 2\n" in metrics
        assert "aletheia_waiting 1\n" in metrics
        for task in held:
            task.cancel()
        await scene.until(0)
        scene.engine.pace = 0
        assert (await http.post(CHATS, json=CHAT | {"n": 3})).status_code == 200

    play(scene, act)
    assert scene.engine.most == 2
    assert (scene.usage.refused, scene.usage.cut_off, scene.usage.requests) == (2, 2, 3)


@pytest.mark.parametrize("streamed", [False, True], ids=["waiting for the whole", "in mid-stream"])
def test_who_leaves_frees_the_slot_at_once_also_from_the_queue(chat: Chat, streamed: bool) -> None:
    scene = Scene(chat, pace=0.02, max_concurrent=1)

    async def act(http: httpx.AsyncClient) -> None:
        async def ask() -> None:
            async with http.stream("POST", CHATS, json=CHAT | {"stream": streamed}) as response:
                async for _ in response.aiter_lines():
                    pass

        first = asyncio.create_task(ask())
        await scene.until(1)
        second, third = asyncio.create_task(ask()), asyncio.create_task(ask())
        await scene.until(1, 2)
        second.cancel()
        await scene.until(1, 1)
        if streamed:
            await asyncio.sleep(0.1)
        began = time.monotonic()
        first.cancel()
        await scene.until(1, 0)
        assert len(scene.engine.asked) == 2, "the one who left the queue never ran"
        third.cancel()
        await scene.until(0)
        assert time.monotonic() - began < 1

    play(scene, act)
    assert (scene.usage.requests, scene.usage.cut_off) == (3, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_ends_with_504_and_frees_the_slot(chat: Chat, stream: bool) -> None:
    scene = Scene(chat, max_concurrent=1, request_timeout=0.3)

    async def act(http: httpx.AsyncClient) -> None:
        both = [http.post(CHATS, json=CHAT | {"stream": stream}) for _ in range(2)]  # one waits all the time
        for response in await asyncio.gather(*both):
            assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        await scene.until(0)

    play(scene, act)
    assert (scene.usage.timed_out, scene.usage.requests, scene.usage.errors) == (2, 2, 0)


def test_in_mid_stream_lateness_is_told_in_the_stream(chat: Chat) -> None:
    scene = Scene(chat, pace=0.05, request_timeout=0.3)

    async def act(http: httpx.AsyncClient) -> None:
        response = await http.post(CHATS, json=CHAT | {"stream": True})
        *parts, last = events(response.text)
        assert response.status_code == 200
        assert content(parts).startswith("word word")
        assert last["error"]["code"] == "timeout"
        await scene.until(0)
        client = openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="longer"):
            async for _ in await client.chat.completions.create(**CHAT, stream=True):
                pass
        await client.close()

    play(scene, act)
    assert scene.usage.timed_out == 2


def raw(address: httpx.URL, head: str, body: bytes) -> socket.socket:
    connection = socket.create_connection((address.host, address.port or 80), timeout=10)
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", head, "", ""]
    connection.sendall("\r\n".join(lines).encode() + body)
    return connection


def status_of(connection: socket.socket) -> int:
    with connection:
        return int(connection.recv(4096).split(b" ")[1])


def test_who_sends_slowly_holds_no_slot_and_is_sent_away_in_time(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT", 0.5)
    scene = Scene(chat, pace=0, text="one", max_concurrent=1, max_waiting=0)

    async def act(http: httpx.AsyncClient) -> None:
        began = time.monotonic()
        slow = [raw(http.base_url, "Content-Length: 1000", b'{"model"') for _ in range(3)]
        headers_only = socket.create_connection((http.base_url.host, http.base_url.port or 80))
        headers_only.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        assert (await http.post(CHATS, json=CHAT)).status_code == 200
        assert [await asyncio.to_thread(status_of, connection) for connection in slow] == [408] * 3
        assert time.monotonic() - began < 5
        headers_only.close()

    play(scene, act)
    assert scene.usage.requests == 1


def test_a_body_over_the_limit_is_refused_however_it_comes(chat: Chat) -> None:
    scene = Scene(chat, pace=0, text="one", max_body_mb=0.01)
    big = json.dumps(CHAT | {"user": "x" * 20_000}).encode()

    async def act(http: httpx.AsyncClient) -> None:
        async def in_parts() -> Any:
            for start in range(0, len(big), 1000):
                yield big[start : start + 1000]

        headers = {"content-type": "application/json"}
        for sent in (big, in_parts()):
            response = await http.post(CHATS, content=sent, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        for head, body in (
            ("Content-Length: 999999999999", b"{"),
            ("Transfer-Encoding: chunked", b"ffffff\r\n" + b"x" * 20_000),
        ):
            assert await asyncio.to_thread(status_of, raw(http.base_url, head, body)) == 413
        short = json.dumps(CHAT).encode()
        lying = raw(http.base_url, f"Content-Length: {len(short) - 5}", short)
        assert await asyncio.to_thread(status_of, lying) == 400
        assert (await http.post(CHATS, json=CHAT)).status_code == 200

    play(scene, act)


def test_a_client_that_leaves_before_its_body_is_there_is_nobodys_fault(chat: Chat) -> None:
    scene = Scene(chat, pace=0, text="one")

    async def act(http: httpx.AsyncClient) -> None:
        raw(http.base_url, "Content-Length: 1000", b"{").close()
        await asyncio.sleep(0.05)
        assert 'status="499"} 1' in (await http.get("/metrics")).text

    play(scene, act)
    assert (scene.usage.errors, scene.usage.requests) == (0, 0)


def test_while_a_long_prompt_is_tokenised_others_are_served(chat: Chat) -> None:
    class Slow:
        """A chat whose long prompts take half a second."""

        def __getattr__(self, name: str) -> Any:
            return getattr(chat, name)

        def prompt(self, messages: Any) -> list[int]:
            time.sleep(0.5)
            return chat.prompt(messages[:1])[:10]

    scene = Scene(Slow(), pace=0, text="one")  # type: ignore[arg-type]

    async def act(http: httpx.AsyncClient) -> None:
        long = CHAT | {"messages": [{"role": "user", "content": "word " * 5000}]}
        asked = asyncio.create_task(http.post(CHATS, json=long))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        assert (await http.get("/health")).status_code == 200
        assert time.monotonic() - began < 0.3
        assert not asked.done()
        assert (await asked).status_code == 200

    play(scene, act)
