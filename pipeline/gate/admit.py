"""The rows of one file, folder or hub data set that pass the gate, all in memory; and what was found on the others.

    admitted = admit(workspace, "data/sft", Conversation, config.training_data.check, leaks)

For a stage, which needs its rows at once. `aletheia data check` streams instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from pipeline.config import Check, TrainingData
from pipeline.data.formats import converted
from pipeline.data.rows import SHAPES, AnyRow, Row, RowFault, validated
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.gate import gate as gates
from pipeline.gate.benchmarks import forbid_tasks
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
    rejects: dict[tuple[str, int], Finding] = {}
    warnings: dict[str, list[Finding]] = {}

    def note(finding: Finding) -> None:
        if finding.rule.severity == "error":
            rejects.setdefault((finding.file, finding.line), finding)
        else:
            warnings.setdefault(finding.rule.name, []).append(finding)

    files = sources(workspace, name)
    gates.run(gate, files, note, rows.append, kind, quiet)
    if not gate.total.rows:
        raise UserError("holds no rows", where=name, remedy=f"rows like {SHAPES[kind]}, one a line")
    broken = next((r for r in rejects.values() if r.rule.name == "broken-file"), None)
    if broken:  # one finding, and nobody knows how many rows
        raise UserError(f"cannot be read to its end: {broken.reason}", where=broken.where, remedy=broken.rule.remedy)
    for found in () if quiet else warnings.values():
        for finding in found[:SHOWN]:
            say(f"warning: {finding.where}: {finding.text}")
        if len(found) > SHOWN:
            say(f"         {len(found) - SHOWN} more of {found[0].rule.name}: aletheia data check {name}")
    kept = [row for number, row in enumerate(rows) if number not in gate.dropped]
    refused = list(rejects.values())
    if not kept:
        first = refused[0]
        remedy = first.rule.remedy if len(refused) == 1 else f"aletheia data check {name}"
        raise UserError(f"none of {gate.total.rows} rows can be used: {first.text}", where=first.where, remedy=remedy)
    return Admitted(kept, gate.total.rows, refused, dict(gate.found))  # type: ignore[arg-type]  # all are of `kind`


def evaluation_leaks(
    workspace: Workspace, config: TrainingData, tasks: Sequence[str], extra: Sequence[Row] = (), quiet: bool = False
) -> Leaks | None:
    """What must not stand in a training row: prompts and answers of an evaluation, of lm-eval's `tasks`, and of `extra`.

    None where there is nothing.
    """
    leaks = Leaks(config.check.leak_words, config.check.near_duplicate)
    folders = [f"{config.eval}/{part}" for part in ("questions", "choices")]
    found = [source for name in folders if workspace.path(name).exists() for source in sources(workspace, name)]
    forbidden = forbid(leaks, found) + forbid_tasks(leaks, workspace.path(config.eval), tasks)
    for row in extra:
        for text in (*row.asked, *row.answers):
            leaks.forbid(text, row.where)
    if not forbidden and not quiet:
        say(f"note: no evaluation rows in {config.eval}: leaks into them are not checked")
    return leaks if forbidden or extra else None


def forbid(leaks: Leaks, found: Sequence[Source]) -> int:
    """The number of rows whose texts are now forbidden. Those that are no rows are passed over; the evaluation refuses them."""
    forbidden = 0
    for source in found:
        for raw in source.raws():
            try:
                if raw.values is None:
                    continue
                kind, values = converted(raw.values)
                row = validated(values, kind, source.shown, raw.line)
            except RowFault:
                continue
            forbidden += 1
            for text in (*row.asked, *row.answers):
                leaks.forbid(text, row.where)
    return forbidden
