"""Log-probabilities of a pass's trained tokens: the LM head only where there is loss, a chunk of positions at a time.

Full logits of 4,096 tokens over 102,400 words take 1.6 GB in float32; here a chunk's are turned at once into the
log-probability of its targets and the direction in which that moves the hidden state, and are dropped.
(The idea is that of Liger's fused linear cross-entropy, arXiv 2410.10989, which needs a GPU.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.train.attention import no_mask
from pipeline.train.passes import Pass

CHUNK = 1024  # positions


def token_log_probs(model: Any, batch: Pass, beside: int | None = None) -> torch.Tensor:
    """(trained,) float32, nats. `model`: a causal language model, with or without an adapter; on the pass's device.

    `beside`: (trained, 2), the second of this token at the same places.
    """
    base, targets = bare(model), batch.targets[:, None]
    if beside is not None:
        targets = torch.cat([targets, torch.full_like(targets, beside)], 1)
    if batch.documents is None:
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        with _head_at(base, batch.predicted_at):
            logits = base(input_ids=batch.input_ids, use_cache=False, **inputs).logits.flatten(0, -2)
        if len(logits) != len(batch.targets):  # its head could not be told where to look
            logits = logits[batch.predicted_at]
        parts = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.cat([_of_targets(*part) for part in parts]).squeeze(1)
    hidden = base.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=no_mask(batch.input_ids.device),
        documents=batch.documents,
        use_cache=False,
    ).last_hidden_state
    wanted, head = hidden[0, batch.predicted_at], base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:  # it has an adapter, or is trained
        return _of_targets(head(wanted), targets).squeeze(1)
    if beside is not None:
        parts = zip(wanted.to(head.weight.dtype).split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.cat([_of_targets(head(hidden), of) for hidden, of in parts])
    found: torch.Tensor = _FrozenHead.apply(wanted.to(head.weight.dtype), head.weight, head.bias, batch.targets)
    return found


def sequence_sums(values: torch.Tensor, batch: Pass) -> torch.Tensor:
    """(sequences,): values of trained tokens summed over each sequence."""
    return values.new_zeros(batch.sequences).index_add(0, batch.sequence, values)


def bare(model: Any) -> Any:
    """The transformers model inside wrappers for several processes and for adapters."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _head_at(base: Any, places: torch.Tensor) -> Iterator[None]:
    """In the model's own forward pass the LM head is given these places of the flattened pass alone.

    What the model does to its logits (scale, soft cap) is still done: other ways are checked against this one.
    """
    head = base.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, -2)[places][None], *given[1:]))
    try:
        yield
    finally:
        handle.remove()


def _of_targets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary), (n, k) → (n, k) log-probabilities."""
    return torch.log_softmax(_wide(logits), -1).gather(-1, targets)


class _FrozenHead(torch.autograd.Function):
    """(n, hidden), (vocabulary, hidden), bias or None, (n,) → (n,) float32, or float64 as given."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        found = torch.empty(len(hidden), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        direction = torch.empty_like(hidden) if wanted else None
        slope: torch.Tensor | None = None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _wide(F.linear(hidden[part], weight, bias))
            target = targets[part, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            found[part] = (logits.gather(-1, target) - normaliser)[:, 0]
            if direction is not None:  # d log p(y) / d hidden = W[y] − Σ p(w) W[w]
                slope = logits.sub_(normaliser).exp_().neg_()
                slope.scatter_add_(-1, target, torch.ones_like(target, dtype=slope.dtype))
                direction[part] = slope.to(weight.dtype) @ weight
            del logits
            slope = None  # before the next chunk's stand beside it
        if direction is not None:
            ctx.save_for_backward(direction)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return (gradients[0][:, None] * _wide(direction)).to(direction.dtype), None, None, None


def _wide(values: torch.Tensor) -> torch.Tensor:
    """float32 whatever the model computes in; float64 stays, for the check of gradients."""
    return values if values.dtype == torch.float64 else values.float()
