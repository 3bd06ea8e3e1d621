"""Merge: base + adapter into one plain `transformers` folder, a tensor at a time, with a receipt.

    aletheia merge --profile tiny        make merge PROFILE=tiny

Takes the newest adapter: DPO's, or SFT's where none or only an older DPO stands. LoRA, rsLoRA and DoRA on linear layers
(`pipeline.lora`; anything else in the adapter is refused) are added in float32 and rounded once to the base's dtype.
Writes `checkpoints/EXP-…/model` with tokenizer, template, chat contract and a generation_config that stops at the
end-of-turn; the link is `<name>-merged`. The receipt in the record (`pipeline.receipt`): every merged tensor read back
and compared with base + adapter, every other tensor unchanged bit for bit, and the logits of real prompts against plain
peft. An adapter trained over a quantised base is merged into the weights as stored; a base that is itself stored
quantised is refused.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline import lora
from pipeline.chat import PROBES, Chat
from pipeline.data.rows import Message, PreferencePair
from pipeline.errors import UserError
from pipeline.model import Base, check_trained_on, find_base
from pipeline.progress import Progress, say
from pipeline.receipt import check_logits, check_weights
from pipeline.records import find
from pipeline.records.find import artifacts, link_newest
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.shards import rewrite, size, tensor_names
from pipeline.stage import Job, Source, take
from pipeline.training_data import PARTS, recorded

PROMPTS_CHECKED = 4


@dataclass
class Merge:
    name: ClassVar[str] = "merge"

    job: Job
    base: Base
    chat: Chat
    source: Source
    adapter: lora.Adapter
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source = take(job, find.latest_first(job.workspace, job.profile.id, ["dpo", "sft"]), "adapter")
        base = find_base(job.workspace, job.profile)
        chat = base.chat()
        check_trained_on(base, chat, job.workspace, source)
        if "quantization_config" in json.loads((base.folder / "config.json").read_text()):
            raise job.profile.error("base_model", f"{base.name} is stored quantised", "the model it was quantised from")
        adapter = lora.read(source.output, base.folder, base.trust_remote_code)
        return cls(job, base, chat, source, adapter, [source.input])

    @property
    def trained_over(self) -> str:
        """The base's quantization in training: `auto` is what was chosen."""
        facts = self.source.facts
        known = facts.results.get("training", {}).get("quantization")
        return str(known or facts.configuration.get("quantization", "none"))

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("adapter", f"{self.source.file.id}, {self.adapter.kind} on {len(self.adapter.updates)} modules"),
            ("base", f"{self.base.name} as stored; training saw it with quantization {self.trained_over}"),
            ("writes", f"{size(self.base.folder) / 1e9:.2f} GB"),
        ]

    def run(self, record: Record) -> None:
        record.facts.lineage.base = self.base.identity()
        record.facts.data = {"contract": self.chat.contract.sha256, "template": self.chat.contract.facts()}
        folder, partial = record.output / "model", record.output / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        self._enough_disk(partial)

        with Progress("merging", len(tensor_names(self.base.folder)), "tensor") as progress:
            for _ in rewrite(self.base.folder, partial, self.adapter.merged):
                progress.advance()
        self._write_the_rest(partial)
        receipt = check_weights(self.base.folder, partial, self.adapter)
        receipt |= self._check_logits(partial, receipt["rounding_share_of_update"])
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

        record.facts.results = {"receipt": receipt}
        record.facts.artifacts = artifacts(record.workspace, folder)
        link = link_newest(record.workspace, f"{self.job.config.name}-merged", folder)
        done = f"merged {self.adapter.kind}, {receipt['modules']} modules; within rounding: all"
        say(f"{done}; {record.workspace.shown(link)}")

    def _write_the_rest(self, folder: Path) -> None:
        """Configuration, tokenizer, template and contract; generation stops at the end-of-turn that was trained."""
        from transformers import AutoConfig, GenerationConfig

        AutoConfig.from_pretrained(self.base.folder, trust_remote_code=self.base.trust_remote_code).save_pretrained(
            folder
        )
        self.chat.tokenizer.save_pretrained(folder)
        self.chat.contract.save(folder)
        generation = self.base.folder / "generation_config.json"
        values = json.loads(generation.read_text()) if generation.exists() else {}
        tokenizer = self.chat.tokenizer
        values.pop("_from_model_config", None)  # it is what we say now, not what transformers derived
        values |= {
            "eos_token_id": self.chat.end_of_turn_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        GenerationConfig(**values).save_pretrained(folder)

    def _check_logits(self, merged: Path, rounding_share: float) -> dict[str, Any]:
        if not self.job.config.merge_config.check_logits:
            return {"logits": "not compared: merge_config.check_logits is false"}
        prompts = [self.chat.prompt(messages) for messages in self._prompts()]
        return check_logits(self.base, merged, self.source.output, prompts, rounding_share, self.trained_over)

    def _prompts(self) -> list[Sequence[Message]]:
        """Of rows that its training held out, or trained; of the contract's own conversations where those are gone."""
        facts = self.source.facts
        kind = next(kind for kind, stage in PARTS.items() if stage == facts.stage)
        try:
            for part in ("held_out", "train"):
                rows: list[Any] = recorded(self.job.workspace, self.job.config, self.source.file, facts, part, kind)
                if rows:
                    found = rows[:PROMPTS_CHECKED]
                    return [row.prompt if kind is PreferencePair else row.messages[:-1] for row in found]
        except UserError as error:
            say(f"note: logits are compared on prompts of the chat contract: {error}")
        return [probe[:-1] for probe in PROBES]

    def _enough_disk(self, folder: Path) -> None:
        needed = size(self.base.folder)
        free = shutil.disk_usage(folder).free
        if free < needed * 1.05:
            raise UserError(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free", where=str(folder))
