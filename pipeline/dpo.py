"""Direct preference optimisation: continues the SFT adapter on preference pairs.

    aletheia dpo --profile tiny        make dpo PROFILE=tiny
    aletheia dpo --from base           straight on the base, when asked for

Reads the pairs of `training_data.dpo` and the newest SFT adapter. The policy starts as that adapter, and its own log-probs
before the first step are the reference; `pipeline.train.reference` checks this: the policy's tensors are the SFT adapter's, the
loss is ln 2, every margin is 0, and the reference is not the base. Writes `checkpoints/EXP-…/adapter`, one adapter on the
base, and the link `<name>-dpo`. (Rafailov et al. 2023, arXiv 2305.18290; other losses: `pipeline.train.preference`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline import imports, statistics
from pipeline.chat import Chat, Encoded
from pipeline.data.rows import PreferencePair
from pipeline.model import Base, check_trained_on, find_base, say_other_quantization
from pipeline.progress import say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take
from pipeline.train import conflicts, heldout, preflight
from pipeline.train.fit import Lengths
from pipeline.train.plan import orders
from pipeline.train.preflight import Prediction
from pipeline.training_data import TrainingRows, check_context, encoded, read, say_what_the_other_holds_out

if TYPE_CHECKING:
    from pipeline.train.preference import PairSums

Sides = tuple[Encoded, Encoded]  # prompt + chosen, prompt + rejected


@dataclass
class Dpo:
    name: ClassVar[str] = "dpo"

    job: Job
    base: Base
    chat: Chat
    rows: TrainingRows[PreferencePair]
    needs: Prediction
    source: Source | None  # None: straight on the base
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source = None if job.source == "base" else take(job, ["sft"], "adapter")
        base = find_base(job.workspace, job.profile, partial(preflight.check, job, cls.name))
        check_context(job, base, "dpo_config")
        conflicts.check_adapter(job.profile, base, source.output if source else None)
        chat = base.chat().remember()
        if source:
            check_trained_on(base, chat, job.workspace, source)
        rows = read(job.workspace, job.config, PreferencePair, chat)
        rows.shared = say_what_the_other_holds_out(job.workspace, job.config, rows, PreferencePair)
        conflicts.check_rows(job.profile, "dpo_config", rows)
        epoch = next(orders(job.config.dpo_config, rows.domains, job.config.seed))
        train, held_out = ([chat.pair(pair) for pair in part] for part in (rows.train, rows.held_out))
        needs = preflight.predict(job, cls.name, Lengths.of(train, held_out, epoch))
        base = replace(base, quantization=needs.setup.quantization)
        if source:
            say_other_quantization(source, base)
        return cls(job, base, chat, rows, needs, source, [source.input] if source else [])

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("policy and reference", self.source.file.id if self.source else f"{self.base.name}, no SFT"),
            ("pairs", self.rows.text(self.job.config.training_data.max_reject_share)),
            *self.needs.rows(),
        ]

    def run(self, record: Record) -> None:
        if self.job.own_process:
            imports.leave_out_unused(self.base)
        from pipeline.train import adapter, reference, training
        from pipeline.train.kto import ReferencePoint, mismatched
        from pipeline.train.objective import PreferenceLoss, domain_weights
        from pipeline.train.preference import held_out_figures

        config, job = self.job.config.dpo_config, self.job
        kto = config.loss_type == "kto"
        train_pairs, held_out = encoded(job, record, self.base, self.chat, self.rows, self.chat.pair, config.max_length)
        rows, pairs = [row for row, _ in train_pairs], [sides for _, sides in train_pairs]
        unseen, n = [sides for _, sides in held_out], len(held_out)

        of_sft = self.source.output if self.source else None
        policy = adapter.start(self.base, job.config.sft_config, of_sft, job.config.seed)
        how = training.execution(config, policy, pairs, unseen, self.chat.tokenizer.pad_token_id, self.needs.setup)
        measuring = replace(how)  # whatever passes training comes down to, before and after are laid alike
        known_as = reference.key(**self._reference_parts(record, how))

        def reference_of(some: "Sequence[Sides]") -> "list[PairSums]":
            return job.ranks.from_first(lambda: reference.log_probs(job.workspace, known_as, policy, how, some))

        log_probs = reference_of(pairs)
        checked = reference.check(policy, pairs, log_probs, how, config, of_sft)
        record.facts.results = {"reference": {"is": self.source.file.id if self.source else "base"} | checked}

        tokens = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in pairs]
        domains = [row.domain for row in rows]
        weights = domain_weights(config.domain_weights, domains)

        def step_loss(step: list[int]) -> PreferenceLoss:
            return PreferenceLoss(step, config, tokens, weights, log_probs, kl(step) if kl else 0.0)

        trainer = training.make_trainer(job, record, self.base, policy, config, pairs, domains, step_loss, how)
        # KTO's reference point of a step: the trainer knows the steps, and the policy still is the reference.
        kl = ReferencePoint.of(policy, pairs, trainer.steps, config.max_length, how, reference_of) if kto else None

        borrowing = mismatched(unseen, range(n), config.max_length) if kto else []

        def measured(model: Any, what: str, pause: heldout.Pause = heldout.no_pause) -> "list[PairSums]":
            some = [*unseen, *borrowing]
            found = job.ranks.from_first(lambda: heldout.log_probs(model, some, measuring, what, pause))
            return [own + others for own, others in zip_longest(found[:n], found[n:], fillvalue=())]

        before = measured(trainer.model, "held-out pairs before") if held_out else []
        measure = heldout.Measure(measured, partial(held_out_figures, config, unseen, before)) if held_out else None
        ids = [row.id for row in rows]
        after = training.train(trainer, job, record, self.chat, config, ids, domains, measure, self.needs)

        if held_out:
            record.facts.results |= self._preferences(record, [pair.id for pair, _ in held_out], unseen, before, after)
        else:
            say("no pairs are held out: what it has learnt for others is not known")
        adapter.keep(trainer.model, self.chat, record, f"{job.config.name}-dpo")

    def _reference_parts(self, record: Record, how: Any) -> dict[str, Any]:
        """All that the reference's log-probs depend on, but the pairs."""
        base = record.facts.lineage.base or {}
        return {
            "base": base.get("sha256"),
            "adapter": self.source.input.sha256 if self.source else None,
            "contract": self.chat.contract.sha256,
            "quantization": self.base.quantization,
            "compute": str(how.compute),
            "packed": how.packed,
        }

    def _preferences(
        self, record: Record, ids: list[str], pairs: list[Sides], before: "list[PairSums]", after: "list[PairSums]"
    ) -> dict[str, Any]:
        """Implicit-reward accuracy: the share of held-out pairs whose margin rose. Length alone stands beside it."""
        from pipeline.train.preference import PairLogProbs, accuracy, warnings

        config = self.job.config.dpo_config
        known = PairLogProbs.of(pairs, after, before)
        preferred = accuracy(known)
        was, became = ([chosen - rejected for chosen, rejected, *_ in side] for side in (before, after))  # margins
        change = statistics.paired(was, became)
        shorter = sum(len(chosen.ids) < len(rejected.ids) for chosen, rejected in pairs)
        by_length = statistics.proportion(max(shorter, len(pairs) - shorter), len(pairs))
        heldout.write(record.folder, ids, was, became)
        shown = "above chance" if (preferred.ci_low or 0) > 0.5 else "not shown to be above chance"
        say(f"held-out preference accuracy {preferred.text()}, {shown}; length alone would score {by_length.value:.2f}")
        found = warnings(known)
        for warning in found:
            say(f"warning: {warning}")
        rewards = {
            f"reward_{side}": statistics.mean([config.beta * (a[i] - b[i]) for b, a in zip(before, after, strict=True)])
            for i, side in enumerate(("chosen", "rejected"))
        }
        return {
            "preference_accuracy": preferred.model_dump(exclude_none=True)
            | {"chance": 0.5, "length_alone": by_length.value},
            "margin": change.model_dump(exclude_none=True) | {"unit": "nats"},
            **{name: figure.model_dump(exclude_none=True) for name, figure in rewards.items()},
            **({"warnings": found} if found else {}),
        }
