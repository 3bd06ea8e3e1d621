"""lm-eval-harness tasks: the profile's own, YAML files in `<training_data.eval>/tasks`, and the standard ones, by name."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import yamlio
from pipeline.errors import UserError


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
    return [own.get(name, name) for name in dict.fromkeys(names)]


def task_name(task: dict[str, Any] | str) -> str:
    return task if isinstance(task, str) else str(task["task"])


def data_files(task: dict[str, Any]) -> list[str]:
    """The patterns of an own task's files, as `find_tasks` left them."""
    files = (task.get("dataset_kwargs") or {}).get("data_files", [])
    splits = list(files.values()) if isinstance(files, dict) else [files]
    return [str(pattern) for split in splits for pattern in (split if isinstance(split, list) else [split])]


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
