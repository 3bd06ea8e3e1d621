"""Prometheus' text format, read back as it is specified."""

import re

from serving.front.metrics import Histogram, Metrics, Usage

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="[^"\\\n]*",?)+)\})? (\S+)')


def read(text: str) -> dict[str, float]:
    """Samples by name and labels. Each belongs to the family that was announced before it."""
    found, family, kind = {}, "", ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == family
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()  # type: ignore[union-attr]
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert name in [family + suffix for suffix in suffixes]
            key = f"{name}{{{labels or ''}}}"
            assert key not in found
            found[key] = float(value)
    return found


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="0.1"} 2', 'x_bucket{le="1.0"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 7.65", "x_count 4",
    ]  # fmt: skip


def test_the_text_holds_all_that_was_counted() -> None:
    usage = Usage(errors=2, cut_off=3, timed_out=4, prompt_tokens=50, completion_tokens=60)
    metrics = Metrics(usage)
    metrics.answered["/v1/completions", 200] += 5
    metrics.answered["other", 404] += 1
    metrics.first_token.observe(0.02)
    found = read(metrics.text(running=7, waiting=8))
    assert found['aletheia_requests_total{endpoint="/v1/completions",status="200"}'] == 5
    assert found['aletheia_requests_total{endpoint="other",status="404"}'] == 1
    wanted = {"errors_total": 2, "cut_off_total": 3, "timeouts_total": 4, "running": 7, "waiting": 8}
    wanted |= {"prompt_tokens_total": 50, "completion_tokens_total": 60, "request_seconds_count": 0}
    assert {name: found[f"aletheia_{name}{{}}"] for name in wanted} == wanted
    assert found['aletheia_first_token_seconds_bucket{le="0.01"}'] == 0
    assert found['aletheia_first_token_seconds_bucket{le="0.025"}'] == 1
