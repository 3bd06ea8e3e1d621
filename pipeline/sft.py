"""Supervised fine-tuning: a LoRA adapter on the base, trained on conversations.

    aletheia sft --profile tiny        make sft PROFILE=tiny

Reads the conversations of `training_data.sft`. Writes `checkpoints/EXP-…/adapter` and the link `<name>-sft`, and into
the record the held-out loss before and after, per row, with its interval. Each assistant's turn and its end-of-turn is
trained and nothing else; the loss is the mean over a step's trained tokens. It does not pack rows, and it does not
evaluate in mid-training.
"""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pipeline import data, heldout, statistics
from pipeline.chat import Chat, Encoded
from pipeline.data import Conversation
from pipeline.errors import UserError
from pipeline.model import Base, find_base
from pipeline.progress import say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import FEW_STEPS, Job, steps_in_all


@dataclass
class Sft:
    name: ClassVar[str] = "sft"

    job: Job
    base: Base
    chat: Chat
    rows: list[Conversation]
    inputs: list[Input] = field(default_factory=list)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        rows = data.read_rows(job.workspace, job.config.training_data.sft, Conversation)
        base = find_base(job.workspace, job.profile)
        check_context(job, base, "sft_config")
        return cls(job, base, base.chat(), rows)

    def plan(self) -> list[tuple[str, str]]:
        config = self.job.config.sft_config
        train, held_out = data.split(self.rows, self.job.config.training_data.validation)
        steps = steps_in_all(config, len(train))
        few = f"  (fewer than {FEW_STEPS}: more rows or epochs, or a smaller batch)" if steps < FEW_STEPS else ""
        return [
            ("base", f"{self.base.name} on {self.base.device}, quantization {self.base.quantization}"),
            ("rows", f"{len(train)} to train, {len(held_out)} held out"),
            ("a step learns from", f"{config.batch_size * config.gradient_accumulation} rows"),
            ("steps", str(steps) + few),
        ]

    def run(self, record: Record) -> None:
        from trl import SFTConfig, SFTTrainer

        from pipeline import training

        config, job = self.job.config.sft_config, self.job
        train_rows, held_out = self._encoded(record)

        model = self.base.load(quantized=True)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **training.trainer_arguments(config, job, self.base, record.output),
                dataset_kwargs={"skip_prepare_dataset": True},  # the rows come as token ids and labels
            ),
            train_dataset=_dataset(train_rows),
            processing_class=self.chat.tokenizer,
            peft_config=lora(config),
        )
        training.float32_adapter(trainer.model)

        before = self._losses(trainer.model, held_out, "held-out loss before")
        summary = training.train(trainer, record, job.resume)
        after = self._losses(trainer.model, held_out, "held-out loss after")

        trained_tokens = sum(sum(e.mask) for _, e in train_rows)
        record.facts.results = {"training": summary | {"trained_tokens_an_epoch": trained_tokens}}
        if held_out:
            change = statistics.paired(before, after)
            record.facts.results["eval_loss"] = change.model_dump(exclude_none=True) | {"unit": "nats a token"}
            verdict = change.verdict(lower_is_better=True)
            say(f"held-out loss {change.before.text()} → {change.after.text()} nats a token: {verdict}")
            rows = [{"id": r.id, "before": b, "after": a} for (r, _), b, a in zip(held_out, before, after, strict=True)]
            (record.folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        suffix = "sft-control" if config.shuffle_answers else "sft"
        training.keep_adapter(trainer.model, self.chat, record, f"{job.config.name}-{suffix}")

    def _encoded(self, record: Record) -> tuple[list[tuple[Conversation, Encoded]], list[tuple[Conversation, Encoded]]]:
        """Training and held-out rows with their token ids and masks; what was used goes into the record."""
        from pipeline import training

        config, limits = self.job.config.sft_config, self.job.config.training_data
        train, held_out = data.split(self.rows, limits.validation)
        facts: dict[str, Any] = {"train": data.describe(train), "held_out": data.describe(held_out)}
        same_data(self.job, record, facts)
        record.facts.data = facts
        record.facts.results = {}
        if config.shuffle_answers:
            train = data.shuffle_answers(train, self.job.config.seed)
        record.facts.lineage.base = same_base(self.job, record, self.base)
        record.facts.data["contract"] = self.chat.contract.sha256

        def encode(row: Conversation) -> Encoded:
            return self.chat.conversation(row.messages)

        def keep(rows: list[Conversation]) -> list[tuple[Conversation, Encoded]]:
            if not rows:
                return []
            return training.usable(rows, self.chat, config.max_length, encode, record, limits.max_reject_share)

        encoded = keep(train), keep(held_out)
        record.save()
        return encoded

    def _losses(self, model: Any, rows: list[tuple[Conversation, Encoded]], what: str) -> list[float]:
        if not rows:
            return []
        batch = self.job.config.eval_config.batch_size
        return heldout.losses(model, [e for _, e in rows], self.chat.tokenizer.pad_token_id, batch, what)


def lora(config: Any) -> Any:
    """peft's configuration of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )


def check_context(job: Job, base: Base, section: str) -> None:
    """Raises `UserError` when rows may be longer than the model was made for."""
    limit, wanted = base.context, getattr(job.config, section).max_length
    if limit and wanted > limit:
        raise job.profile.error(
            f"{section}.max_length", f"{wanted} is more than the base's context of {limit}", str(limit)
        )


def same_data(job: Job, record: Record, facts: dict[str, Any]) -> None:
    """A resumed run must see the rows it began with, or it would replay some and skip others."""
    for part, now in facts.items():
        then = record.facts.data.get(part)
        if job.resume and then and then["sha256"] != now["sha256"]:
            raise UserError(
                f"the {part} rows changed since the run began ({then['rows']} rows then, {now['rows']} now)",
                where=job.workspace.shown(record.file.path),
                remedy="a run of its own, without --resume",
            )


def same_base(job: Job, record: Record, base: Base) -> dict[str, Any]:
    """The base's identity; a resumed run must stand on the weights it began on."""
    then, now = record.facts.lineage.base, base.identity()
    if job.resume and then and then["sha256"] != now["sha256"]:
        raise UserError(
            f"the weights of {base.name} changed since the run began",
            where=job.workspace.shown(record.file.path),
            remedy="a run of its own, without --resume",
        )
    return now


def _dataset(rows: list[tuple[Conversation, Encoded]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [e.ids for _, e in rows], "labels": [e.labels for _, e in rows]})
