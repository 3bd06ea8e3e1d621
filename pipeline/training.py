"""What SFT and DPO share: the trainer's arguments, what watches it, and how its state is kept.

The trainers are trl's. Around them: progress with ETA, a stop on Ctrl-C or SIGTERM at the next step with everything
saved, a stop on a loss that is not finite, and checkpoints that are sealed once they are whole, so that a torn one is
never resumed from.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from pipeline.chat import Chat
from pipeline.config import DpoConfig, SftConfig
from pipeline.data import Message, Row
from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.model import Base
from pipeline.progress import Progress, say
from pipeline.records.find import artifacts, link_newest, sha256
from pipeline.records.lifecycle import Record
from pipeline.stage import FEW_STEPS, Job

SEAL = "sealed.json"
LOG = "log.jsonl"


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
        "max_length": None,  # rows too long were rejected by name; nothing is cut
    }


def train(trainer: Any, record: Record, resume: bool) -> dict[str, Any]:
    """Runs the trainer to its end and returns what the record says of it.

    Raises `Interrupted` when someone asked to stop (the state is saved) and `StageFailed` on a loss that is not finite.
    """
    trainer.remove_callback(PrinterCallback)
    watch = _Watch(record, trainer.args)
    trainer.add_callback(watch)
    checkpoint = newest_sealed(Path(trainer.args.output_dir)) if resume else None
    if resume:
        say(
            f"goes on from {checkpoint.name}"
            if checkpoint
            else "no whole checkpoint was left: starts from the beginning"
        )
        _forget_after(record.folder / LOG, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    with record.stop.deferred("stopping after this step and saving"), watch:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if record.stop.requested and trainer.state.global_step < trainer.state.max_steps:
        done = f"{trainer.state.global_step}/{trainer.state.max_steps}"
        raise Interrupted(f"interrupted by {record.stop.requested} after step {done}; RESUME=1 goes on from there")
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    if not any(rates):
        raise StageFailed(
            f"nothing was learnt: the rate was 0 in all {trainer.state.global_step} steps, which were warm-up",
            step=trainer.state.global_step,
            remedy="more rows or epochs, or warmup_ratio=0.0",
        )
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "train_loss": {"first": round(logged[0], 4), "last": round(logged[-1], 4)},
        "seconds": round(outcome.metrics["train_runtime"], 2),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


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
    for line in log.read_text("utf-8").splitlines(keepends=True) if log.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
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


def usable(
    rows: Sequence[Any], chat: Chat, max_length: int, encode: Callable[[Any], Any], record: Record, max_share: float
) -> list[tuple[Any, Any]]:
    """Rows that can be trained, with their encoding. The others go to `rejects.jsonl`, each with place and reason.

    Raises `UserError` when more than `max_share` are rejected, or all.
    """
    kept, rejects = [], []
    for row in rows:
        reserved = chat.reserved_in(_messages(row))
        if reserved:
            rejects.append((row, f"its text holds the special token {reserved}"))
            continue
        try:
            encoded = encode(row)
        except UserError as error:  # the template takes the others, not this one
            rejects.append((row, error.what))
            continue
        longest = max(len(side.ids) for side in (encoded if isinstance(encoded, tuple) else (encoded,)))
        if longest > max_length:
            rejects.append((row, f"{longest} tokens, max_length is {max_length}"))
        else:
            kept.append((row, encoded))
    path = record.folder / "rejects.jsonl"
    if "rejected" not in record.facts.data:
        path.unlink(missing_ok=True)  # what an interrupted run left: the rows are judged anew
    if rejects:
        lines = [json.dumps({"where": r.where, "id": r.id, "reason": why}, ensure_ascii=False) for r, why in rejects]
        with path.open("a", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
        say(f"note: {len(rejects)} of {len(rows)} rows cannot be used, first {rejects[0][0].where}: {rejects[0][1]}")
        say(f"      all of them, with reasons: {record.workspace.shown(path)}")
    record.facts.data["rejected"] = record.facts.data.get("rejected", 0) + len(rejects)
    if not kept or len(rejects) / len(rows) > max_share:
        row, why = rejects[0]
        raise UserError(
            f"{len(rejects)} of {len(rows)} rows cannot be used, more than max_reject_share allows; the first: {why}",
            where=row.where,
            remedy="a larger max_length, shorter rows, or a larger training_data.max_reject_share",
        )
    return kept


def float32_adapter(model: Any) -> None:
    """The adapter trains in float32 (trl turns it to bf16 over a quantised base; small updates would be lost)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _messages(row: Row) -> list[Message]:
    return [m for name in ("messages", "prompt", "chosen", "rejected") for m in getattr(row, name, [])]


class _Watch(TrainerCallback):
    """Sees every step: progress, the log, stop requests, finite losses, sealed checkpoints."""

    def __init__(self, record: Record, arguments: Any) -> None:
        self.record, self.arguments = record, arguments
        self.progress: Progress | None = None

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.__exit__(*error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.max_steps < FEW_STEPS:
            say(
                f"note: {state.max_steps} steps teach little (under {FEW_STEPS}): more rows or epochs, or a smaller batch"
            )
        self.progress = Progress(f"training {self.record.facts.stage}", state.max_steps, "step", done=state.global_step)
        self.progress.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        with (self.record.folder / LOG).open("a", encoding="utf-8") as out:
            out.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise StageFailed(
                    f"{name} is {logs[name]} at step {state.global_step}",
                    step=state.global_step,
                    remedy="a lower learning_rate, or bf16 in place of fp16",
                )
        if self.progress and "loss" in logs:
            self.progress.note = f"loss {logs['loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress:
            self.progress.advance(state.global_step)
        if self.record.stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The seal is written last: a checkpoint without one, or whose files differ, is torn."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != SEAL]
        seal = {str(p.relative_to(checkpoint)): sha256(p) for p in files}
        (checkpoint / SEAL).write_text(json.dumps(seal, indent=1))
