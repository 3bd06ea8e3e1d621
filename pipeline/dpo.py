"""Direct preference optimisation: continues the SFT adapter on preference pairs.

    aletheia dpo --profile tiny        make dpo PROFILE=tiny
    aletheia dpo --from base           straight on the base, when asked for

Reads the pairs of `training_data.dpo` and the newest SFT adapter. The policy starts as that adapter, and its own log-probs
before the first step are the reference (`pipeline.reference`); this is checked: the policy's tensors are the SFT adapter's,
the loss is ln 2, every margin is 0, and the reference is not the base. Writes `checkpoints/EXP-…/adapter`, one adapter on
the base, and the link `<name>-dpo`. (Rafailov et al. 2023, arXiv 2305.18290; other losses: `pipeline.preference`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline import heldout, preflight, statistics
from pipeline.chat import Chat, Encoded
from pipeline.config import DpoConfig
from pipeline.data.rows import PreferencePair, row_hash
from pipeline.errors import StageFailed
from pipeline.fit import Lengths
from pipeline.model import Base, check_trained_on, find_base
from pipeline.preflight import Prediction
from pipeline.progress import say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take
from pipeline.statistics import Figure
from pipeline.training_data import TrainingRows, check_context, encoded, read, say_what_the_other_holds_out

if TYPE_CHECKING:
    from pipeline.objective import PairSums
    from pipeline.preference import PairLogProbs
    from pipeline.trainer import Execution

Sides = tuple[Encoded, Encoded]  # prompt + chosen, prompt + rejected
EncodedPair = tuple[PreferencePair, Sides]
PAIRS_CHECKED = 8  # enough to show a wrong reference, cheap enough to run every time


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
        chat = base.chat()
        if source:
            check_trained_on(base, chat, job.workspace, source)
        rows = read(job.workspace, job.config, PreferencePair, chat)
        rows.shared = say_what_the_other_holds_out(job.workspace, job.config, rows, PreferencePair)
        needs = preflight.predict(
            job, cls.name, Lengths.of(*([chat.pair(pair) for pair in part] for part in (rows.train, rows.held_out)))
        )
        base = replace(base, quantization=needs.setup.quantization)
        return cls(job, base, chat, rows, needs, source, [source.input] if source else [])

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("policy and reference", self.source.file.id if self.source else f"{self.base.name}, no SFT"),
            ("pairs", self.rows.text(self.job.config.training_data.max_reject_share)),
            *self.needs.rows(),
        ]

    def run(self, record: Record) -> None:
        from pipeline import reference, training
        from pipeline.objective import PreferenceLoss, domain_weights

        config, job = self.job.config.dpo_config, self.job
        train_pairs, held_out = encoded(job, record, self.base, self.chat, self.rows, self.chat.pair, config.max_length)
        rows, pairs = [row for row, _ in train_pairs], [sides for _, sides in train_pairs]
        pad, batch = self.chat.tokenizer.pad_token_id, job.config.eval_config.batch_size

        adapter = self.source.output if self.source else None
        policy = training.policy(self.base, job.config.sft_config, adapter, job.config.seed)
        how = training.execution(config, policy, pairs, pad, self.needs.setup)
        known_as = reference.key(**self._reference_parts(record, how))
        hashes = [row_hash(row) for row in rows]
        log_probs = reference.log_probs(job.workspace, known_as, policy, pairs, hashes, how)
        record.facts.results = {"reference": self._check_reference(policy, pairs, log_probs, how)}

        tokens = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in pairs]
        weights = domain_weights(config.domain_weights, [row.domain for row in rows])
        trainer = training.make_trainer(
            job,
            record,
            self.base,
            policy,
            config,
            pairs,
            step_loss=lambda step: PreferenceLoss(step, config, tokens, weights, log_probs),
            how=how,
        )

        unseen = [sides for _, sides in held_out]

        def measured(model: Any, what: str, pause: heldout.Pause = heldout.no_pause) -> "list[PairSums]":
            with how.autocast(trainer.args.device):
                return heldout.pair_log_probs(model, unseen, pad, batch, what, pause)

        before = measured(trainer.model, "held-out pairs before") if held_out else []
        measure = heldout.Measure(measured, partial(_figures, config, unseen, before)) if held_out else None
        after = training.train(trainer, job, record, self.chat, config, [row.id for row in rows], measure, self.needs)

        if held_out:
            record.facts.results |= self._preferences(record, held_out, before, after)
        training.keep_adapter(trainer.model, self.chat, record, f"{job.config.name}-dpo")

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

    def _check_reference(
        self, policy: Any, pairs: Sequence[Sides], reference: "Sequence[PairSums]", how: "Execution"
    ) -> dict[str, Any]:
        """Promise 3. Raises `StageFailed` when the reference is not the policy that DPO starts from."""
        from pipeline.preference import loss_at_start, losses
        from pipeline.reference import measure

        config, few = self.job.config.dpo_config, pairs[:PAIRS_CHECKED]
        start = measure(policy, few, how, "policy before the first step")
        with policy.disable_adapter():
            base = measure(policy, few, how, "base")
        known = pair_log_probs(few, start, reference[: len(few)])
        loss, expected = losses(config, known).mean().item(), loss_at_start(config)
        off, distance = _furthest(start, reference), _furthest(base, reference)
        longest = max(len(side.ids) for pair in few for side in pair)
        allowed = longest * (0.01 if how.compute else 1e-5)  # nats: rounding, of other passes than the reference's
        if not off <= allowed:  # a NaN is not
            raise StageFailed(f"the policy's log-probs are {off:.2g} nats off the reference's before step 1", step=0)
        if not (expected is None or how.compute or abs(loss - expected) <= 1e-3 * max(1.0, expected)):
            raise StageFailed(f"at step 0 the {config.loss_type} loss is {loss:.6f}, not {expected:.6f}", step=0)
        if self.source is not None:
            self._same_tensors(policy, self.source.output)
            if not distance >= max(1e-3, off):
                raise StageFailed("the reference gives the base's log-probs: it is not the SFT policy", step=0)
        margin = (known.chosen - known.reference_chosen - known.rejected + known.reference_rejected).mean().item()
        is_expected = "no reference" if expected is None else f"= {expected:.4f} as it must"
        say(f"reference checked: loss {loss:.4f} {is_expected}, margin {margin:.1g}, {distance:.2f} nats from the base")
        return {
            "is": self.source.file.id if self.source else "base",
            "loss_at_step_0": round(loss, 6),
            "margin_at_step_0": round(config.beta * margin, 6),
            "max_log_prob_distance_from_policy": round(off, 6),
            "max_log_prob_distance_from_base": round(distance, 3),
        }

    @staticmethod
    def _same_tensors(policy: Any, adapter: Path) -> None:
        """The policy's tensors are, bit for bit, those of the SFT record's file."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        stored = load_file(adapter / "adapter_model.safetensors")
        start = get_peft_model_state_dict(policy)
        different = [k for k, v in stored.items() if k not in start or not start[k].cpu().float().equal(v.float())]
        if different or len(stored) != len(start):
            raise StageFailed(f"the policy starts apart from the SFT adapter in {different[:3] or 'its keys'}", step=0)

    def _preferences(
        self, record: Record, pairs: list[EncodedPair], before: "list[PairSums]", after: "list[PairSums]"
    ) -> dict[str, Any]:
        """Implicit-reward accuracy: the share of held-out pairs whose margin rose. Length alone stands beside it."""
        from pipeline.preference import warnings

        config = self.job.config.dpo_config
        known = pair_log_probs([sides for _, sides in pairs], after, before)
        accuracy = _accuracy(known)
        margins_before, margins_after = ([chosen - rejected for chosen, rejected in side] for side in (before, after))
        change = statistics.paired(margins_before, margins_after)
        shorter = sum(len(c.ids) < len(r.ids) for _, (c, r) in pairs)
        by_length = statistics.proportion(max(shorter, len(pairs) - shorter), len(pairs))
        heldout.write(record.folder, [pair.id for pair, _ in pairs], margins_before, margins_after)
        shown = "above chance" if (accuracy.ci_low or 0) > 0.5 else "not shown to be above chance"
        say(f"held-out preference accuracy {accuracy.text()}, {shown}; length alone would score {by_length.value:.2f}")
        found = warnings(known)
        for warning in found:
            say(f"warning: {warning}")
        rewards = {
            f"reward_{side}": statistics.mean([config.beta * (a[i] - b[i]) for b, a in zip(before, after, strict=True)])
            for i, side in enumerate(("chosen", "rejected"))
        }
        return {
            "preference_accuracy": accuracy.model_dump(exclude_none=True)
            | {"chance": 0.5, "length_alone": by_length.value},
            "margin": change.model_dump(exclude_none=True) | {"unit": "nats"},
            **{name: figure.model_dump(exclude_none=True) for name, figure in rewards.items()},
            **({"warnings": found} if found else {}),
        }


