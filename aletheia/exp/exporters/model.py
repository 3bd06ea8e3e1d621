"""The model that a record made: what made it, what judged it, where it lies and what it must be asked with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aletheia.exp.exporters.record import Finished, finished
from pipeline.chat import Contract
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import index

OUTPUT = {"sft": "adapter", "dpo": "adapter", "merge": "model"}
SUFFIX = {"sft": "sft", "dpo": "dpo", "merge": "merged"}


@dataclass(frozen=True)
class Model:
    """The model: its record, those it was made by (first to last, itself among them), those that judged it, its pipeline."""

    record: Finished
    made_by: list[Finished]
    judged_by: list[Finished]
    pipeline: Finished | None

    @property
    def name(self) -> str:
        return f"{self.record.facts.configuration.get('name') or self.record.facts.profile}-{SUFFIX[self.record.facts.stage]}"

    @property
    def is_adapter(self) -> bool:
        return self.record.facts.stage != "merge"

    @property
    def base(self) -> dict[str, Any]:
        return self.record.facts.lineage.base or {}

    @property
    def base_on_hub(self) -> str | None:
        """Only what came from the hub has a revision."""
        return str(self.base["name"]) if self.base.get("revision") and self.base.get("name") else None

    @property
    def is_control(self) -> bool:
        sections = [one.facts.configuration.get("sft_config") for one in self.made_by]
        return any(isinstance(section, dict) and section.get("shuffle_answers") for section in sections)

    @property
    def folder(self) -> Path:
        return self.record.workspace.checkpoints / self.record.id / OUTPUT[self.record.facts.stage]

    @property
    def contract(self) -> Contract | None:
        try:
            return Contract.load(self.folder)
        except UserError:
            return None


def model_of(record: Finished) -> Model:
    """With all that other records know of it; one that cannot be read is named and left out."""
    parent = record.facts.lineage.parent
    pipeline = _finished_or_none(record, parent) if parent else None
    return Model(record, _made_by(record), list(_judged_by(record)), pipeline)


def _made_by(record: Finished) -> list[Finished]:
    """The chain of the records whose outputs it was built from, first to last. One that is gone ends it, aloud."""
    chain = [record]
    while chain[0].facts.lineage.inputs:
        taken = chain[0].facts.lineage.inputs[0].id
        if any(one.id == taken for one in chain):
            break
        before = _finished_or_none(record, taken)
        if before is None or before.facts.stage not in OUTPUT:
            break
        chain.insert(0, before)
    return chain


def _judged_by(record: Finished) -> Iterator[Finished]:
    """The complete evaluations of this model; for an adapter also those of the merges of it, which are the same model."""
    entries = [e for e in index.entries(record.workspace) if e.facts and e.facts.status == "complete"]
    taken = {e.id: {i.id for i in e.facts.lineage.inputs} for e in entries if e.facts}
    stage = {e.id: e.facts.stage for e in entries if e.facts}
    same = {record.id} | {one for one in taken if stage[one] == "merge" and record.id in taken[one]}
    for one in reversed(taken):
        judge = _finished_or_none(record, one) if stage[one] == "eval" and taken[one] & same else None
        if judge:
            yield judge


def _finished_or_none(record: Finished, other: str) -> Finished | None:
    try:
        return finished(record.workspace, other)
    except UserError as error:
        say(f"note: {error}; the card is without it")
        return None
