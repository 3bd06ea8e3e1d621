"""Data: reads all rows of a profile, checks them, and records counts, split and hashes.

    aletheia data snapshot --profile tiny        make data PROFILE=tiny

Training reads the same rows again and records their hashes itself; this stage is for looking before training, and the
first step of a pipeline. It checks form, not quality.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, MultipleChoice, PreferencePair, Question, describe, hashes
from pipeline.data.split import split
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job


@dataclass
class Snapshot:
    name: ClassVar[str] = "data"

    job: Job
    sft: list[Conversation]
    dpo: list[PreferencePair]
    questions: list[Question]
    choices: list[MultipleChoice]
    inputs: list[Input] = field(default_factory=list)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        paths, workspace = job.config.training_data, job.workspace
        return cls(
            job,
            read_rows(workspace, paths.sft, Conversation),
            read_rows(workspace, paths.dpo, PreferencePair),
            read_rows(workspace, f"{paths.eval}/questions", Question),
            read_rows(workspace, f"{paths.eval}/choices", MultipleChoice),
        )

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("sft", self._split_text(self.sft)),
            ("dpo", self._split_text(self.dpo)),
            ("eval", f"{len(self.questions)} open questions, {len(self.choices)} multiple choice"),
        ]

    def run(self, record: Record) -> None:
        record.facts.data = {
            "sft": self._split(self.sft),
            "dpo": self._split(self.dpo),
            "questions": describe(self.questions),
            "choices": describe(self.choices),
        }
        sets: dict[str, list[Any]] = {"questions": self.questions, "choices": self.choices}
        for name, rows in (("sft", self.sft), ("dpo", self.dpo)):
            train, held_out = split(rows, self.job.config.training_data.validation)
            sets |= {f"{name}.train": train, f"{name}.held_out": held_out}
        items.write_rows(record.folder, {name: hashes(rows) for name, rows in sets.items()})
        record.facts.results = {"rows": len(self.sft) + len(self.dpo) + len(self.questions) + len(self.choices)}
        for label, text in self.plan():
            say(f"{label}: {text}")

    def _split(self, rows: list[Any]) -> dict[str, Any]:
        train, held_out = split(rows, self.job.config.training_data.validation)
        return {"train": describe(train), "held_out": describe(held_out)}

    def _split_text(self, rows: list[Any]) -> str:
        train, held_out = split(rows, self.job.config.training_data.validation)
        return f"{len(train)} rows to train, {len(held_out)} held out"
