"""Some pieces of work at once, in threads that nobody waits for: a run that is interrupted ends while they still wait."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def at_once(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[tuple[T, R]]:
    """Each item with what its work returned, in the order in which they come. Once it is closed, or work raises, no
    further one is begun; what is under way goes on by itself, and ends with the process.
    """
    waiting, done = deque(items), SimpleQueue[tuple[T, R | None, BaseException | None]]()

    def run() -> None:
        with suppress(IndexError):  # none is waiting
            while True:
                item = waiting.popleft()
                found, error = None, None
                try:
                    found = work(item)
                except BaseException as raised:
                    error = raised
                    waiting.clear()
                done.put((item, found, error))

    for _ in range(min(threads, len(items))):
        Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            item, found, error = done.get()
            if error:
                raise error
            yield item, found  # type: ignore[misc]
    finally:
        waiting.clear()