def pair_log_probs(
    pairs: Sequence[Sides], policy: "Sequence[PairSums]", reference: "Sequence[PairSums]"
) -> "PairLogProbs":
    """As the losses take them."""
    import torch

    from pipeline.preference import PairLogProbs

    (chosen, rejected), (ref_chosen, ref_rejected) = (torch.tensor(side).T for side in (policy, reference))
    tokens = torch.tensor([[sum(side.mask) for side in pair] for pair in pairs]).T
    return PairLogProbs(chosen, rejected, ref_chosen, ref_rejected, *tokens)


def _figures(
    config: DpoConfig, pairs: Sequence[Sides], before: "list[PairSums]", after: "list[PairSums]"
) -> dict[str, Figure]:
    """The loss on held-out pairs, with the policy at the start as reference; and who is preferred."""
    from pipeline.preference import losses

    known = pair_log_probs(pairs, after, before)
    return {
        "eval_loss": statistics.mean(losses(config, known).tolist()),
        "eval_preference_accuracy": _accuracy(known),
    }


def _accuracy(known: "PairLogProbs") -> Figure:
    """The share of pairs whose margin rose."""
    rose = known.chosen - known.rejected > known.reference_chosen - known.reference_rejected
    return statistics.proportion(int(rose.sum()), len(rose))


def _furthest(some: "Sequence[PairSums]", others: "Sequence[PairSums]") -> float:
    """Nats. Of the pairs that both have."""
    return max(abs(a - b) for one, other in zip(some, others, strict=False) for a, b in zip(one, other, strict=True))
