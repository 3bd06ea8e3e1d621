"""What the engine refuses, what ends early and what fails: nothing is left behind, and nobody is kept waiting."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipeline.chat import Chat
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.transformers_backend.asking import answer, prompts


async def within(seconds: float, fulfilled: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not fulfilled() and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return fulfilled()


def is_idle(engine: TransformersEngine) -> bool:
    total, free = engine.cache_bytes
    return engine.requests == 0 and free == total


def test_what_could_never_be_answered_is_refused_and_others_are_not_touched(
    engine: TransformersEngine, tuned_chat: Chat
) -> None:
    """Planted: a token that the model does not have would end the generation thread."""
    vocabulary = engine._vocabulary
    wrong = [
        ([], Sampling(1)),
        ([vocabulary], Sampling(1)),
        ([-1], Sampling(1)),
        ([1] * 2000, Sampling(49)),
        ([1], Sampling(1, top_logprobs=-1)),
        ([1], Sampling(1, temperature=-1.0)),
    ]

    async def refused(prompt: list[int], sampling: Sampling) -> bool:
        with pytest.raises(ValueError):
            await answer(engine, prompt, sampling)
        with pytest.raises(ValueError):
            await engine.score(prompt * 2, 0)
        return True

    async def scene() -> tuple[Answer, list[bool]]:
        other = asyncio.create_task(answer(engine, prompts(tuned_chat, 1)[0], Sampling(24, 0.0)))
        await asyncio.sleep(0.05)
        return await other, [await refused(*request) for request in wrong[:4]]

    found, answers = asyncio.run(scene())
    alone = asyncio.run(answer(engine, prompts(tuned_chat, 1)[0], Sampling(24, 0.0)))
    assert found.tokens == alone.tokens and found.tokens and all(answers)
    for prompt, sampling in wrong[4:]:
        with pytest.raises(ValueError):
            asyncio.run(answer(engine, prompt, sampling))
    assert engine.alive and is_idle(engine)


def test_closing_an_answer_frees_its_place_and_its_cache_at_once(
    start: Callable[..., TransformersEngine], model: Any, tuned_chat: Chat
) -> None:
    """Planted: cancelled at any moment, also before the thread has seen the request."""
    engine = start(model, max_concurrent=2)

    async def leave(after: float) -> None:
        asked = engine.generate(prompts(tuned_chat, 2)[1], Sampling(1500, 1.0, top_logprobs=2))
        if after:
            await anext(asked)
            await asyncio.sleep(after)
            await asked.aclose()
        else:
            task = asyncio.create_task(anext(asked))
            await asyncio.sleep(0)
            task.cancel()

    async def scene() -> tuple[bool, float]:
        for after in (0, 0.001, 0.01, 0.03, 0):
            await asyncio.gather(*(leave(after) for _ in range(6)))
        idle = await within(5, lambda: is_idle(engine))
        began = time.monotonic()
        await answer(engine, [1, 2, 3], Sampling(2, 0.0))
        return idle, time.monotonic() - began

    idle, seconds = asyncio.run(scene())
    assert idle
    assert seconds < 1, "both places were free"
    assert not engine._drawer._told and engine._manager.output_router.output_queue.empty()


def test_one_that_waits_and_leaves_does_not_get_its_turn(
    start: Callable[..., TransformersEngine], model: Any, tuned_chat: Chat
) -> None:
    engine = start(model, max_concurrent=1)
    waiting = engine._manager.batch_processor.scheduler.waiting_requests

    async def scene() -> tuple[bool, bool]:
        running = asyncio.create_task(answer(engine, [1, 2, 3], Sampling(1500, 0.0)))
        await asyncio.sleep(0.1)
        late = [asyncio.create_task(answer(engine, [1, 2, 3], Sampling(1500, 0.0))) for _ in range(3)]
        came = await within(10, lambda: len(waiting) == 3)
        for task in late:
            task.cancel()
        left = await within(2, lambda: not waiting and not running.done())
        running.cancel()
        return came, left

    assert asyncio.run(scene()) == (True, True)


async def outcome(asked: Awaitable[Any]) -> Any:
    """Its result, or what went wrong; never waits for ever."""
    try:
        return await asyncio.wait_for(asked, timeout=30)
    except RuntimeError as error:
        return str(error)


def test_a_stopped_engine_refuses_instead_of_keeping_one_waiting(
    model: Any, start: Callable[..., TransformersEngine]
) -> None:
    engine = start(model, max_concurrent=1)

    async def scene() -> list[Any]:
        running = [asyncio.create_task(outcome(answer(engine, [1, 2, 3], Sampling(1500, 0.0)))) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert engine.alive
        engine.stop()
        return [await task for task in running]

    assert all("before this request completed" in error for error in asyncio.run(scene()))
    assert not engine.alive
    assert asyncio.run(outcome(answer(engine, [1, 2, 3], Sampling(4)))) == "the generation thread has ended"
    assert "shutdown" in asyncio.run(outcome(engine.score([1, 2, 3], 0)))


@pytest.mark.parametrize("silently", [False, True])
def test_a_model_that_breaks_fails_every_request_and_shows(
    start: Callable[..., TransformersEngine], model: Any, monkeypatch: pytest.MonkeyPatch, silently: bool
) -> None:
    """Planted: also a thread that ends without telling anyone."""

    def breaks(*_: Any) -> None:
        raise RuntimeError("out of memory")

    engine = start(model, max_concurrent=2)
    if silently:
        monkeypatch.setattr(engine._manager, "_fail_all_remaining_requests", lambda *_: None)

    async def scene() -> list[Any]:
        running = [asyncio.create_task(outcome(answer(engine, [1, 2, 3], Sampling(1500, 0.0)))) for _ in range(5)]
        await asyncio.sleep(0.1)
        hook = model.register_forward_pre_hook(breaks)
        try:
            failed = [await task for task in running]
            assert await within(10, lambda: not engine.alive)
            late = [await outcome(answer(engine, [1, 2, 3], Sampling(4))), await outcome(engine.score([1, 2, 3], 0))]
            return [*failed, *late]
        finally:
            hook.remove()

    ended = "the generation thread has ended"
    *failed, late, scored = asyncio.run(scene())
    assert failed == [ended if silently else "out of memory"] * 5
    assert (late, scored) == (ended, "Cannot pause generation while no generation loop is running.")
