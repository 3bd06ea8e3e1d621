"""Attention per document, for packed passes: registered with transformers' attention interface as `documents`.

Each document of `documents` (see `pipeline.train.passes`) attends to itself alone, by causal `scaled_dot_product_attention`
without a mask, so that packing costs no padding, no dense mask and no leak between rows. The rejected answer of a
preference pair attends to the pair's prompt and to itself. Without `documents` it is transformers' own `sdpa`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.train.passes import Document

NAME = "documents"


def install(model: Any) -> None:
    """Makes a transformers model attend per document where a pass says so."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def no_mask(device: torch.device) -> torch.Tensor:
    """For `attention_mask`: of four dimensions, it is passed on as it is, and no mask is built. `_attend` ignores it."""
    return torch.empty((1, 1, 0, 0), device=device)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: Sequence[Document] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: (1, heads, tokens, head size). Returns (1, tokens, heads, head size)."""
    if documents is None:
        stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return stock
    grouped = query.shape[1] != key.shape[1]
    found: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        square, length = q.shape[2] == k.shape[2], k.shape[2]
        mask: Any = None if square else causal_lower_right(q.shape[2], length)
        if sliding_window is not None and length > sliding_window:
            mask, square = _window(q.shape[2], length, sliding_window, q.device), False
        found.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=square, dropout_p=dropout, scale=scaling, enable_gqa=grouped
            )
        )

    start = 0
    for prompt, chosen, rejected in documents:
        fork = start + prompt + chosen
        attend(*(t[:, :, start:fork] for t in (query, key, value)))
        end = fork + rejected
        if rejected:
            k, v = (torch.cat((t[:, :, start : start + prompt], t[:, :, fork:end]), dim=2) for t in (key, value))
            attend(query[:, :, fork:end], k, v)
        start = end
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _window(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """(queries, keys), true where seen: the last `queries` positions look back over `window` positions, themselves included."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)
