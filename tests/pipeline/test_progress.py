from types import SimpleNamespace

import pytest

from pipeline import progress
from pipeline.progress import LINE_EVERY, Progress, duration, say, track


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (1.26, "1.3 s"),
        (42, "42 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_notes_go_to_stderr_and_leave_stdout_to_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert list(track([1, 2], "counting")) == [1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hello\ncounting  2/2 rows  ")


def test_in_a_log_a_line_comes_every_few_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 40, "step") as task:
        for _ in range(30):
            clock.now += LINE_EVERY / 10
            task.advance(note="loss 1.0")
        lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training  10/40 steps  30 s left  loss 1.0",
        "training  20/40 steps  20 s left  loss 1.0",
        "training  30/40 steps  10 s left  loss 1.0",
    ]


def test_the_eta_of_a_resumed_task_counts_only_what_was_done_since(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("training", 100, "step", done=90) as task:
        clock.now += 20
        task.advance(95)
        assert capsys.readouterr().err == "training  95/100 steps  20 s left\n"


def test_a_task_that_stops_says_where(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Progress("dividing", 2, "batch") as task:
        clock.now += 2
        task.advance()
        raise ZeroDivisionError
    assert capsys.readouterr().err == "dividing  1/2 batches  stopped at 1/2 after 2.0 s\n"
