"""The adapter that is trained: how it starts, and how it is written and kept.

model = adapter.start(base, config, earlier, seed)      # base and adapter; DPO's policy
adapter.keep(model, chat, record, "tiny-sft")           # checkpoints/EXP-…/adapter, hashed into the record; then the link
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from pipeline.chat import Chat
from pipeline.config import SftConfig
from pipeline.merging.lora import layers
from pipeline.model import Base
from pipeline.records.find import artifacts
from pipeline.records.lifecycle import Record
from pipeline.train.checkpoints import BEST

LAST = "adapter-last"  # beside `adapter`, as BEST, where they differ from it


def start(base: Base, config: SftConfig, adapter: Path | None, seed: int) -> Any:
    """The base, quantised where the profile says so, with an adapter to train: an earlier one goes on, else a new one."""
    model = base.load(quantized=True)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        torch.manual_seed(seed)
        model = get_peft_model(model, peft_config(config))
        list(layers(model, "sft_config.target_modules"))  # what could not be merged is refused now
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bf16 small updates would be lost
            parameter.data = parameter.data.float()
    return model


def peft_config(config: SftConfig) -> LoraConfig:
    """peft's configuration of the adapter."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.adapter == "rslora",
        use_dora=config.adapter == "dora",
        task_type="CAUSAL_LM",
    )


def save(model: Any, chat: Chat, folder: Path) -> None:
    """Adapter, tokenizer and contract: whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = model.peft_config["default"]
    if isinstance(config.target_modules, set):  # a set's order differs between processes, and with it the file's hash
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(partial, selected_adapters=["default"], safe_serialization=True)
    chat.tokenizer.save_pretrained(partial)
    chat.contract.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def keep(model: Any, chat: Chat, record: Record, link: str) -> str:
    """Writes the trained adapter and hashes it into the record; the link will point at it."""
    folder = record.output / "adapter"
    save(model, chat, folder)
    others = [record.output / name for name in (BEST, LAST)]
    record.facts.artifacts = [a for f in (folder, *others) if f.is_dir() for a in artifacts(record.workspace, f)]
    return record.link(link, folder)
