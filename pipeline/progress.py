"""What a person sees while work goes on: notes and progress with an ETA, all on stderr.

On a terminal a bar that redraws; elsewhere (a log, CI) a line every few seconds.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal


def say(text: str) -> None:
    """One note to the person, on stderr; stdout is for data."""
    _write(printable(text, but="\n\t") + "\n")


def printable(text: Any, but: str = "") -> str:
    """Nothing in it, `but` these, that a terminal would obey: it may come from a file that someone edited. So one line."""
    return "".join(letter if letter.isprintable() or letter in but else " " for letter in str(text))


def _write(text: str) -> None:
    """Where nobody reads any more (`… 2>&1 | head`), work goes on."""
    with suppress(BrokenPipeError):
        print(text, end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """A task of `total` units. `advance()` moves it; the ETA is the mean pace so far."""

    def __init__(self, description: str, total: int, unit: str = "row", done: int = 0) -> None:
        self.description, self.total = description, total
        self.units = unit if unit.isupper() else f"{unit}es" if unit.endswith("ch") else f"{unit}s"
        self.done = self.first = done
        self.note = ""
        self._started = self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        self._started = self._drawn = time.monotonic()
        return self

    def advance(self, done: int | None = None, note: str = "") -> None:
        self.done = self.done + 1 if done is None else done
        self.note = note or self.note
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self._drawn < (0.1 if terminal else LINE_EVERY):
            return
        self._drawn = now
        line = f"{self.description}  {self.done}/{self.total} {self.units}{self.eta(now)}  {self.note}".rstrip()
        if terminal:
            _write(f"\r\x1b[K{line}")
        else:
            say(line)

    def eta(self, now: float) -> str:
        moved = self.done - self.first
        if not moved:
            return ""
        return f"  {duration((now - self._started) / moved * (self.total - self.done))} left"

    def __exit__(self, error: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if sys.stderr.isatty():
            _write("\r\x1b[K")
        took = duration(time.monotonic() - self._started)
        ending = f"{took}" if error is None else f"stopped at {self.done}/{self.total} after {took}"
        say(f"{self.description}  {self.done}/{self.total} {self.units}  {ending}  {self.note}".rstrip())


def track(items: Iterable[T], description: str, unit: str = "row") -> Iterator[T]:
    """Yields `items` (which must have a length) and shows how far one is."""
    with Progress(description, len(items), unit) as progress:  # type: ignore[arg-type]
        for item in items:
            yield item
            progress.advance()
