"""The prompts and answers of lm-eval-harness tasks, so that none of them stands in a training row.

Tasks made of `<eval>/choices` and `<eval>/questions` are left to the gate, which reads these as rows. Of the others, those whose
data comes from a hub may not be on this machine: that is said, and they are not checked.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.gate.leaks import Leaks
from pipeline.progress import say
from pipeline.tasks import data_files, find_tasks, task_name

OWN = "aletheia_"  # how the shipped tasks are named


def forbid_tasks(leaks: Leaks, folder: Path, names: Sequence[str], quiet: bool = False) -> int:
    """How many texts are now forbidden. `folder` holds tasks/, questions/ and choices/.

    Raises `UserError` where an own task is not right.
    """
    rows = tuple(str(folder / part) for part in ("questions", "choices"))
    forbidden = 0
    for task in find_tasks(folder, names):
        if isinstance(task, dict) and all(path.startswith(rows) for path in data_files(task)):
            continue
        if isinstance(task, str) and task.startswith(OWN):  # of another folder: the evaluation says that it is missing
            continue
        try:
            if not quiet:
                say(f"reads the benchmark {task_name(task)}, so that it does not leak into training")
            for text, where, prompt in texts(_loaded(task)):
                leaks.forbid(text, where, prompt)
                forbidden += 1
        except Exception as error:  # lm-eval and datasets raise all sorts where a hub cannot be reached
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if not quiet:
                say(f"note: leaks into {task_name(task)} are not checked: {reason}")
    return forbidden


def texts(tasks: Iterable[Any]) -> Iterator[tuple[str, str, bool]]:
    """Prompt and right answer of each document, with where it stands and whether it is the prompt."""
    for task in tasks:
        for number, document in enumerate(task.eval_docs):
            where = f"{task.config.task} item {number}"
            target = task.doc_to_target(document)
            choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
            yield str(task.doc_to_text(document)), where, True
            yield str(choices[target] if choices and isinstance(target, int) else target), where, False


def _loaded(task: dict[str, Any] | str) -> list[Any]:
    """Indexing the standard tasks takes some 15 s."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return list(TaskManager(include_defaults=isinstance(task, str)).load([task])["tasks"].values())
