"""The queue in front of the engine, without a server around it."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import ServeConfig
from serving.front.limits import Gate
from serving.front.protocol import ApiError


def gate(**options: Any) -> Gate:
    return Gate(ServeConfig(**options))


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


def refused(gate: Gate, answers: int) -> ApiError:
    with pytest.raises(ApiError) as raised, gate.request(answers):
        pass
    return raised.value


def test_places_are_counted_for_each_answer_and_come_back() -> None:
    async def scene() -> None:
        doors = gate(max_concurrent=2, max_waiting=1)
        with ExitStack() as held:
            held.enter_context(doors.request(2))
            full = refused(doors, 2)
            assert (full.status, full.code, full.headers) == (429, "rate_limit_exceeded", {"Retry-After": "1"})
            with doors.request(1):
                assert doors.waiting == 3
                assert str(refused(doors, 1)).startswith("3 answers are generated or wait, of 3 that may")
        assert (doors.waiting, doors.open) == (0, 0)
        assert refused(doors, 4).status == 400, "that many could never be taken"

    run(scene())


def test_an_answers_place_is_anothers_when_it_is_done_though_its_request_goes_on() -> None:
    async def scene() -> None:
        doors = gate(max_concurrent=1, max_waiting=1)
        with doors.request(2) as places:
            async with doors.slot(places):
                assert (doors.running, doors.waiting) == (1, 1)
                assert refused(doors, 1).status == 429
            with doors.request(1):
                assert (doors.running, doors.waiting) == (0, 2)
        assert doors.waiting == 0

    run(scene())


def test_slots_go_in_order_and_a_waiter_that_leaves_takes_none() -> None:
    async def scene() -> None:
        doors, order = gate(max_concurrent=1), []

        async def one(name: str) -> None:
            with doors.request(1) as places:
                async with doors.slot(places):
                    order.append(name)
                    await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(one(name)) for name in "abcd"]
        await asyncio.sleep(0.01)
        assert (doors.running, doors.waiting) == (1, 3)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a", "c", "d"]
        assert (doors.running, doors.waiting) == (0, 0)

    run(scene())


def test_retry_after_follows_recent_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        doors, clock = gate(max_concurrent=2, max_waiting=2), [0.0]
        monkeypatch.setattr("serving.front.limits.time", SimpleNamespace(monotonic=lambda: clock[0]))
        for _ in range(3):
            with doors.request(1) as places:
                async with doors.slot(places):
                    clock[0] += 30.0
        with doors.request(4) as places:
            async with AsyncExitStack() as running:
                await running.enter_async_context(doors.slot(places))
                await running.enter_async_context(doors.slot(places))
                assert refused(doors, 1).headers == {
                    "Retry-After": "45"
                }  # two wait: three turns of 30 s, two at a time

    run(scene())


def test_what_takes_too_long_ends_with_504() -> None:
    async def scene() -> None:
        doors = gate(request_timeout=0.05)
        with pytest.raises(ApiError) as raised:
            async with doors.in_time():
                await asyncio.sleep(5)
        assert (raised.value.status, raised.value.code) == (504, "timeout")

    run(scene())


@pytest.mark.parametrize("before", [True, False], ids=["entered before", "entered after"])
def test_draining_ends_what_runs_after_its_time_and_lets_no_more_in(before: bool) -> None:
    async def scene() -> None:
        doors = gate(drain_timeout=0.1)
        assert not doors.drained
        with doors.request(1):
            if not before:
                doors.drain()
            began = time.monotonic()
            with pytest.raises(ApiError) as raised:
                async with doors.in_time():
                    if before:
                        doors.drain()
                    closed = refused(doors, 1)
                    assert (closed.status, closed.headers) == (503, {"Retry-After": "1"})
                    assert not doors.drained
                    await asyncio.sleep(5)
            assert 0.05 < time.monotonic() - began < 1
            assert (raised.value.status, raised.value.code) == (503, "shutting_down")
        assert doors.drained

    run(scene())


def test_a_second_signal_ends_it_at_once() -> None:
    async def scene() -> None:
        doors = gate(drain_timeout=60)
        with pytest.raises(ApiError):
            async with doors.in_time():
                doors.drain()
                doors.drain(0)
                await asyncio.sleep(5)

    run(scene())
