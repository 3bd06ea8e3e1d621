"""Direct preference optimisation: continues the SFT adapter on preference pairs.

    aletheia dpo --profile tiny        make dpo PROFILE=tiny
    aletheia dpo --from base           straight on the base, when asked for

Reads the pairs of `training_data.dpo` and the newest SFT adapter. The policy starts as that adapter and a frozen copy of
it is the reference; before the first step this is checked: the reference's tensors are the SFT adapter's, the loss is
ln 2, every margin is 0, and the reference is not the base. Writes `checkpoints/EXP-…/adapter`, one adapter on the
base, and the link `<name>-dpo`. (Rafailov et al. 2023, arXiv 2305.18290; the loss is trl's.)
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline import heldout, statistics
from pipeline.chat import Chat, Encoded
from pipeline.data.rows import PreferencePair
from pipeline.errors import StageFailed
from pipeline.model import Base, check_trained_on, find_base
from pipeline.progress import say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, steps_in_all, take
from pipeline.statistics import Figure
from pipeline.training_data import TrainingRows, check_context, encoded, read, say_what_the_other_holds_out

EncodedPair = tuple[PreferencePair, tuple[Encoded, Encoded]]
PAIRS_CHECKED = 8  # enough to show a wrong reference, cheap enough to run every time


@dataclass
class Dpo:
    name: ClassVar[str] = "dpo"

    job: Job
    base: Base
    chat: Chat
    rows: TrainingRows[PreferencePair]
    source: Source | None  # None: straight on the base
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source = None if job.source == "base" else take(job, ["sft"], "adapter")
        base = find_base(job.workspace, job.profile)
        check_context(job, base, "dpo_config")
        chat = base.chat()
        if source:
            check_trained_on(base, chat, job.workspace, source)
        rows = read(job.workspace, job.config, PreferencePair, chat)
        rows.shared = say_what_the_other_holds_out(job.workspace, job.config, rows, PreferencePair)
        return cls(job, base, chat, rows, source, [source.input] if source else [])

    def plan(self) -> list[tuple[str, str]]:
        config = self.job.config.dpo_config
        return [
            ("policy and reference", self.source.file.id if self.source else f"{self.base.name}, no SFT"),
            ("pairs", self.rows.text(self.job.config.training_data.max_reject_share)),
            ("a step learns from", f"{config.batch_size * config.gradient_accumulation} pairs"),
            ("steps", str(steps_in_all(config, len(self.rows.train)))),
        ]

    def run(self, record: Record) -> None:
        from transformers import PrinterCallback
        from trl import DPOConfig

        from pipeline import training
        from pipeline.private import PreparedDpoTrainer

        config, job = self.job.config.dpo_config, self.job
        train_pairs, held_out = encoded(job, record, self.base, self.chat, self.rows, self.chat.pair, config.max_length)
        pad, batch = self.chat.tokenizer.pad_token_id, job.config.eval_config.batch_size

        def margins(model: Any, what: str, pause: heldout.Pause = heldout.no_pause) -> list[float]:
            return heldout.margins(model, [sides for _, sides in held_out], pad, batch, what, pause)

        policy = self._policy()
        start = {name: p.detach().float().clone() for name, p in policy.named_parameters() if p.requires_grad}
        trainer = PreparedDpoTrainer(
            model=policy,
            args=DPOConfig(**training.trainer_arguments(config, job, self.base, record.output), beta=config.beta),
            train_dataset=_dataset(train_pairs),
            processing_class=self.chat.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # it prints what evaluate() finds
        for name, parameter in trainer.model.named_parameters():
            if name in start:  # over a quantised base trl has rounded the adapter to bf16
                parameter.data = start[name].to(parameter.device)

        record.facts.results = {"reference": self._check_reference(trainer, train_pairs)}
        before = margins(trainer.model, "held-out pairs before") if held_out else []
        measure = heldout.Measure(margins, partial(_figures, before, config.beta)) if held_out else None
        trained = [(pair.id, sum(chosen.mask) + sum(rejected.mask)) for pair, (chosen, rejected) in train_pairs]
        after = training.train(trainer, record, config, trained, measure, job.resume)

        if held_out:
            record.facts.results |= self._preferences(record, held_out, before, after)
        training.keep_adapter(trainer.model, self.chat, record, f"{job.config.name}-dpo")

    def _policy(self) -> Any:
        """The SFT policy, its adapter trainable; or the base with a new one."""
        from peft import PeftModel, get_peft_model

        model = self.base.load(quantized=True)
        if self.source is None:
            import torch

            from pipeline.training import lora

            torch.manual_seed(self.job.config.seed)
            return get_peft_model(model, lora(self.job.config.sft_config))
        return PeftModel.from_pretrained(model, self.source.output, is_trainable=True)

    def _check_reference(self, trainer: Any, pairs: list[EncodedPair]) -> dict[str, Any]:
        """Promise 3. Raises `StageFailed` when the reference is not the policy that DPO starts from."""
        from pipeline.private import reference_log_probs

        few = pairs[:PAIRS_CHECKED]
        start = trainer.evaluate(_dataset(few))
        loss, margin = start["eval_loss"], start["eval_rewards/margins"]
        if not (abs(loss - math.log(2)) <= 1e-4 and abs(margin) <= 1e-4):  # a NaN is neither
            raise StageFailed(
                f"at step 0 the DPO loss is {loss:.6f}, not ln 2, and the margin {margin:.2g}, not 0", step=0
            )
        reference, base = reference_log_probs(
            trainer, [e for _, sides in few for e in sides], self.chat.tokenizer.pad_token_id
        )
        distance = max(abs(r - b) for r, b in zip(reference, base, strict=True))
        if self.source is not None:
            self._same_tensors(trainer.model, self.source.output)
            if not distance >= 1e-3:
                raise StageFailed("the reference gives the base's log-probs: it is not the SFT policy", step=0)
        say(f"reference checked: loss {loss:.4f} = ln 2, margin {margin:.1g}, {distance:.2f} nats from the base")
        return {
            "is": self.source.file.id if self.source else "base",
            "loss_at_step_0": round(loss, 6),
            "margin_at_step_0": round(margin, 6),
            "max_log_prob_distance_from_base": round(distance, 3),
        }

    @staticmethod
    def _same_tensors(model: Any, adapter: Path) -> None:
        """The reference's tensors are, bit for bit, those of the SFT record's file."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        stored = load_file(adapter / "adapter_model.safetensors")
        reference = get_peft_model_state_dict(model, adapter_name="ref")
        different = [
            k for k, v in stored.items() if k not in reference or not reference[k].cpu().float().equal(v.float())
        ]
        if different or len(stored) != len(reference):
            raise StageFailed(f"the reference differs from the SFT adapter in {different[:3] or 'its keys'}", step=0)

    def _preferences(
        self, record: Record, pairs: list[EncodedPair], before: list[float], after: list[float]
    ) -> dict[str, Any]:
        """Implicit-reward accuracy: the share of held-out pairs whose margin rose. Length alone stands beside it."""
        accuracy = _accuracy(before, after)
        change = statistics.paired(before, after)
        shorter = sum(len(c.ids) < len(r.ids) for _, (c, r) in pairs)
        by_length = statistics.proportion(max(shorter, len(pairs) - shorter), len(pairs))
        heldout.write(record.folder, [pair.id for pair, _ in pairs], before, after)
        shown = "above chance" if (accuracy.ci_low or 0) > 0.5 else "not shown to be above chance"
        say(f"held-out preference accuracy {accuracy.text()}, {shown}; length alone would score {by_length.value:.2f}")
        return {
            "preference_accuracy": accuracy.model_dump(exclude_none=True)
            | {"chance": 0.5, "length_alone": by_length.value},
            "margin": change.model_dump(exclude_none=True) | {"unit": "nats"},
        }


