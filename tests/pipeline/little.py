"""What the tests of training share: random models small enough for float64, rows of random tokens, and plain answers.

The plain answers are transformers' own: a padded batch, its `sdpa` attention, full logits. No code of the pipeline's.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.encoded import Encoded

VOCABULARY = 61
Pair = tuple[Encoded, Encoded]


def little_model(
    kind: str = "Llama",
    *,
    heads: int = 2,
    adapter: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **shape: Any,
) -> Any:
    """With a LoRA adapter of nothing but random values on each linear layer; `adapter={}`: without one.

    Its norms are torch's own: transformers' compute in float32 whatever they are given. `heads`: of keys and values.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": heads, "max_position_embeddings": 256}
    config = getattr(transformers, f"{kind}Config")(**small, initializer_range=0.3, pad_token_id=0, **shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == f"{kind}RMSNorm":
            model.set_submodule(name, torch.nn.RMSNorm(config.hidden_size, module.variance_epsilon, dtype=dtype))
    if adapter == {}:
        return model.eval()
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **{"target_modules": "all-linear"} | (adapter or {}))
    return get_peft_model(model, lora, autocast_adapter_dtype=False).eval()


def trainable(model: Any) -> list[Tensor]:
    found = [p for p in model.parameters() if p.requires_grad]
    assert found
    return found


def sequence(source: random.Random, *turns: tuple[int, int]) -> Encoded:
    """Random tokens; a turn is so many that are given, then so many that are trained."""
    mask = [trained for given, answered in turns for trained in [False] * given + [True] * answered]
    return Encoded([source.randrange(1, VOCABULARY) for _ in mask], mask)


def pair(source: random.Random, prompt: int, chosen: int, rejected: int) -> Pair:
    """Random tokens; the same prompt on both sides."""
    one, other = sequence(source, (prompt, chosen)), sequence(source, (prompt, rejected))
    return one, Encoded(one.ids[:prompt] + other.ids[prompt:], other.mask)


def plain_log_probs(model: Any, sequences: Sequence[Encoded]) -> list[Tensor]:
    """log p of each sequence's trained tokens, nats, all in one padded batch."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("sdpa")
    longest = max(len(row.ids) for row in sequences)
    padding = [longest - len(row.ids) for row in sequences]
    ids = torch.tensor([row.ids + [0] * more for row, more in zip(sequences, padding, strict=True)])
    real = torch.tensor([[1] * len(row.ids) + [0] * more for row, more in zip(sequences, padding, strict=True)])
    scores = torch.log_softmax(base(input_ids=ids, attention_mask=real, use_cache=False).logits, -1)
    found = []
    for n, row in enumerate(sequences):
        places = [place for place, trained in enumerate(row.mask) if trained]
        found.append(scores[n, [place - 1 for place in places], [row.ids[place] for place in places]])
    return found


def gradients(values: Sequence[Tensor], model: Any) -> list[Tensor]:
    """Of each value, by all that the model trains, as one vector."""
    by = trainable(model)
    found = [torch.autograd.grad(value, by, retain_graph=True, allow_unused=True) for value in values]
    return [
        torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(gs, by, strict=True)])
        for gs in found
    ]
