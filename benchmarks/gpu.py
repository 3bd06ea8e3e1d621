"""Training speed and memory on a GPU: our passes against TRL's defaults, on the same rows and weights in one process.

    python benchmarks/gpu.py --json gpu.json                          # the 7B shape; some 10 minutes on an H200
    python benchmarks/gpu.py --tasks sft --bases bf16 --profile       # and where a step's time goes
    python benchmarks/gpu.py --shape tiny --device cpu                # that it runs; no measurement of the goals

Needs torch, transformers and peft, in whatever versions a GPU machine has, and of the project only `attention.py`, `head.py`,
`passes.py` and `encoded.py` of `pipeline/`, which import no more. What needs trl, datasets or bitsandbytes is left out where
they are not installed, and is named; without trl, SFT's peer is `transformers.Trainer` with TRL's settings.

A Llama of random weights, built on the device. Rows of random tokens, an eighth to all of the longest, three quarters of them
trained. Both sides take the same rows in the same steps, padded in twos by TRL and packed by us; where the loss of the first
step differs, it is said. Runs alternate. Tokens are counted without padding, and a pair's prompt once. FLOP are those that a
step cannot do without: 4 for each weight of the layers and token (LoRA needs no gradient of the weights), 4 for each weight
of the head and trained token, 12 × hidden for each layer and pair of positions that attend; and DPO's reference, one more
forward pass. What is computed twice counts once. Memory is what was taken from the device, CUDA's own context aside.
The trainer around the passes, loading of data and saving are not measured.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu_rows import SHAPES, flops, make_rows, matmul_rate
from benchmarks.gpu_training import PEER_ROWS, WARM_UP, Run, Steps, Training
from pipeline.encoded import Encoded
from pipeline.train.passes import size

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


@dataclass
class Line:
    """A contestant at a task, over all its runs; medians, and (smallest, largest)."""

    task: str
    base: str
    who: str
    tokens_per_second: float
    tokens_per_second_spread: tuple[float, float]
    share_of_matmul: float
    peak_gb: float | None
    how: dict[str, Any]
    runs: list[Run]
    times_as_fast: float | None = None  # as its peer
    times_as_fast_spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Goal:
    what: str
    must_be: str
    bound: float
    value: float | None
    judged: bool  # by this shape on this device

    @property
    def verdict(self) -> str:
        if self.value is None or not self.judged:
            return "not measured"
        return "reached" if (self.value >= self.bound if self.must_be == "≥" else self.value < self.bound) else "missed"


@dataclass
class Bench:
    options: argparse.Namespace
    training: Training
    matmul: float  # FLOP/s
    lines: list[Line] = field(default_factory=list)
    memory_gb: dict[str, float | None] = field(default_factory=dict)  # by base: one row of full length a step
    notes: list[str] = field(default_factory=list)

    def measure(self) -> None:
        for name in self.options.bases:
            if name == "nf4" and not self.has("bitsandbytes"):
                self.notes.append("left out: everything on NF4 (bitsandbytes is not installed)")
                continue
            base = self.training.base(quantised=name == "nf4")
            for task in self.options.tasks:
                if task == "memory":
                    self.hold(base, name)
                else:
                    self.compare(base, name, task)
            del base
            self.training.clean()

    def hold(self, base: Any, name: str) -> None:
        """What a small card has to hold: a row of full length, its activations recomputed."""
        tell(f"memory, {name}")
        length = self.training.shape.length
        row = Encoded([2] * length, [False] + [True] * (length - 1))
        try:
            run = self.training.ours(base, [[row]] * (1 + WARM_UP), length, checkpointing=True)
            self.memory_gb[name] = run.reserved and run.reserved / 1e9
        except torch.OutOfMemoryError:
            self.notes.append(f"left out: memory on {name} (it is more than this device has)")
        self.training.restore(base)

    def compare(self, base: Any, name: str, task: str) -> None:
        steps = make_rows(self.training.shape, task, WARM_UP + self.options.steps)
        pass_tokens, checkpointing = self.fitting(base, steps)
        contestants: dict[str, Callable[[], Run]] = {
            "ours": lambda: self.training.ours(base, steps, pass_tokens, checkpointing)
        }
        if self.has("trl") and self.has("datasets"):
            contestants["trl"] = lambda: self.training.trl(base, steps)
        elif task == "sft":
            self.notes.append(
                f"left out: trl at {task} on {name} (not installed); transformers.Trainer is in its place"
            )
            contestants["trainer"] = lambda: self.training.plain_trainer(base, steps)
        else:
            self.notes.append(f"left out: a peer at {task} on {name} (trl is not installed)")
        runs: dict[str, list[Run]] = {who: [] for who in contestants}
        for number in range(self.options.pairs):
            for who, run in contestants.items():
                tell(f"{task} on {name}, {who}, {number + 1} of {self.options.pairs}")
                try:
                    runs[who].append(run())
                except torch.OutOfMemoryError:
                    self.notes.append(f"left out: a run of {who} at {task} on {name} (out of memory)")
                self.training.restore(base)
        ours = {"pass_tokens": pass_tokens, "gradient_checkpointing": checkpointing}
        theirs = {"rows_a_pass": PEER_ROWS, "gradient_checkpointing": True}
        found = [self.line(task, name, w, ours if w == "ours" else theirs, r, steps) for w, r in runs.items() if r]
        if len(found) == 2:
            self.relate(*found)
        self.lines += found

    def fitting(self, base: Any, steps: Steps) -> tuple[int, bool]:
        """Tokens a pass, and whether to recompute activations: what the longest row takes tells how many fit."""
        length = self.training.shape.length
        if self.options.pass_tokens or not self.training.cuda:
            return self.options.pass_tokens or 2 * length, False
        longest = max((row for rows in steps for row in rows), key=size)
        before = torch.cuda.memory_allocated()
        try:
            run = self.training.ours(base, [[longest]] * (1 + WARM_UP), size(longest), checkpointing=False)
        except torch.OutOfMemoryError:
            return 2 * length, True
        finally:
            self.training.restore(base)
        room = 0.8 * torch.cuda.get_device_properties(0).total_memory - before
        tokens = int(room / (((run.allocated or 0) - before) / size(longest)))
        return (min(tokens, 8 * length), False) if tokens >= length else (2 * length, True)

    def line(self, task: str, base: str, who: str, how: dict[str, Any], runs: list[Run], steps: Steps) -> Line:
        counted = [row for rows in steps[WARM_UP:] for row in rows]
        tokens, needed = sum(map(size, counted)), flops(self.training.shape, counted)
        speeds = [tokens / sum(run.seconds) for run in runs]
        speed = statistics.median(speeds)
        peak = max((run.reserved for run in runs if run.reserved is not None), default=None)
        share = speed * needed / tokens / self.matmul
        return Line(task, base, who, speed, (min(speeds), max(speeds)), share, peak and peak / 1e9, how, runs)

    def relate(self, ours: Line, peer: Line) -> None:
        ratios = [sum(b.seconds) / sum(a.seconds) for a, b in zip(ours.runs, peer.runs, strict=False)]
        ours.times_as_fast, ours.times_as_fast_spread = statistics.median(ratios), (min(ratios), max(ratios))
        mine, theirs = ours.runs[0].first_loss, peer.runs[0].first_loss
        if not abs(mine - theirs) <= 0.01 * abs(theirs):
            self.notes.append(
                f"no comparison: {ours.task} on {ours.base} begins at {mine:.4f}, {peer.who} at {theirs:.4f}"
            )

    def has(self, library: str) -> bool:
        return library not in self.options.without and importlib.util.find_spec(library) is not None

    @property
    def judges(self) -> bool:
        return self.training.cuda and self.options.shape == "7b"

    def goals(self) -> list[Goal]:
        def ours(task: str) -> Line | None:
            return next((x for x in self.lines if (x.task, x.base, x.who) == (task, "bf16", "ours")), None)

        sft, dpo, judged = ours("sft"), ours("dpo"), self.judges
        return [
            Goal("SFT, share of the matmul rate", "≥", 0.45, sft.share_of_matmul if sft else None, judged),
            Goal("SFT, times as fast as TRL's defaults", "≥", 2.0, sft.times_as_fast if sft else None, judged),
            Goal("DPO, times as fast as TRL's defaults", "≥", 2.0, dpo.times_as_fast if dpo else None, judged),
            Goal("LoRA on bf16, 1 × 2,048 tokens, GB", "<", 24.0, self.memory_gb.get("bf16"), judged),
            Goal("QLoRA on NF4, 1 × 2,048 tokens, GB", "<", 10.0, self.memory_gb.get("nf4"), judged),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bases", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--tasks", nargs="+", choices=("sft", "dpo", "memory"), default=["sft", "dpo", "memory"])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a run")
    parser.add_argument("--pass-tokens", type=int, help="of ours; else what fits")
    parser.add_argument("--without", nargs="+", default=[], metavar="LIBRARY", help="as if it were not installed")
    parser.add_argument("--profile", action="store_true", help="also where the time of our first task's steps goes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine shows no CUDA GPU; --shape tiny --device cpu shows that the benchmark runs")
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that older versions of transformers need
    device, shape = torch.device(options.device), SHAPES[options.shape]
    bench = Bench(options, Training(shape, device), matmul_rate(shape.matmul, device))
    if options.profile:
        profile(bench)
    bench.measure()
    show(bench)
    if options.json:
        options.json.write_text(json.dumps(as_json(bench), ensure_ascii=False, indent=1) + "\n", "utf-8")


def profile(bench: Bench) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    task = next((task for task in bench.options.tasks if task != "memory"), "sft")
    base = bench.training.base(quantised=bench.options.bases[0] == "nf4")
    steps = make_rows(bench.training.shape, task, 1 + WARM_UP)
    pass_tokens, checkpointing = bench.fitting(base, steps)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.training.cuda
    with watched(activities=activities) as seen:
        bench.training.ours(base, steps, pass_tokens, checkpointing)
    by = "self_cuda_time_total" if bench.training.cuda else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))


def show(bench: Bench) -> None:
    print(
        f"\n{machine(bench)['name']}, bf16 product of {bench.training.shape.matmul}²: {bench.matmul / 1e12:.3g} TFLOP/s"
    )
    if not bench.judges:
        print("NOT A MEASUREMENT OF THE GOALS: another shape, or no GPU. It shows that the benchmark runs.")
    rows = [("task", "base", "who", "tokens/s", "(range)", "of matmul rate", "peak memory", "times as fast", "(range)")]
    for x in bench.lines:
        low, high = x.tokens_per_second_spread
        slow, fast = x.times_as_fast_spread or (0, 0)
        rows.append(
            (
                *(x.task, x.base, x.who, f"{x.tokens_per_second:,.0f}", f"({low:,.0f}–{high:,.0f})"),
                *(f"{x.share_of_matmul:.1%}", f"{x.peak_gb:.1f} GB" if x.peak_gb else "–"),
                *((f"{x.times_as_fast:.2f}", f"({slow:.2f}–{fast:.2f})") if x.times_as_fast else ("", "")),
            )
        )
    table(rows)
    goals = [
        (g.what, f"{g.must_be} {g.bound:g}", "–" if g.value is None else f"{g.value:.3g}", g.verdict)
        for g in bench.goals()
    ]
    print()
    table([("goal", "", "here", ""), *goals])
    print("".join(f"\nnote: {note}" for note in bench.notes))


def table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def as_json(bench: Bench) -> dict[str, Any]:
    return {
        "measures_the_goals": bench.judges,
        "machine": machine(bench),
        "versions": versions(),
        "shape": asdict(bench.training.shape),
        "options": {key: value for key, value in vars(bench.options).items() if key != "json"},
        "matmul_flops": bench.matmul,
        "lines": [asdict(line) for line in bench.lines],
        "memory_gb": bench.memory_gb,
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in bench.goals()],
        "notes": bench.notes,
    }


def machine(bench: Bench) -> dict[str, Any]:
    if not bench.training.cuda:
        return {"name": f"{platform.machine()} CPU", "cores": os.cpu_count()}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_gb": found.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
