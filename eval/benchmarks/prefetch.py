"""The data of a profile's benchmarks, into the cache of this machine: for one that has no hub.

    aletheia eval prefetch --profile deepseek-coder-7b      where there is a network
    HF_HUB_OFFLINE=1 aletheia eval benchmarks               there, or with that cache copied, where there is none

Loads every task as the evaluation will, which is what puts its data into the cache (`HF_HOME`, ~/.cache/huggingface). Code
tasks too: nothing of them is run. Own tasks, whose data is in the checkout, need none of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import preflight
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.stage import Job
from pipeline.stock_tasks import known_names, why_offline
from pipeline.tasks import find_tasks, task_name


@dataclass(frozen=True)
class Fetched:
    """`size` in bytes on disk, of the data as it is read; None with `problem`, where it could not be had."""

    task: str
    source: str
    items: int | None = None
    size: int | None = None
    problem: str | None = None

    def row(self) -> tuple[str, str, str, str]:
        items = "" if self.items is None else f"{self.items:,}"
        size = "" if self.size is None else f"{self.size / 1e6:.1f} MB"
        return self.task, self.source, items, self.problem or size


def prefetch(job: Job) -> list[Fetched]:
    """Each of `eval_config.tasks`, in order. Raises `UserError` where a task needs the hub, and it cannot be reached."""
    from huggingface_hub import constants

    names = job.config.eval_config.tasks
    if not names:
        raise UserError("names no task, so there is nothing to fetch", where="eval_config.tasks")
    tasks = find_tasks(job.workspace.path(job.config.training_data.eval), names)
    from_hub = {task for task in tasks if isinstance(task, str)} & {*known_names()}
    if from_hub and (why := why_offline()):
        raise UserError(why, where="eval prefetch", remedy="a machine with a network, and its HF_HOME copied here")
    found = preflight.check(tasks, run_code=True, online=True, only_fetch=True)
    ready = {each.name: each for each in found.ready}
    rows = []
    for task in tasks:
        name = task_name(task)
        if name in ready:
            each = ready[name]
            rows.append(Fetched(name, _source(task, each), each.items, _size(each)))
        else:
            rows.append(Fetched(name, "", problem=found.left_out[name]))
    if from_hub:
        say(f"in {constants.HF_HOME}; elsewhere: HF_HOME=a copy of it HF_HUB_OFFLINE=1 aletheia eval benchmarks")
    return rows


def check_all(rows: list[Fetched]) -> None:
    """Raises `StageFailed` where some could not be had."""
    if missing := [row for row in rows if row.problem]:
        raise StageFailed(f"{len(missing)} of {len(rows)} could not be had: {', '.join(row.task for row in missing)}")


def _source(task: dict[str, Any] | str, ready: preflight.Ready) -> str:
    if not isinstance(task, str):
        return "own"
    return ", ".join(dict.fromkeys(str(leaf.DATASET_PATH) for leaf in ready.leaves.values()))


def _size(ready: preflight.Ready) -> int:
    files = set()
    for task in ready.leaves.values():
        splits = task.dataset.values() if isinstance(task.dataset, dict) else [task.dataset]
        files |= {file["filename"] for split in splits for file in getattr(split, "cache_files", [])}
    return sum(Path(file).stat().st_size for file in files)
