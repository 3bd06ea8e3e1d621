"""Code benchmarks: the project's own items are right, and whatever a model writes runs in the sandbox or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import code, preflight
from pipeline import stock_tasks
from pipeline.tasks import find_tasks
from pipeline.workspace import CHECKOUT

FOLDER = CHECKOUT / "data" / "eval"
ROWS = [json.loads(line) for path in sorted((FOLDER / "code").glob("*.jsonl")) for line in path.open(encoding="utf-8")]
ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5"


def test_every_item_is_whole_and_asked_once() -> None:
    assert len(ROWS) >= 20
    assert len({row["id"] for row in ROWS}) == len({row["entry_point"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["prompt"].startswith((f"def {row['entry_point']}(", f"class {row['entry_point']}:"))
        assert row["prompt"].endswith('"""\n') or row["prompt"].endswith("):\n")
        assert "```" not in row["prompt"] + row["reference"], "it would end the block that the answer is taken from"


def test_every_reference_solution_passes_its_tests_and_its_examples() -> None:
    """All in one sandbox: each item's `check` in turn, then the examples in its docstring."""
    program = "\n\n".join(row["prompt"] + row["reference"] for row in ROWS)
    checks = "\n".join(f"{row['test']}\ncheck({row['entry_point']})" for row in ROWS)
    examples = """
import doctest, sys
tests = [test for test in doctest.DocTestFinder().find(sys.modules["candidate"]) if test.examples]
assert len(tests) == LENGTH, len(tests)
assert all(doctest.DocTestRunner().run(test).failed == 0 for test in tests)
"""
    assert code.problem(program, checks + examples.replace("LENGTH", str(len(ROWS)))) is None


def test_every_item_fails_what_does_nothing() -> None:
    tests = "\n".join(f"{row['test']}\nfound[{row['id']!r}] = fails(check)" for row in ROWS)
    program = """
found = {}
def fails(check):
    try:
        check(lambda *given, **named: None)
    except Exception:
        return True
"""
    assert code.problem(program, f"{tests}\nassert all(found.values()), found") is None


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("def add(a, b):\n    return a - b", "AssertionError"),
        ("def add(a, b:", "SyntaxError: "),
        ("import sys\nsys.exit(0)", "ended before its tests did"),
        ("import os\nos._exit(0)", "ended before its tests did"),
        (
            "import socket\nsocket.create_connection(('127.0.0.1', 9))",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        (f"open({str(CHECKOUT / 'README.md')!r})", "PermissionError: [Errno 13] Permission denied"),
        ("def add(a, b):\n    return '\ud800'", "AssertionError"),
    ],
    ids=["wrong", "no Python", "exits", "exits hard", "network", "files", "half a character"],
)
def test_what_does_not_pass_says_why(program: str, why: str) -> None:
    assert (code.problem(program, TESTS) or "").startswith(why)


@pytest.mark.parametrize(
    "program",
    [
        "open('tests.py', 'w').write('pass')",
        "import builtins\nbuiltins.compile = lambda *given: ''",
        "import builtins\nbuiltins.exec = lambda *given: None",
        "import builtins, io\nbuiltins.open = lambda *given, **named: io.StringIO('pass')",
        "import sys\nsys.argv[:] = []\nclass AssertionError(Exception): pass\nadd = lambda a, b: 0",
    ],
    ids=["their file", "compile", "exec", "open", "AssertionError"],
)
def test_what_a_program_puts_in_place_of_others_changes_nothing_for_its_tests(program: str) -> None:
    assert code.problem(program, TESTS) in ("AssertionError", "NameError: name 'add' is not defined")


@pytest.mark.parametrize(
    "more", ["import io, sys\nsys.stdout = io.StringIO()", "import atexit\natexit.register(print, 1)"]
)
def test_nor_does_what_a_right_one_prints(more: str) -> None:
    assert code.problem(f"{ADD}{more}\n", TESTS) is None


def test_a_program_is_a_module_of_its_own_as_in_code_eval() -> None:
    program = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n" + ADD
    )
    assert (
        code.problem(program + "if __name__ == '__main__':\n    raise SystemExit(1)", f"{TESTS}\nassert P(1).x == 1")
        is None
    )


