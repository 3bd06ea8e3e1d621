"""The rows of one file, folder or hub data set that pass the gate, all in memory; and what was found on the others.

    admitted = admit(workspace, "data/sft", Conversation, config.training_data.check, leaks)

For a stage, which needs its rows at once. `aletheia data check` streams instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from pipeline.config import Check, TrainingData
from pipeline.data.read import row_of
from pipeline.data.rows import SHAPES, AnyRow, MultipleChoice, Question, Row, RowFault
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.gate import gate as gates
from pipeline.gate.benchmarks import READ, forbid_tasks
from pipeline.gate.finding import Finding
from pipeline.gate.leaks import Leaks
from pipeline.progress import say
from pipeline.workspace import Workspace

SHOWN = 3  # warnings of one rule that are said one by one


@dataclass
class Admitted(Generic[AnyRow]):
    rows: list[AnyRow]
    read: int
    rejects: list[Finding] = field(default_factory=list)  # one a row: the first error found
    findings: dict[str, int] = field(default_factory=dict)  # by the rule's name


def admit(
    workspace: Workspace,
    name: str,
    kind: type[AnyRow],
    check: Check,
    leaks: Leaks | None = None,
    quiet: bool = False,
) -> Admitted[AnyRow]:
    """Says what was found. Raises `UserError` where there is nothing to read, or no row passes."""
    # the model's own special tokens are looked for where rows are encoded, not guessed at here
    gate = gates.Gate(check.model_copy(update={"ignore": [*check.ignore, "special-token"]}), leaks=leaks)
    rows: list[Row] = []
    rejects: dict[str, Finding] = {}  # by place; of a row that breaks several rules the first
    warnings: dict[str, list[Finding]] = {}

    def note(finding: Finding) -> None:
        if finding.rule.severity == "error":
            rejects.setdefault(finding.where, finding)
        else:
            warnings.setdefault(finding.rule.name, []).append(finding)

    files = sources(workspace, name)
    gates.run(gate, [(source, kind) for source in files], note, rows.append, quiet)
    if not gate.total.rows:
        raise UserError("holds no rows", where=name, remedy=f"rows like {SHAPES[kind]}, one a line")
    broken = next((r for r in rejects.values() if r.rule.name == "broken-file"), None)
    if broken:  # one finding, and nobody knows how many rows
        raise UserError(f"cannot be read to its end: {broken.reason}", where=broken.where, remedy=broken.what_to_do)
    for found in () if quiet else warnings.values():
        for finding in found[:SHOWN]:
            say(f"warning: {finding.where}: {finding.text}")
        if len(found) > SHOWN:
            say(f"         {len(found) - SHOWN} more of {found[0].rule.name}: aletheia data check {name}")
    if gate.failed:
        finding = next(f for f in rejects.values() if not f.line)
        raise UserError(finding.text, where=finding.where, remedy=finding.what_to_do)
    kept = [row for number, row in enumerate(rows) if number not in gate.dropped]
    refused = list(rejects.values())
    if not kept:
        raise _none(gate.total.rows, refused, name)
    if len(kept) + len(refused) != gate.total.rows:
        raise AssertionError(f"{gate.total.rows} rows read, {len(kept)} kept and {len(refused)} rejected")
    return Admitted(kept, gate.total.rows, refused, dict(gate.found))  # type: ignore[arg-type]  # all are of `kind`


def _none(read: int, refused: Sequence[Finding], name: str) -> UserError:
    first = refused[0]
    remedy = first.what_to_do if first.remedy or len(refused) == 1 else f"aletheia data check {name}"
    if first.rule.name in ("leak", "near-leak"):
        remedy = "rows that are not those of the evaluation or of validation.path"
    return UserError(f"none of {read} rows can be used: {first.text}", where=first.where, remedy=remedy)


def evaluation_leaks(
    workspace: Workspace, config: TrainingData, tasks: Sequence[str], extra: Sequence[Row] = (), quiet: bool = False
) -> Leaks | None:
    """What must not stand in a training row: prompts and answers of an evaluation, of lm-eval's `tasks`, and of `extra`.

    None where there is nothing.
    """
    leaks = Leaks(config.check.leak_words, config.check.near_duplicate)
    found = [source for name in evaluation_parts(workspace, config) for source in sources(workspace, name)]
    forbidden = forbid(leaks, found) + forbid_tasks(leaks, workspace.path(config.eval), tasks, quiet)
    for row in extra:
        forbid_row(leaks, row)
    if not forbidden and not quiet:
        say(f"note: no evaluation rows in {config.eval}: leaks into them are not checked")
    return leaks if forbidden or extra else None


def evaluation_parts(workspace: Workspace, config: TrainingData) -> dict[str, type[Row]]:
    """The names of the parts of an evaluation that are there, with their kind. Raises `UserError` without its folder."""
    if not workspace.path(config.eval).is_dir():
        raise UserError(
            "there is no such folder, so nobody could tell what leaks into the evaluation",
            where=f"training_data.eval: {config.eval}",
            remedy="the folder, or an empty one where there is no evaluation",
        )
    kinds: dict[str, type[Row]] = {"questions": Question, "choices": MultipleChoice, "code": Question}
    parts = {f"{config.eval}/{name}": kinds[name] for name in READ}
    return {name: kind for name, kind in parts.items() if workspace.path(name).exists()}


def forbid(leaks: Leaks, found: Sequence[Source], kinds: tuple[type[Row], ...] = (Row,)) -> int:
    """How many rows, of these `kinds`, are now forbidden. What is no row is passed over; an evaluation refuses it."""
    forbidden = 0
    for source in found:
        for raw in source.raws():
            try:
                row = row_of(raw, source.shown)
            except RowFault:
                continue
            if isinstance(row, kinds):
                forbidden += 1
                forbid_row(leaks, row)
    return forbidden


def forbid_row(leaks: Leaks, row: Row) -> None:
    """Its prompts, answers and key points."""
    *before, last = row.asked
    leaks.forbid(last, row.where, prompt=True)
    for text in (*before, *row.answers, *(row.key_points if isinstance(row, Question) else ())):
        leaks.forbid(text, row.where)
