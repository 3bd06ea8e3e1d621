"""Our training against what a user would run instead: the same model, rows and machine, in turn, each a process of its own.

    .venv/bin/python benchmarks/training.py                  # five rounds; about an hour and a half where nothing else runs
    .venv/bin/python benchmarks/training.py --quick          # one round over a few rows: does it all work?
    .venv/bin/python benchmarks/training.py --only dpo --pairs 2

First `audit.py` looks whether all train the same sequences and tokens. Then, in each round, every contestant trains one epoch
of that round's part of the bed, in an order that turns from round to round. Printed are each one's figures and the ratios
with the goals beside them; `results/training.json` keeps every run, with machine and versions, `results/training.png` the plot.

It does not say how well a model learns, nor anything about a GPU (`gpu.py`). CPU seconds hardly feel what else the machine
does; seconds do.
"""

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks import audit  # noqa: E402
from benchmarks.bed import PARTS, Bed, make_bed  # noqa: E402
from benchmarks.compare import Result, cautions, differences, draw, goals_table, runs_table  # noqa: E402
from benchmarks.contestants import BIN, CONTESTANTS, NAMES, Contestant  # noqa: E402

HELPS = 10
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5, help="rounds: each contestant once, so a pair with ours")
    parser.add_argument(
        "--quick", action="store_true", help="one round of three steps: for the harness, not for figures"
    )
    parser.add_argument("--only", choices=("sft", "dpo", "help"), action="append", help="repeatable")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier one was stopped")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks/results", help="folder")
    parser.add_argument("--show", action="store_true", help="run nothing: the tables and the plot of what is there")
    given = parser.parse_args()
    kept = given.results / ("training-quick.json" if given.quick else "training.json")
    if given.show:
        found = json.loads(kept.read_text("utf-8"))
    else:
        earlier = taken_up(kept, machine()) if given.resume else None
        found = compete(given.only or ["help", "sft", "dpo"], given.pairs, given.quick, kept, earlier)
    results = [Result(**run | {"losses": tuple(run["losses"])}) for run in found["runs"]]
    draw(kept.with_suffix(".png"), results, NAMES)
    print(f"\n{runs_table(results, NAMES)}\n\n{goals_table(results, NAMES)}")
    for caution in cautions(results, found["machine"]["cores"]):
        print(f"note: {caution}")
    faults = [
        f"{task}, {name}: {fault}"
        for task, contestants in found["same_work"].items()
        for name, seen in contestants.items()
        for fault in seen["faults"]
    ]
    if faults := [*faults, *differences(results)]:
        sys.exit("\n".join(["\nnot the same work, so no comparison:", *faults]))


