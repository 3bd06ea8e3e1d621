"""How a token is drawn: each request adds noise of its own to its logits, and the largest is the draw.

Gumbel noise added to log-probs makes their argmax an exact draw from them (Gumbel 1954; Maddison, Tarlow and Minka 2014,
"A* Sampling"). The noise is a counter-based generator's (Philox; Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3"), so it depends on the request's seed and the token's position alone: not on what else is in the batch, nor on
what was drawn before. A change of the logits by rounding seldom changes the draw, which is what the noise is better at
than one uniform number looked up in the cumulated probabilities (Daliri, Musco and Suresh 2025, "Coupling without
Communication and Drafter-Invariant Speculative Decoding").

Imported where an engine is made, since it imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from serving.engine import TokenScore


@dataclass(frozen=True)
class Draw:
    """What one request's tokens are drawn with; `seed` is settled, also where the request named none."""

    temperature: float
    top_p: float
    seed: int


class Drawer(ContinuousBatchingLogitsProcessor):
    """The one logits processor of an engine: it changes a row so that its argmax is the token, and tells its log-probs.

    Works row by row from the requests that `prepare_tensor_args` was shown, so batches must not be prepared ahead
    (`use_async_batching`) nor replayed (`use_cuda_graph`).
    """

    supported_kwargs = {"draw": Draw}  # noqa: RUF012 - the class attribute that the base class declares
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, Draw]] = []
        self._told: dict[str, tuple[int, list[TokenScore]]] = {}

    def tell(self, request: str, top: int) -> list[TokenScore]:
        """A list that grows by one score a token of this request, until `forget`."""
        scores: list[TokenScore] = []
        self._told[request] = top, scores
        return scores

    def forget(self, request: str) -> None:
        self._told.pop(request, None)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        states = [request.state for request in requests_with_new_token]
        # the position counts prompt and answer: a request that is evicted and computed again goes on with its noise
        self._rows = [(s.request_id, s.position_offset, s.logit_processor_kwargs["draw"]) for s in states]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores: (rows, vocabulary), float32, the model's own logits; rows beyond the requests' are padding."""
        for row, (request, position, draw) in zip(scores, self._rows, strict=False):
            told = self._told.get(request)
            plain = row.log_softmax(-1) if told else row
            if draw.temperature:
                row.copy_(noisy(row, draw, position))
            if told:
                top, found = told
                found.append(token_scores(plain[None], [int(row.argmax())], top)[0])
        return scores


def noisy(logits: Tensor, draw: Draw, position: int) -> Tensor:
    """(vocabulary,) → (vocabulary,), float64: its argmax is a draw from softmax(logits / temperature), cut to `top_p`."""
    tempered = (logits.double() - logits.max()) / draw.temperature  # at most 0: no temperature is too low
    if draw.top_p < 1:
        tempered = _nucleus(tempered, draw.top_p)
    return tempered + torch.from_numpy(gumbel(draw.seed, position, len(logits))).to(logits.device)


def gumbel(seed: int, position: int, size: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Standard Gumbel noise, (size,): always the same for this seed and position.

    In float64: a float32 has so few values near 0 that every tenth of a million unlikely tokens would be drawn.
    """
    philox = np.random.Philox(key=seed % 2**128, counter=position << 128)  # the lower half counts within the token
    return -np.log(np.random.Generator(philox).standard_exponential(size))


def _nucleus(tempered: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities reach `top_p`; the rest is −inf (Holtzman et al. 2020)."""
    ordered, order = tempered.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return tempered.index_fill(0, order[before >= top_p], -torch.inf)


def token_scores(log_probs: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """log_probs: (positions, vocabulary), in nats. Each position's token and the `top` likeliest ones."""
    chosen = log_probs[range(len(tokens)), list(tokens)].tolist()
    likeliest = log_probs.topk(min(top, log_probs.shape[-1]), -1)
    return [
        TokenScore(logprob, dict(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
