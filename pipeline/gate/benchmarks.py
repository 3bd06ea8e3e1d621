"""The prompts and answers of lm-eval-harness tasks, so that none of them stands in a training row.

Tasks made of rows that the gate reads itself (`READ`) are left to it. Of the others, those whose data comes from a hub may not
be on this machine: that is said, and they are not checked. Nothing of a code task is run.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import stock_tasks
from pipeline.gate.leaks import Leaks
from pipeline.progress import say
from pipeline.tasks import data_files, find_tasks, task_name

OWN = "aletheia_"  # how the shipped tasks are named
READ = ("questions", "choices", "code")  # below training_data.eval


def forbid_tasks(leaks: Leaks, folder: Path, names: Sequence[str], quiet: bool = False) -> int:
    """How many texts are now forbidden. `folder` holds tasks/ and those of `READ`.

    Raises `UserError` where an own task is not right.
    """
    rows = tuple(str(folder / part) for part in READ)
    wanted = [
        task
        for task in find_tasks(folder, names)
        if not (isinstance(task, dict) and all(path.startswith(rows) for path in data_files(task)))
        and not (
            isinstance(task, str) and task.startswith(OWN)
        )  # of another folder: the evaluation says that it is missing
    ]
    standard = [task for task in wanted if isinstance(task, str)]
    known = stock_tasks.find(standard) if standard else None
    online = known is None or stock_tasks.why_offline() is None
    forbidden = 0
    for task in wanted:
        try:
            if not quiet:
                say(f"reads the benchmark {task_name(task)}, so that it does not leak into training")
            with stock_tasks.hub(online):
                found = _loaded(task, known)
            for text, where, prompt in texts(found):
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


def _loaded(task: dict[str, Any] | str, known: stock_tasks.Stock | None) -> list[Any]:
    """Raises whatever three libraries raise, and `ValueError` for what is not even looked at."""
    from lm_eval.tasks import TaskManager

    if known is None or not isinstance(task, str):
        return [
            stock_tasks.loaded(TaskManager(include_defaults=False), task, task_name(task), [], stock_tasks.NotRun())
        ]
    if task in known.unknown:
        raise ValueError("there is no such task")
    leaves = known.leaves(task)
    if any(stock_tasks.code_of(known.config(leaf)) == "itself" for leaf in leaves):
        raise ValueError("it runs code in a way of its own")
    return [known.load(leaf) for leaf in leaves]