def taken_up(kept: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What an earlier benchmark found. Raises `SystemExit` where it ran elsewhere, or another commit: no round of this one."""
    found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    for fact in ("commit", "cpu", "cores", "libraries"):
        if found["machine"][fact] != now[fact]:
            raise SystemExit(f"{kept}: its {fact} was {found['machine'][fact]}, now {now[fact]}: begin anew")
    return found


def compete(
    tasks: Sequence[str], rounds: int, quick: bool, kept: Path, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Every contestant in every round, in turn. Writes what is found after each run: a long benchmark may be stopped."""
    bed = make_bed()
    found = earlier or {"machine": machine(), "bed": bed.facts, "same_work": {}, "runs": []}
    there = {(run["task"], run["name"], run["round"]) for run in found["runs"]}
    found["runs"] += [asdict(result) for result in (helps() if "help" in tasks and not earlier else [])]
    trained = [task for task in CONTESTANTS if task in tasks]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aletheia-bench-") as work:
        for task in (task for task in trained if task not in found["same_work"]):
            found["same_work"][task] = same_work(bed, task, "quick" if quick else "0", Path(work))
        for number in range(1 if quick else rounds):
            for task in trained:
                part = "quick" if quick else str(number % PARTS[task])
                names = CONTESTANTS[task]
                first = number % len(names)  # another one each round
                for name in (name for name in (*names[first:], *names[:first]) if (task, name, number) not in there):
                    found["runs"].append(asdict(measured(bed, task, name, number, part, Path(work))))
                    kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def measured(bed: Bed, task: str, name: str, number: int, part: str, work: Path) -> Result:
    """One run of one contestant; says what it gave."""
    contestant = Contestant(name, task, part, bed, work / f"{task}-{name}-{number}", bed.model)
    run = contestant.run()
    first, last = run.steps[0], run.steps[-1]
    rows = bed.sequences(task, part)
    # of pairs every step has as many, so that nobody needs to tell their tokens
    done = (
        sum(len(ids) for ids, _ in rows) - first.tokens if task == "sft" else len(rows) / 2 * (1 - 1 / len(run.steps))
    )
    result = Result(
        task,
        name,
        number,
        part,
        run.wall,
        run.cpu,
        first.wall,
        first.cpu,
        done / (last.cpu - first.cpu),
        done / (last.wall - first.wall),
        run.largest,
        run.whole,
        tuple(step.loss for step in run.steps),
        parameters(contestant.adapter),
        os.getloadavg()[0],
    )
    say(
        f"{task} {number} {NAMES[name]}: {result.speed:.1f} / CPU s, first step {first.wall:.1f} s, "
        f"{run.wall:.0f} s ({run.cpu:.0f} CPU s), {run.whole / 1e6:,.0f} MB, loss {first.loss:.3f} → {last.loss:.3f}"
    )
    return result


def same_work(bed: Bed, task: str, part: str, work: Path) -> dict[str, Any]:
    """What each contestant trains in an epoch, by name, and how that differs from the bed."""
    rows, found = bed.sequences(task, part), {}
    for name in CONTESTANTS[task]:
        contestant = Contestant(name, task, part, bed, work / f"audit-{task}-{name}", bed.narrow)
        folder = contestant.prepared()
        if name.startswith("hand"):  # it is no transformers model, and notes itself what it trains
            command = [sys.executable, *contestant.argv(), "--audit", "found.json"]
        else:
            command = [sys.executable, str(CHECKOUT / "benchmarks/audit.py"), "found.json", *contestant.argv()]
        with (folder / "audit.txt").open("w") as output:
            code = subprocess.run(
                command, cwd=folder, env=contestant.environment(), stdout=output, stderr=output
            ).returncode
        if code:
            raise SystemExit("\n".join((folder / "audit.txt").read_text().splitlines()[-20:]))
        seen = json.loads((folder / "found.json").read_text())
        sequences = seen.pop("sequences")
        faults = audit.faults(rows, sequences, pairs=task == "dpo")
        supervised = sum(sum(mask) for _, mask in sequences)
        found[name] = seen | {"sequences": len(sequences), "supervised_tokens": supervised, "faults": faults}
        say(f"{task} {NAMES[name]}: {'; '.join(faults) or f'all {len(rows)} sequences, whole, each once'}")
    return found


def helps() -> list[Result]:
    found = []
    for number in range(-1, HELPS):  # the first one fills the caches
        start, before = time.perf_counter(), os.times()
        subprocess.run([BIN / "aletheia", "--help"], stdout=subprocess.DEVNULL, check=True)
        wall, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found.append(Result("help", "ours", number, "", wall, cpu))
    return found[1:]


def parameters(file: Path) -> dict[str, int]:
    """Numbers in a safetensors file, by their type. Its head is JSON after eight bytes that say how long."""
    content = file.read_bytes()
    head = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    found: Counter[str] = Counter()
    for name, tensor in head.items():
        if name != "__metadata__":
            low, high = tensor["data_offsets"]
            found[tensor["dtype"]] += (high - low) // (4 if tensor["dtype"] == "F32" else 2)
    return dict(found)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "bf16": "avx512_bf16" in info,
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "commit": _git("rev-parse", "HEAD"),
        "changed": len(_git("status", "--porcelain").splitlines()),
    }


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
