"""Benchmarks through lm-eval-harness, in process, item by item, so that two models can be compared pair by pair.

The profile's own tasks are the YAML files in `<training_data.eval>/tasks`; any other name is one of lm-eval's, whose
data comes from a hub. The chat template is applied, and no answer is cached between models.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import yamlio
from pipeline.chat import Chat
from pipeline.config import EvalConfig
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say


@dataclass(frozen=True)
class Scores:
    """A task's metric for each item, keyed by lm-eval's `doc_id`, and the task's version."""

    metric: str
    version: str
    items: dict[int, float]


def find_tasks(folder: Path, names: Sequence[str]) -> list[dict[str, Any] | str]:
    """Own tasks as configurations with absolute data files, others as lm-eval's names. Raises `UserError`."""
    own: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "tasks").glob("*.yaml")):
        try:
            task = yamlio.load(path.read_text("utf-8")).value
        except yamlio.YamlError as error:
            raise UserError(error.what, where=f"{path}:{error.line}:{error.column}") from None
        except UnicodeDecodeError:
            raise UserError("is not UTF-8", where=str(path)) from None
        if not isinstance(task, dict) or not isinstance(task.get("task"), str):
            raise UserError("a task is a mapping of keys to values, one of them `task`, its name", where=str(path))
        options = task.get("dataset_kwargs")
        if task["task"] in names and isinstance(options, dict) and "data_files" in options:
            options["data_files"] = _absolute(options["data_files"], folder, path)
        own[task["task"]] = task
    return [own.get(name, name) for name in names]


def run(
    model: Any, chat: Chat, tasks: Sequence[dict[str, Any] | str], config: EvalConfig, label: str
) -> dict[str, Scores]:
    """Raises `StageFailed` when a task's data cannot be had, with the harness's own reason."""
    import logging

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    say(f"{label}: benchmarks {', '.join(_name(task) for task in tasks)}")
    standard = any(isinstance(task, str) for task in tasks)
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=config.batch_size),
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=standard),  # indexing the stock tasks takes 15 s
            limit=config.limit,
            apply_chat_template=True,
            bootstrap_iters=0,  # our intervals are paired, from the items
            verbosity="ERROR",
        )
    except (ConnectionError, OSError, KeyError, ValueError) as error:
        raise StageFailed(f"lm-eval: {error}", remedy="eval_config.tasks with tasks whose data is at hand") from None
    return {name: _scores(name, results) for name in results["samples"]}


def _absolute(files: Any, folder: Path, task: Path) -> Any:
    """lm-eval takes patterns relative to where it was started; ours are relative to `folder`."""
    if isinstance(files, dict):
        return {split: _absolute(pattern, folder, task) for split, pattern in files.items()}
    if isinstance(files, list):
        return [_absolute(pattern, folder, task) for pattern in files]
    pattern = str(folder / str(files))
    if not glob.glob(pattern, recursive=True):
        raise UserError(f"no file is named {pattern}", where=str(task))
    return pattern


def _scores(name: str, results: Any) -> Scores:
    """The task's first metric: acc for multiple choice, exact_match and the like for generation."""
    samples = results["samples"][name]
    metric = next(m for m in samples[0]["metrics"] if isinstance(samples[0].get(m), int | float))
    items = {int(sample["doc_id"]): float(sample[metric]) for sample in samples}
    return Scores(metric, str(results["versions"].get(name)), items)


def _name(task: dict[str, Any] | str) -> str:
    return task if isinstance(task, str) else str(task["task"])
