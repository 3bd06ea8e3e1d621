"""Code that a model wrote for a benchmark: run in the sandbox (`eval/sandbox/`), and nowhere else.

Takes the place of the metric `code_eval` by which lm-eval's code tasks run it unguarded (`pipeline/stock_tasks.py`), with the
same call and the same estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1). Own tasks name it too:

    unsafe_code: true
    metric_list: [{metric: pass_at_1, aggregation: mean, higher_is_better: true}]
    filter_list: [{name: code, filter: [{function: code_after_prompt}]}]

A program passes when it and its tests run to their end within `LIMITS`. It has Python's standard library alone, so that a
solution that imports numpy does not pass. What a program does to its files, to builtins, or to its output changes nothing for
its tests; but it shares their process, and one that means to (a result that equals everything, a look into its caller's frame)
passes: tests find mistakes, not malice.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from eval.sandbox import sandbox
from eval.sandbox.sandbox import Limits

LIMITS = Limits(cpu=10, wall=15.0)
_MAIN = """\
import os, sys, types
module = types.ModuleType("candidate")
sys.modules["candidate"] = module
codes, run, tell = [], exec, os.write  # before the program runs, which may change any of them
for name in ("candidate.py", "tests.py"):
    with open(name, encoding="utf-8") as text:
        codes.append(compile(text.read(), name, "exec"))
for code in codes:
    run(code, module.__dict__)
tell(1, b"{end}")
"""


class SandboxedCodeEval:
    """In place of `evaluate.load("code_eval")`. Remembers why a program failed, by program and tests."""

    def __init__(self) -> None:
        self.problems: dict[tuple[str, str], str | None] = {}

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Mean pass@k over tasks: the tests of each, and the programs written for it. Raises `UserError` without a sandbox."""
        ran: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        shares: dict[int, list[float]] = {size: [] for size in k}
        for task, (tests, programs) in enumerate(zip(references, predictions, strict=True)):
            problems = [self.problem(program, tests) for program in programs]
            ran[task] = [(i, {"passed": p is None, "result": p or "passed"}) for i, p in enumerate(problems)]
            for size in k:
                if len(programs) >= size:
                    shares[size].append(pass_at_k(len(programs), problems.count(None), size))
        return {f"pass@{size}": math.fsum(found) / len(found) for size, found in shares.items() if found}, ran

    def problem(self, program: str, tests: str) -> str | None:
        if (program, tests) not in self.problems:
            self.problems[program, tests] = problem(program, tests)
        return self.problems[program, tests]


def problem(program: str, tests: str) -> str | None:
    """Why a program does not pass its tests, in one line; None where it does. Raises `UserError` without a sandbox."""
    end = secrets.token_hex(16)
    files = {"candidate.py": program, "tests.py": tests}
    files = {name: text.encode("utf-8", "replace").decode() for name, text in files.items()}  # no half characters
    outcome = sandbox.run("python", _MAIN.format(end=end), LIMITS, files)
    if outcome.passed and end not in outcome.stdout:
        return "ended before its tests did"
    return outcome.problem


def pass_at_k(programs: int, passed: int, k: int) -> float:
    """Chance that one of k drawn from `programs` passes: 1 − C(n−c, k)/C(n, k)."""
    return 1.0 - math.comb(programs - passed, k) / math.comb(programs, k)


def with_sandbox(task: Mapping[str, Any], code_eval: SandboxedCodeEval) -> dict[str, Any]:
    """An own task's configuration, with what it calls `pass_at_1` and `code_after_prompt` as functions."""

    def pass_at_1(references: Sequence[str], predictions: Sequence[Any]) -> float:
        programs = [[p] if isinstance(p, str) else list(p) for p in predictions]
        return code_eval.compute(references, programs)[0]["pass@1"]

    metrics = [m | {"metric": pass_at_1} if m.get("metric") == PASS else m for m in task.get("metric_list") or []]
    filters = [
        each | {"filter": [_CODE if step.get("function") == AFTER_PROMPT else step for step in each["filter"]]}
        for each in task.get("filter_list") or []
    ]
    return {**task, **({"metric_list": metrics} if metrics else {}), **({"filter_list": filters} if filters else {})}


def code_after_prompt(answers: Sequence[Sequence[str]], items: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Each item's `prompt`, and what the model wrote after it up to the end of the block."""
    return [
        [item["prompt"] + text.partition("```")[0] for text in texts]
        for texts, item in zip(answers, items, strict=True)
    ]


PASS, AFTER_PROMPT = "pass_at_1", "code_after_prompt"
_CODE = {"function": "custom", "filter_fn": code_after_prompt}
