"""From the generation thread to who waits: the newest result, and nothing for or of those who have left."""

import asyncio

import pytest
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from serving.transformers_backend.results import Router


def result(request: str, tokens: int, status: RequestStatus = RequestStatus.DECODING) -> GenerationOutput:
    return GenerationOutput(request, generated_tokens=[7] * tokens, status=status)


def test_a_slow_reader_finds_the_newest_result_alone() -> None:
    async def scene() -> tuple[int, int]:
        router = Router(pytest.fail)
        box = router.open("one")
        for tokens in (1, 2, 3):
            await asyncio.to_thread(router.deliver_batch, [result("one", tokens)])
        newest = await box.take(lambda: True)
        with pytest.raises(RuntimeError, match="has ended"):  # and then waits for a newer one
            await box.take(lambda: False)
        router.close("one")
        return len(newest.generated_tokens), len(router)

    assert asyncio.run(scene()) == (3, 0)


def test_what_still_runs_though_its_reader_has_left_is_cancelled() -> None:
    """Planted: a cancellation that the thread saw before the request itself is forgotten by transformers."""
    cancelled: list[str] = []
    router = Router(cancelled.append)
    router.deliver_batch([result("left", 1), result("done", 1, RequestStatus.FINISHED)])
    router.deliver(result("failed", 1, RequestStatus.FAILED))
    assert cancelled == ["left"] and router.output_queue.empty()


def test_a_loop_that_was_closed_does_not_end_the_thread() -> None:
    async def leave_open() -> Router:
        router = Router(pytest.fail)
        router.open("one")
        return router

    asyncio.run(leave_open()).deliver(result("one", 1))
