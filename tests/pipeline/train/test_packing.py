"""A model is packed only where its rows come out as the model alone gives them; and else it is left as it was.

Random models of kinds that go wrong in different ways. What their rows must be is transformers' own, a row at a time.
"""

import random
from typing import Any

import pytest
import torch

from pipeline.encoded import Encoded
from pipeline.train import packing
from pipeline.train.head import sequence_sums, token_log_probs
from pipeline.train.passes import lay
from pipeline.train.trainer import Execution
from tests.pipeline.little import VOCABULARY, sequence

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str, dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SHAPE | shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.to(dtype)


def rows_of(*lengths: int) -> list[Encoded]:
    source = random.Random(0)
    return [sequence(source, (length // 3, length - length // 3)) for length in lengths]


def how_for(model: Any) -> Execution:
    return Execution(10**6, packed=True, compute=None if model.dtype == torch.float32 else model.dtype)


def alone(model: Any, row: Encoded) -> float:
    """log p of the trained tokens, by the model's own forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].float()
    scores = torch.log_softmax(logits, -1)
    return sum(scores[i - 1, row.ids[i]].item() for i, trained in enumerate(row.mask) if trained)


def furthest(model: Any, rows: list[Encoded], how: Execution) -> float:
    """Nats a token that a row is off, laid as training lays it."""
    worst = 0.0
    for batch in lay(rows, how.pass_tokens, how.packed, how.pad_id):
        with torch.no_grad():
            sums = sequence_sums(token_log_probs(model, batch), batch).tolist()
        worst = max(
            worst, *(abs(s - alone(model, rows[i])) / sum(rows[i].mask) for s, i in zip(sums, batch.rows, strict=True))
        )
    return worst


ROWS = rows_of(80, 12, 100, 9, 10, 31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [{}, {"kind": "mistral", "sliding_window": 32}, {"kind": "qwen2_moe", "num_experts": 4}]
)
def test_a_model_that_packs_rightly_is_packed(shape: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(**{"kind": "llama", **shape}, dtype=dtype)
    assert packing.problem(model, ROWS, how_for(model)) is None
    assert model.config._attn_implementation == "documents"
    if dtype == torch.float32:
        assert furthest(model, ROWS, how_for(model)) < 1e-4


WRONG: dict[str, dict[str, Any]] = {
    "sinks that only its own attention knows": {"kind": "gpt_oss", "num_local_experts": 4, "head_dim": 8},
    "a soft cap that sdpa refuses": {"kind": "gemma2", "head_dim": 8},
    "a window that stands in its mask alone": {"kind": "phimoe", "sliding_window": 32, "num_local_experts": 4},
    "convolutions over its neighbours": {"kind": "lfm2", "layer_types": ["conv", "full_attention"]},
    "convolutions, in bf16": {"kind": "lfm2", "layer_types": ["conv", "full_attention"], "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("why", WRONG)
def test_a_model_that_does_not_is_said_and_left_with_its_own_attention(why: str) -> None:
    model = model_of(**WRONG[why])
    own = model.config._attn_implementation
    assert packing.problem(model, ROWS, how_for(model))
    assert model.config._attn_implementation == own != "documents"
    padded = Execution(10**6, packed=False)
    if model.dtype == torch.float32:
        assert furthest(model, ROWS, padded) < 1e-3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0,
         "original_max_position_embeddings": 32},
    ],
)  # fmt: skip
def test_rows_whose_positions_hang_on_the_longest_beside_them_get_a_pass_each(rope: dict[str, Any]) -> None:
    kind = "phi3" if rope["rope_type"] == "longrope" else "llama"
    shape = (
        {"max_position_embeddings": 32, "original_max_position_embeddings": 32}
        if kind == "phi3"
        else {"max_position_embeddings": 32}
    )
    model = model_of(kind, rope_parameters=rope, **shape)
    assert packing.one_row_a_pass(model, ROWS) and not packing.one_row_a_pass(model, rows_of(9, 30))
    together, apart = Execution(10**6, packed=False), Execution(1, packed=False)
    assert furthest(model, ROWS, together) > 0.01  # else nothing is shown
    assert furthest(model, ROWS, apart) < 1e-4


def test_one_row_is_enough_to_see() -> None:
    model = model_of("llama")
    assert packing.problem(model, ROWS[:1], how_for(model)) is None
