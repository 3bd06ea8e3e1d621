"""Adapters that vLLM serves unmerged: which ones it may, over which weights."""

import json
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.records.find import artifacts
from serving.serve import servable
from serving.vllm_backend.loras import Lora, beside, lora, room

if TYPE_CHECKING:
    from tests.conftest import Trained


def rewrite(copied: "Trained", stage: str, **values: Any) -> None:
    """Changes the adapter's configuration, and its record takes it for its own."""
    path = copied.output(stage) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    rehash(copied, stage)


def rehash(copied: "Trained", stage: str) -> None:
    file = copied.record(stage)
    facts = file.facts()
    assert facts is not None
    facts.artifacts = artifacts(copied.workspace, copied.output(stage))
    file.write(facts)


def test_an_adapter_of_the_same_base_is_served_beside_under_its_id(trained: "Trained", base: Base) -> None:
    job = trained.job(f"serve_config.adapters=[{trained.sft}]", source=trained.dpo)
    _, base, chat = servable(job)
    loras, inputs = beside(job, base.folder, base, chat)
    assert loras == [Lora(trained.sft, trained.output("sft"), 16)]
    assert [(taken.id, taken.stage) for taken in inputs] == [(trained.sft, "sft")]


def test_over_a_merged_model_an_adapter_of_its_base_would_be_applied_twice_and_is_refused(trained: "Trained") -> None:
    job = trained.job(f"serve_config.adapters=[{trained.sft}]")
    source, base, chat = servable(job)
    with pytest.raises(UserError, match=r"was trained on other weights than those served; try --from an adapter's"):
        beside(job, source.output, base, chat)


def test_one_that_was_trained_with_another_template_is_refused(copied: "Trained") -> None:
    path = copied.output("sft") / "chat_contract.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "0" * 64}))
    rehash(copied, "sft")
    job = copied.job(f"serve_config.adapters=[{copied.sft}]", source=copied.dpo)
    _, base, chat = servable(job)
    with pytest.raises(UserError, match=f"serve_config.adapters: {copied.sft} was trained with another chat template"):
        beside(job, base.folder, base, chat)


def test_a_record_that_is_no_adapter_or_was_changed_is_refused(copied: "Trained") -> None:
    job = copied.job(f"serve_config.adapters=[{copied.merge}]", source=copied.dpo)
    _, base, chat = servable(job)
    with pytest.raises(UserError, match="is no sft or dpo record"):
        beside(job, base.folder, base, chat)
    (copied.output("sft") / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="was changed since"):
        beside(copied.job(f"serve_config.adapters=[{copied.sft}]"), base.folder, base, chat)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
    ],
)
def test_what_vllm_would_refuse_or_compute_otherwise_is_refused(copied: "Trained", option: str, value: Any) -> None:
    rewrite(copied, "sft", **{option: value})
    with pytest.raises(
        UserError, match=f"adapter_config.json: vLLM cannot serve an adapter with {option}; try make merge"
    ):
        lora(copied.job(), "x", copied.output("sft"))


def test_room_is_made_for_the_largest_rank(copied: "Trained") -> None:
    def of(*ranks: int) -> int:
        return room([Lora(str(rank), copied.output("sft"), rank) for rank in ranks])

    assert [of(1), of(4, 2), of(8), of(9, 16), of(17), of(512, 1)] == [1, 8, 8, 16, 32, 512]
    rewrite(copied, "sft", r=513)
    with pytest.raises(UserError, match="rank 512 at most, not 513"):
        lora(copied.job(), "x", copied.output("sft"))
