"""What SFT and DPO share: the trainer's arguments, its run under watch, and how its state is kept.

Checkpoints are sealed once they are whole (`pipeline.train.watch`), so that a torn one is never resumed from. What a run leaves
for its record: `log.jsonl`, a line a step and a validation, and its curves (`pipeline.train.curves`).
"""

import gc
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from pipeline.chat import Chat
from pipeline.config import DpoConfig, SftConfig
from pipeline.config import Telemetry as ShownNowhere
from pipeline.errors import AletheiaError, Interrupted, StageFailed, UserError
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Visualization
from pipeline.stage import Job
from pipeline.train import adapter, checkpoints, curves, packing
from pipeline.train.adapter import LAST
from pipeline.train.checkpoints import BEST, newest_sealed, step_of
from pipeline.train.footprint import Setup
from pipeline.train.head import bare
from pipeline.train.heldout import Measure
from pipeline.train.passes import Row, out_of_memory, supervised
from pipeline.train.plan import orders, plan, rows_an_epoch
from pipeline.train.preflight import Prediction, check_disk
from pipeline.train.step import NOTHING, StepFigures
from pipeline.train.telemetry import Telemetry
from pipeline.train.trainer import Execution, StepLoss, StepTrainer
from pipeline.train.watch import LOG, Enough, Watch


def make_trainer(
    job: Job,
    record: Record,
    base: Base,
    model: Any,
    config: SftConfig | DpoConfig,
    rows: Sequence[Row],
    domains: Sequence[str],
    step_loss: Callable[[list[int]], StepLoss],
    how: Execution,
    rank: Sequence[int] | None = None,
    neftune_alpha: float | None = None,
) -> StepTrainer:
    """Arguments that differ from the library's defaults say why."""
    steps = plan(config, domains, job.config.seed, rank)
    trainer = StepTrainer(
        model=model,
        rows=rows,
        steps=steps,
        step_loss=step_loss,
        execution=how,
        neftune_alpha=neftune_alpha,
        plateau=config.schedule == "reduce_on_plateau",
        ranks=job.ranks,
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
    domains: Sequence[str],
    held_out: Measure | None,
    needs: Prediction,
) -> list[Any]:
    """Runs the trainer to its end and returns the held-out rows' values of the kept adapter; `results.training` says how it went.

    `ids` and `domains` are the rows'. Raises `Interrupted` when someone asked to stop (the state is saved) and
    `StageFailed` when a guard trips.
    """
    ranks = job.ranks
    if ranks.first:
        check_disk(needs.disk_needed(), record.output)
    checkpoint = _take_up(trainer, job, record) if job.resume else None
    earlier = [line for line in items.read(record.folder / LOG) if "loss" in line]
    figures = StepFigures(trainer, [{} if checkpoint else NOTHING, *earlier][-1])

    def keep_best(step: int) -> None:
        if ranks.first:
            adapter.save(trainer.model, chat, checkpoints.best_at(record.output, step))

    def seal(checkpoint: Path) -> None:
        how, quantization = trainer.execution, needs.setup.quantization
        checkpoints.seal(checkpoint, how, quantization, ranks.size, record.facts.configuration)

    for label, value in needs.sampling():
        say(f"{label}: {value}")
    telemetry = Telemetry(job.config.telemetry if ranks.first else ShownNowhere(tensorboard=False), record)
    an_epoch = rows_an_epoch(config, domains)
    watch = Watch(record, config, trainer, figures, ids, an_epoch, held_out, keep_best, seal, telemetry)
    checkpoints.forget_worse(record.output, watch.validations())
    trainer.add_callback(figures)
    trainer.add_callback(watch)
    with telemetry:
        try:
            plain = trainer.execution.compute is None
            lean = disable_input_dtype_casting(trainer.model, active=not plain)  # autocast does it
            with (
                record.stop.deferred("stopping after this step and saving"),
                watch,
                lean,
                _out_of_memory_told(),
                suppress(Enough),
            ):
                if job.own_process:
                    gc.freeze()  # accelerate begins with a collection, which would walk through all that was imported
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            ranks.part()
            _stop_if_asked(record, trainer.state)
            after = watch.validate(trainer.model, trainer.state)
        finally:
            log = items.read(record.folder / LOG)
            record.facts.results["training"] = _told(trainer, log, needs.setup.quantization, watch.enough()) | {
                "predicted": needs.facts()
            }
            if config.domain_sampling:
                met = Counter(domains[row] for step in trainer.steps[: trainer.state.global_step] for row in step)
                record.facts.results["training"]["rows_met"] = dict(sorted(met.items()))
            if job.config.telemetry.curves:
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
        "trained_tokens_an_epoch": sum(
            supervised(trainer.rows[row]) for row in next(orders(config, domains, job.config.seed))
        ),
    }
    if "seconds" in figures.totals:
        record.facts.results["training"]["seconds"] = seconds = round(figures.totals["seconds"], 2)
        whole = trainer.state.global_step == len(trainer.steps)
        actual = needs.against(memory_gb=steps[-1]["memory_gb"], seconds=seconds if whole else None)
        record.facts.results["training"]["predicted_and_actual"] = actual
    return _best_or_last(trainer, record, chat, config, watch, after)


