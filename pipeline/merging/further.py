"""The adapters that a merge takes: its source's, and the further ones of `merge_config.adapters`.

Each must be of the same base and the same chat contract. A record is named by its id, or by a folder in its checkpoints
(a link to one, its `adapter-best`), and its files must be those the record names. Another folder, from elsewhere, must
bring a contract and name the base; that its weights were these nobody can prove then, and the record says so.

A DPO goes on from its SFT, so it holds it: what two adapters both hold would be added twice, and is refused.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Chat, Contract
from pipeline.errors import UserError
from pipeline.merging import adapter_config
from pipeline.merging.lora import CONFIG, WEIGHTS
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import find, ids
from pipeline.records.schema import Facts, Input
from pipeline.stage import Job, Source

KEY = "merge_config.adapters"


@dataclass(frozen=True)
class Taken:
    """An adapter's folder, and what is known of it."""

    name: str  # EXP-…, or a folder
    folder: Path
    sha256: str
    trained_over: str  # the base's quantization in training
    base: str | None  # hash of the base's weights in training; None: not known
    input: Input | None = None  # of a record

    def facts(self) -> dict[str, Any]:
        found = {"name": self.name, "sha256": self.sha256, "trained_over": self.trained_over}
        return found if self.base else found | {"base": "the same by its name; no hash of it is known"}


def taken(source: Source) -> Taken:
    return _of_record(source.facts, source.output, source.input)


def further(job: Job, base: Base, chat: Chat, first: Taken) -> list[Taken]:
    """Those beside the first, which has been checked.

    Raises `UserError` for one of another base or template, and for two that hold the same adapter.
    """
    found: list[Taken] = []
    held = _held(job, first) if job.config.merge_config.adapters else {}
    for name in job.config.merge_config.adapters:
        one = _find(job, base, name)
        shown = job.workspace.shown(one.folder)
        if Contract.load(one.folder) != chat.contract:
            raise UserError("was trained with another chat template than the base has now", where=shown)
        if one.base not in (None, first.base):
            raise UserError("was trained on other weights than this base's", where=shown)
        own = _held(job, one)
        for weights in own.keys() & held.keys():
            what = f"{one.name} holds the adapter of {own[weights]}, as another one does: it would be added twice"
            raise job.profile.error(KEY, what, "naming one of them")
        held |= own
        say(f"adds {one.name} (named)")
        found.append(one)
    return found


def _find(job: Job, base: Base, name: str) -> Taken:
    workspace, folder = job.workspace, job.workspace.path(name)
    if not ids.ID.match(name) and not folder.is_dir():
        raise job.profile.error(KEY, f"{name} is neither a record nor a folder", "EXP-… of a training")
    kept, resolved = workspace.checkpoints.resolve(), folder.resolve()
    inside = resolved.relative_to(kept).parts if resolved.is_relative_to(kept) else ()
    of = name if ids.ID.match(name) else inside[0] if inside and ids.ID.match(inside[0]) else None
    if of is None:
        return _from_elsewhere(job, base, name, folder)
    file, facts = find.source(workspace, job.profile.id, ["dpo", "sft"], of)
    output, taken_input = find.checked_output(workspace, file, facts, "adapter")
    if of != name:
        output = kept / of / Path(*inside[1:])
        if not any(workspace.path(artifact.path).resolve().parent == output for artifact in facts.artifacts):
            raise job.profile.error(KEY, f"{name} is no output that {of} names", of)
        taken_input = taken_input.model_copy(update={"path": workspace.shown(workspace.checkpoints / of / output.name)})
    return _of_record(facts, output, taken_input)


def _held(job: Job, one: Taken) -> dict[str, str]:
    """Hashes of the weights that it is, and of those that it went on from, and whose they are."""
    held = {find.sha256(one.folder / WEIGHTS): one.name}
    if one.input and (facts := (file := find.named(job.workspace, one.input.id)).facts()):
        for ancestor, known in find.lineage(job.workspace, file, facts):
            held |= {part.sha256: ancestor.id for part in known.artifacts if Path(part.path).name == WEIGHTS}
    return held


def _of_record(facts: Facts, folder: Path, taken_input: Input) -> Taken:
    known = facts.results.get("training", {}).get("quantization")
    over = str(known or facts.configuration.get("quantization", "none"))
    return Taken(
        taken_input.id, folder, _hash(folder), over, (facts.lineage.base or {}).get("sha256"), input=taken_input
    )


def _from_elsewhere(job: Job, base: Base, name: str, folder: Path) -> Taken:
    """Raises `UserError` for one that does not name this base."""
    if not all((folder / part).is_file() for part in (CONFIG, WEIGHTS)):
        raise job.profile.error(KEY, f"{name} holds no adapter that peft saved", "EXP-… of a training")
    of = adapter_config.read(folder / CONFIG).get("base_model_name_or_path") or ""
    if of != base.name and not (of and Path(of).resolve() == base.folder.resolve()):
        what = f"{name} is an adapter of {of or 'a base it does not name'}, not of {base.name}"
        raise job.profile.error(KEY, what, "EXP-… of a training on this base")
    say(f"note: {name} has no record: that its base had these very weights is not known")
    return Taken(name, folder, _hash(folder), "none", None)


def _hash(folder: Path) -> str:
    """Of what the adapter's weights are and how they are read."""
    return hashlib.sha256("".join(_digests(folder)).encode()).hexdigest()


def _digests(folder: Path) -> Iterator[str]:
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_file():  # else the adapter is refused when it is read
            yield find.sha256(folder / name)
