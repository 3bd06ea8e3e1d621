"""What SFT and DPO share: the trainer's arguments, its run under watch, and how its state is kept.

The trainers are trl's. Checkpoints are sealed once they are whole (`pipeline.watch`), so that a torn one is never resumed
from. What a run leaves for its record: `log.jsonl`, a line a step and a validation, and its curves (`pipeline.curves`).
"""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PrinterCallback

from pipeline import curves
from pipeline.chat import Chat
from pipeline.config import DpoConfig, SftConfig
from pipeline.errors import AletheiaError, Interrupted, StageFailed
from pipeline.heldout import Measure
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.find import artifacts, link_newest, sha256
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Visualization
from pipeline.stage import Job
from pipeline.step import NOTHING, Feed, StepFigures
from pipeline.watch import LOG, SEAL, Watch


def trainer_arguments(config: SftConfig | DpoConfig, job: Job, base: Base, output: Path) -> dict[str, Any]:
    """Arguments common to `SFTConfig` and `DPOConfig`. Those that differ from the library's defaults say why."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": job.config.seed,
        "bf16": base.device == "cuda" and base.dtype == "bfloat16",  # trl's default is True, also on a CPU
        "use_cpu": base.device == "cpu",
        "gradient_checkpointing": config.gradient_checkpointing,  # trl's default is True: 0.7 × the speed
        "logging_nan_inf_filter": False,  # the default logs a NaN as 0.0 and trains on
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,  # the older one stays until the newer is sealed
        "report_to": "none",
        "disable_tqdm": True,  # we show our own progress
        "dataloader_pin_memory": base.device == "cuda",
        "remove_unused_columns": False,  # a row's number comes along, so that a step can name its rows
        "max_length": None,  # rows too long were rejected by name; nothing is cut
    }


def train(
    trainer: Any,
    record: Record,
    config: SftConfig | DpoConfig,
    rows: Sequence[tuple[str, int]],
    held_out: Measure | None,
    resume: bool,
) -> list[float]:
    """Runs the trainer to its end and returns the held-out rows' values there; `results.training` says how it went.

    `rows`: id and supervised tokens of each training row, in the dataset's order. Raises `Interrupted` when someone
    asked to stop (the state is saved) and `StageFailed` on a loss that is not finite.
    """
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_sealed(Path(trainer.args.output_dir)) if resume else None
    if resume:
        whole = f"goes on from {checkpoint.name}" if checkpoint else None
        say(whole or "no whole checkpoint was left: starts from the beginning")
        _forget_after(record.folder / LOG, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    trainer.data_collator = feed = Feed(trainer.data_collator)
    earlier = [line for line in items.read(record.folder / LOG) if "loss" in line]
    step = StepFigures(feed, [tokens for _, tokens in rows], [{} if checkpoint else NOTHING, *earlier][-1])
    watch = Watch(record, step, [name for name, _ in rows], held_out, config.evaluate_each_epoch)
    trainer.add_callback(step)
    trainer.add_callback(watch)
    try:
        with record.stop.deferred("stopping after this step and saving"), watch:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
        if record.stop.requested and state.global_step < state.max_steps:
            done = f"{state.global_step}/{state.max_steps}"
            parent = record.facts.lineage.parent
            again = f"make run EXP={parent}" if parent else "RESUME=1"
            raise Interrupted(f"interrupted by {record.stop.requested} after step {done}; {again} goes on from there")
        if not any(entry.get("learning_rate") for entry in state.log_history):
            raise StageFailed(
                f"nothing was learnt: the rate was 0 in all {state.global_step} steps, which were warm-up",
                step=state.global_step,
                remedy="more rows or epochs, or warmup_ratio=0.0",
            )
        after = watch.validate(trainer.model, state)
    finally:
        log = items.read(record.folder / LOG)
        record.facts.results["training"] = {"steps": trainer.state.global_step} | _best_and_latest(log)
        _draw(record, log)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    record.facts.results["training"] |= {
        "train_loss": {"first": round(losses[0], 4), "last": round(losses[-1], 4)},
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "trained_tokens_an_epoch": sum(tokens for _, tokens in rows),
    }
    if "seconds" in step.totals:
        record.facts.results["training"]["seconds"] = round(step.totals["seconds"], 2)
    return after


def _best_and_latest(log: list[dict[str, Any]]) -> dict[str, Any]:
    """By the held-out loss; empty where nothing was held out."""
    validations = [{key: line[key] for key in ("epoch", "step", "eval_loss")} for line in log if "eval_loss" in line]
    finite = [validation for validation in validations if math.isfinite(validation["eval_loss"])]
    return {"best": min(finite, key=lambda v: v["eval_loss"]), "latest": validations[-1]} if finite else {}


def _draw(record: Record, log: list[dict[str, Any]]) -> None:
    """Curves beside the record, of however much was trained; one that cannot be drawn fails nothing."""
    if sum("loss" in line for line in log) < 2:
        return
    try:
        drawn = curves.draw(record.folder, log)
    except AletheiaError:  # someone asked to stop
        raise
    except Exception as error:
        say(f"note: the curves could not be drawn ({type(error).__name__}: {error})")
    else:
        record.facts.visualizations = [Visualization(path=f"{record.id}/{name}", purpose=why) for name, why in drawn]


def newest_sealed(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and whole; torn ones are passed over, aloud."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        try:
            sealed = json.loads((checkpoint / SEAL).read_text())
            if all(sha256(checkpoint / name) == digest for name, digest in sealed.items()):
                return checkpoint
        except (OSError, ValueError):
            pass
        say(f"note: {checkpoint.name} is torn and passed over")
    return None


def _forget_after(log: Path, step: int) -> None:
    """Steps that are taken again are not to stand twice in the log, nor a line that was torn."""
    kept = []
    for line in log.read_text("utf-8", "replace").splitlines(keepends=True) if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    log.write_text("".join(kept), "utf-8")


def keep_adapter(model: Any, chat: Chat, record: Record, link: str) -> Path:
    """Writes the trained adapter, whole or not at all, hashes it into the record and points the link at it."""
    folder, partial = record.output / "adapter", record.output / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    config = model.peft_config["default"]
    if isinstance(config.target_modules, set):  # a set's order differs between processes, and with it the file's hash
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(partial, selected_adapters=["default"], safe_serialization=True)
    chat.tokenizer.save_pretrained(partial)
    chat.contract.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    record.facts.artifacts = artifacts(record.workspace, folder)
    for checkpoint in record.output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the run is done: there is nothing left to resume
    return link_newest(record.workspace, link, folder)


def lora(config: SftConfig) -> LoraConfig:
    """peft's configuration of the adapter."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )


def float32_adapter(model: Any) -> None:
    """The adapter trains in float32 (trl turns it to bf16 over a quantised base; small updates would be lost)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
