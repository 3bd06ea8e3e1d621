"""The CPU server over HTTP against its engine alone: tokens a second with one stream and with eight.

    .venv/bin/python benchmarks/serving.py                 # five rounds, some five minutes where nothing else runs
    .venv/bin/python benchmarks/serving.py --quick         # one round of a narrow model: does it all work?

A Llama of 171M parameters in bf16 with random weights, made on the spot; its end-of-turn is never likeliest, so every answer
has its full length. Two processes wait on one machine and are asked in turn: our server, and transformers' continuous
batching without any of our code. Same prompts, same lengths, greedy; our server also draws, at a temperature so low that
no end-of-turn comes. A rate is all tokens over the time from the first request to the last token.
`results/serving.json` keeps every run.

It does not measure latency under load (`aletheia eval latency`) nor anything about a GPU.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks.bed import Bed, make_bed  # noqa: E402
from benchmarks.training import machine, say  # noqa: E402

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
NARROW = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
PROMPT, ANSWER, QUICK_ANSWER, CONTEXT, STREAMS = 64, 128, 8, 512, 8
NAMES = {"ours": "our server", "drawn": "our server, drawn", "engine": "transformers' engine alone"}
LOW = 0.05  # temperature
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Run:
    """`streams` answers at once. Seconds, and tokens of all answers together."""

    name: str
    round: int
    streams: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="of all contestants, in an order that turns")
    parser.add_argument(
        "--quick", action="store_true", help="a narrow model, one round: for the harness, not for figures"
    )
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks/results", help="folder")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        CHILDREN[given.child](given.model)
        return
    kept = given.results / ("serving-quick.json" if given.quick else "serving.json")
    found = compete(1 if given.quick else given.rounds, given.quick, kept)
    print(f"\n{table([Run(**run) for run in found['runs']])}")
    if not found["same_text"]:
        sys.exit("\nnot the same answers, so no comparison")


def compete(rounds: int, quick: bool, kept: Path) -> dict[str, Any]:
    """Every contestant with one stream and with all, in every round. Writes what is found."""
    bed = make_bed()
    prompts = [ids[:PROMPT] for ids, _ in bed.sequences("sft", "0") if len(ids) >= PROMPT][:STREAMS]
    answer = QUICK_ANSWER if quick else ANSWER
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="aletheia-bench-") as work:
        model = make_model(bed, Path(work), NARROW if quick else SHAPE)
        with child("serve", Path(work)) as server, child("engine", Path(work)) as engine:
            contestants = {
                "ours": lambda asked: asyncio.run(over_http(server["address"], asked, answer, 0.0)),
                "drawn": lambda asked: asyncio.run(over_http(server["address"], asked, answer, LOW)),
                "engine": lambda asked: engine["ask"]({"prompts": asked, "tokens": answer}),
            }
            texts = {name: contestants[name](prompts[:1])["texts"] for name in ("ours", "engine")}  # and warms up
            for number in range(rounds):
                names = list(contestants)[number % 3 :] + list(contestants)[: number % 3]
                for streams in (1, STREAMS):
                    for name in names:
                        said = contestants[name](prompts[:streams])
                        assert said["tokens"] == streams * answer, f"{name}: {said['tokens']} tokens"
                        runs.append(Run(name, number, streams, said["tokens"], said["seconds"]))
                        say(f"{number} {NAMES[name]}, {streams}: {runs[-1].rate:.1f} tokens/s")
            threads, memory = server["threads"], server["memory"]()
    found = {
        "machine": machine() | {"threads": threads},
        "model_parameters": model,
        "prompt": PROMPT,
        "answer": answer,
        "server_memory_bytes": memory,
        "same_text": texts["ours"] == texts["engine"],
        "runs": [asdict(run) for run in runs],
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def table(runs: Sequence[Run]) -> str:
    """Medians, and the goals: ratios within a round, their median and range."""

    def rates(name: str, streams: int) -> list[float]:
        return [run.rate for run in runs if (run.name, run.streams) == (name, streams)]

    lines = [f"{'tokens/s':<28} {'1 stream':>9} {f'{STREAMS} streams':>10} {'times':>6}"]
    for name, shown in NAMES.items():
        one, all_of_them = median(rates(name, 1)), median(rates(name, STREAMS))
        lines.append(f"{shown:<28} {one:>9.1f} {all_of_them:>10.1f} {all_of_them / one:>6.2f}")
    goals = [
        (f"{STREAMS} streams over one stream", ("ours", STREAMS), ("ours", 1), 5.0),
        (f"{STREAMS} streams over the engine alone", ("ours", STREAMS), ("engine", STREAMS), 0.9),
        ("one stream over the engine alone", ("ours", 1), ("engine", 1), None),
        ("drawn over greedy, all streams", ("drawn", STREAMS), ("ours", STREAMS), None),
    ]
    lines += ["", f"{'ratio':<35} {'median':>6} {'range':>12}  goal"]
    for says, ours, other, at_least in goals:
        ratios = [a / b for a, b in zip(rates(*ours), rates(*other), strict=True)]
        middle = median(ratios)
        goal = "" if at_least is None else f"≥ {at_least:g} {'reached' if middle >= at_least else 'MISSED'}"
        lines.append(f"{says:<35} {middle:>6.2f} {f'{min(ratios):.2f}–{max(ratios):.2f}':>12}  {goal}".rstrip())
    return "\n".join(lines)


async def over_http(address: str, prompts: Prompts, answer: int, temperature: float) -> dict[str, Any]:
    """All at once, streamed, as clients do."""
    import httpx

    async def one(http: httpx.AsyncClient, prompt: Sequence[int]) -> tuple[str, int]:
        body = {
            "model": "bench", "prompt": list(prompt), "max_tokens": answer, "temperature": temperature, "seed": 1,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        text, tokens = "", 0
        async with http.stream("POST", "/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    text += "".join(choice["text"] for choice in event["choices"])
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return text, tokens

    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        began = time.perf_counter()
        answers = await asyncio.gather(*(one(http, prompt) for prompt in prompts))
        seconds = time.perf_counter() - began
    return {"texts": [text for text, _ in answers], "tokens": sum(n for _, n in answers), "seconds": seconds}


@contextmanager
def child(kind: str, model: Path) -> Iterator[dict[str, Any]]:
    """A process of its own that says in one line of JSON that it is ready; `ask` sends a line and waits for one."""
    import psutil

    command = [sys.executable, __file__, "--child", kind, "--model", str(model)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin and process.stdout
        print(json.dumps(request), file=process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def memory() -> int:
        return int(psutil.Process(process.pid).memory_info().rss)

    try:
        yield json.loads(process.stdout.readline()) | {"ask": ask, "memory": memory}
    finally:
        process.kill()
        process.wait()


def load(folder: Path) -> tuple[Any, Any, int]:
    """Model, chat and compute threads, as `aletheia serve` has them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.chat import Chat
    from serving.transformers_backend.engine import use_threads

    threads = use_threads(None)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, Chat(AutoTokenizer.from_pretrained(folder), "bench"), threads


