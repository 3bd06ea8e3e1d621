"""How fast `aletheia data check` is and how much memory it takes, as whole processes pinned to one core.

    .venv/bin/python benchmarks/gate.py                        # 20,000 and 100,000 rows
    .venv/bin/python benchmarks/gate.py --rows 1000000         # 2 GB; some 20 minutes

The rows are conversations of about 2 KB each, made from a fixed seed: prose of Zipf-distributed words, a third with a code
block, one in a hundred a near copy of an earlier one, one in a thousand broken. They lie in a temporary folder. Rows a second
are of the process's own CPU time, so that what else the machine does counts little; starting (0.5 s) is part of it.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
SETS = {  # of rules: what is left out
    "structure": ["D2", "D4"],
    "structure, duplicates": ["D2", "near-duplicate", "leak", "near-leak"],
    "with near-duplicates": ["D2", "leak", "near-leak"],
    "every rule": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    columns = (
        ("rows", ">9"),
        ("size", ">8"),
        ("rules", "<22"),
        ("seconds", ">8"),
        ("CPU s", ">7"),
        ("rows/CPU s", ">10"),
    )
    print("  ".join(f"{name:{width}}" for name, width in (*columns, ("peak memory", ">11"), ("rejected", ">8"))))
    for number in parser.parse_args().rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            make_rows(path, number)
            for name, ignored in SETS.items():
                seconds, used, peak, rejected = checked(path, ignored)
                print(
                    f"{number:9,}  {path.stat().st_size / 1e6:5,.0f} MB  {name:<22}  {seconds:8.1f}  "
                    f"{used:7.1f}  {number / used:10,.0f}  {peak / 1e6:8,.0f} MB  {rejected:8,}",
                    flush=True,
                )


def make_rows(path: Path, number: int) -> None:
    draw = random.Random(42)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 10))) for _ in range(30_000)]
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
    kept: list[str] = []
    with path.open("w", encoding="utf-8") as out:
        for index in range(number):
            if index % 1000 == 999:
                out.write('{"messages": [{"role": "user", "content": "broken"}]}\n')
                continue
            text = " ".join(draw.choices(words, cum_weights=weights, k=300))
            if index % 100 == 50:
                text = f"{draw.choice(kept)} {draw.choice(words)}"
            elif len(kept) < 1000:
                kept.append(text)
            if index % 3 == 0:
                text += f"\n\n```python\nvalue_{index} = {{{draw.randrange(1000)}: 'x'}}\nprint(value_{index})\n```"
            prompt = " ".join(draw.choices(words, cum_weights=weights, k=25))
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            out.write(json.dumps({"id": f"row-{index}", "domain": f"d{index % 5}", "messages": turns}) + "\n")


def checked(path: Path, ignored: list[str]) -> tuple[float, float, int, int]:
    """Seconds, CPU seconds, peak resident memory in bytes, and rows rejected, of one whole command on one core."""
    options = [word for rule in ignored for word in ("--ignore", rule)]
    command = [sys.executable, "-m", "aletheia.cli", "data", "check", str(path), "--json", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    core = min(os.sched_getaffinity(0))
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, env=environment, cwd=CHECKOUT, stdout=out, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) not in (0, 1):
            raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        out.seek(0)
        rejected = json.load(out)["rejected"]
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, rejected


if __name__ == "__main__":
    main()
