"""Code in answers: does it parse, and where a question brings tests, does it pass them.

    found = inspect(question, answer, run=True)
    share([found, …])        {"answers", "without_code", "unscored", "parses": {"code", "python", …}, "passes": {"tests"}}

The unit is the answer: it parses in a language when all its fenced blocks of it do that can be judged. A block cannot be judged
where its language has no parser here, or the parser says nothing of it (a transcript, a template, too large); an answer all of
whose blocks are such is unscored, and one without a block has no code. Both are counted and in no share.

A question's `tests` are Python: the answer's Python blocks, one after another, are a module whose names they see. An answer
passes when they run to their end in the sandbox (`eval/sandbox/`); no code, or too slow, is no pass. Tests find mistakes, not
malice: code can see that it is tested, and what the tests are.
"""

import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.sandbox import sandbox
from pipeline import statistics
from pipeline.data.rows import Question
from pipeline.errors import UserError
from pipeline.gate.code import MOST_CHARACTERS, MOST_MARKDOWN, Block, blocks, fault

LANGUAGES = {  # as a fence names it: as it is counted
    "python": "python", "py": "python", "python3": "python", "sql": "sql", "postgresql": "sql", "postgres": "sql", "pgsql": "sql",
    "mysql": "sql", "sqlite": "sql", "tsql": "sql", "yaml": "yaml", "yml": "yaml", "json": "json", "jsonl": "json",
    "ndjson": "json", "toml": "toml", "bash": "shell", "sh": "shell", "shell": "shell", "go": "go", "golang": "go",
}  # fmt: skip
_NO_CODE_OF_ANY = {"python": "\n)", "sql": "\n)))", "yaml": "\n}", "json": "\n}", "toml": "\n]", "shell": "\n)"}
_GO_SECONDS = 10
_MAIN = """\
import sys
sys.path.insert(0, "")
import answer
globals().update({{name: value for name, value in vars(answer).items() if not name.startswith("__")}})
{tests}
print("\\n{end}", end="")
"""


@dataclass(frozen=True)
class Found:
    """What one answer's code is worth."""

    blocks: int = 0
    unclosed: bool = False  # its last fence is never closed: the answer was cut off, or forgot it
    searched: bool = True
    parses: dict[str, bool] = field(default_factory=dict)  # by language, of those that could be judged
    faults: list[str] = field(default_factory=list)
    tested: bool = False
    problem: str | None = None  # why it does not pass; None too where it was not tested
    not_run: str | None = None  # why the sandbox could not run its tests: then it is unscored

    def as_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "blocks": self.blocks,
            "unclosed": self.unclosed,
            "parses": self.parses,
            "faults": self.faults,
        }
        row |= {"passes": self.problem is None, "problem": self.problem} if self.tested else {}
        return row | ({"not_run": self.not_run} if self.not_run else {})


def tests_of(question: Question) -> str | None:
    """A question's optional field `tests`. Raises `UserError` where it is no text."""
    found = (question.model_extra or {}).get("tests")
    if found is None:
        return None
    if not isinstance(found, str) or not found.strip():
        raise UserError("tests: must be Python, as text", where=question.where)
    return found


def inspect(question: Question, answer: str, run: bool) -> Found:
    """`run`: also the question's tests, where it has some."""
    code, unclosed = blocks(answer)
    parses: dict[str, bool] = {}
    faults = []
    for block in code:
        judged, problem = parse(block, f"{question.prompt}\n{answer}")
        if judged:
            language = LANGUAGES[block.language]
            parses[language] = parses.get(language, True) and problem is None
        if problem:
            faults.append(f"block at line {block.line}: {problem}")
    found = Found(len(code), unclosed is not None, len(answer) <= MOST_MARKDOWN, parses, faults)
    tests = tests_of(question) if run else None
    if tests is None:
        return found
    try:
        return replace(found, tested=True, problem=failure(code, tests))
    except UserError as error:
        return replace(found, not_run=str(error))


def parse(block: Block, about: str) -> tuple[bool, str | None]:
    """Whether a block can be judged, and what is wrong with it."""
    language = LANGUAGES.get(block.language)
    if language is None or len(block.text) > MOST_CHARACTERS:
        return False, None
    if language == "go":
        return _go(block.text)
    problem = fault(block, about)
    if problem is not None:
        return True, problem
    # a parser that does not mind what no language takes said nothing of the block itself either
    spoilt = Block(block.language, block.text + _NO_CODE_OF_ANY[language], block.line)
    return fault(spoilt, about) is not None, None


def _go(text: str) -> tuple[bool, str | None]:
    """With gofmt, which only parses, and takes a fragment too."""
    gofmt = shutil.which("gofmt")
    if gofmt is None:
        return False, None
    try:
        done = subprocess.run(
            [gofmt, "-e"], input=text.encode("utf-8", "replace"), capture_output=True, timeout=_GO_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return False, None
    if done.returncode == 0:
        return True, None
    first = done.stderr.decode("utf-8", "replace").partition("\n")[0]
    if not first.startswith("<standard input>:"):  # it broke down itself
        return False, None
    line, _, what = first.removeprefix("<standard input>:").partition(":")
    return True, f"line {line} is no Go: {what.partition(': ')[2][:160]}"


def failure(code: Sequence[Block], tests: str) -> str | None:
    """Why the Python of an answer does not pass its tests, in one line; None where it does."""
    texts = [block.text for block in code if LANGUAGES.get(block.language) == "python"]
    if not texts:
        return "has no Python"
    end = secrets.token_hex(16)
    outcome = sandbox.run("python", _MAIN.format(tests=tests, end=end), files={"answer.py": "\n\n".join(texts)})
    if outcome.passed and not outcome.stdout.endswith(end):
        return "ended before its tests did"
    return outcome.problem


def share(found: Sequence[Found]) -> dict[str, Any]:
    """Shares of one model's answers, each with its interval; none of nothing."""
    languages = sorted({language for answer in found for language in answer.parses})
    parses = {"code": [all(a.parses.values()) for a in found if a.parses]}
    parses |= {language: [a.parses[language] for a in found if language in a.parses] for language in languages}
    passes = [a.problem is None for a in found if a.tested]
    return {
        "answers": len(found),
        "without_code": sum(a.searched and not a.blocks for a in found),
        "unscored": sum(not a.searched or (a.blocks > 0 and not a.parses) for a in found),
        "unclosed": sum(a.unclosed for a in found),
        "parses": {name: statistics.proportion(sum(each), len(each)) for name, each in parses.items() if each},
        "passes": {"tests": statistics.proportion(sum(passes), len(passes))} if passes else {},
        "not_run": sum(a.not_run is not None for a in found),
    }


def compare(ours: Sequence[Found], theirs: Sequence[Found]) -> dict[str, Any]:
    """Both models' shares, and the changes on the questions where both could be judged."""
    both = list(zip(theirs, ours, strict=True))
    code = [tuple(float(all(a.parses.values())) for a in pair) for pair in both if all(a.parses for a in pair)]
    tests = [tuple(float(a.problem is None) for a in pair) for pair in both if all(a.tested for a in pair)]
    changes = {
        name: statistics.paired([b for b, _ in pairs], [a for _, a in pairs], shares=True)
        for name, pairs in (("parses", code), ("passes", tests))
        if pairs
    }
    return {"model": share(ours), "base": share(theirs), "change": changes}


def told(results: dict[str, Any]) -> str:
    """One line of `compare`'s results."""
    parts = []
    for who in ("base", "model"):
        shares = results[who]
        code = shares["parses"].get("code")
        parses = f"{code.text(digits=2)} of {code.n} parse" if code else "none could be judged"
        passes = f", {tests.text(digits=2)} pass their tests" if (tests := shares["passes"].get("tests")) else ""
        parts.append(f"{who}: {parses}{passes}, {shares['without_code']} without code, {shares['unscored']} unscored")
    return f"code in answers: {'; '.join(parts)}"
