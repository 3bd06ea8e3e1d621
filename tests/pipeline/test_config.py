from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config import Profile


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [f.annotation for f in model.model_fields.values()]
    return [model] + [s for i in inner if isinstance(i, type) and issubclass(i, BaseModel) for s in sections(i)]


@pytest.mark.parametrize("section", sections(Profile), ids=lambda section: section.__name__)
def test_every_key_says_what_it_means(section: type[BaseModel]) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_defaults_are_what_the_design_promises() -> None:
    config = Profile(name="x", base_model="tiny")
    sft, dpo = config.sft_config, config.dpo_config
    assert (sft.learning_rate, sft.batch_size, sft.gradient_accumulation, sft.epochs) == (2e-4, 2, 16, 2.0)
    assert (sft.lora_rank, sft.lora_alpha, sft.max_length) == (16, 32, 2048)
    assert (dpo.learning_rate, dpo.batch_size, dpo.gradient_accumulation, dpo.epochs) == (1e-5, 2, 16, 1.0)
    assert dpo.beta == 0.1


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rank": True},
        {"lora_rank": "16"},
        {"lora_rank": 16.0},
        {"lora_rank": 0},
        {"learning_rate": "2e-4"},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"max_grad_norm": float("inf")},
        {"warmup_ratio": 1.1},
        {"schedule": "cosin"},
        {"gradient_checkpointing": 1},
    ],
)
def test_a_value_of_another_kind_is_refused_not_converted(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Profile.model_validate({"name": "x", "base_model": "tiny", "sft_config": values})
