"""Merge: base + adapter into one plain `transformers` folder, shard by shard, with a receipt.

    aletheia merge --profile tiny        make merge PROFILE=tiny

Takes the newest adapter: DPO's, or SFT's where none or only an older DPO stands. Reads the base tensor by tensor, adds
B·A·scale in float32, rounds once to the base's dtype, and writes `checkpoints/EXP-…/model` with tokenizer, template,
chat contract and a generation_config that stops at the end-of-turn; the link is `<name>-merged`. The receipt in the
record: every merged tensor read back and compared with base + adapter, every other tensor unchanged bit for bit, no
adapter key left over, and the logits of real prompts against plain peft where the model fits in memory. Plain LoRA on
linear layers only: anything else in the adapter is refused. A quantised base is never merged into: the weights as
stored are used.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline.chat import PROBES, Chat
from pipeline.data.rows import Message, PreferencePair
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base, check_trained_on, find_base, load_model
from pipeline.progress import Progress, say
from pipeline.records import find
from pipeline.records.find import artifacts, link_newest
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take
from pipeline.training_data import PARTS, recorded

INDEX = "model.safetensors.index.json"
PROMPTS_CHECKED = 4
# peft options that change what a merge must do; each must be off
UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
               "trainable_token_indices", "layer_replication", "megatron_config", "target_parameters", "use_qalora")  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """An adapter as plain matrices: for each base weight, A `(rank, in)` and B `(out, rank)`, both float32."""

    scale: float
    matrices: dict[str, tuple[Any, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Lora":
        """Raises `UserError` for anything but plain LoRA, and for a key that belongs to no pair."""
        from safetensors.torch import load_file

        config = json.loads((folder / "adapter_config.json").read_text())
        wanted = [name for name in UNSUPPORTED if config.get(name)]
        if config.get("peft_type") != "LORA" or wanted or config.get("bias", "none") != "none":
            raise UserError(
                f"merge handles plain LoRA only, not {', '.join(wanted) or 'this adapter'}", where=str(folder)
            )
        tensors = load_file(folder / "adapter_model.safetensors")
        halves: dict[str, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            module, found, half = key.removeprefix("base_model.model.").rpartition(".lora_")
            if not found or half not in ("A.weight", "B.weight"):
                raise UserError(f"the adapter's key {key} is left over", where=str(folder))
            halves.setdefault(f"{module}.weight", {})[half[0]] = tensor.float()
        single = [name for name, pair in halves.items() if set(pair) != {"A", "B"}]
        if single:
            raise UserError(f"the adapter has only half of {single[0]}", where=str(folder))
        pairs = {name: (pair["A"], pair["B"]) for name, pair in halves.items()}
        return cls(config["lora_alpha"] / config["r"], pairs)

    def merged(self, name: str, weight: Any) -> Any:
        """`weight + scale · B·A` in float32, rounded once to the weight's dtype; the weight itself where none applies."""
        if name not in self.matrices:
            return weight
        a, b = self.matrices[name]
        return weight.float().addmm_(b, a, alpha=self.scale).to(weight.dtype)


