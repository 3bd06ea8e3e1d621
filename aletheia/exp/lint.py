"""`aletheia exp lint`: every mistake in the records, a line each, as a compiler would say it.

experiments/EXP-2026-11-21-003.yaml:5:1: error: hypotesis: no key of a record; try hypothesis
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from aletheia.output import print_json
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import criteria, ids
from pipeline.records.file import Reading, RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.person import problems
from pipeline.workspace import Workspace

_CONFLICT = re.compile(r"(?m)^(<{7} |={7}$|>{7} )")
_ID = re.compile(r"\bEXP-\d{4}-\d{2}-\d{2}-\d{3,}\b")


@dataclass(frozen=True)
class Finding:
    file: str
    line: int
    column: int
    severity: Literal["error", "warning"]
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.severity}: {self.what}"


def lint(workspace: Workspace, exps: Sequence[str], as_json: bool) -> bool:
    """Prints what is wrong in `exps` (ids or files; default: all). False when there is an error."""
    paths = [_path(workspace, exp) for exp in exps] or sorted(workspace.experiments.glob("EXP-*.yaml"))
    findings = [finding for path in paths for finding in _of_file(workspace, path)]
    findings += list(_doubled(workspace, set(paths)))
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(finding, file=sys.stdout)
        say(f"{len(paths)} records, {errors} errors, {len(findings) - errors} warnings")
    return errors == 0


def _of_file(workspace: Workspace, path: Path) -> Iterator[Finding]:
    shown = workspace.shown(path)

    def found(what: str, severity: Literal["error", "warning"] = "error", line: int = 1, column: int = 1) -> Finding:
        return Finding(shown, line, column, severity, what)

    file = RecordFile(path)
    try:
        read = file.read()
    except UserError as error:
        yield found(error.what)
        return
    try:
        text = file.above()
    except UserError as error:
        yield found(error.what, line=_line(error), column=_line(error, 2))
        return
    conflict = _CONFLICT.search(text)
    if conflict:
        yield found("a merge conflict is not resolved", line=text.count("\n", 0, conflict.start()) + 1)
        return
    for problem in problems(text):
        what = f"{problem.key + ': ' if problem.key else ''}{problem.what}" + (
            f"; try {problem.remedy}" if problem.remedy else ""
        )
        yield found(what, problem.severity, problem.line, problem.column)
    if read.mistake:
        return
    yield from (found(*one) for one in _of_record(workspace, file, read))


def _of_record(
    workspace: Workspace, file: RecordFile, read: Reading
) -> Iterator[tuple[str, Literal["error", "warning"]]]:
    said = read.person.get("experiment_id")
    if not ids.ID.match(file.id):
        yield f"`{file.id}` is no record's name; try aletheia exp renumber {workspace.shown(file.path)}", "error"
    elif said is not None and said != file.id:
        yield f"experiment_id: is {said}, the file is {file.id}; try the file's name", "error"
    try:
        now = criteria.read(read.person.get("success_criteria"))
        frozen = read.facts.verdict.criteria if read.facts and read.facts.verdict else []
        for change in criteria.changes(frozen, now) if read.facts else []:
            yield f"success_criteria: changed after the start, and not used: {change}", "warning"
    except UserError as error:
        yield str(error), "error"
    if read.damage:
        yield f"below the line: {read.damage.what}", "error"
    if read.edited:
        yield f"{read.edited}; try aletheia exp sync {file.id}", "error"
    if read.pending:
        yield f"what the pipeline knows waits beside it; try aletheia exp sync {file.id}", "error"
    if read.facts and liveness(read.facts) == "dead":
        yield f"its process is gone; try aletheia exp repair {file.id}", "warning"
    for name in sorted(_named(read) - {file.id}):
        if not (workspace.experiments / f"{name}.yaml").exists():
            yield f"names {name}, and there is no such record", "warning"


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
        match = re.search(rb"(?m)^experiment_id:\s*['\"]?(EXP-\d{4}-\d{2}-\d{2}-\d{3,})\b", path.read_bytes())
        claims[match[1].decode() if match else path.stem].append(path)
    for experiment_id, paths in claims.items():
        for path in paths[1:] if len(paths) > 1 else []:
            if path in asked or paths[0] in asked:
                other = workspace.shown(paths[0])
                what = f"{other} has the id {experiment_id} too; try aletheia exp renumber on one of the two"
                yield Finding(workspace.shown(path), 1, 1, "error", what)


def _path(workspace: Workspace, exp: str) -> Path:
    path = Path(exp) if Path(exp).suffix == ".yaml" else workspace.experiments / f"{exp}.yaml"
    path = path if path.is_absolute() or path.exists() else workspace.root / path
    if not path.exists():
        raise UserError("there is no such record", where=exp, remedy="aletheia exp list")
    return path.resolve() if path.is_absolute() else (Path.cwd() / path)


def _line(error: UserError, place: int = 1) -> int:
    parts = error.where.split(":")
    return int(parts[place]) if len(parts) > place and parts[place].isdigit() else 1
