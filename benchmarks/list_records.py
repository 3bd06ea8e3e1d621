"""How long `aletheia exp list` takes: cold (every record is parsed) and warm (the cache is there), as whole processes.

    .venv/bin/python benchmarks/list_records.py                # 1,000 and 10,000 records
    .venv/bin/python benchmarks/list_records.py --records 500

The records are an SFT's of about 4 KB each, with an identical lower half but for its figures, in a temporary folder.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from pipeline.records.file import RecordFile  # noqa: E402
from pipeline.records.lifecycle import upper_half  # noqa: E402
from pipeline.records.schema import Artifact, Facts, StatusChange  # noqa: E402

WARM_RUNS = 5
QUERY = ("exp", "list", "--json", "--where", "eval_loss < 5.5", "--sort", "eval_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 10_000])
    print(
        f"{'records':>8}  {'cold':>8}  {'a record':>9}  {'warm, median':>12}  {'of which a process that lists none':>34}"
    )
    empty = median_of(lambda: timed(Path(tempfile.mkdtemp())))
    for number in parser.parse_args().records:
        with tempfile.TemporaryDirectory() as folder:
            make_records(Path(folder), number)
            time.sleep(2.1)  # the cache trusts no file that is younger
            cold = timed(Path(folder))
            warm = median_of(lambda root=Path(folder): timed(root))
        print(f"{number:8,}  {cold:6.1f} s  {cold / number * 1e3:6.2f} ms  {warm:10.2f} s  {empty:32.2f} s")


def make_records(root: Path, number: int) -> None:
    experiments = root / "experiments"
    experiments.mkdir()
    for day, first in enumerate(range(0, number, 1000), 1):
        for index in range(first, min(first + 1000, number)):
            experiment_id = f"EXP-2026-{(day - 1) // 28 + 1:02d}-{(day - 1) % 28 + 1:02d}-{index - first + 1:03d}"
            above = upper_half(experiment_id, experiment_id[4:14], {"profile": "tiny", "stages": ["sft"]})
            file = RecordFile(experiments / f"{experiment_id}.yaml")
            file.path.write_bytes(above)
            file.write(facts(5 + index / number))


def facts(loss: float) -> Facts:
    figure = {"value": loss, "ci_low": loss - 0.1, "ci_high": loss + 0.1, "n": 25}
    settings = {f"setting_{i}": i / 7 for i in range(30)}
    files = [Artifact(path=f"checkpoints/adapter/file_{i}", sha256=f"{i:064d}", bytes=i) for i in range(7)]
    return Facts(
        status="complete",
        stage="sft",
        profile="tiny",
        history=[StatusChange(status="complete", at="2026-01-01T00:00:00Z")],
        configuration={f"{part}_config": settings for part in ("sft", "dpo")},
        results={"eval_loss": {"before": figure, "after": figure, "delta": figure}},
        artifacts=files,
        environment={"libraries": {f"library_{i}": f"1.{i}" for i in range(10)}},
        resources={"wall_seconds": 60.0 + loss},
    )


def timed(root: Path) -> float:
    """Seconds of one whole command."""
    command = [sys.executable, "-m", "aletheia.cli", *QUERY]
    environment = os.environ | {"ALETHEIA_ROOT": str(root)}
    start = time.perf_counter()
    subprocess.run(command, env=environment, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def median_of(run: Callable[[], float]) -> float:
    return statistics.median(run() for _ in range(WARM_RUNS))


if __name__ == "__main__":
    main()
