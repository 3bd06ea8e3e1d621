"""Results on their way from the generation thread to the coroutines that wait for them.

transformers' own router keeps the handler of a cancelled request for ever, and every result until it is read. Here a
request that nobody waits for leaves nothing behind, and one whose reader is slow keeps its newest result only.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

ENDED = "the generation thread has ended"
PATIENCE = 1.0  # seconds without a token before one looks whether the thread still lives


class Mailbox:
    """The newest result of one request; it holds the whole answer so far."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._newest: GenerationOutput | None = None

    def put(self, result: GenerationOutput) -> None:
        self._newest = result
        self._arrived.set()

    async def take(self, alive: Callable[[], bool]) -> GenerationOutput:
        """Waits for a newer result. Raises `RuntimeError` when none can come any more."""
        while not self._arrived.is_set():
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._arrived.wait()
            except TimeoutError:
                if not alive() and not self._arrived.is_set():
                    raise RuntimeError(ENDED) from None
        self._arrived.clear()
        assert self._newest is not None
        return self._newest


class Router(OutputRouter):
    """`open` and `close` in the event loop, `deliver` and `deliver_batch` in the generation thread."""

    def __init__(self, cancel: Callable[[str], None]) -> None:
        super().__init__()
        self._cancel = cancel
        self._boxes: dict[str, Mailbox] = {}

    def __len__(self) -> int:
        return len(self._boxes)

    def open(self, request: str) -> Mailbox:
        self._boxes[request] = Mailbox()
        return self._boxes[request]

    def close(self, request: str) -> None:
        self._boxes.pop(request, None)

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        found = []
        for output in outputs:
            box = self._boxes.get(output.request_id)
            if box:
                found.append((box, output))
            elif not output.is_finished():  # its cancellation came before the request itself was seen, and was lost
                self._cancel(output.request_id)
        if found:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits; the thread must not end by it
                found[0][0].loop.call_soon_threadsafe(_hand_over, found)


def _hand_over(found: Sequence[tuple[Mailbox, GenerationOutput]]) -> None:
    for box, output in found:
        box.put(output)
