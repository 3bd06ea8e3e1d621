"""Supervised fine-tuning: a LoRA adapter on the base, trained on conversations.

    aletheia sft --profile tiny        make sft PROFILE=tiny

Reads the conversations of `training_data.sft`. Writes `checkpoints/EXP-…/adapter` and the link `<name>-sft`, and into
the record the held-out loss before and after, per row, with its interval. Each assistant's turn and its end-of-turn is
trained and nothing else; the loss is the mean over a step's trained tokens. `--from EXP` goes on from that adapter.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

from pipeline import imports, statistics
from pipeline.chat import Chat, Encoded
from pipeline.data.rows import Conversation
from pipeline.data.split import shuffle_answers
from pipeline.model import Base, check_trained_on, find_base, say_other_quantization
from pipeline.progress import say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take
from pipeline.train import conflicts, heldout, preflight
from pipeline.train.fit import Lengths
from pipeline.train.plan import difficulty_rank, orders
from pipeline.train.preflight import Prediction
from pipeline.training_data import TrainingRows, check_context, encoded, read, say_what_the_other_holds_out


@dataclass
class Sft:
    name: ClassVar[str] = "sft"

    job: Job
    base: Base
    chat: Chat
    rows: TrainingRows[Conversation]
    needs: Prediction
    source: Source | None = None  # an earlier adapter to go on from; None: a new one
    inputs: list[Input] = field(default_factory=list)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source = take(job, ["sft", "dpo"], "adapter") if job.source not in (None, "base") else None
        base = find_base(job.workspace, job.profile, partial(preflight.check, job, cls.name))
        check_context(job, base, "sft_config")
        conflicts.check_adapter(job.profile, base, source.output if source else None)
        chat = base.chat().remember()
        if source:
            check_trained_on(base, chat, job.workspace, source)
            _check_same_adapter(job, source)
        rows = read(job.workspace, job.config, Conversation, chat)
        rows.shared = say_what_the_other_holds_out(job.workspace, job.config, rows, Conversation)
        conflicts.check_rows(job.profile, "sft_config", rows)
        epoch = next(orders(job.config.sft_config, rows.domains, job.config.seed))
        train, held_out = ([chat.conversation(row.messages) for row in part] for part in (rows.train, rows.held_out))
        needs = preflight.predict(job, cls.name, Lengths.of(train, held_out, epoch))
        base = replace(base, quantization=needs.setup.quantization)
        if source:
            say_other_quantization(source, base)
        return cls(job, base, chat, rows, needs, source, [source.input] if source else [])

    def plan(self) -> list[tuple[str, str]]:
        return [
            (
                "adapter",
                f"that of {self.source.file.id} goes on" if self.source else self.job.config.sft_config.adapter,
            ),
            ("base", f"{self.base.name} on {self.base.device}, quantization {self.base.quantization}"),
            ("rows", self.rows.text(self.job.config.training_data.max_reject_share)),
            *self.needs.rows(),
        ]

    def run(self, record: Record) -> None:
        if self.job.own_process:
            imports.leave_out_unused(self.base)
        from pipeline.train import adapter, training
        from pipeline.train.objective import SupervisedLoss, domain_weights
        from pipeline.train.passes import supervised

        config, job = self.job.config.sft_config, self.job
        train_rows, held_out = self._encoded(record)
        rows, sequences = [row for row, _ in train_rows], [tokens for _, tokens in train_rows]
        unseen = [tokens for _, tokens in held_out]

        model = adapter.start(self.base, config, self.source.output if self.source else None, job.config.seed)
        how = training.execution(config, model, sequences, unseen, self.chat.tokenizer.pad_token_id, self.needs.setup)
        measuring = replace(how)  # whatever passes training comes down to, before and after are laid alike
        tokens = [supervised(sequence) for sequence in sequences]
        domains = [row.domain for row in rows]
        weights = domain_weights(config.domain_weights, domains)
        trainer = training.make_trainer(
            job,
            record,
            self.base,
            model,
            config,
            sequences,
            domains,
            step_loss=lambda step: SupervisedLoss(step, tokens, weights),
            how=how,
            rank=difficulty_rank([row.difficulty for row in rows]) if config.curriculum else None,
            neftune_alpha=config.neftune_alpha,
        )

        def losses(model: Any, what: str, pause: heldout.Pause = heldout.no_pause) -> list[float]:
            return job.ranks.from_first(lambda: heldout.losses(model, unseen, measuring, what, pause))

        before = losses(trainer.model, "held-out rows before") if held_out else []
        measure = heldout.Measure(losses, lambda values: {"eval_loss": statistics.mean(values)}) if held_out else None
        ids = [row.id for row in rows]
        after = training.train(trainer, job, record, self.chat, config, ids, domains, measure, self.needs)

        if held_out:
            change = statistics.paired(before, after)
            record.facts.results["eval_loss"] = change.model_dump(exclude_none=True) | {"unit": "nats a token"}
            verdict = change.verdict(lower_is_better=True)
            say(f"held-out loss {change.before.text()} → {change.after.text()} nats a token: {verdict}")
            heldout.write(record.folder, [row.id for row, _ in held_out], before, after)
        else:
            say("no rows are held out: what it has learnt for others is not known")
        suffix = "sft-control" if config.shuffle_answers else "sft"
        adapter.keep(trainer.model, self.chat, record, f"{job.config.name}-{suffix}")

    def _encoded(self, record: Record) -> tuple[list[tuple[Conversation, Encoded]], list[tuple[Conversation, Encoded]]]:
        config, seed = self.job.config.sft_config, self.job.config.seed

        def encode(row: Conversation) -> Encoded:
            return self.chat.conversation(row.messages)

        def shuffled(rows: list[Conversation]) -> list[Conversation]:
            return shuffle_answers(rows, seed)

        alter = shuffled if config.shuffle_answers else None
        return encoded(self.job, record, self.base, self.chat, self.rows, encode, config.max_length, alter)


def _check_same_adapter(job: Job, source: Source) -> None:
    """An adapter that goes on keeps its shape: the profile may say no other, or the record would not be true."""
    config = job.config.sft_config
    stored, kind = conflicts.stored(source.output), conflicts.kind_of(source.output)
    said = {"lora_rank": (config.lora_rank, stored["r"]), "lora_alpha": (config.lora_alpha, stored["lora_alpha"])}
    for key, (now, then) in (said | {"adapter": (config.adapter, kind)}).items():
        if now != then:
            what = f"is {now}, the adapter of {source.file.id} has {then}"
            raise job.profile.error(f"sft_config.{key}", what, f"--set sft_config.{key}={then}")