def serve(folder: Path) -> None:
    """The child that is our server."""
    import socket

    import uvicorn

    from pipeline.config import ServeConfig
    from serving.front.app import Usage, build_app
    from serving.transformers_backend.engine import TransformersEngine

    model, chat, threads = load(folder)
    app = build_app(TransformersEngine(model, chat, CONTEXT, STREAMS), "bench", ServeConfig(), Usage())
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(json.dumps({"address": f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "threads": threads}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def engine(folder: Path) -> None:
    """The child that is transformers' continuous batching alone: no streaming, no sampling, no server."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, chat, _ = load(folder)
    batching = ContinuousBatchingConfig(
        num_blocks=STREAMS * -(-CONTEXT // ContinuousBatchingConfig.page_size),
        max_batch_tokens=CONTEXT,
        max_requests_per_batch=STREAMS,
    )
    greedy = GenerationConfig(
        do_sample=False, eos_token_id=chat.end_of_turn_id, pad_token_id=chat.tokenizer.pad_token_id
    )
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=batching) as manager:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            began = time.perf_counter()
            names = manager.add_requests(asked["prompts"], max_new_tokens=asked["tokens"])
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                if result := manager.get_result(timeout=60):
                    done[result.request_id] = result.generated_tokens
            seconds = time.perf_counter() - began
            texts = [chat.tokenizer.decode(done[name], skip_special_tokens=True) for name in names]
            said = {"texts": texts, "tokens": sum(map(len, done.values())), "seconds": seconds}
            print(json.dumps(said), flush=True)


def make_model(bed: Bed, folder: Path, shape: dict[str, int]) -> int:
    """Its parameters. The row of the end-of-turn in the LM head is 0: among thousands of logits it is never the largest."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(bed.model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, dtype="bfloat16", tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


CHILDREN = {"serve": serve, "engine": engine}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
