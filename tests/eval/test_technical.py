"""Code in answers: what is judged, what is counted, and what its tests say."""

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from eval import technical
from eval.sandbox.walls import landlock_abi
from pipeline import statistics
from pipeline.data.rows import Question
from pipeline.errors import UserError
from pipeline.gate.code import Block

if TYPE_CHECKING:
    from tests.conftest import Trained

walled = pytest.mark.skipif(sys.platform != "linux" or not landlock_abi(), reason="Linux with Landlock")
go = pytest.mark.skipif(shutil.which("gofmt") is None, reason="no gofmt")

GOOD = {
    "python": "def f(x):\n    return x",
    "sql": "SELECT a FROM b WHERE c = 1",
    "yaml": "a:\n  - b: |\n      text",
    "json": '{"a": [1, 2]}',
    "shell": 'for f in *; do echo "$f"; done',
    "toml": "[a]\nb = 1",
}
BAD = {
    "python": "def f(x:\n    return x",
    "sql": "SELECT FROM WHERE (",
    "yaml": "a: [1, 2\nb: }",
    "json": '{"a": [1, 2}',
    "shell": "for f in *; do echo",
    "toml": "[a\nb = 1",
}


def fenced(language: str, text: str) -> str:
    return f"So:\n\n```{language}\n{text}\n```\n"


def question(**more: Any) -> Question:
    return Question(prompt="How?", key_points=["so"], **more)


@pytest.mark.parametrize("language", GOOD)
def test_each_language_is_judged_both_ways(language: str) -> None:
    name = {"shell": "bash"}.get(language, language)
    good, bad = (technical.inspect(question(), fenced(name, texts[language]), False) for texts in (GOOD, BAD))
    assert good.parses == {language: True} and good.faults == []
    assert bad.parses == {language: False}
    assert len(bad.faults) == 1 and bad.faults[0].startswith("block at line 3: ")


@go
@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("package a\n\nfunc f() int { return 1 }", (True, None)),
        ("x := 1\nfmt.Println(x)", (True, None)),
        ("func f( {", (True, "line 1 is no Go: expected ')', found '{'")),
    ],
    ids=["file", "fragment", "wrong"],
)
def test_go_is_parsed_where_its_compiler_is(text: str, verdict: tuple[bool, str | None]) -> None:
    assert technical.parse(Block("go", text, 1), "") == verdict


def test_without_its_compiler_go_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert technical.parse(Block("go", "func f( {", 1), "") == (False, None)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", ">>> 1 +\n1"),
        ("bash", "$ ls ("),
        ("yaml", "{{- if .Values.a }}\na: {{ .b }}"),
        ("python", "x = 1\n" * 40_000),
        ("rust", "fn main() {}"),
        ("", "anything"),
    ],
    ids=["python session", "shell session", "template", "too large", "no parser", "unnamed"],
)
def test_what_cannot_be_judged_is_unscored(language: str, text: str) -> None:
    found = technical.inspect(question(), fenced(language, text), False)
    assert (found.parses, found.faults) == ({}, [])
    shares = technical.share([found])
    assert (shares["unscored"], shares["without_code"], shares["parses"]) == (1, 0, {})


def test_the_unit_is_the_answer_and_what_has_no_code_is_in_no_share() -> None:
    answers = [
        fenced("python", GOOD["python"]) + fenced("py", BAD["python"]) + fenced("json", GOOD["json"]),
        fenced("python", GOOD["python"]),
        "No code at all.",
        fenced("text", "a"),
        "```json\n{}",
    ]
    shares = statistics.as_record(technical.share([technical.inspect(question(), answer, False) for answer in answers]))
    assert {name: (each["value"], each["n"]) for name, each in shares["parses"].items()} == {
        "code": (pytest.approx(2 / 3, abs=1e-6), 3), "python": (0.5, 2), "json": (1.0, 2),
    }  # fmt: skip
    assert [shares[name] for name in ("answers", "without_code", "unscored", "unclosed")] == [5, 1, 1, 1]
    assert shares["passes"] == {}
    # Wilson: 1 of 2, z = 1.96: 0.5 ± 0.4055
    assert [shares["parses"]["python"][end] for end in ("ci_low", "ci_high")] == pytest.approx(
        [0.0945, 0.9055], abs=1e-3
    )