@dataclass
class Merge:
    name: ClassVar[str] = "merge"

    job: Job
    base: Base
    chat: Chat
    source: Source
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source = take(job, find.latest_first(job.workspace, job.profile.id, ["dpo", "sft"]), "adapter")
        base = find_base(job.workspace, job.profile)
        chat = base.chat()
        check_trained_on(base, chat, job.workspace, source)
        return cls(job, base, chat, source, [source.input])

    def plan(self) -> list[tuple[str, str]]:
        size = sum(f.stat().st_size for f in self.base.folder.glob("*.safetensors"))
        return [("adapter", self.source.file.id), ("base", self.base.name), ("writes", f"{size / 1e9:.2f} GB")]

    def run(self, record: Record) -> None:
        record.facts.lineage.base = self.base.identity()
        record.facts.data = {"contract": self.chat.contract.sha256}
        adapter = Lora.read(self.source.output)
        folder, partial = record.output / "model", record.output / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        self._enough_disk(partial)

        self._write_weights(adapter, partial)
        self._write_the_rest(partial)
        receipt = check_weights(self.base.folder, partial, adapter)
        receipt |= self._check_logits(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

        record.facts.results = {"receipt": receipt}
        record.facts.artifacts = artifacts(record.workspace, folder)
        link = link_newest(record.workspace, f"{self.job.config.name}-merged", folder)
        say(f"merged {receipt['modules']} modules; within rounding: all; {record.workspace.shown(link)}")

    def _write_weights(self, adapter: Lora, folder: Path) -> None:
        """One output file for each of the base's, one tensor of it in float32 at a time."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        names = set(tensor_names(self.base.folder))
        unknown = sorted(set(adapter.matrices) - names)
        if unknown:
            raise UserError(f"the adapter's {unknown[0]} is no weight of the base", where=self.base.name)
        tied = sorted(n for n in adapter.matrices if "embed" in n or "lm_head" in n)
        if tied:
            raise UserError(
                f"the adapter is on {tied[0]}, whose weight may be tied; merge refuses it", where=self.base.name
            )
        with Progress("merging", len(names), "tensor") as progress:
            for shard in shards(self.base.folder):
                tensors = {}
                with safe_open(shard, framework="pt") as stored:
                    for name in stored.keys():  # noqa: SIM118  (not a dict)
                        tensors[name] = adapter.merged(name, stored.get_tensor(name)).contiguous()
                        progress.advance()
                save_file(tensors, folder / shard.name, metadata={"format": "pt"})

    def _write_the_rest(self, folder: Path) -> None:
        """Configuration, tokenizer, template and contract; generation stops at the end-of-turn that was trained."""
        from transformers import AutoConfig, GenerationConfig

        AutoConfig.from_pretrained(self.base.folder, trust_remote_code=self.base.trust_remote_code).save_pretrained(
            folder
        )
        index = self.base.folder / INDEX
        if index.exists():
            shutil.copyfile(index, folder / INDEX)
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

    def _check_logits(self, merged: Path) -> dict[str, Any]:
        """The merged model against base + adapter through plain peft, on held-out prompts, where both fit in memory."""
        import psutil
        import torch
        from peft import PeftModel

        if not self.job.config.merge_config.check_logits:
            return {"logits": "not compared: merge_config.check_logits is false"}
        size = sum(f.stat().st_size for f in merged.glob("*.safetensors"))
        if 3 * size > psutil.virtual_memory().available:
            say("note: the model does not fit in memory twice: logits are not compared, the tensors are")
            return {"logits": "not compared: the model does not fit in memory twice"}
        prompts = [self.chat.prompt(messages) for messages in self._prompts()]
        outputs = []
        for adapted in (True, False):
            model = load_model(self.base.folder if adapted else merged, self.base)
            if adapted:
                model = PeftModel.from_pretrained(model, self.source.output).eval()
            with torch.inference_mode():
                outputs.append(
                    [model(input_ids=torch.tensor([p], device=model.device)).logits[0].float().cpu() for p in prompts]
                )
            exact = model.dtype == torch.float32 and stored_dtypes(merged) == {"F32"}
            del model
        largest = max((a - b).abs().max().item() for a, b in zip(*outputs, strict=True))
        scale = max(a.abs().max().item() for a in outputs[0])
        bound = (1e-4 if exact else 0.1) * max(scale, 1.0)  # else the weights or the sums were rounded to 8 bits
        if largest > bound:
            raise StageFailed(f"merged logits differ from base + adapter by {largest:.3g}, more than {bound:.3g}")
        return {
            "logits_max_difference": float(f"{largest:.3g}"),
            "logits_bound": float(f"{bound:.3g}"),
            "prompts": len(prompts),
        }

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
        needed = sum(f.stat().st_size for f in self.base.folder.glob("*.safetensors"))
        free = shutil.disk_usage(folder).free
        if free < needed * 1.05:
            raise UserError(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free", where=str(folder))


def check_weights(base: Path, merged: Path, adapter: Lora) -> dict[str, Any]:
    """The receipt: reads the output back and compares it with base + adapter, computed anew in float64.

    Raises `StageFailed` when a merged tensor is further from it than its dtype's rounding, when a targeted tensor did not
    change, when any other did, or when a tensor is missing or extra.
    """
    import torch
    from safetensors import safe_open

    if tensor_names(base) != tensor_names(merged):
        raise StageFailed("the merged model has other tensors than the base")
    worst, least_change = 0.0, float("inf")
    for shard in shards(base):
        with safe_open(shard, framework="pt") as before, safe_open(merged / shard.name, framework="pt") as after:
            for name in before.keys():  # noqa: SIM118  (not a dict)
                old, new = before.get_tensor(name), after.get_tensor(name)
                if name not in adapter.matrices:
                    if not torch.equal(old, new):
                        raise StageFailed(f"{name} is not targeted by the adapter and changed")
                    continue
                a, b = (m.double() for m in adapter.matrices[name])
                update = adapter.scale * (b @ a)
                exact = old.double() + update
                # half a unit of the dtype, after a float32 sum of rank + 1 terms (Higham 2002, section 3.1)
                sums = old.double().abs() + adapter.scale * (b.abs() @ a.abs())
                allowed = exact.abs() * torch.finfo(new.dtype).eps / 2 + sums * (a.shape[0] + 2) * 2**-24
                excess = ((new.double() - exact).abs() / allowed).max().item()
                if not excess <= 1:
                    raise StageFailed(f"{name} is {excess:.1f} × the rounding of {new.dtype} away from base + adapter")
                if torch.equal(old, new):
                    raise StageFailed(f"{name} is targeted by the adapter and did not change")
                worst = max(worst, excess)
                least_change = min(least_change, (update.norm() / old.double().norm()).item())
    return {
        "modules": len(adapter.matrices),
        "unchanged_tensors": len(tensor_names(base)) - len(adapter.matrices),
        "worst_share_of_rounding_bound": round(worst, 3),
        "smallest_relative_change": float(f"{least_change:.3g}"),
    }


def shards(folder: Path) -> list[Path]:
    """The weight files that the model is made of: those of the index where there is one."""
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def stored_dtypes(folder: Path) -> set[str]:
    """As safetensors names them: F32, BF16."""
    from safetensors import safe_open

    found = set()
    for shard in shards(folder):
        with safe_open(shard, framework="pt") as stored:
            found |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118  (not a dict)
    return found


def tensor_names(folder: Path) -> list[str]:
    return sorted(_names(folder))


def _names(folder: Path) -> Iterator[str]:
    from safetensors import safe_open

    for shard in shards(folder):
        with safe_open(shard, framework="pt") as stored:
            yield from stored.keys()
