"""lm-eval's tasks by name: those that the profiles name exist, groups and tags are taken apart, code tasks are known."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import stock_tasks as stock

COMPUTER_SCIENCE = [
    "mmlu_college_computer_science", "mmlu_high_school_computer_science", "mmlu_computer_security", "mmlu_machine_learning",
]  # fmt: skip
PROFILES = ["hellaswag", "truthfulqa_mc2", "humaneval_instruct", "mbpp_instruct", *COMPUTER_SCIENCE]


@pytest.fixture(scope="module")
def found() -> stock.Stock:
    names = [*PROFILES, "mmlu_stem", "ai2_arc", "glue", "cruxeval_input", "openllm", "no_such_task"]
    return stock.find(names)


def test_every_name_of_the_profiles_is_a_task(found: stock.Stock) -> None:
    assert found.unknown == ("no_such_task",)
    assert [found.leaves(name) for name in PROFILES] == [[name] for name in PROFILES]


def test_groups_and_tags_stand_for_their_tasks(found: stock.Stock) -> None:
    stem = found.leaves("mmlu_stem")
    assert len(stem) == 19 and set(COMPUTER_SCIENCE) <= set(stem)
    assert found.leaves("ai2_arc") == ["arc_challenge", "arc_easy"]
    assert len(found.leaves("glue")) > 5, "a tag whose tasks lie in several folders"


def test_a_group_that_changes_its_tasks_is_not_taken_apart(found: stock.Stock) -> None:
    with pytest.raises(KeyError):
        found.leaves("openllm")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("humaneval_instruct", "sandboxed"),
        ("mbpp_instruct", "sandboxed"),
        ("cruxeval_input", "itself"),
        ("hellaswag", None),
    ],
)
def test_what_runs_a_models_code_is_known_without_importing_it(
    found: stock.Stock, name: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {str(path) for path in stock.modules(found.config(name))}
    for known, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) in modules:  # another test has run the task
            monkeypatch.delitem(sys.modules, known)
    assert stock.code_of(found.config(name)) == kind
    assert not modules & {getattr(module, "__file__", None) for module in list(sys.modules.values())}


def test_a_task_that_says_it_is_unsafe_and_not_how_is_taken_at_its_word() -> None:
    assert stock.code_of({"task": "x", "unsafe_code": True}) == "itself"
    assert stock.code_of({"task": "x"}) is None


def test_the_library_comes_back_after_and_was_never_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", before := object())
    (module := tmp_path / "utils.py").write_text("import evaluate\nours = evaluate.load('code_eval')\n")
    with stock.stand_in([module], ours := stock.NotRun()):
        space: dict[str, Any] = {}
        exec(module.read_text(), space)
        assert space["ours"] is ours
        with pytest.raises(KeyError):
            sys.modules["evaluate"].load("bleu")
    assert sys.modules["evaluate"] is before


@pytest.mark.parametrize(
    ("written", "code_in_it"),
    [
        ("def f():\n    return 1\n```", "def f():\n    return 1"),
        ("import re\nx = 2\n```\nThat is it.", "import re\nx = 2"),
        ("```python\nx = 3\n```", "x = 3"),
        ("\nx = 4\n```", "\nx = 4"),
        ("never closed", ""),
    ],
    ids=["begins at once", "prose after", "opens it again", "a line later", "unclosed"],
)
def test_mbpps_extraction_loses_no_first_word(written: str, code_in_it: str) -> None:
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    [module] = stock.modules(stock.find(["mbpp_instruct"]).config("mbpp_instruct"))
    with stock.stand_in([module], stock.NotRun()):
        loaded = _load_module_with_cache(module)
        assert loaded.extract_code_blocks("def f():\n    return 1\n```").startswith(" f()"), (
            "mended upstream: take ours out"
        )
    assert loaded.extract_code_blocks(written) == code_in_it
