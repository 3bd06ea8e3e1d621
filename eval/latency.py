"""A server under load: time to the first token, between tokens and end to end, throughput and goodput.

    aletheia eval latency --profile tiny
    aletheia eval latency --profile tiny --endpoint http://127.0.0.1:8000/v1

guidellm measures (pinned in requirements-latency.txt, in .venv-latency by `make setup-latency`), as a child and twice.
Closed loop: so many requests are always under way, each answer makes room for the next one. Open loop: requests come at
a fixed rate and random times (Poisson), answered or not, as people's do. What it measured lies beside the record,
request by request: latency-closed.json, latency-open.json.

Ours are the percentiles with their intervals, from order statistics, and what is not said: no p95 of fewer than 200
answers, no p99 of fewer than 1,000. Percentiles are over what was answered; what failed is counted beside them.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import statistics
from pipeline.config import EvalConfig
from pipeline.data.rows import Message
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.statistics import Figure
from pipeline.workspace import CHECKOUT, INSTALLED
from serving.endpoint import REQUEST_TIMEOUT, Endpoint, Lacks

NEEDED = {"p50": (0.50, 1), "p95": (0.95, 200), "p99": (0.99, 1000)}  # the quantile, and answers that it takes
TIMES = {"ttft_ms": "to the first token, ms", "itl_ms": "between tokens, ms", "e2e_ms": "end to end, ms"}
LATE = 0.1  # of what is measured: guidellm's own delays above this are told
OPEN_SHARE = 0.7  # of the closed loop's throughput: busy, and not beyond what the server can do


def guidellm() -> Path:
    """Raises `UserError` where it is not installed."""
    folder = Path(os.environ.get("ALETHEIA_LATENCY") or CHECKOUT / ".venv-latency")
    command = folder / "bin" / "guidellm"
    if not (command.exists() and (folder / INSTALLED).exists()):
        raise UserError(
            "guidellm, which measures it, is not installed", where="eval latency", remedy="make setup-latency"
        )
    return command


def measure(endpoint: Endpoint, prompts: Sequence[str], config: EvalConfig, folder: Path) -> dict[str, Any]:
    """Both loops, each over `latency_requests` of the prompts in turn, greedy. Raises `StageFailed` with guidellm's words."""
    try:  # it answers, and its first pass is behind it
        endpoint.chat([Message(role="user", content=prompts[0])], max_tokens=1)
    except Lacks as why:
        raise StageFailed(f"{endpoint.root}/v1/chat/completions: {why}") from None
    closed = _loop(endpoint, prompts, config, {"kind": "concurrent", "streams": config.latency_concurrency}, folder)
    rate = config.latency_rate or _short(OPEN_SHARE * closed["figures"]["requests_per_second"])
    opened = _loop(endpoint, prompts, config, {"kind": "poisson", "rate": rate}, folder)
    distinct = len(set(itertools.islice(prompts, config.latency_requests)))
    if distinct < config.latency_requests:
        say(f"note: {distinct} distinct prompts, repeated: a server that caches prefixes answers the repeats sooner")
    return {
        "tool": closed["tool"],
        "endpoint": endpoint.root,
        "model": endpoint.model,
        "distinct_prompts": distinct,
        "limits": {"ttft_ms": config.ttft_limit_ms, "itl_ms": config.itl_limit_ms},
        "closed": {"concurrency": config.latency_concurrency} | closed["figures"],
        "open": {"rate": rate} | opened["figures"],
    }


