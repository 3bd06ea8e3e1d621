"""What a training is given: rows through the gate, split and encoded, on the base that it began with.

Rows that cannot be used go to `rejects.jsonl` beside the record, each with file, line, rule and reason; which rows were
used, to `rows.jsonl`; the rows themselves into a snapshot (`pipeline/data/store.py`). A resume on other rows or another
base is refused. Imports no trainer.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.chat import Chat, Encoded
from pipeline.config import Profile
from pipeline.data import store
from pipeline.data.rows import AnyRow, Conversation, PreferencePair, Row, describe, hashes, row_hash, text_digest
from pipeline.data.split import described, split
from pipeline.errors import UserError
from pipeline.gate import tokens
from pipeline.gate.admit import Admitted, admit, evaluation_leaks, forbid_row
from pipeline.gate.finding import Finding
from pipeline.gate.leaks import Leaks
from pipeline.gate.rules import BY_NAME
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Facts
from pipeline.stage import Job
from pipeline.workspace import Workspace

UNFIT = "unfit"  # in rows.jsonl: rows that are too long, or that the template does not take
PARTS: dict[type, str] = {Conversation: "sft", PreferencePair: "dpo"}  # keys of training_data
Tokens = TypeVar("Tokens", Encoded, tuple[Encoded, Encoded])


@dataclass
class TrainingRows(Generic[AnyRow]):
    """Rows that can be trained, in their two parts, and what was found on the others.

    They stand in the order of their hashes: what a run trains, and when, depends on the set and the seed, not on files.
    """

    train: list[AnyRow]
    held_out: list[AnyRow]
    read: int
    rejects: list[Finding]
    findings: Counter[str]  # by the rule's name
    unfit: list[AnyRow]  # of the rejects those that are too long, or that the template does not take
    shared: int = 0  # training rows that stand in what the other stage holds out

    @property
    def domains(self) -> list[str]:
        """Of the rows to train."""
        return [row.domain for row in self.train]

    @property
    def every(self) -> list[AnyRow]:
        return [*self.train, *self.held_out]

    def described(self, job: Job) -> dict[str, Any]:
        """For the record: both parts, the snapshot of all, and how they were told apart."""
        path = store.keep(job.workspace, self.every)
        return {
            "train": describe(self.train),
            "held_out": describe(self.held_out),
            "split": described(job.config.training_data.validation),
            "snapshot": {
                "rows": len(self.every),
                "sha256": path.name.partition(".")[0],
                "path": job.workspace.shown(path),
            },
            "order_seed": job.config.seed,
            "read": self.read,
            "rejected": len(self.rejects),
            "findings": dict(sorted(self.findings.items())),
            "in_held_out_of_other_stage": self.shared,
        }

    def parts(self) -> dict[str, dict[str, str]]:
        """Hashes by id, for `rows.jsonl`."""
        found = {"train": hashes(self.train), "held_out": hashes(self.held_out)}
        return found | ({UNFIT: hashes(self.unfit)} if self.unfit else {})

    def text(self, limit: float = 1.0) -> str:
        """`limit`: the share of rejected rows from which the stage stops."""
        rejected = f", {len(self.rejects)} of {self.read} rejected" if self.rejects else ""
        stops = ": more than max_reject_share allows, it would stop" if len(self.rejects) > limit * self.read else ""
        return f"{len(self.train)} to train, {len(self.held_out)} held out{rejected}{stops}"


def read(
    workspace: Workspace,
    config: Profile,
    kind: type[AnyRow],
    chat: Chat | None = None,
    quiet: bool = False,
) -> TrainingRows[AnyRow]:
    """The conversations or pairs of a profile: through the gate, split, and without what does not fit.

    None of them stands in an evaluation. `chat`: None leaves the rules on tokens out. The same files and settings give the
    same rows and parts, in whatever stage. Raises `UserError` where there is nothing to read, or nothing passes.
    """
    paths, tasks = config.training_data, config.eval_config.tasks
    apart = _held_out_apart(workspace, config, kind, quiet)
    leaks = evaluation_leaks(workspace, paths, tasks, apart.rows if apart else (), quiet)
    admitted = admit(workspace, getattr(paths, PARTS[kind]), kind, paths.check, leaks, quiet)
    train, held_out = split(admitted.rows, paths.validation) if apart is None else (admitted.rows, apart.rows)
    found = TrainingRows(train, held_out, admitted.read, admitted.rejects, Counter(admitted.findings), [])
    if apart:
        found.read += apart.read
        found.rejects += apart.rejects
        found.findings += Counter(apart.findings)
        _drop_what_is_held_out(found)
    if chat:
        _drop_what_does_not_fit(found, chat, getattr(config, f"{PARTS[kind]}_config").max_length)
    found.train.sort(key=row_hash)
    found.held_out.sort(key=row_hash)
    return found


def _drop_what_is_held_out(found: TrainingRows[AnyRow]) -> None:
    """Training rows whose very text is held out, however short they are: shorter than a leak in words must be."""
    places = {text_digest(row): row.where for row in found.held_out}
    kept = []
    for row in found.train:
        if where := places.get(text_digest(row)):
            found.rejects.append(_finding(row, "leak", f"is held out at {where}"))
            found.findings["leak"] += 1
        else:
            kept.append(row)
    found.train = kept


def _drop_what_does_not_fit(found: TrainingRows[AnyRow], chat: Chat, max_length: int) -> None:
    for part in (found.train, found.held_out):
        kept = []
        for row in part:
            if faults := list(tokens.faults(chat, row, max_length)):
                found.unfit.append(row)
                found.rejects.append(_finding(row, *faults[0]))
                found.findings.update(name for name, _ in faults)
            else:
                kept.append(row)
        part[:] = kept


def _finding(row: Row, rule: str, reason: str) -> Finding:
    return Finding(BY_NAME[rule], row.file, row.line, reason, row.id, item=row.item)


def say_what_the_other_holds_out(workspace: Workspace, config: Profile, rows: TrainingRows[AnyRow], kind: type) -> int:
    """How many training rows stand in what the other stage holds out: dpo's in sft's conversations, sft's in dpo's pairs.

    They may be trained, since teams ask the same questions for both; but what is then measured there is not unseen.
    """
    other = next(k for k in PARTS if k is not kind)
    try:
        held_out: list[Any] = read(workspace, config, other, quiet=True).held_out
    except UserError:  # there are none, or none that are right: the other stage says so
        return 0
    leaks = Leaks(config.training_data.check.leak_words, config.training_data.check.near_duplicate)
    for row in held_out:
        forbid_row(leaks, row)
    shared = [row for row in rows.train if any(leaks.found(t, t == row.asked[-1]) for t in (*row.asked, *row.answers))]
    if shared:
        say(
            f"note: {len(shared)} of {len(rows.train)} rows stand in what {PARTS[other]} holds out, first {shared[0].where}:"
        )
        say(f"      figures on {PARTS[other]}'s held-out rows are not of unseen rows after this")
    return len(shared)


def _held_out_apart(workspace: Workspace, config: Profile, kind: type[AnyRow], quiet: bool) -> Admitted[AnyRow] | None:
    """The rows of `validation.path`; None where a share is held out instead."""
    paths = config.training_data
    if paths.validation.path is None:
        return None
    name = f"{paths.validation.path}/{PARTS[kind]}"
    if not workspace.path(paths.validation.path).is_dir():
        where = f"training_data.validation.path: {paths.validation.path}"
        raise UserError("there is no such folder", where=where, remedy="a folder with sft/, dpo/ or both")
    if not workspace.path(name).exists():
        return None
    leaks = evaluation_leaks(workspace, paths, config.eval_config.tasks, quiet=True)
    return admit(workspace, name, kind, paths.check, leaks, quiet)


def recorded(
    workspace: Workspace, config: Profile, file: RecordFile, facts: Facts, part: str, kind: type[AnyRow]
) -> list[AnyRow]:
    """The very rows that a training used, `train` or `held_out`: from its snapshot, else from the files as they are now.

    Raises `UserError` when some of them are nowhere any more.
    """
    folder = workspace.experiments / file.id
    ids = {sha256: row_id for row_id, sha256 in items.rows(folder).get(part, {}).items()}
    wanted = set(ids)
    said = facts.data.get(part, {})
    if not said.get("rows"):
        return []
    if items.digest(items.rows(folder).get(part, {}).values()) != said.get("sha256"):
        raise UserError(f"its {items.ROWS} does not name the rows that the record says", where=workspace.shown(folder))
    try:
        rows = store.load(workspace, str(facts.data.get("snapshot", {}).get("sha256")), kind)
    except UserError:
        rows = read(workspace, config, kind, quiet=True).every
    found = [row for row in rows if row_hash(row) in wanted]
    for row in found:
        if row.id == row.where:
            row.put(ids[row_hash(row)])  # where this record found it: a snapshot may be older than the file's name
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
    alter: Callable[[list[AnyRow]], list[AnyRow]] | None = None,
) -> tuple[list[tuple[AnyRow, Tokens]], list[tuple[AnyRow, Tokens]]]:
    """Training rows, or what `alter` makes of them, and held-out rows, with token ids; what was used goes into the record.

    Raises `UserError` when a resume does not find what the run began with, or too many rows cannot be used.
    """
    facts = rows.described(job)
    identity = base.identity()
    begun = job.resume and any(record.output.glob("checkpoint-*"))
    if begun:  # else nothing is trained yet, and these rows are as good
        _same_as_begun(job, record, base, identity, facts)
    record.facts.data = facts | {"contract": chat.contract.sha256, "template": chat.contract.facts()}
    record.facts.lineage.base = identity
    record.facts.results = {}
    say(f"rows: {rows.text()}")
    items.write_rows(record.folder, rows.parts())
    rejects = list(rows.rejects)
    used = list(_fitting(alter(rows.train), chat, max_length, rejects)) if alter else rows.train
    train = [(row, encode(row)) for row in used]
    record.facts.data["rejected"] = len(rejects)
    write_rejects(record.folder, rejects)
    record.save()
    stop_at_too_many(job, record, rejects, rows.read)
    if not train:
        first = rejects[0]
        raise UserError(f"no row is left to train on: {first.text}", where=first.where, remedy=first.what_to_do)
    return train, [(row, encode(row)) for row in rows.held_out]


def _fitting(rows: list[AnyRow], chat: Chat, max_length: int, rejects: list[Finding]) -> Iterator[AnyRow]:
    """What was altered may no longer fit: such rows go to `rejects`."""
    for row in rows:
        fault = next(tokens.faults(chat, row, max_length), None)
        if fault is None:
            yield row
        else:
            rejects.append(_finding(row, *fault))


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
            remedy=f"{first.what_to_do}, or a larger training_data.max_reject_share; all are in {shown}",
        )


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
