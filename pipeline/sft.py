"""Supervised fine-tuning: a LoRA adapter on the base, trained on conversations.

    aletheia sft --profile tiny        make sft PROFILE=tiny

Reads the conversations of `training_data.sft`. Writes `checkpoints/EXP-…/adapter` and the link `<name>-sft`, and into
the record the held-out loss before and after, per row, with its interval. Each assistant's turn and its end-of-turn is
trained and nothing else; the loss is the mean over a step's trained tokens. It does not pack rows.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pipeline import heldout, statistics
from pipeline.chat import Chat, Encoded
from pipeline.data.rows import Conversation
from pipeline.data.split import shuffle_answers
from pipeline.model import Base, find_base
from pipeline.progress import say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import FEW_STEPS, Job, steps_in_all
from pipeline.training_data import TrainingRows, check_context, encoded, read, say_what_the_other_holds_out


@dataclass
class Sft:
    name: ClassVar[str] = "sft"

    job: Job
    base: Base
    chat: Chat
    rows: TrainingRows[Conversation]
    inputs: list[Input] = field(default_factory=list)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        base = find_base(job.workspace, job.profile)
        check_context(job, base, "sft_config")
        chat = base.chat()
        rows = read(job.workspace, job.config, Conversation, chat)
        rows.shared = say_what_the_other_holds_out(job.workspace, job.config, rows, Conversation)
        return cls(job, base, chat, rows)

    def plan(self) -> list[tuple[str, str]]:
        config = self.job.config.sft_config
        steps = steps_in_all(config, len(self.rows.train))
        few = f"  (fewer than {FEW_STEPS}: more rows or epochs, or a smaller batch)" if steps < FEW_STEPS else ""
        return [
            ("base", f"{self.base.name} on {self.base.device}, quantization {self.base.quantization}"),
            ("rows", self.rows.text(self.job.config.training_data.max_reject_share)),
            ("a step learns from", f"{config.batch_size * config.gradient_accumulation} rows"),
            ("steps", str(steps) + few),
        ]

    def run(self, record: Record) -> None:
        from trl import SFTConfig, SFTTrainer

        from pipeline import training

        config, job = self.job.config.sft_config, self.job
        train_rows, held_out = self._encoded(record)
        pad, batch = self.chat.tokenizer.pad_token_id, job.config.eval_config.batch_size

        def losses(model: Any, what: str, pause: heldout.Pause = heldout.no_pause) -> list[float]:
            return heldout.losses(model, [e for _, e in held_out], pad, batch, what, pause)

        model = self.base.load(quantized=True)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **training.trainer_arguments(config, job, self.base, record.output),
                dataset_kwargs={"skip_prepare_dataset": True},  # the rows come as token ids and labels
            ),
            train_dataset=_dataset(train_rows),
            processing_class=self.chat.tokenizer,
            peft_config=training.lora(config),
        )
        training.float32_adapter(trainer.model)

        before = losses(trainer.model, "held-out rows before") if held_out else []
        measure = heldout.Measure(losses, lambda values: {"eval_loss": statistics.mean(values)}) if held_out else None
        trained = [(row.id, sum(tokens.mask)) for row, tokens in train_rows]
        after = training.train(trainer, record, config, trained, measure, job.resume)

        if held_out:
            change = statistics.paired(before, after)
            record.facts.results["eval_loss"] = change.model_dump(exclude_none=True) | {"unit": "nats a token"}
            verdict = change.verdict(lower_is_better=True)
            say(f"held-out loss {change.before.text()} → {change.after.text()} nats a token: {verdict}")
            heldout.write(record.folder, [row.id for row, _ in held_out], before, after)
        suffix = "sft-control" if config.shuffle_answers else "sft"
        training.keep_adapter(trainer.model, self.chat, record, f"{job.config.name}-{suffix}")

    def _encoded(self, record: Record) -> tuple[list[tuple[Conversation, Encoded]], list[tuple[Conversation, Encoded]]]:
        config, seed = self.job.config.sft_config, self.job.config.seed

        def encode(row: Conversation) -> Encoded:
            return self.chat.conversation(row.messages)

        def alter(rows: list[Conversation]) -> list[Conversation]:
            return shuffle_answers(rows, seed) if config.shuffle_answers else rows

        return encoded(self.job, record, self.base, self.chat, self.rows, encode, config.max_length, alter)


def _dataset(rows: list[tuple[Conversation, Encoded]]) -> Any:
    from datasets import Dataset

    columns = {"input_ids": [e.ids for _, e in rows], "labels": [e.labels for _, e in rows]}
    return Dataset.from_dict(columns | {"row": range(len(rows))})
