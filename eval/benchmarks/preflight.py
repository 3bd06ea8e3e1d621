"""Before a benchmark runs: which tasks can, and why the others cannot.

    found = check(find_tasks(folder, ["aletheia_choices", "hellaswag"]), run_code=False)
    found.ready          their items at hand: what is loaded here is what runs
    found.left_out       {"hellaswag": "its data is not on this machine: aletheia eval prefetch"}

A task is left out where its name is unknown (which an evaluation refuses), where it runs code that a model wrote and
`run_code` is not true or there is no sandbox, where it would run such code by itself, and where its data cannot be had.
Nothing is imported of the first three.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.benchmarks import code
from eval.sandbox import sandbox
from pipeline import stock_tasks
from pipeline.stock_tasks import Stock, hub, why_offline
from pipeline.tasks import task_name

SEED = 1234  # of the examples before a question
UNKNOWN = "there is no such task"
Tasks = Sequence[dict[str, Any] | str]


@dataclass(frozen=True)
class Ready:
    """A name of the profile and the tasks that it stands for, their data loaded: one, or several of a group."""

    name: str
    leaves: dict[str, Any]  # lm-eval's tasks
    runs_code: bool = False
    mended: str | None = None  # what was put right of a task's own code

    @property
    def items(self) -> int:
        return sum(len(task.eval_docs) for task in self.leaves.values())


@dataclass
class Preflight:
    ready: list[Ready] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # by name: why
    code_eval: code.SandboxedCodeEval = field(default_factory=code.SandboxedCodeEval)

    def table(self) -> list[tuple[str, str, str]]:
        """Task, items, and what becomes of it."""
        rows = [(r.name, str(r.items), "runs, its code in the sandbox" if r.runs_code else "runs") for r in self.ready]
        return rows + [(name, "–", f"left out: {why}") for name, why in self.left_out.items()]

    def lines(self) -> list[str]:
        widths = [max(len(row[column]) for row in self.table()) for column in (0, 1)]
        return [f"{name:<{widths[0]}}  {n:>{widths[1]}}  {what}" for name, n, what in self.table()]


def check(tasks: Tasks, run_code: bool, online: bool | None = None, only_fetch: bool = False) -> Preflight:
    """`online` None: as the hub can be reached. Only where one of lm-eval's own tasks is named does it matter.

    `only_fetch`: nothing is going to run here, so that a task that runs code is loaded where it could not be run.
    """
    found, names = Preflight(), [task for task in tasks if isinstance(task, str)]
    own = {task_name(task) for task in tasks if not isinstance(task, str)}
    known = stock_tasks.find(names) if names else None
    if names and online is None:
        online = why_offline() is None
    with hub(not names or bool(online)):
        for task in tasks:
            name = task_name(task)
            if isinstance(task, dict):
                _add(found, name, {name: task}, None, run_code or only_fetch, online, only_fetch)
                continue
            assert known is not None
            if name in known.unknown:
                near = difflib.get_close_matches(name, [*own, *stock_tasks.known_names()], 1)
                found.left_out[name] = UNKNOWN + (f"; did you mean {near[0]}?" if near else "")
                continue
            try:
                leaves = {leaf: known.config(leaf) for leaf in known.leaves(name)}
            except KeyError:
                found.left_out[name] = "a group that sets its tasks' options: name the tasks that it lists"
                continue
            _add(found, name, leaves, known, run_code or only_fetch, online, only_fetch)
    return found


def _add(
    found: Preflight,
    name: str,
    leaves: Mapping[str, dict[str, Any]],
    known: Stock | None,
    run_code: bool,
    online: bool | None,
    only_fetch: bool,
) -> None:
    kinds = {_code_of(config, own=known is None) for config in leaves.values()}
    if why := _refused(kinds, run_code, only_fetch):
        found.left_out[name] = why
        return
    loaded = {}
    for leaf, config in leaves.items():
        try:
            loaded[leaf] = _load(leaf, config, known, found.code_eval)
        except Exception as error:  # a task's own code, and three libraries below it
            found.left_out[name] = _no_data(leaf if leaf != name else "", error, known is not None, online)
            return
    files = [path for config in leaves.values() for path in stock_tasks.modules(config)]
    found.ready.append(Ready(name, loaded, "sandboxed" in kinds, stock_tasks.mended(files)))


def _code_of(config: Mapping[str, Any], own: bool) -> str | None:
    if not own or stock_tasks.names_code_eval(config):
        return stock_tasks.code_of(config)
    ours = any(metric.get("metric") == code.PASS for metric in config.get("metric_list") or [])
    return "sandboxed" if ours or config.get("unsafe_code") else None  # YAML without functions: it can only name ours


def _refused(kinds: set[str | None], run_code: bool, only_fetch: bool) -> str | None:
    if "itself" in kinds:
        return "it runs code outside the sandbox, in a way of its own"
    if "sandboxed" not in kinds:
        return None
    if not run_code:
        return "it runs code that the model wrote: eval_config.run_code=true allows that, in the sandbox"
    problem = None if only_fetch else sandbox.available()
    return f"it runs code that the model wrote, and there is no sandbox here: {problem}" if problem else None


def _load(leaf: str, config: Mapping[str, Any], known: Stock | None, code_eval: code.SandboxedCodeEval) -> Any:
    """lm-eval's task with its data. `known` None: an own one, whose configuration this is."""
    from lm_eval.tasks import TaskManager

    if known is None:
        spec = code.with_sandbox(config, code_eval)
        task = stock_tasks.loaded(TaskManager(include_defaults=False), spec, leaf, [], code_eval)
    else:
        task = known.load(leaf, code_eval)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(SEED)
    return task


def _no_data(leaf: str, error: Exception, from_hub: bool, online: bool | None) -> str:
    whose = f"{leaf}: " if leaf else ""
    if from_hub and not online:
        return f"{whose}its data is not on this machine, and the hub cannot be reached: aletheia eval prefetch where it can"
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{whose}its data cannot be had ({said})"
