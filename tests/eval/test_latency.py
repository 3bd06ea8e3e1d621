"""Latency: what guidellm measured is told as it is, with its intervals, and not more than n allows."""

import copy
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval import latency
from eval.evaluate import Evaluate
from eval.latency import figures, percentile, table
from pipeline.errors import StageFailed, UserError
from pipeline.statistics import Figure
from tests.serving.processes import runs, until

if TYPE_CHECKING:
    from tests.conftest import Trained

REAL = Path(__file__).with_name("latency-closed.json")  # a run of 40 requests, two of which the server refused


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(REAL.read_text("utf-8"))  # type: ignore[no-any-return]


def repeated(report: dict[str, Any], times: int) -> dict[str, Any]:
    """As if as many more requests had been answered."""
    found = copy.deepcopy(report)
    found["benchmarks"][0]["requests"]["successful"] *= times
    return found


def test_a_real_run_is_told_as_it_was(report: dict[str, Any]) -> None:
    found, benchmark = figures(report), report["benchmarks"][0]
    answered, metrics = benchmark["requests"]["successful"], benchmark["metrics"]
    assert (found["answered"], found["failed"]) == (38, 2)
    for key, theirs, unit in (("ttft_ms", "time_to_first_token_ms", 1), ("e2e_ms", "request_latency", 1000)):
        ours = found[key]["p50"]
        assert ours["value"] == pytest.approx(sorted(unit * r[theirs] for r in answered)[18], abs=1e-3)
        assert ours["ci_low"] < unit * metrics[theirs]["successful"]["percentiles"]["p50"] < ours["ci_high"]
    span = max(r["request_end_time"] for r in answered) - min(r["request_start_time"] for r in answered)
    tokens = sum(r["output_tokens"] for r in answered)
    assert found["tokens_per_second"] == pytest.approx(tokens / span, rel=0.1)
    assert found["requests_per_second"] == pytest.approx(len(answered) / span, rel=0.1)
    assert found["output_tokens"] == pytest.approx(tokens / len(answered), rel=1e-3)


def test_goodput_counts_failures_and_what_was_too_slow(report: dict[str, Any]) -> None:
    benchmark = report["benchmarks"][0]
    slo = benchmark["config"]["slo"]
    good = sum(
        r["time_to_first_token_ms"] <= slo["ttft_ms"] and r["inter_token_latency_ms"] <= slo["tpot_ms"]
        for r in benchmark["requests"]["successful"]
    )
    share = figures(report)["goodput"]
    assert 0 < good < 38, "the limits of this run part its answers"
    assert (share["value"], share["n"]) == (pytest.approx(good / 40), 40)
    assert share["ci_low"] < share["value"] < share["ci_high"]


def test_no_percentile_is_said_of_too_few(report: dict[str, Any]) -> None:
    assert set(figures(report)["ttft_ms"]) == {"p50"}
    assert figures(report)["not_said"][:2] == [
        "no p95: 200 answers are needed, there are 38",
        "no p99: 1,000 answers are needed, there are 38",
    ]
    assert set(figures(repeated(report, 6))["ttft_ms"]) == {"p50", "p95"}
    many = figures(repeated(report, 27))
    assert set(many["itl_ms"]) == {"p50", "p95", "p99"} and not many["not_said"]


def test_the_table_is_aligned_and_says_nothing_in_place_of_what_is_not_said(report: dict[str, Any]) -> None:
    lines = table({"closed": figures(report), "open": figures(repeated(report, 6))})
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "closed loop, to the first token, ms",
        "closed loop, between tokens, ms",
        "closed loop, end to end, ms",
    ]
    assert all(line.endswith("–") for line in lines[1:])
    assert len({line.index("[") for line in lines[1:]} | {lines[0].index("p50")}) >= 1
    assert all(line[lines[0].index("p99")] == "–" for line in lines[1:])


def test_a_server_that_answered_nothing_is_a_failure_in_its_own_words(report: dict[str, Any]) -> None:
    report["benchmarks"][0]["requests"]["successful"] = []
    with pytest.raises(StageFailed, match=r"no request was answered: .*400"):
        figures(report)


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_intervals_hold_the_true_percentile_as_often_as_they_say(quantile: float) -> None:
    truth, drawn = -math.log(1 - quantile), random.Random(7)
    held = []
    for _ in range(400):
        figure = percentile([drawn.expovariate(1.0) for _ in range(200)], quantile)
        assert figure.ci_low is not None and figure.ci_high is not None
        assert figure.ci_low <= figure.value <= figure.ci_high
        held.append(figure.ci_low <= truth <= figure.ci_high)
    assert statistics.mean(held) >= 0.93  # at least 0.95, three standard errors allowed


def test_a_percentile_is_one_of_the_values_and_has_no_interval_where_n_is_too_small() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == Figure(value=2.0, n=3)
    hundred = [float(i) for i in range(1, 101)]
    assert percentile(hundred, 0.95).value == 95.0
    assert percentile(hundred[:30], 0.95).ci_high is None


# ── the tool ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_the_tool_nothing_is_started_and_the_remedy_is_said(
    trained: "Trained", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALETHEIA_LATENCY", str(tmp_path))
    with pytest.raises(UserError, match="is not installed; try make setup-latency"):
        Evaluate.prepare(trained.job(parts=("latency",)))


def test_a_tool_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="guidellm: the second line"):
        latency._run(["sh", "-c", "echo first; echo the second line >&2; exit 3"], tmp_path)


def test_what_the_tool_started_does_not_stay(tmp_path: Path) -> None:
    latency._run(["sh", "-c", "sleep 600 & echo $! > child"], tmp_path)
    number = int((tmp_path / "child").read_text())
    until(lambda: not runs(number))


def installed() -> bool:
    try:
        return latency.guidellm().exists()
    except UserError:
        return False


@pytest.fixture(scope="module")
def address(trained: "Trained") -> Iterator[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.chat import Chat
    from pipeline.config import ServeConfig
    from serving.front.app import Usage, build_app
    from serving.transformers_backend.engine import TransformersEngine
    from tests.serving.in_process import serving

    folder = trained.output("merge")
    chat = Chat(AutoTokenizer.from_pretrained(folder), "merged")
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder).eval(), chat, 2048, 4)
    with serving(build_app(engine, "small-merged", ServeConfig(), Usage(), "secret")) as address:
        yield address


@pytest.mark.skipif(not installed(), reason="guidellm is not installed; make setup-latency")
def test_both_loops_are_measured_over_http_and_the_key_stays_secret(
    copied: "Trained", address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stage import run_stage

    monkeypatch.setenv("ALETHEIA_API_KEY", "secret")
    load = (
        "latency_requests=12",
        "latency_tokens=8",
        "latency_concurrency=3",
        "latency_rate=20",
        f"endpoint={address}",
    )
    record = run_stage(Evaluate, copied.job(*(f"eval_config.{key}" for key in load), parts=("latency",)))
    assert set(record.facts.results) == {"model", "against", "latency"}
    found = record.facts.results["latency"]
    assert (found["tool"], found["model"]) == ("guidellm 0.8.1", "small-merged")
    for loop in ("closed", "open"):
        assert (found[loop]["answered"], found[loop]["failed"]) == (12, 0)
        assert found[loop]["ttft_ms"]["p50"]["value"] < found[loop]["e2e_ms"]["p50"]["value"]
        report = (record.folder / f"latency-{loop}.json").read_text("utf-8")
        assert "secret" not in report
        assert len(json.loads(report)["benchmarks"][0]["requests"]["successful"]) == 12
    assert (found["closed"]["concurrency"], found["open"]["rate"]) == (3, 20.0)