def _take_up(trainer: StepTrainer, job: Job, record: Record) -> Path | None:
    """The checkpoint that a resume goes on from, computed as before; None: there is no whole one.

    Raises `UserError` for another number of ranks, which would draw other noise, and `StageFailed` for rows that were packed
    and cannot be now.
    """
    ranks, log = job.ranks, record.folder / LOG
    checkpoint = ranks.from_first(lambda: newest_sealed(record.output))
    done = step_of(checkpoint) if checkpoint else 0
    _forget_after(log, done)
    known = ranks.from_first(log.read_bytes)
    if not ranks.first:
        log.write_bytes(known)
    if checkpoint is None:
        say("no whole checkpoint was left: starts from the beginning")
        return None
    say(f"goes on from {checkpoint.name}")
    if missing := done - sum("loss" in line for line in items.read(log)):
        say(f"note: {missing} of these {done} steps are not in {log.name}: curves and guards know the others alone")
    how = checkpoints.computed(checkpoint)
    if how["packed"] and not trainer.execution.packed:
        raise StageFailed("the run began packed, and packed rows do not come out right now; the libraries may differ")
    if (began := how["ranks"]) != ranks.size:
        remedy = f"torchrun --nproc-per-node {began}" if began > 1 else "the command without torchrun"
        raise UserError(f"the run to resume began on {began} ranks, this is {ranks.size}", remedy=remedy)
    trainer.execution.pass_tokens, trainer.execution.packed = how["pass_tokens"], how["packed"]
    return checkpoint


@contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Where no smaller passes help: in the optimiser's own state, in a copy of the adapter."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        remedy = "quantization: nf4, a smaller lora_rank or max_length"
        raise StageFailed("out of memory outside of the passes over rows", remedy=remedy) from error


def _stop_if_asked(record: Record, state: Any) -> None:
    if record.stop.requested and state.global_step < state.max_steps:
        done, parent = f"{state.global_step}/{state.max_steps}", record.facts.lineage.parent
        again = f"make run EXP={parent}" if parent else "RESUME=1 (--resume)"
        raise Interrupted(f"interrupted by {record.stop.requested} after step {done}; {again} goes on from there")


def execution(
    config: SftConfig | DpoConfig,
    model: Any,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    pad_id: int | None,
    setup: Setup,
) -> Execution:
    """How the passes are computed: packed where that gives what the model alone gives, as is checked."""
    compute = bare(model).dtype
    how = Execution(
        setup.pass_tokens,
        packed=config.packing,
        checkpointing=setup.checkpointing,
        compute=compute if compute in (torch.bfloat16, torch.float16) else None,
        pad_id=pad_id or 0,  # masked, so any id does; some tokenizers have none
    )
    if packing.one_row_a_pass(model, [*rows, *held_out]):
        say("note: this model's positions depend on the longest row of a pass: a row a pass, which is slower")
        how.pass_tokens = 1
    if how.packed and (problem := packing.problem(model, rows, how)):
        say(f"note: this model cannot be packed ({problem}); trains padded, which is slower")
        how.packed = False
    return how


def _told(trainer: StepTrainer, log: list[dict[str, Any]], quantization: str, stopped_early: bool) -> dict[str, Any]:
    """How the run went, for its record; of however much was trained."""
    how = trainer.execution
    told: dict[str, Any] = {"steps": trainer.state.global_step}
    if stopped_early and trainer.state.global_step < len(trainer.steps):
        told["stopped_early"] = f"after {trainer.state.global_step} of {len(trainer.steps)} steps"
    validations = [{key: line[key] for key in ("epoch", "step", "eval_loss")} for line in log if "eval_loss" in line]
    finite = [validation for validation in validations if math.isfinite(validation["eval_loss"])]
    if finite:
        told |= {"best": min(finite, key=lambda v: v["eval_loss"]), "latest": validations[-1]}
    told |= {"quantization": quantization, "gradient_checkpointing": how.checkpointing}
    told |= {"packed": how.packed, "pass_tokens": how.pass_tokens}
    if trainer.ranks.size > 1:
        told["ranks"] = trainer.ranks.size
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
    for name in (BEST, LAST):  # of a run that was killed at its end
        shutil.rmtree(record.output / name, ignore_errors=True)
    if best is None or best["step"] == trainer.state.global_step:
        return after
    where = f"epoch {best['epoch']:g} (held-out loss {best['eval_loss']:.3f})"
    folder = checkpoints.best_at(record.output, best["step"])
    if config.keep == "last" or watch.held_out is None:
        shutil.copytree(folder, record.output / BEST)
        say(f"note: the held-out loss was lowest at {where}: {BEST} is that adapter; keep: best would take it")
        return after
    adapter.save(trainer.model, chat, record.output / LAST)
    set_peft_model_state_dict(trainer.model, load_file(folder / "adapter_model.safetensors"))
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
    whole = log.with_name(f".{log.name}")
    whole.write_text("".join(kept), "utf-8")
    whole.replace(log)
