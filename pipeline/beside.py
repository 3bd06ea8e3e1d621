"""Work done beside what the program goes on with.

Of what waits for the disk, or computes long outside Python: in a thread. Of many small operations: in processes, since
threads of these wait for one another in Python.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from threading import Thread
from typing import Any, TypeVar

from pipeline.errors import StageFailed

T = TypeVar("T")
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)

_work: Callable[[Any], Any]  # of a process beside


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Begins it in a thread. What is returned waits for its result, or raises what it raised; the program's end does not."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result


def in_a_process(work: Callable[[], T]) -> T:
    """What it gives or raises, in a process whose memory ends with it: many small objects leave this one's in pieces."""
    [(_, found)] = in_processes(lambda _: work(), [""], 1, remedy="")
    return found


def in_processes(
    work: Callable[[str], T], items: Iterable[str], cores: int, remedy: str = "--resume"
) -> Iterator[tuple[str, T]]:
    """Each item, as it comes, with what `work` gives for it; in their order.

    Forked, they know what this process knows, and share the memory of it. They end with it, however it ends. Raises what
    `work` raises, and `StageFailed` when one of them is killed.
    """
    pool = ProcessPoolExecutor(cores, get_context("fork"), _begin, (work, os.getpid()))
    running, before = deque[tuple[str, Future[T]]](), active_children()
    try:
        pool.submit(int).result()  # they are forked now: before `items` has threads that hold locks
        for item in items:
            running.append((item, pool.submit(_do, item)))
            while running and running[0][1].done():
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()
    except BaseException as error:
        for process in active_children():  # one that was killed may hold a lock that the others would wait for
            if process not in before:
                process.kill()
        if isinstance(error, BrokenProcessPool):
            what = "a process beside this one was killed, perhaps for want of memory"
            raise StageFailed(what, remedy=remedy) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[str], Any], parent: int) -> None:
    global _work
    _work = work
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent heeds them, and ends this process
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _do(item: str) -> Any:
    return _work(item)
