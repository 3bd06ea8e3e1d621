"""lm-eval's own tasks by name, without its index of all 14,000 files, which takes 15 s; and nothing of theirs runs code.

    found = find(["hellaswag", "mmlu_stem"])
    found.leaves("mmlu_stem")          ["mmlu_abstract_algebra", …]
    found.load("mmlu_anatomy")         lm-eval's task, with its data

A name stands for a task, for a group (a file that lists others) or for a tag (that tasks name themselves). Only files that
mention a wanted name are read; lm-eval's `TaskManager` then reads their folders.

Code tasks (HumanEval, MBPP and theirs) load the metric `code_eval` of the library `evaluate` as their module is imported, and
run what a model wrote by it, unguarded. A stand-in takes its place: one that runs nothing, or another that is given.
"""

import functools
import logging
import os
import re
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_KEY = r"^[ \t-]*[\"']?(task|group|tag)[\"']?[ \t]*:[ \t]*"
_NAMED = re.compile(_KEY + r"[\"']?([\w.+:-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_LISTED = re.compile(r"^[ \t]*-[ \t]+[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_RUNS = re.compile(
    r"(?<![\w.])(?:exec|eval)\(|\b(?:subprocess|multiprocessing)\b|\bos\.(?:system|popen)\b"
)  # model's code, mostly
MENDED = "an answer that begins with its code keeps its first word (lm-evaluation-harness#3447)"
_FENCE = re.compile(r"\A\s*```[\w+-]*[ \t]*\n")  # of an answer that opens the block once more
CODE_EVAL = "code_eval"  # the metric that runs code, of the library `evaluate`: we put the sandbox in its place


@dataclass(frozen=True)
class Stock:
    """lm-eval's `TaskManager` over the folders of the tasks found."""

    manager: Any
    unknown: tuple[str, ...]

    def leaves(self, name: str) -> list[str]:
        """The tasks that a name stands for. Raises `KeyError` for a group that changes its tasks, or names an unknown one."""
        entry = self.manager.task_index[name]
        if entry.kind.name in ("TASK", "PY_TASK"):
            return [name]
        if entry.kind.name == "TAG":  # the entry's own `tags` are those of the last folder alone
            return sorted(other.name for other in self.manager.task_index.values() if name in other.tags and other.cfg)
        children = entry.cfg["task"]
        if not isinstance(children, list) or not all(isinstance(child, str) for child in children):
            raise KeyError(name)
        return [leaf for child in children for leaf in self.leaves(child)]

    def load(self, leaf: str, code_eval: Any = None) -> Any:
        """With its data, from the hub or the cache: raises whatever three libraries raise."""
        return loaded(self.manager, leaf, leaf, modules(self.config(leaf)), code_eval or NotRun())

    def config(self, leaf: str) -> dict[str, Any]:
        """As its YAML says; functions are text, none is imported."""
        return dict(self.manager.task_index[leaf].cfg)


def find(names: Sequence[str]) -> Stock:
    """Those of `names` that lm-eval has, with all that they stand for."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    where, folders, wanted, known = _index(), set[str](), list(names), set[str]()
    while wanted:
        name = wanted.pop()
        if name in known:
            continue
        known.add(name)
        for path, kind in where.get(name, ()):
            folders.add(os.path.dirname(path))
            if kind == "group":
                text = Path(path).read_text("utf-8", "replace")
                wanted += [*_LISTED.findall(text), *(child for _, child in _NAMED.findall(text))]
    tops = sorted(f for f in folders if not any(f.startswith(other + os.sep) for other in folders))
    manager = TaskManager(include_defaults=False, include_path=tops)
    return Stock(manager, tuple(name for name in names if name not in manager.task_index))


def known_names() -> list[str]:
    return sorted(_index())


def code_of(config: Mapping[str, Any]) -> str | None:
    """Whether its own Python runs a model's code: `sandboxed` where it does so by `code_eval` alone, else `itself`."""
    texts = [path.read_text("utf-8", "replace") for path in set(_modules(config))]
    if any(_RUNS.search(text) for text in texts) or names_code_eval(config):
        return "itself"
    if any(CODE_EVAL in text for text in texts):
        return "sandboxed"
    return "itself" if config.get("unsafe_code") else None


def names_code_eval(config: Mapping[str, Any]) -> bool:
    """By its name lm-eval would load the real one."""
    return any(metric.get("metric") == CODE_EVAL for metric in config.get("metric_list") or [])


def modules(config: Mapping[str, Any]) -> list[Path]:
    """The files of the functions that the task names, none of them imported."""
    return sorted(set(_modules(config)))


def _modules(value: Any) -> Iterator[Path]:
    """`/…/humaneval/utils.pass_at_k` is how lm-eval writes `!function utils.pass_at_k` that it has not resolved."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _modules(one)
    elif isinstance(value, str) and value.startswith(os.sep):
        path = Path(value.rpartition(".")[0] + ".py")
        if path.is_file():
            yield path


@functools.cache
def _index() -> dict[str, list[tuple[str, str]]]:
    """Every name: the files that define it, each with `task`, `group` or `tag`."""
    spec = find_spec("lm_eval")
    assert spec and spec.submodule_search_locations
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for folder, _, files in os.walk(os.path.join(spec.submodule_search_locations[0], "tasks")):
        for file in files:
            if file.endswith(".yaml"):
                path = os.path.join(folder, file)
                with open(path, encoding="utf-8", errors="replace") as opened:
                    text = opened.read()
                for kind, name in _defined(text):
                    found[name].append((path, kind))
    return dict(found)


def _defined(text: str) -> Iterator[tuple[str, str]]:
    """A group lists tasks of other files below `task`: those are no definitions."""
    named = _NAMED.findall(text)
    groups = any(kind == "group" for kind, _ in named)
    yield from ((kind, name) for kind, name in named if not (groups and kind == "task"))
    if not groups and re.search(_KEY.replace("task|group|tag", "tag") + r"$", text, re.MULTILINE):
        yield from (("tag", name) for name in _LISTED.findall(text))


class NotRun:
    """In place of `code_eval` where nothing is to run: no program passes."""

    def compute(self, **_: Any) -> tuple[dict[str, float], dict[int, Any]]:
        return {"pass@1": 0.0}, {}


def loaded(manager: Any, spec: Any, name: str, files: Sequence[Path], code_eval: Any) -> Any:
    """lm-eval's task of a name or a configuration."""
    from datasets import disable_progress_bars

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    with warnings.catch_warnings(), stand_in(files, code_eval):
        warnings.simplefilter("ignore")
        return manager.load([spec])["tasks"][name]


@contextmanager
def stand_in(files: Sequence[Path], code_eval: Any) -> Iterator[None]:
    """While this is open, `files` are imported anew, and find `code_eval` where they load it; other metrics they lack.

    The library itself, which imports half of transformers, is left out of it. Afterwards their known fault is mended.
    """
    known = {str(path.resolve()) for path in files if CODE_EVAL in path.read_text("utf-8", "replace")}
    if not known:
        yield
        return
    _forget(known)
    library, before = types.ModuleType("evaluate"), sys.modules.get("evaluate")
    library.__dict__["load"] = {CODE_EVAL: code_eval}.__getitem__
    sys.modules["evaluate"] = library
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if before is not None:
            sys.modules["evaluate"] = before
    for module in _imported(known):
        _mend(module)


def mended(files: Sequence[Path]) -> str | None:
    """What was put right in those that are imported, for the record."""
    return next(
        (module.mended for module in _imported({str(p.resolve()) for p in files}) if hasattr(module, "mended")), None
    )


def _imported(files: set[str]) -> list[Any]:
    return [module for module in list(sys.modules.values()) if getattr(module, "__file__", None) in files]


def _forget(files: set[str]) -> None:
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) in files:
            del sys.modules[name]


def _mend(module: Any) -> None:
    """MBPP's own extraction takes the first word of an answer that begins at once, `def`, for the name of a language, so that
    such an answer never passes: EleutherAI/lm-evaluation-harness#3447, open. Where it is closed, nothing is changed.
    """
    extract = getattr(module, "extract_code_blocks", None)
    if extract is None or extract("x = 1\n```") == "x = 1":
        return

    def whole(text: str) -> str:
        return str(extract("\n" + _FENCE.sub("", text)))

    module.extract_code_blocks, module.mended = whole, MENDED


def why_offline() -> str | None:
    """None where the hub can be reached."""
    import httpx
    from datasets import config
    from huggingface_hub import constants

    if constants.is_offline_mode() or config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=10, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:  # the last two: of an odd proxy
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return None


@contextmanager
def hub(online: bool) -> Iterator[None]:
    """While this is open and not `online`, the hub's libraries take what they have and do not try five times to reach it."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not online:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