def table(results: dict[str, Any]) -> list[str]:
    """Aligned lines for a person."""
    rows: list[tuple[str, ...]] = [("", *NEEDED)]
    for loop in ("closed", "open"):
        found = results[loop]
        for key, label in TIMES.items():
            cells = (_text(found[key][name]) if name in found.get(key, {}) else "–" for name in NEEDED)
            rows.append((f"{loop} loop, {label}", *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def tell(results: dict[str, Any]) -> None:
    for line in table(results):
        say(line)
    limits = results["limits"]
    for loop, load in (("closed", "concurrency"), ("open", "rate")):
        found = results[loop]
        how = f"{found[load]} at once" if load == "concurrency" else f"{found[load]:g} requests/s"
        said = f"{loop} loop, {how}: {found['answered']} answered, {found['failed']} failed"
        say(f"{said}; {found['requests_per_second']:.3g} requests/s, {found['tokens_per_second']:.3g} tokens/s")
        if share := found.get("goodput"):
            ends = f"{share['value']:.1%} [{share['ci_low']:.1%}, {share['ci_high']:.1%}]"
            within = f"{limits['ttft_ms']:g} ms to the first token and {limits['itl_ms']:g} ms between tokens"
            say(f"  goodput {found['good_requests_per_second']:.3g} requests/s: {ends} are within {within}")
        for why in found["not_said"]:
            say(f"  – {why}")


def percentile(values: Sequence[float], quantile: float) -> Figure:
    """An order statistic, and those that hold the true one between them with 95 % (binomial; Conover 1999, 3.2).

    Without an interval where n is too small for one.
    """
    from scipy import stats

    ordered = sorted(values)
    value = ordered[math.ceil(quantile * len(ordered)) - 1]
    interval = stats.quantile_test(ordered, p=quantile).confidence_interval(statistics.CONFIDENCE)
    known = interval.low <= value <= interval.high  # NaN is not
    ends = (round(float(interval.low), 3), round(float(interval.high), 3)) if known else (None, None)
    return Figure(value=round(value, 3), ci_low=ends[0], ci_high=ends[1], n=len(ordered))


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """One loop's, from guidellm's report."""
    benchmark = report["benchmarks"][0]
    requests, metrics = benchmark["requests"], benchmark["metrics"]
    answered = requests["successful"]
    if not answered:
        first = next((r["info"]["error"] for r in requests["errored"]), "none was answered in time")
        raise StageFailed(f"no request was answered: {first}")
    found: dict[str, Any] = {
        "answered": len(answered),
        "failed": len(requests["errored"]) + len(requests["incomplete"]),
        "requests_per_second": _mean(metrics["requests_per_second"]),
        "tokens_per_second": _mean(metrics["output_tokens_per_second"]),
        "prompt_tokens": _mean(metrics["prompt_token_count"]),
        "output_tokens": _mean(metrics["output_token_count"]),
    }
    times = {
        "ttft_ms": [r["time_to_first_token_ms"] for r in answered],
        "itl_ms": [r["inter_token_latency_ms"] for r in answered],  # the mean of an answer; none of a single token
        "e2e_ms": [1000 * r["request_latency"] for r in answered],
    }
    for key, values in times.items():
        known = [value for value in values if value is not None]
        said = {name: q for name, (q, needed) in NEEDED.items() if len(known) >= needed}
        found[key] = {name: percentile(known, q).model_dump(exclude_none=True) for name, q in said.items()}
    found["not_said"] = [
        f"no {name}: {needed:,} answers are needed, there are {len(answered):,}"
        for name, (_, needed) in NEEDED.items()
        if len(answered) < needed
    ] + [f"guidellm: {w['message']}" for w in benchmark.get("warnings", []) if w["observed"] > LATE]
    if (determined := metrics["slo_determined_requests"]) and metrics["request_goodput"]:
        share = statistics.proportion(round(metrics["slo_attainment"] * determined), determined)
        found["goodput"] = share.model_dump(exclude_none=True)
        found["good_requests_per_second"] = _mean(metrics["request_goodput"])
    return found


def _loop(
    endpoint: Endpoint, prompts: Sequence[str], config: EvalConfig, profile: dict[str, Any], folder: Path
) -> dict[str, Any]:
    name = "closed" if profile["kind"] == "concurrent" else "open"
    output = folder / f"latency-{name}.json"
    say(f"{name} loop: {config.latency_requests} requests, {profile.get('rate') or profile['streams']:g} "
        + ("a second" if name == "open" else "at once"))  # fmt: skip
    with tempfile.TemporaryDirectory() as private:  # the API key stands in the file
        data = Path(private) / "prompts.jsonl"
        cycled = itertools.islice(itertools.cycle(prompts), config.latency_requests)
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in cycled), "utf-8")
        scenario = Path(private) / "scenario.json"
        scenario.write_text(json.dumps({"spec": _spec(endpoint, config, profile, data, output)}), "utf-8")
        _run([str(guidellm()), "run", "--config", str(scenario), "--disable-console"], Path(private))
    report = json.loads(output.read_text("utf-8"))
    return {"figures": figures(report), "tool": f"guidellm {report['metadata']['guidellm_version']}"}


def _spec(endpoint: Endpoint, config: EvalConfig, profile: dict[str, Any], data: Path, output: Path) -> dict[str, Any]:
    return {
        "backend": {
            "kind": "openai_http",
            "target": endpoint.root,
            "model": endpoint.model,
            "request_format": "/v1/chat/completions",
            "api_key": os.environ.get("ALETHEIA_API_KEY"),
            "max_tokens": config.latency_tokens,
            "timeout": REQUEST_TIMEOUT,
            "verify": True,
            "validate_backend": False,
            "extras": {"body": {"temperature": 0}},
        },
        "profile": profile,
        "constraints": [{"kind": "max_requests", "count": config.latency_requests}],
        "data": [{"kind": "json_file", "path": str(data)}],
        "data_column_mapper": {"kind": "generative_column_mapper", "column_mappings": {"text_column": "prompt"}},
        "seed": {"kind": "static", "value": config.seed},
        "metrics": {
            "kind": "generative",
            "sample_size": 0,  # times and counts of every request, and no texts
            "slo": {"ttft_ms": config.ttft_limit_ms, "tpot_ms": config.itl_limit_ms},
        },
        "outputs": [{"kind": "json", "path": str(output)}],
    }


def _run(command: list[str], folder: Path) -> None:
    """guidellm and what it starts, with no hub. Raises `StageFailed` with its last words."""
    environment = (
        os.environ
        | {
            "GUIDELLM__MAX_WORKER_PROCESSES": "1",  # one sends some hundred requests a second; ten would take the server's cores
            "GUIDELLM__LOGGING__CONSOLE_LOG_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        }
    )
    with (folder / "said").open("w+", encoding="utf-8") as said:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait()
        finally:  # Ctrl-C too: nothing of it stays
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if code:
            said.seek(0)
            lines = [line.strip() for line in said if line.strip()]
            raise StageFailed(f"guidellm: {lines[-1][:500] if lines else f'exit code {code}'}")


def _mean(metric: dict[str, Any]) -> float:
    """Over what was answered."""
    return _short(metric["successful"]["mean"])


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _text(figure: dict[str, Any]) -> str:
    interval = f" [{figure['ci_low']:.4g}, {figure['ci_high']:.4g}]" if "ci_low" in figure else ""
    return f"{figure['value']:.4g}{interval}"
