"""Data: every row of a profile through the gate, and what passes kept as a snapshot.

    aletheia data snapshot --profile tiny        make data PROFILE=tiny

Training sends the same rows through the same gate and records the same hashes; this stage is for looking before training,
and the first step of a pipeline. Rejected rows stand in `rejects.jsonl` beside the record.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pipeline.chat import Chat
from pipeline.data import store
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, MultipleChoice, PreferencePair, Question, describe, hashes
from pipeline.errors import UserError
from pipeline.model import find_base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job
from pipeline.training_data import TrainingRows, read, stop_at_too_many, write_rejects


@dataclass
class Snapshot:
    name: ClassVar[str] = "data"

    job: Job
    sft: TrainingRows[Conversation]
    dpo: TrainingRows[PreferencePair]
    questions: list[Question]
    choices: list[MultipleChoice]
    inputs: list[Input] = field(default_factory=list)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        paths, workspace = job.config.training_data, job.workspace
        chat = _chat(job)
        return cls(
            job,
            read(workspace, job.config, Conversation, chat),
            read(workspace, job.config, PreferencePair, chat),
            read_rows(workspace, f"{paths.eval}/questions", Question),
            read_rows(workspace, f"{paths.eval}/choices", MultipleChoice),
        )

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("sft", self.sft.text(self.job.config.training_data.max_reject_share)),
            ("dpo", self.dpo.text(self.job.config.training_data.max_reject_share)),
            ("eval", f"{len(self.questions)} open questions, {len(self.choices)} multiple choice"),
        ]

    def run(self, record: Record) -> None:
        training: dict[str, TrainingRows[Any]] = {"sft": self.sft, "dpo": self.dpo}
        evaluation: dict[str, list[Any]] = {"questions": self.questions, "choices": self.choices}
        record.facts.data = {
            **{name: rows.described(self.job) for name, rows in training.items()},
            **{name: describe(rows) for name, rows in evaluation.items()},
        }
        for rows in evaluation.values():
            store.keep(self.job.workspace, rows)
        parts = {f"{name}.{part}": found for name, rows in training.items() for part, found in rows.parts().items()}
        items.write_rows(record.folder, parts | {name: hashes(rows) for name, rows in evaluation.items()})
        write_rejects(record.folder, [*self.sft.rejects, *self.dpo.rejects])
        rows_in_all = [len(r.every) for r in training.values()] + [len(rows) for rows in evaluation.values()]
        record.facts.results = {"rows": sum(rows_in_all)}
        record.save()
        for label, text in self.plan():
            say(f"{label}: {text}")
        for r in training.values():
            stop_at_too_many(self.job, record, r.rejects, r.read)


def _chat(job: Job) -> Chat | None:
    """The tokenizer's, where the base model is at hand: looking at data should not need a GPU or a download."""
    try:
        return find_base(job.workspace, job.profile).chat()
    except UserError as error:
        say(f"note: tokens are not counted here, training will: {error.what}")
        return None