@pytest.mark.parametrize(
    ("programs", "passed", "k", "chance"), [(1, 1, 1, 1.0), (4, 1, 1, 0.25), (4, 2, 2, 5 / 6), (3, 0, 2, 0.0)]
)
def test_pass_at_k_is_the_unbiased_estimate(programs: int, passed: int, k: int, chance: float) -> None:
    assert code.pass_at_k(programs, passed, k) == pytest.approx(chance)


def test_it_answers_as_code_eval_does_and_runs_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = code.SandboxedCodeEval()
    passes = ours.compute(references=[TESTS, TESTS], predictions=[[ADD], ["def add(a, b): return 0"]], k=[1, 2])
    assert passes[0] == {"pass@1": 0.5}, "2 of one program cannot be drawn"
    assert passes[1][1] == [(0, {"passed": False, "result": "AssertionError"})]
    monkeypatch.setattr(code, "problem", None)
    assert ours.compute(references=[TESTS], predictions=[[ADD]])[0] == {"pass@1": 1.0}


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Path]:
    """Data in the shape of HumanEval's and MBPP's, and a secret that stands outside of every sandbox."""
    secret = tmp_path / "secret"
    secret.write_text("kept")
    prompt = 'def add(a, b):\n    """Their sum."""\n'
    item = {"task_id": "0", "prompt": prompt, "entry_point": "add", "test": f"def check(add):\n    {TESTS}\n"}
    (tmp_path / "humaneval.json").write_text(json.dumps(item) + "\n")
    item = {"task_id": 11, "text": "Their sum.", "code": ADD, "test_list": [TESTS, TESTS, TESTS]}
    (tmp_path / "mbpp.json").write_text(json.dumps(item) + "\n")
    return {"secret": secret, **{name: tmp_path / f"{name}.json" for name in ("humaneval", "mbpp")}}


@pytest.mark.parametrize("name", ["humaneval_instruct", "mbpp_instruct"])
def test_lm_evals_own_code_tasks_run_what_was_written_in_the_sandbox(name: str, local: dict[str, Path]) -> None:
    """The task as it is published, on local data: only its `code_eval` is ours. An attack changes nothing."""
    found = stock_tasks.find([name])
    entry = found.manager.task_index[name]
    ours = code.SandboxedCodeEval()
    with stock_tasks.stand_in(stock_tasks.modules(found.config(name)), ours):
        path = str(local[name.partition("_")[0]])
        overrides = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": path}}}
        task = found.manager._factory.build(entry, overrides=overrides, registry=found.manager.task_index)
    doc = next(iter(task.eval_docs))
    good, bad = ("    return a + b\n```", f"    open({str(local['secret'])!r}, 'w')\n    return a + b\n```")
    if name == "mbpp_instruct":
        good, bad = (f"def add(a, b):\n{body}" for body in (good, bad))
    scores = [_score(task, doc, [answer]) for answer in (good, bad)]
    assert scores == [1.0, 0.0]
    assert local["secret"].read_text() == "kept"
    assert any("Permission denied" in str(problem) for problem in ours.problems.values())


def _score(task: Any, doc: Any, answers: Sequence[str]) -> float:
    from lm_eval.api.instance import Instance

    asked = Instance("generate_until", doc, ("", {}), 0)
    asked.resps = list(answers)
    task._instances = [asked]
    task.apply_filters()
    [filtered] = asked.filtered_resps.values()
    [score] = task.process_results(doc, [filtered]).values()
    return float(score)


def test_the_own_task_is_not_even_loaded_unless_code_may_run() -> None:
    tasks = find_tasks(FOLDER, ["aletheia_code"])
    refused = preflight.check(tasks, run_code=False)
    assert not refused.ready and "eval_config.run_code=true" in refused.left_out["aletheia_code"]
    allowed = preflight.check(tasks, run_code=True)
    assert [(each.name, each.items, each.runs_code) for each in allowed.ready] == [("aletheia_code", len(ROWS), True)]
