"""What the server does, counted: for its record, and for Prometheus at /metrics.

The text format 0.0.4 is a line a figure, so it is written here: its client library is no dependency of the project yet.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass
class Usage:
    """What the server has done, for the record. Each of `requests` was answered, or is in one of the next three."""

    requests: int = 0  # taken on, to be generated
    errors: int = 0  # the backend failed
    cut_off: int = 0  # the client left, or the server stopped
    timed_out: int = 0
    refused: int = 0  # never taken on: a mistake, no key, a full queue
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.time)


class Histogram:
    """Observations in seconds, counted up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    def __init__(self, usage: Usage) -> None:
        self.usage = usage
        self.answered: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.first_token, self.whole = Histogram(FIRST_TOKEN), Histogram(WHOLE)

    def text(self, running: int, waiting: int) -> str:
        usage = self.usage
        figures: list[tuple[str, str, str, Iterator[str] | int]] = [
            ("requests_total", "counter", "Requests by endpoint and status; 499: the client left.", self._by_status()),
            ("errors_total", "counter", "Requests that the backend failed.", usage.errors),
            ("cut_off_total", "counter", "Requests whose client left, or that a shutdown ended.", usage.cut_off),
            ("timeouts_total", "counter", "Requests that took longer than they may.", usage.timed_out),
            ("running", "gauge", "Answers that are generated now.", running),
            ("waiting", "gauge", "Answers that wait for their turn.", waiting),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", usage.prompt_tokens),
            ("completion_tokens_total", "counter", "Tokens generated.", usage.completion_tokens),
            ("first_token_seconds", "histogram", "From a request to its first token, waiting included.",
             self.first_token.lines("aletheia_first_token_seconds")),
            ("request_seconds", "histogram", "From a request to the end of its answer.",
             self.whole.lines("aletheia_request_seconds")),
        ]  # fmt: skip
        lines = []
        for name, kind, meaning, values in figures:
            lines += [f"# HELP aletheia_{name} {meaning}", f"# TYPE aletheia_{name} {kind}"]
            lines += [f"aletheia_{name} {values}"] if isinstance(values, int) else values
        return "\n".join(lines) + "\n"

    def _by_status(self) -> Iterator[str]:
        for (endpoint, status), count in sorted(self.answered.items()):
            yield f'aletheia_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
