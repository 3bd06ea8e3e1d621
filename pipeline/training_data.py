"""What a training is given: its rows, split and encoded, on the base that it began with.

Rows that cannot be used go to `rejects.jsonl` beside the record, each with place and reason; which rows were used, to
`rows.jsonl`. A resume on other rows or another base is refused. Imports no trainer.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pipeline.chat import Chat, Encoded
from pipeline.data.rows import Message, Row, describe, hashes
from pipeline.data.split import split
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.stage import Job

AnyRow = TypeVar("AnyRow", bound=Row)
Tokens = TypeVar("Tokens", Encoded, tuple[Encoded, Encoded])


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
    rows: Sequence[AnyRow],
    encode: Callable[[AnyRow], Tokens],
    max_length: int,
    alter: Callable[[list[AnyRow]], list[AnyRow]] = list,
) -> tuple[list[tuple[AnyRow, Tokens]], list[tuple[AnyRow, Tokens]]]:
    """Training rows, as `alter` leaves them, and held-out rows, with their token ids; what was used goes into the record.

    Raises `UserError` when a resume does not find what the run began with, or too many rows cannot be used.
    """
    train, held_out = split(rows, job.config.training_data.validation)
    facts: dict[str, Any] = {"train": describe(train), "held_out": describe(held_out)}
    identity = base.identity()
    if job.resume:
        _same_as_begun(job, record, base, identity, facts)
    record.facts.data = facts | {"contract": chat.contract.sha256}
    record.facts.lineage.base = identity
    record.facts.results = {}
    items.write_rows(record.folder, {"train": hashes(train), "held_out": hashes(held_out)})
    (record.folder / "rejects.jsonl").unlink(missing_ok=True)  # what an interrupted run left: the rows are judged anew
    max_share = job.config.training_data.max_reject_share
    found = [_usable(part, chat, max_length, encode, record, max_share) for part in (alter(train), held_out)]
    record.save()
    return found[0], found[1]


def _same_as_begun(job: Job, record: Record, base: Base, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Other rows would make a resumed run replay some and skip others; other weights, make it another run."""
    changed = [
        f"the {part} rows changed since the run began ({then['rows']} rows then, {now['rows']} now)"
        for part, now in facts.items()
        if (then := record.facts.data.get(part)) and then["sha256"] != now["sha256"]
    ]
    weights = record.facts.lineage.base
    if weights and weights["sha256"] != identity["sha256"]:
        changed.append(f"the weights of {base.name} changed since the run began")
    if changed:
        where, remedy = job.workspace.shown(record.file.path), "a run of its own, without --resume"
        raise UserError(changed[0], where=where, remedy=remedy)


def _usable(
    rows: Sequence[AnyRow],
    chat: Chat,
    max_length: int,
    encode: Callable[[AnyRow], Tokens],
    record: Record,
    max_share: float,
) -> list[tuple[AnyRow, Tokens]]:
    """Rows that can be trained, with their encoding. Raises `UserError` when more than `max_share` cannot, or none can."""
    kept, rejects = [], []
    for row in rows:
        reserved = chat.reserved_in(_messages(row))
        if reserved:
            rejects.append((row, f"its text holds the special token {reserved}"))
            continue
        try:
            tokens = encode(row)
        except UserError as error:  # the template takes the others, not this one
            rejects.append((row, error.what))
            continue
        longest = max(len(side.ids) for side in (tokens if isinstance(tokens, tuple) else (tokens,)))
        if longest > max_length:
            rejects.append((row, f"{longest} tokens, max_length is {max_length}"))
        else:
            kept.append((row, tokens))
    record.facts.data["rejected"] = record.facts.data.get("rejected", 0) + len(rejects)
    if rejects:
        path = record.folder / "rejects.jsonl"
        lines = [json.dumps({"where": r.where, "id": r.id, "reason": why}, ensure_ascii=False) for r, why in rejects]
        with path.open("a", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
        row, why = rejects[0]
        say(f"note: {len(rejects)} of {len(rows)} rows cannot be used, first {row.where}: {why}")
        say(f"      all of them, with reasons: {record.workspace.shown(path)}")
        if not kept or len(rejects) / len(rows) > max_share:
            raise UserError(
                f"{len(rejects)} of {len(rows)} rows cannot be used, more than max_reject_share allows; the first: {why}",
                where=row.where,
                remedy="a larger max_length, shorter rows, or a larger training_data.max_reject_share",
            )
    return kept


def _messages(row: Row) -> list[Message]:
    return [m for name in ("messages", "prompt", "chosen", "rejected") for m in getattr(row, name, [])]