def test_changes_are_on_the_questions_where_both_are_judged() -> None:
    good, bad, none = (
        technical.inspect(question(), answer, False)
        for answer in (fenced("python", GOOD["python"]), fenced("python", BAD["python"]), "No.")
    )
    results = technical.compare([good, good, good, none], [bad, good, none, good])
    change = results["change"]["parses"]
    assert (change.before.value, change.after.value, change.delta.value, change.delta.n) == (0.5, 1.0, 0.5, 2)
    assert "1 without code, 0 unscored" in technical.told(results)
    assert technical.compare([none], [good])["change"] == {}


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TESTS = "assert double(4) == 8\nassert _halve(4) == 2"
DOUBLE, HALVE = "def double(x):\n    return 2 * x", "def _halve(x):\n    return x / 2"
RIGHT = f"{DOUBLE}\n\n\n{HALVE}"


@walled
@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (fenced("python", RIGHT), None),
        (fenced("python", DOUBLE) + fenced("py", HALVE), None),
        (fenced("python", RIGHT + "\nif __name__ == '__main__':\n    input()"), None),
        (fenced("python", RIGHT.replace("2 * x", "3 * x")), "AssertionError"),
        (fenced("python", "import sys\nsys.exit(0)"), "ended before its tests did"),
        (fenced("python", "import os\nos._exit(0)"), "ended before its tests did"),
        (fenced("python", BAD["python"]), "SyntaxError: '(' was never closed"),
        (fenced("python", "open('/etc/passwd')"), "PermissionError: [Errno 13] Permission denied: '/etc/passwd'"),
        (fenced("bash", "echo"), "has no Python"),
        ("Nothing.", "has no Python"),
    ],
    ids=["right", "two blocks", "main", "wrong", "exit", "_exit", "syntax", "outside", "shell", "no code"],
)
def test_an_answer_passes_when_its_tests_ran_to_their_end(answer: str, problem: str | None) -> None:
    found = technical.inspect(question(tests=TESTS), answer, run=True)
    assert (found.tested, found.problem) == (True, problem)
    passes = technical.share([found])["passes"]["tests"]
    assert (passes.value, passes.n) == (float(problem is None), 1)


def test_nothing_runs_unless_it_is_asked_for(tmp_path: Any) -> None:
    mark = tmp_path / "ran"
    found = technical.inspect(question(tests=f"open({str(mark)!r}, 'w')"), fenced("python", RIGHT), run=False)
    assert not found.tested and not mark.exists() and technical.share([found])["passes"] == {}


@pytest.mark.parametrize("tests", [7, " ", ["assert True"]], ids=["number", "blank", "list"])
def test_tests_that_are_no_text_are_refused(tests: Any) -> None:
    with pytest.raises(UserError, match="tests: must be Python, as text"):
        technical.tests_of(question(tests=tests))


@walled
def test_an_evaluation_records_what_parses_and_what_passes(copied: "Trained") -> None:
    from eval.evaluate import Evaluate
    from pipeline.stage import run_stage

    folder = copied.workspace.path("data/eval/questions")
    for path in folder.iterdir():
        path.unlink()
    rows = [
        {"id": str(i), "prompt": f"How {i}?", "key_points": ["so"]} | ({"tests": "1 / 0"} if i else {})
        for i in range(3)
    ]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    record = run_stage(Evaluate, copied.job("eval_config.run_code=true", parts=("winrate",)))
    found = record.facts.results["technical"]
    assert found["model"]["answers"] == found["base"]["answers"] == 3
    assert found["model"]["passes"]["tests"]["value"] == 0.0 and found["base"]["passes"]["tests"]["n"] == 2
    lines = [json.loads(line) for line in (record.folder / "technical.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    assert ["passes" in line["model"] for line in lines] == [False, True, True]
