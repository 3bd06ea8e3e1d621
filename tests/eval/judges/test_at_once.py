"""Work in threads: all of it comes back, an error ends it, and nobody waits for what is under way."""

import threading

import pytest

from eval.judges.at_once import at_once


@pytest.mark.parametrize("threads", [1, 4, 100])
@pytest.mark.parametrize("n", [0, 1, 25])
def test_every_item_comes_back_once_with_its_result(n: int, threads: int) -> None:
    assert sorted(at_once(lambda item: item * item, range(n), threads)) == [(i, i * i) for i in range(n)]


def test_so_many_run_at_once_and_no_more() -> None:
    together = threading.Barrier(3)
    assert len(list(at_once(lambda item: together.wait(30), range(9), 3))) == 9, "or the barrier breaks"


def test_an_error_of_the_work_is_raised_and_ends_it() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        return 1 // (item - 2)

    with pytest.raises(ZeroDivisionError):
        list(at_once(work, range(50), 1))
    assert begun == [0, 1, 2]


def test_an_interrupted_run_does_not_wait_and_begins_nothing_more() -> None:
    hold, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item:
            assert hold.wait(30)

    before = set(threading.enumerate())
    running = at_once(work, range(50), 2)
    next(running)
    running.close()  # comes back, though both threads wait
    workers = set(threading.enumerate()) - before
    assert workers and all(thread.daemon for thread in workers)
    hold.set()
    for thread in workers:
        thread.join(30)
    assert len(begun) <= 3
