"""Many clients at once over HTTP, some of them rude: everyone else is answered, and nothing is left behind."""

import asyncio
import gc
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from transformers import AutoModelForCausalLM

from pipeline.chat import Chat
from pipeline.config import ServeConfig
from pipeline.data.rows import Message
from serving.front.app import Usage, build_app
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.in_process import serving

if TYPE_CHECKING:
    from tests.conftest import Trained

REQUESTS, CLIENTS, TOKENS, CONTEXT = 200, 64, 8, 1024
ASKED = [f"What is {noun}?" for noun in ("an index", "a lock", "a queue", "a cache", "a shard", "a pod")]
LEFT_BEHIND = ("RequestState", "GenerationOutput", "Mailbox")
Body = dict[str, Any]
JSON = {"content-type": "application/json"}


@dataclass
class Served:
    address: str
    engine: TransformersEngine
    answers: dict[str, str]  # to each question, alone

    async def settled(self) -> bool:
        """Whether within some seconds nothing is under way and all of the cache is free."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            total, free = self.engine.cache_bytes
            if free == total and self.engine.requests == 0:
                return True
            await asyncio.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def served(trained: "Trained", tuned_chat: Chat, greedy: Callable[..., list[int]]) -> Iterator[Served]:
    folder = trained.output("merge")
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder).eval(), tuned_chat, CONTEXT, 16)

    def alone(question: str) -> str:
        tokens = greedy(folder, tuned_chat.prompt([Message(role="user", content=question)]), TOKENS)
        return str(tuned_chat.tokenizer.decode(tokens, skip_special_tokens=True))

    with serving(build_app(engine, "small", ServeConfig(), Usage())) as address:
        yield Served(address, engine, {question: alone(question) for question in ASKED})


def body(question: str, **more: Any) -> Body:
    messages = [{"role": "user", "content": question}]
    return {"model": "small", "messages": messages, "max_tokens": TOKENS, "temperature": 0} | more


def malformed(number: int) -> bytes:
    good = body(ASKED[0])
    wrong: list[Body] = [
        {k: v for k, v in good.items() if k != "messages"},
        good | {"model": "gpt-4"},
        good | {"temperature": -1},
        good | {"max_tokens": "many"},
        body("word " * 2 * CONTEXT),
    ]
    kinds = [b"{not json", *(json.dumps(request).encode() for request in wrong)]
    return kinds[number % len(kinds)]


async def one(http: httpx.AsyncClient, served: Served, number: int) -> str:
    """What became of it: answered, refused, cut off; anything else is a finding."""
    question = ASKED[number % len(ASKED)]
    if number % 10 == 3:
        response = await http.post("/chat/completions", content=malformed(number // 10), headers=JSON)
        told = response.status_code in (400, 404, 413, 422) and response.json()["error"]["message"]
        return "refused" if told else f"{response.status_code}: {response.text}"
    if number % 10 == 7:  # a long answer, left after its first words
        long = body(question, stream=True, max_tokens=400, temperature=1.0)
        async with http.stream("POST", "/chat/completions", json=long) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return "cut off"
        return "it ended by itself"
    if number % 2:
        response = await http.post("/chat/completions", json=body(question))
        text = response.json()["choices"][0]["message"]["content"]
    else:
        async with http.stream("POST", "/chat/completions", json=body(question, stream=True)) as response:
            events = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        text = "".join(json.loads(e)["choices"][0]["delta"].get("content") or "" for e in events[:-1])
    return "answered" if text == served.answers[question] else f"{question} {text!r}"


async def wave(served: Served, requests: int) -> Counter[str]:
    """`CLIENTS` at once, each with its next request as soon as it has the last answer."""
    numbers = list(range(requests))
    random.Random(1).shuffle(numbers)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=served.address, timeout=60, limits=limits) as http:

        async def client() -> list[str]:
            found = []
            while numbers:
                found.append(await one(http, served, numbers.pop()))
            return found

        outcomes = await asyncio.gather(*(client() for _ in range(CLIENTS)))
    assert await served.settled(), f"{served.engine.requests} under way, cache {served.engine.cache_bytes}"
    return Counter(outcome for found in outcomes for outcome in found)


def test_every_good_request_of_many_is_answered_rightly_and_no_slot_is_lost(served: Served) -> None:
    outcomes = asyncio.run(wave(served, REQUESTS))
    assert outcomes == {"answered": REQUESTS * 8 // 10, "refused": REQUESTS // 10, "cut off": REQUESTS // 10}
    assert served.engine.alive


def left_behind() -> int:
    gc.collect()
    return sum(type(thing).__name__ in LEFT_BEHIND for thing in gc.get_objects())


def test_memory_stays_flat_over_wave_after_wave(served: Served) -> None:
    asyncio.run(wave(served, 20))  # touches the cache's pages once
    process, found = psutil.Process(), []
    for _ in range(3):
        asyncio.run(wave(served, 20))
        found.append((left_behind(), threading.active_count(), process.memory_info().rss))
    objects, threads, memory = zip(*found, strict=True)
    assert max(objects) <= 2 * 16, "no more than the last pass had"
    assert len(set(threads)) == 1
    assert memory[-1] - memory[0] < 16e6
