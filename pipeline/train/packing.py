"""Whether a model can be packed, measured in every training: its rows must come out as the model alone gives them.

    if problem := packing.problem(model, rows, how):    # and the model attends as before

Three rows, the longest first so that a window or another scale of positions shows, are measured one by one with the model's
own attention, then packed. And the last one is measured again among other neighbours of the same lengths: the kernels
are the same then, so that even a small leak stands out from rounding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.errors import StageFailed
from pipeline.train import attention
from pipeline.train.head import bare, sequence_sums, token_log_probs
from pipeline.train.passes import Pass, Row, lay, out_of_memory, size, supervised
from pipeline.train.trainer import Execution

SHORT_ROWS = 2  # beside the longest
OFF, LEAK = 1e-3, 1e-4  # nats a token that rounding may make: in other kernels; in the same, with other neighbours
ROUGHLY_OFF, ROUGH_LEAK = 0.05, 0.005  # in 16 bits, and over a quantised base: int8 rounds by the largest of a pass
POSITIONS_BY_THE_LONGEST = ("dynamic", "longrope")  # kinds of rope whose scale a pass's longest row decides


def problem(model: Any, rows: Sequence[Row], how: Execution) -> str | None:
    """None when the rows come out alike: the model then attends per document. In eval mode, without gradients."""
    by_size = sorted(rows, key=size)
    few = [by_size[-1], *by_size[: min(SHORT_ROWS, len(rows) - 1)]]
    own, was_training = bare(model).config._attn_implementation, model.training
    found: str | None = None
    model.eval()
    try:
        alone = [_sums(model, lay([row], size(row), False, how.pad_id)[0], how) for row in few]
        attention.install(bare(model))
        (batch,) = lay(few, sum(map(size, few)), True, how.pad_id)
        packed = list(_sums(model, batch, how).split([len(sums) for sums in alone]))
        apart = max(_off(*both) for both in zip(alone, packed, few, strict=True))
        again = _sums(model, _among_others(batch, size(few[-1])), how)[-len(alone[-1]) :]
        leak = _off(packed[-1], again, few[-1])
        rough = how.compute or getattr(bare(model).config, "quantization_config", None)
        if not apart <= (ROUGHLY_OFF if rough else OFF):
            found = f"a row changes by {apart:.2g} nats a token when packed"
        elif not leak <= (ROUGH_LEAK if rough else LEAK):
            found = f"a row changes by {leak:.2g} nats a token with its neighbours"
    except (TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:  # it takes no attention of ours
        if out_of_memory(error):  # which is no word on packing
            remedy = "quantization: nf4, or a smaller max_length"
            raise StageFailed(
                f"out of memory with a row of {size(few[0]):,} tokens in a pass", remedy=remedy
            ) from error
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(was_training)
    if found:
        bare(model).set_attn_implementation(own)
    return found


def one_row_a_pass(model: Any, rows: Sequence[Row]) -> bool:
    """Whether a row's positions depend on the longest row beside it, packed or padded, so that each needs a pass of its own."""
    config, longest = bare(model).config.get_text_config(), max(map(size, rows), default=0)
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # one, or one for each kind of layer
        if isinstance(kind, dict) and kind.get("rope_type") in POSITIONS_BY_THE_LONGEST:
            return bool(longest > kind.get("original_max_position_embeddings", config.max_position_embeddings))
    return False


def _sums(model: Any, batch: Pass, how: Execution) -> torch.Tensor:
    """(sequences,) log-probabilities, nats."""
    batch = batch.to(bare(model).device)
    with torch.no_grad(), how.autocast(batch.input_ids.device):
        return sequence_sums(token_log_probs(model, batch), batch).cpu()


def _off(one: torch.Tensor, other: torch.Tensor, row: Row) -> float:
    """Nats a token; a NaN stays."""
    return ((one - other).abs().sum() / max(supervised(row), 1)).item()


def _among_others(batch: Pass, last: int) -> Pass:
    """The pass with other tokens before its `last` ones, which stay."""
    ids = batch.input_ids.flip(1)
    ids[:, -last:] = batch.input_ids[:, -last:]
    return replace(batch, input_ids=ids)
