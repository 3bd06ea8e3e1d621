"""Settings that would do nothing, or end in a crash: refused in one line before anything is loaded.

`check_profile` says what the profile alone tells, `check_rows` what its rows tell, `check_adapter` what base and device do.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import DpoConfig, SftConfig
from pipeline.train.plan import difficulty_rank, measured_after, rows_an_epoch

if TYPE_CHECKING:
    from pipeline.model import Base
    from pipeline.profile import Profile
    from pipeline.training_data import TrainingRows

Conflict = tuple[str, str, str]  # key within its section, what is wrong, remedy


def check_profile(profile: "Profile") -> None:
    """Raises `UserError` for a setting that needs held-out rows, or measurements of them, where there are none."""
    validation = profile.config.training_data.validation
    held_out = bool(validation.fraction or validation.path)
    for section in ("sft_config", "dpo_config"):
        _raise_first(profile, section, _unmeasured(getattr(profile.config, section), held_out))


def check_rows(profile: "Profile", section: str, rows: "TrainingRows[Any]") -> None:
    """Raises `UserError` for a setting that these rows leave without effect."""
    if not rows.train:
        return  # is said where it is said why
    config = getattr(profile.config, section)
    _raise_first(profile, section, _unknown_domains(config, rows.domains))
    _raise_first(profile, section, _weights_that_cancel(config, rows.domains))
    _raise_first(profile, section, _unmeasured(config, bool(rows.held_out), rows_an_epoch(config, rows.domains)))
    if getattr(config, "curriculum", False) and len(set(difficulty_rank([row.difficulty for row in rows.train]))) == 1:
        why = "all rows to train are of one difficulty"
        raise profile.error(f"{section}.curriculum", why, "beginner, intermediate and expert in the rows, or false")


def check_adapter(profile: "Profile", base: "Base", adapter: Path | None) -> None:
    """`adapter`: an earlier one that goes on; None: a new one. Raises `UserError` where training it would crash.

    On a CPU peft reads an 8-bit weight for DoRA and puts it back without its scales, which the next pass needs.
    """
    kind = kind_of(adapter) if adapter else profile.config.sft_config.adapter
    if (kind, base.quantization, base.device) == ("dora", "int8", "cpu"):
        what = "an int8 base cannot be trained with a DoRA adapter on a CPU: peft loses its scales"
        raise profile.error("quantization", what, "nf4 or none, or another sft_config.adapter")


def kind_of(adapter: Path) -> str:
    """lora | rslora | dora, of an adapter's folder."""
    config = stored(adapter)
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def stored(adapter: Path) -> dict[str, Any]:
    """peft's configuration of an adapter's folder."""
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    return found


def _unmeasured(config: SftConfig | DpoConfig, held_out: bool, rows: int | None = None) -> Iterator[Conflict]:
    """`rows` an epoch; None: not known yet, so that with `evaluate_steps` nobody knows how often is measured."""
    patience, plateau = config.early_stopping, config.schedule == "reduce_on_plateau"
    wanted = [  # key, how to do without it, measurements before the last step that it takes to do anything
        ("evaluate_steps", "null", 0 if config.evaluate_steps else None),
        ("early_stopping", "null", patience + 1 if patience else None),
        ("schedule", "cosine", 2 if plateau else None),
        ("keep", "last", 1 if config.keep == "best" else None),
    ]
    there = None if rows is None and config.evaluate_steps else len(measured_after(config, rows or 1))
    for key, without, measurements in wanted:
        if measurements is None:
            continue
        value = getattr(config, key)
        if not held_out:
            remedy = f"training_data.validation.fraction: 0.1, or {key}: {without}"
            yield key, f"{value} needs held-out rows, and there are none", remedy
        elif there is not None and there < measurements:
            takes = f"{value} takes {measurements} or more measurements of the held-out rows before the last step"
            yield key, f"{takes}, and there are {there}", f"evaluate_steps, more epochs, or {key}: {without}"


def _unknown_domains(config: SftConfig | DpoConfig, domains: list[str]) -> Iterator[Conflict]:
    for key in ("domain_weights", "domain_sampling"):
        for name in sorted(set(getattr(config, key)) - set(domains)):
            yield f"{key}.{name}", "no row to train has this domain", f"one of: {', '.join(sorted(set(domains)))}"


def _weights_that_cancel(config: SftConfig | DpoConfig, domains: list[str]) -> Iterator[Conflict]:
    """A step's loss is divided by the weights of its rows, so they act only between rows of one step."""
    weights = config.domain_weights
    if weights and config.batch_size * config.gradient_accumulation == 1:
        yield "domain_weights", "a weight cancels out where a step has one row", "gradient_accumulation, or {}"
    elif weights and len({weights.get(domain, 1.0) for domain in domains}) == 1:
        yield "domain_weights", "all rows to train have one and the same weight", "another weight, or {}"


def _raise_first(profile: "Profile", section: str, conflicts: Iterator[Conflict]) -> None:
    for key, what, remedy in conflicts:
        raise profile.error(f"{section}.{key}", what, remedy)
