"""`aletheia exp lint`: every mistake in the records, a line each, as a compiler would say it.

experiments/EXP-2026-11-21-003.yaml:5:1: error: hypotesis: no key of a record; try hypothesis
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from aletheia.exp.mend import is_copy, located
from aletheia.exp.plan import planned_profile, read_plan
from aletheia.output import print_json
from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import criteria, ids
from pipeline.records.file import LINE, Reading, RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.person import problems
from pipeline.workspace import Workspace

Severity = Literal["error", "warning"]
_OWN_ID = re.compile(rb"(?m)^(?:\xef\xbb\xbf)?experiment_id:[ \t]*['\"]?(EXP-\d{4}-\d{2}-\d{2}-\d{3,})\b")
_CONFLICT = re.compile(r"(?m)^(<{7} |={7}$|>{7} )")
_ID = re.compile(r"\bEXP-\d{4}-\d{2}-\d{2}-\d{3,}\b")


@dataclass(frozen=True)
class Finding:
    file: str
    line: int
    column: int
    severity: Severity
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.severity}: {self.what}"


def lint(workspace: Workspace, exps: Sequence[str], as_json: bool) -> bool:
    """Prints what is wrong in `exps` (ids or files; default: all). False when there is an error."""
    files = [located(workspace, exp) for exp in exps]
    files = files or [RecordFile(path) for path in sorted(workspace.experiments.glob("EXP-*.yaml"))]
    findings = [finding for file in files for finding in _of_file(workspace, file)]
    findings += _doubled(workspace, {file.path for file in files})
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(finding, file=sys.stdout)
        say(f"{len(files)} records, {errors} errors, {len(findings) - errors} warnings")
    return errors == 0


def _of_file(workspace: Workspace, file: RecordFile) -> Iterator[Finding]:
    shown = workspace.shown(file.path)

    def found(what: str, severity: Severity = "error", line: int = 1, column: int = 1) -> Finding:
        return Finding(shown, line, column, severity, what)

    try:
        read, whole = file.read(), file.path.read_bytes().decode("utf-8", "replace")
    except UserError as error:
        yield found(error.what)
        return
    conflict = _CONFLICT.search(whole)
    if conflict:
        yield found("a merge conflict is not resolved", line=_line(whole, conflict.start()))
        return
    try:
        text = file.above()
    except UserError as error:
        yield found(error.what, "error", *_place(error))
    else:
        found_problems = problems(text)
        for problem in found_problems:
            what = f"{problem.key + ': ' if problem.key else ''}{problem.what}"
            what += f"; try {problem.remedy}" if problem.remedy else ""
            yield found(what, problem.severity, problem.line, problem.column)
        if read.mistake is None:
            misfits = list(_of_person(workspace, file, read, yamlio.load(text)))
            for what, severity, line in misfits:
                yield found(what, severity, line)
            sound = "error" not in [p.severity for p in found_problems] + [severity for _, severity, _ in misfits]
            if sound and read.facts is None and not read.damage and read.person.get("profile"):
                yield from (found(str(error), "error", *_place(error)) for error in _plan_mistakes(workspace, file))
    if read.damage:
        yield found(f"below the line: {read.damage.what}", "error", *_place(read.damage))
    below = _line(whole, whole.find(LINE)) if LINE in whole else 1
    for what, severity in _of_facts(file, read):
        yield found(what, severity, below)
    for name in sorted(_named(read) - {file.id}):
        if not (workspace.experiments / f"{name}.yaml").exists():
            yield found(f"names {name}, and there is no such record", "warning", _line(whole, whole.find(name)))


def _of_person(
    workspace: Workspace, file: RecordFile, read: Reading, document: yamlio.Document
) -> Iterator[tuple[str, Severity, int]]:
    """What does not fit its name, its criteria or what has run."""
    said = read.person.get("experiment_id")
    if not ids.ID.match(file.id):
        yield f"`{file.id}` is no record's name; try aletheia exp renumber {workspace.shown(file.path)}", "error", 1
    elif said is not None and said != file.id:
        what = f"experiment_id: is {said}, the file is {file.id}; try the file's name"
        yield what, "error", document.lines.get(("experiment_id",), 1)
    wanted = read.person.get("success_criteria")
    for index, value in enumerate(wanted if isinstance(wanted, list) else []):
        text = value.get("criterion") if isinstance(value, dict) else value
        try:
            if isinstance(text, str):
                criteria.parse(text, f"success_criteria[{index + 1}]")
        except UserError as error:
            yield str(error), "error", document.lines.get(("success_criteria", index), 1)
    if read.facts:
        frozen = read.facts.verdict.criteria if read.facts.verdict else []
        with suppress(UserError):
            for change in criteria.changes(frozen, criteria.read(wanted)):
                what = f"success_criteria: changed after the start, and not used: {change}"
                yield what, "warning", document.lines.get(("success_criteria",), 1)


def _plan_mistakes(workspace: Workspace, file: RecordFile) -> Iterator[UserError]:
    """What `exp run` would refuse."""
    shown = workspace.shown(file.path)
    try:
        planned_profile(workspace, read_plan(workspace, file, begun=False, quietly=True), shown)
    except UserError as error:
        yield error


def _of_facts(file: RecordFile, read: Reading) -> Iterator[tuple[str, Severity]]:
    if read.edited:
        yield f"{read.edited}; try aletheia exp sync {file.id}", "error"
    if read.pending:
        yield f"what the pipeline knows waits beside it; try aletheia exp sync {file.id}", "error"
    if read.facts and not (read.sealed or read.edited or read.pending):
        remedy = f"git log -- experiments/{file.path.name}"
        yield f"carries no seal: the program's half is not as it was written; try {remedy}", "error"
    if read.facts and liveness(read.facts) == "dead":
        yield f"its process is gone; try aletheia exp repair {file.id}", "warning"


def _named(read: Reading) -> set[str]:
    """Ids that the record refers to; free text is not searched."""
    person = read.person
    values = [person.get("from"), person.get("related"), person.get("parent"), person.get("next_steps")]
    names = set(_ID.findall(str(values)))
    if read.facts:
        lineage = read.facts.lineage
        names |= {taken.id for taken in lineage.inputs} | set(lineage.children)
        names |= {lineage.parent} if lineage.parent else set()
    return names


def _doubled(workspace: Workspace, asked: set[Path]) -> Iterator[Finding]:
    """Two files with one id: two checkouts made it, and both came together."""
    claims: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(workspace.experiments.glob("EXP-*.yaml")):
        match = _OWN_ID.search(path.read_bytes()) if path.is_file() else None
        claims[match[1].decode() if match else path.stem].append(path)
    for experiment_id, (first, *others) in claims.items():
        for path in others:
            if path in asked or first in asked:
                what = f"{workspace.shown(first)} has the id {experiment_id} too; try aletheia exp renumber on one of the two"
                if is_copy(RecordFile(path), RecordFile(first)):
                    what = f"is a copy of {workspace.shown(first)}; try deleting one of the two"
                yield Finding(workspace.shown(path), 1, 1, "error", what)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, max(position, 0)) + 1


def _place(error: UserError) -> tuple[int, int]:
    """Line and column, where the error tells them."""
    match = re.search(r":(\d+)(?::(\d+))?$", error.where)
    return (int(match[1]), int(match[2] or 1)) if match else (1, 1)
