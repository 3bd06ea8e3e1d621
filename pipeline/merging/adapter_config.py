"""An adapter's configuration as peft saves it: read, and refused where a merge would get it wrong."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import UserError

# keys of adapter_config.json that are handled, or mean nothing to a merge; any other must be off
HANDLED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying",
}  # fmt: skip
FRESH = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # other ways to begin (PiSSA, OLoRA, LoftQ) change the base's weights too
OTHERWISE = "training without it, or serving the adapter unmerged"


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


Rank = Annotated[int, Field(gt=0)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class _Keys(BaseModel):
    """The keys that peft computes with, of the types that it takes unasked."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    r: Rank = 8
    lora_alpha: float = 8
    lora_dropout: float = 0
    rank_pattern: dict[Pattern, Rank] = {}
    alpha_pattern: dict[Pattern, float] = {}
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] | Pattern | None = None
    exclude_modules: list[str] | Pattern | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def read(file: Path) -> dict[str, Any]:
    """Raises `UserError`, naming the key, for what is no such configuration, or one of an adapter that is not merged."""
    where = str(file)
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"is no JSON: {error}", where=where, remedy="saving the adapter again") from None
    if not isinstance(config, dict):
        raise UserError("is no mapping of keys to values", where=where, remedy="saving the adapter again")
    _refuse_options(config, where)
    try:
        _Keys.model_validate(config)
    except ValidationError as error:
        fault = error.errors(include_url=False)[-1]  # of several types it may have, the last
        what = f"{fault['loc'][0]}: {fault['msg'].removeprefix('Value error, ')}"
        raise UserError(what, where=where, remedy="saving the adapter again") from None
    return config


def _refuse_options(config: dict[str, Any], where: str) -> None:
    """Raises `UserError`, naming every option that a merge would get wrong."""
    wrong = sorted(key for key, value in config.items() if key not in HANDLED and value)
    if config.get("peft_type") != "LORA":
        wrong = [str(config.get("peft_type"))]
    elif config.get("init_lora_weights", True) not in FRESH:
        wrong.append(f"init_lora_weights: {config['init_lora_weights']}")
    if wrong:
        raise UserError(f"merge handles LoRA, rsLoRA and DoRA, not {', '.join(wrong)}", where=where, remedy=OTHERWISE)