def _figures(before: list[float], beta: float, after: list[float]) -> dict[str, Figure]:
    """DPO's loss on held-out pairs, −log σ(β·(margin − margin before)), ln 2 at the start; and who is preferred."""
    logits = [beta * (a - b) for b, a in zip(before, after, strict=True)]
    losses = [max(-logit, 0.0) + math.log1p(math.exp(-abs(logit))) for logit in logits]  # as written, it overflows
    return {"eval_loss": statistics.mean(losses), "eval_preference_accuracy": _accuracy(before, after)}


def _accuracy(before: list[float], after: list[float]) -> Figure:
    """The share of pairs whose margin rose."""
    return statistics.proportion(sum(a > b for b, a in zip(before, after, strict=True)), len(after))


def _dataset(pairs: list[EncodedPair]) -> Any:
    """What trl's preference collator takes: prompt, chosen and rejected as token ids."""
    from datasets import Dataset

    def completion(side: Encoded) -> list[int]:
        return [token for token, trained in zip(side.ids, side.mask, strict=True) if trained]

    return Dataset.from_dict(
        {
            "prompt_ids": [chosen.ids[: chosen.mask.index(True)] for _, (chosen, _) in pairs],
            "chosen_ids": [completion(chosen) for _, (chosen, _) in pairs],
            "rejected_ids": [completion(rejected) for _, (_, rejected) in pairs],
            "row": range(len(pairs)),
        }
    )
