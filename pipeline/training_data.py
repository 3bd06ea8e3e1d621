"""What a training is given: rows through the gate, split and encoded, on the base that it began with.

Rows that cannot be used go to `rejects.jsonl` beside the record, each with file, line, rule and reason; which rows were
used, to `rows.jsonl`; the rows themselves into a snapshot (`pipeline/data/store.py`). A resume on other rows or another
base is refused. Imports no trainer.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.chat import Chat, Encoded
from pipeline.config import Profile, TrainingData
from pipeline.data import store
from pipeline.data.rows import AnyRow, Conversation, PreferencePair, describe, hashes, row_hash
from pipeline.data.split import split
from pipeline.errors import UserError
from pipeline.gate import tokens
from pipeline.gate.admit import Admitted, admit, evaluation_leaks
from pipeline.gate.finding import Finding
from pipeline.gate.rules import BY_NAME, selected
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Facts
from pipeline.stage import Job
from pipeline.workspace import Workspace

PARTS: dict[type, str] = {Conversation: "sft", PreferencePair: "dpo"}  # keys of training_data
Tokens = TypeVar("Tokens", Encoded, tuple[Encoded, Encoded])


@dataclass
class TrainingRows(Generic[AnyRow]):
    """Rows that passed the gate, in their two parts, and what was found on the others."""

    train: list[AnyRow]
    held_out: list[AnyRow]
    read: int
    rejects: list[Finding] = field(default_factory=list)
    findings: dict[str, int] = field(default_factory=dict)

    @property
    def every(self) -> list[AnyRow]:
        return [*self.train, *self.held_out]

    def described(self, job: Job) -> dict[str, Any]:
        """For the record: both parts, the snapshot of all, and how they were told apart."""
        validation = job.config.training_data.validation
        how = {"path": validation.path} if validation.path else {
            "strategy": validation.strategy, "fraction": validation.fraction, "seed": validation.seed
        }  # fmt: skip
        path = store.keep(job.workspace, self.every)
        return {
            "train": describe(self.train),
            "held_out": describe(self.held_out),
            "split": how,
            "snapshot": {
                "rows": len(self.every),
                "sha256": path.name.partition(".")[0],
                "path": job.workspace.shown(path),
            },
            "order_seed": job.config.seed,
            "rejected": len(self.rejects),
            "findings": dict(sorted(self.findings.items())),
        }

    def text(self) -> str:
        rejected = f", {len(self.rejects)} rejected" if self.rejects else ""
        return f"{len(self.train)} to train, {len(self.held_out)} held out{rejected}"


def read(
    workspace: Workspace, paths: TrainingData, kind: type[AnyRow], tasks: Sequence[str], quiet: bool = False
) -> TrainingRows[AnyRow]:
    """The conversations or pairs that `paths` names, none of which stands in an evaluation or in one of `tasks`.

    The same files and settings give the same rows and parts, in whatever stage. Raises `UserError` where there is nothing to
    read, or nothing passes.
    """
    apart = _held_out_apart(workspace, paths, kind, tasks, quiet)
    leaks = evaluation_leaks(workspace, paths, tasks, apart.rows if apart else (), quiet)
    admitted = admit(workspace, getattr(paths, PARTS[kind]), kind, paths.check, leaks, quiet)
    if apart is None:
        train, held_out = split(admitted.rows, paths.validation)
        return TrainingRows(train, held_out, admitted.read, admitted.rejects, admitted.findings)
    findings = Counter(admitted.findings) + Counter(apart.findings)
    read_in_all = admitted.read + apart.read
    return TrainingRows(admitted.rows, apart.rows, read_in_all, [*admitted.rejects, *apart.rejects], dict(findings))


def _held_out_apart(
    workspace: Workspace, paths: TrainingData, kind: type[AnyRow], tasks: Sequence[str], quiet: bool
) -> Admitted[AnyRow] | None:
    """The rows of `validation.path`; None where a share is held out instead."""
    if paths.validation.path is None:
        return None
    folder = f"{paths.validation.path}/{PARTS[kind]}"
    name = folder if workspace.path(folder).exists() else paths.validation.path
    return admit(workspace, name, kind, paths.check, evaluation_leaks(workspace, paths, tasks, quiet=True), quiet)


def recorded(
    workspace: Workspace, config: Profile, file: RecordFile, facts: Facts, part: str, kind: type[AnyRow]
) -> list[AnyRow]:
    """The very rows that a training used, `train` or `held_out`: from its snapshot, else from the files as they are now.

    Raises `UserError` when some of them are nowhere any more.
    """
    folder = workspace.experiments / file.id
    wanted = set(items.rows(folder).get(part, {}).values())
    said = facts.data.get(part, {})
    if not said.get("rows"):
        return []
    if items.digest(items.rows(folder).get(part, {}).values()) != said.get("sha256"):
        raise UserError(f"its {items.ROWS} does not name the rows that the record says", where=workspace.shown(folder))
    try:
        rows = store.load(workspace, str(facts.data.get("snapshot", {}).get("sha256")), kind)
    except UserError:
        rows = read(workspace, config.training_data, kind, config.eval_config.tasks, quiet=True).every
    found = [row for row in rows if row_hash(row) in wanted]
    if len({row_hash(row) for row in found}) < len(wanted):
        gone = len(wanted) - len({row_hash(row) for row in found})
        raise UserError(
            f"{gone} of the {len(wanted)} {part} rows of {file.id} are gone or changed since, and so is its snapshot",
            where=getattr(config.training_data, PARTS[kind]),
            remedy="the rows as they were, or training again",
        )
    return found


def check_context(job: Job, base: Base, section: str) -> None:
    """Raises `UserError` when rows may be longer than the model was made for."""
    limit, wanted = base.context, getattr(job.config, section).max_length
    if limit and wanted > limit:
        raise job.profile.error(
            f"{section}.max_length", f"{wanted} is more than the base's context of {limit}", str(limit)
        )


def encoded(
    job: Job,
    record: Record,
    base: Base,
    chat: Chat,
    rows: TrainingRows[AnyRow],
    encode: Callable[[AnyRow], Tokens],
    max_length: int,
    alter: Callable[[list[AnyRow]], list[AnyRow]] = list,
) -> tuple[list[tuple[AnyRow, Tokens]], list[tuple[AnyRow, Tokens]]]:
    """Training rows, as `alter` leaves them, and held-out rows, with their token ids; what was used goes into the record.

    Raises `UserError` when a resume does not find what the run began with, or too many rows cannot be used.
    """
    facts = rows.described(job)
    identity = base.identity()
    if job.resume:
        _same_as_begun(job, record, base, identity, facts)
    record.facts.data = facts | {"contract": chat.contract.sha256}
    record.facts.lineage.base = identity
    record.facts.results = {}
    say(f"rows: {rows.text()}")
    items.write_rows(record.folder, {"train": hashes(rows.train), "held_out": hashes(rows.held_out)})
    rejects = list(rows.rejects)
    kept = _fit(alter(rows.train), job, chat, max_length, encode, rejects)
    kept_out = _fit(rows.held_out, job, chat, max_length, encode, rejects)
    record.facts.data["rejected"] = len(rejects)
    write_rejects(record.folder, rejects)
    record.save()
    stop_at_too_many(job, record, rejects, rows.read)
    if not kept:
        raise UserError("no row is left to train on", where=rejects[0].where, remedy=rejects[0].rule.remedy)
    return kept, kept_out


def write_rejects(folder: Path, rejects: Sequence[Finding]) -> None:
    """`rejects.jsonl`: a line a row, with file, line, rule and reason. What an interrupted run left is replaced."""
    path = folder / "rejects.jsonl"
    path.unlink(missing_ok=True)
    if rejects:
        path.write_text("".join(json.dumps(r.as_json(), ensure_ascii=False) + "\n" for r in rejects), "utf-8")


def stop_at_too_many(job: Job, record: Record, rejects: Sequence[Finding], read: int) -> None:
    """Says how many rows were rejected. Raises `UserError` when they are more than the profile allows."""
    if not rejects:
        return
    first = rejects[0]
    shown = job.workspace.shown(record.folder / "rejects.jsonl")
    say(f"note: {len(rejects)} of {read} rows cannot be used, first {first.where}: {first.text}")
    say(f"      all of them, with reasons: {shown}")
    if len(rejects) / read > job.config.training_data.max_reject_share:
        raise UserError(
            f"{len(rejects)} of {read} rows cannot be used, more than max_reject_share allows; the first: {first.text}",
            where=first.where,
            remedy=f"{first.rule.remedy}, or a larger training_data.max_reject_share; all are in {shown}",
        )


def _fit(
    rows: Iterable[AnyRow],
    job: Job,
    chat: Chat,
    max_length: int,
    encode: Callable[[AnyRow], Tokens],
    rejects: list[Finding],
) -> list[tuple[AnyRow, Tokens]]:
    """Rows that can be trained, with their encoding; what is wrong with the others goes to `rejects`."""
    rules = BY_NAME | selected(job.config.training_data.check)  # ignored or not: what does not fit cannot be trained
    kept: list[tuple[AnyRow, Tokens]] = []
    for row in rows:
        fault = next(tokens.faults(chat, row, max_length), None)
        if fault is None:
            kept.append((row, encode(row)))
        else:
            rejects.append(Finding(rules[fault[0]], row.file, row.line, fault[1], row.id))
    return kept


def _same_as_begun(job: Job, record: Record, base: Base, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Other rows would make a resumed run replay some and skip others; other weights, make it another run."""
    changed = [
        f"the {part} rows changed since the run began ({then['rows']} rows then, {facts[part]['rows']} now)"
        for part in ("train", "held_out")
        if (then := record.facts.data.get(part)) and then["sha256"] != facts[part]["sha256"]
    ]
    weights = record.facts.lineage.base
    if weights and weights["sha256"] != identity["sha256"]:
        changed.append(f"the weights of {base.name} changed since the run began")
    if changed:
        where, remedy = job.workspace.shown(record.file.path), "a run of its own, without --resume"
        raise UserError(changed[0], where=where, remedy=remedy)
