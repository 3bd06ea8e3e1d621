"""`aletheia config explain`: every effective value, where it came from, and what follows from them together."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from aletheia.output import print_json, print_table
from pipeline.errors import AletheiaError
from pipeline.profile import settings
from pipeline.progress import duration
from pipeline.records.find import records
from pipeline.stage import FEW_STEPS, Job, steps_in_all
from pipeline.training_data import PARTS, TrainingRows, read


def explain(job: Job, as_json: bool) -> None:
    rows = [(key, value, job.profile.origin(key), text) for key, value, text in settings(job.config)]
    follows = list(_follows(job))
    if as_json:
        values = {key: {"value": value, "from": origin} for key, value, origin, _ in rows}
        print_json({"values": values, "follows": dict(follows)})
        return
    print_table(("key", "value", "from", "meaning"), rows, sys.stdout)
    print()
    print_table(("what follows", ""), follows, sys.stdout)


def _follows(job: Job) -> Iterator[tuple[str, str]]:
    for kind, stage in PARTS.items():
        config = getattr(job.config, f"{stage}_config")
        a_step = config.batch_size * config.gradient_accumulation
        rows: TrainingRows[Any]
        try:
            rows = read(job.workspace, job.config, kind, quiet=True)
        except AletheiaError as error:
            yield stage, f"unknown: {error}"
            continue
        steps = steps_in_all(config, len(rows.train))
        few = (
            f"; fewer than {FEW_STEPS} steps teach little: more rows or epochs, or a smaller batch"
            if steps < FEW_STEPS
            else ""
        )
        warmup = round(steps * config.warmup_ratio)
        yield f"{stage} rows", rows.text()
        yield f"{stage} steps", f"{steps} of {a_step} rows, the first {warmup} warm up{few}"
        yield f"{stage} time", _time(job, stage, steps)
    yield from _memory(job)


def _time(job: Job, stage: str, steps: int) -> str:
    """From the newest complete run of this profile on this stage: nothing is promised that was not measured."""
    for file, facts in records(job.workspace):
        if facts.profile == job.profile.id and facts.stage == stage and facts.status == "complete":
            with suppress(KeyError, TypeError, ValueError, ArithmeticError):  # an older record, or an edited one
                training = facts.results["training"]
                return f"about {duration(training['seconds'] / training['steps'] * steps)}, at the pace of {file.id}"
    return "unknown until a first run has been measured"


def _memory(job: Job) -> Iterator[tuple[str, str]]:
    """A rough prediction: weights, adapter with AdamW's state, activations of one forward and backward pass."""
    try:
        shape = _shape(job)
    except AletheiaError as error:
        yield "memory", f"unknown: {error}"
        return
    sft = job.config.sft_config
    linear = shape["parameters"] - 2 * shape["vocabulary"] * shape["hidden"]
    bytes_each = {"fp32": 4, "bf16": 2, "auto": shape["stored_bytes"]}[job.config.precision]
    tokens = sft.batch_size * sft.max_length
    a_layer = tokens * (10 * shape["hidden"] + 3 * shape["ffn"]) * bytes_each
    kept = tokens * shape["hidden"] * bytes_each * shape["layers"] + a_layer
    activations = kept if sft.gradient_checkpointing else a_layer * shape["layers"]
    adapter = sft.lora_rank * shape["layers"] * (8 * shape["hidden"] + 3 * (shape["hidden"] + shape["ffn"])) * 16
    head = tokens * shape["vocabulary"] * 4
    rest = adapter + activations + head
    yield "parameters", f"{shape['parameters'] / 1e6:,.1f} M"
    yield "sft memory", f"about {(shape['parameters'] * bytes_each + rest) / 1e9:.1f} GB predicted, not measured"
    yield (
        "  with nf4",
        f"about {(linear * 0.55 + 2 * shape['vocabulary'] * shape['hidden'] * bytes_each + rest) / 1e9:.1f} GB",
    )


def _shape(job: Job) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.model import read_config
    from pipeline.quiet import quiet

    quiet()
    config = read_config(job.workspace, job.profile)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_bytes": torch.finfo(getattr(config, "dtype", None) or torch.float32).bits // 8,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "ffn": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }
