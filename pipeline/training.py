"""What SFT and DPO share: the trainer's arguments, its run under watch, and how its state is kept.

Checkpoints are sealed once they are whole (`pipeline.watch`), so that a torn one is never resumed from. What a run leaves
for its record: `log.jsonl`, a line a step and a validation, and its curves (`pipeline.curves`).
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from pipeline import attention, curves
from pipeline.chat import Chat
from pipeline.config import DpoConfig, SftConfig
from pipeline.errors import AletheiaError, Interrupted, StageFailed
from pipeline.footprint import Setup
from pipeline.head import bare, sequence_sums, token_log_probs
from pipeline.heldout import Measure
from pipeline.lora import layers
from pipeline.model import Base
from pipeline.passes import Row, lay, size, supervised
from pipeline.plan import plan
from pipeline.preflight import Prediction, check_disk
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.find import artifacts, link_newest
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Visualization
from pipeline.stage import Job
from pipeline.step import NOTHING, StepFigures
from pipeline.telemetry import Telemetry
from pipeline.trainer import Execution, StepLoss, StepTrainer
from pipeline.watch import EXECUTION, LOG, Watch, newest_sealed

BEST, LAST = "adapter-best", "adapter-last"  # beside `adapter`, where they differ from it
ROWS_CHECKED = 3  # packed against padded: enough to show a leak between rows


def make_trainer(
    job: Job,
    record: Record,
    base: Base,
    model: Any,
    config: SftConfig | DpoConfig,
    rows: Sequence[Row],
    step_loss: Callable[[list[int]], StepLoss],
    how: Execution,
    rank: Sequence[int] | None = None,
    neftune_alpha: float | None = None,
) -> StepTrainer:
    """Arguments that differ from the library's defaults say why."""
    rows_a_step = config.batch_size * config.gradient_accumulation
    steps = plan(len(rows), rows_a_step, config.epochs, job.config.seed, rank)
    trainer = StepTrainer(
        model=model,
        rows=rows,
        steps=steps,
        step_loss=step_loss,
        execution=how,
        neftune_alpha=neftune_alpha,
        plateau=config.schedule == "reduce_on_plateau",
        args=TrainingArguments(
            output_dir=str(record.output),
            per_device_train_batch_size=1,  # a batch is a whole step; `steps` holds all epochs
            num_train_epochs=1,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant_with_warmup" if config.schedule == "reduce_on_plateau" else config.schedule,
            warmup_steps=math.ceil(len(steps) * config.warmup_ratio),  # 1.0 would be one step
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=job.config.seed,
            bf16=False,  # the passes compute in what `how` says
            fp16=how.compute == torch.float16,  # for its gradient scaler
            use_cpu=base.device == "cpu",
            gradient_checkpointing=how.checkpointing,
            logging_strategy="no",  # the log is ours, and a NaN stands in it as NaN
            save_strategy="steps",
            save_steps=config.save_steps,
            save_total_limit=2,  # the older one stays until the newer is sealed
            report_to="none",
            disable_tqdm=True,  # we show our own progress
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def train(
    trainer: StepTrainer,
    job: Job,
    record: Record,
    chat: Chat,
    config: SftConfig | DpoConfig,
    ids: Sequence[str],
    held_out: Measure | None,
    needs: Prediction,
) -> list[Any]:
    """Runs the trainer to its end and returns the held-out rows' values of the kept adapter; `results.training` says how it went.

    `ids` are the rows'. Raises `Interrupted` when someone asked to stop (the state is saved) and `StageFailed` when a
    guard trips.
    """
    checkpoint = newest_sealed(record.output) if job.resume else None
    check_disk(needs.disk_needed(), record.output)
    if job.resume:
        whole = f"goes on from {checkpoint.name}" if checkpoint else None
        say(whole or "no whole checkpoint was left: starts from the beginning")
        _forget_after(record.folder / LOG, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    if checkpoint:
        vars(trainer.execution).update(json.loads((checkpoint / EXECUTION).read_text()))
    earlier = [line for line in items.read(record.folder / LOG) if "loss" in line]
    figures = StepFigures(trainer, [{} if checkpoint else NOTHING, *earlier][-1])

    def keep_best() -> None:
        save_adapter(trainer.model, chat, record.output / BEST)

    telemetry = Telemetry(job.config.telemetry, record)
    watch = Watch(record, config, trainer, figures, ids, held_out, keep_best, telemetry)
    trainer.add_callback(figures)
    trainer.add_callback(watch)
    with telemetry:
        try:
            plain = trainer.execution.compute is None
            lean = disable_input_dtype_casting(trainer.model, active=not plain)  # autocast does it
            with record.stop.deferred("stopping after this step and saving"), watch, lean:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            _stop_if_asked(record, trainer.state)
            after = watch.validate(trainer.model, trainer.state)
        finally:
            log = items.read(record.folder / LOG)
            record.facts.results["training"] = _told(trainer, log) | {"predicted": needs.facts()}
            _draw(record, log)
    steps = [line for line in log if "loss" in line]
    if not any(line.get("learning_rate") for line in steps):
        raise StageFailed(
            f"nothing was learnt: the rate was 0 in all {len(steps)} steps, which were warm-up",
            step=len(steps),
            remedy="more rows or epochs, or warmup_ratio=0.0",
        )
    record.facts.results["training"] |= {
        "train_loss": {"first": round(steps[0]["loss"], 4), "last": round(steps[-1]["loss"], 4)},
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "trained_tokens_an_epoch": sum(supervised(row) for row in trainer.rows),
    }
    if "seconds" in figures.totals:
        record.facts.results["training"]["seconds"] = seconds = round(figures.totals["seconds"], 2)
        actual = needs.against(memory_gb=steps[-1]["memory_gb"], seconds=seconds)
        record.facts.results["training"]["predicted_and_actual"] = actual
    return _best_or_last(trainer, record, chat, config, watch, after)


def _stop_if_asked(record: Record, state: Any) -> None:
    if record.stop.requested and state.global_step < state.max_steps:
        done, parent = f"{state.global_step}/{state.max_steps}", record.facts.lineage.parent
        again = f"make run EXP={parent}" if parent else "RESUME=1"
        raise Interrupted(f"interrupted by {record.stop.requested} after step {done}; {again} goes on from there")


def execution(
    config: SftConfig | DpoConfig, model: Any, rows: Sequence[Row], pad_id: int | None, setup: Setup
) -> Execution:
    """How the passes are computed: packed where that gives what transformers' own padded forward gives, as is checked."""
    compute = bare(model).dtype
    how = Execution(
        setup.pass_tokens,
        packed=config.packing,
        checkpointing=setup.checkpointing,
        compute=compute if compute in (torch.bfloat16, torch.float16) else None,
        pad_id=pad_id or 0,  # masked, so any id does; some tokenizers have none
    )
    if how.packed:
        attention.install(bare(model))
        if problem := _packing_problem(model, rows, how):
            say(f"note: this model cannot be packed ({problem}); trains padded, which is slower")
            how.packed = False
    return how


def _packing_problem(model: Any, rows: Sequence[Row], how: Execution) -> str | None:
    """Measures a few rows packed and padded, in eval mode. None when they come out alike."""
    few = sorted(rows, key=size)[:ROWS_CHECKED]
    device, was_training = bare(model).device, model.training
    found = []
    model.eval()
    try:
        for packed in (True, False):
            (batch,) = lay(few, sum(map(size, few)) * 2 * len(few), packed, how.pad_id)
            with torch.no_grad(), how.autocast(device):
                sums = sequence_sums(token_log_probs(model, batch.to(device)), batch.to(device)).tolist()
            rows_of = [row for row in batch.rows for _ in range(len(sums) // len(few))]
            found.append([sums[i] for i in sorted(range(len(sums)), key=rows_of.__getitem__)])
    except torch.OutOfMemoryError:  # a RuntimeError too, and no word on packing
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # it takes no attention of ours
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(was_training)
    tokens = sum(map(supervised, few))
    off = sum(abs(a - b) for a, b in zip(*found, strict=True)) / tokens
    allowed = 0.05 if how.compute else 1e-3
    return None if off <= allowed else f"its rows change by {off:.2g} nats a token when packed"


def _told(trainer: StepTrainer, log: list[dict[str, Any]]) -> dict[str, Any]:
    """How the run went, for its record; of however much was trained."""
    how = trainer.execution
    told: dict[str, Any] = {"steps": trainer.state.global_step}
    validations = [{key: line[key] for key in ("epoch", "step", "eval_loss")} for line in log if "eval_loss" in line]
    finite = [validation for validation in validations if math.isfinite(validation["eval_loss"])]
    if finite:
        told |= {"best": min(finite, key=lambda v: v["eval_loss"]), "latest": validations[-1]}
    told |= {"packed": how.packed, "pass_tokens": how.pass_tokens}
    if how.out_of_memory:
        told["out_of_memory"] = how.out_of_memory
    if trips := [{k: line[k] for k in ("step", "trip", "message", "rows")} for line in log if "trip" in line]:
        told["trips"] = trips
    return told


def _best_or_last(
    trainer: StepTrainer, record: Record, chat: Chat, config: SftConfig | DpoConfig, watch: Watch, after: list[Any]
) -> list[Any]:
    """The model is left with the adapter that is kept; the other stays beside it. Returns the held-out values of the kept."""
    best = min(watch.validations(), key=lambda line: line["eval_loss"], default=None)
    folder = record.output / BEST
    if best is None or best["step"] == trainer.state.global_step:
        shutil.rmtree(folder, ignore_errors=True)
        return after
    where = f"epoch {best['epoch']:g} (held-out loss {best['eval_loss']:.3f})"
    if config.keep == "last" or watch.held_out is None:
        say(f"note: the held-out loss was lowest at {where}: {BEST} is that adapter; keep: best would take it")
        return after
    save_adapter(trainer.model, chat, record.output / LAST)
    set_peft_model_state_dict(trainer.model, load_file(folder / "adapter_model.safetensors"))
    shutil.rmtree(folder)
    record.facts.results["training"]["kept"] = {"step": best["step"], "epoch": best["epoch"]}
    say(f"keeps the adapter of {where}; the last one is {LAST}")
    return watch.held_out.values(trainer.model, "held-out rows, best adapter")


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


def _forget_after(log: Path, step: int) -> None:
    """Steps that are taken again are not to stand twice in the log, nor a line that was torn."""
    kept = []
    for line in log.read_text("utf-8", "replace").splitlines(keepends=True) if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    log.write_text("".join(kept), "utf-8")


def save_adapter(model: Any, chat: Chat, folder: Path) -> None:
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


def keep_adapter(model: Any, chat: Chat, record: Record, link: str) -> Path:
    """Writes the trained adapter, hashes it into the record and points the link at it."""
    folder = record.output / "adapter"
    save_adapter(model, chat, folder)
    others = [record.output / name for name in (BEST, LAST)]
    record.facts.artifacts = [a for f in (folder, *others) if f.is_dir() for a in artifacts(record.workspace, f)]
    for checkpoint in record.output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the run is done: there is nothing left to resume
    return link_newest(record.workspace, link, folder)


def policy(base: Base, config: SftConfig, adapter: Path | None, seed: int) -> Any:
    """The base, quantised where the profile says so, with an adapter to train: an earlier one goes on, else a new one."""
    model = base.load(quantized=True)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        torch.manual_seed(seed)
        model = get_peft_model(model, lora(config))
        list(layers(model, "sft_config.target_modules"))  # what could not be merged is refused now
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bf16 small updates would be lost
            parameter.data = parameter.data.float()
    return model


def lora(config: SftConfig) -> LoraConfig:
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
