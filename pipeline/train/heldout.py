"""What a model makes of rows as it is: their log-probabilities, in the same passes as training.

Of held-out rows that is one figure a row, so that differences can be paired; of DPO's training pairs, before the first
step, it is the reference (`pipeline.train.reference`). The same rows, weights and pass size give the same figures bit by bit.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoded import Encoded
from pipeline.errors import StageFailed
from pipeline.progress import Progress, say
from pipeline.statistics import Figure

if TYPE_CHECKING:
    from pipeline.train.passes import Pass, Row
    from pipeline.train.trainer import Execution

Pause = Callable[[], None]  # called before each pass; what it raises ends the measurement
TOGETHER = 1024  # rows laid at once: enough to fill passes well, few enough to hold


@dataclass(frozen=True)
class Measure:
    """How a training measures its held-out rows: one value a row, and the figures that they come to."""

    values: Callable[..., list[Any]]  # (model, what is shown, pause); one a row
    figures: Callable[[list[Any]], dict[str, Figure]]


def no_pause() -> None:
    """Measures to the end."""


def losses(
    model: Any, sequences: Sequence[Encoded], how: "Execution", what: str, pause: Pause = no_pause
) -> list[float]:
    """Mean negative log-likelihood of each sequence's trained tokens, nats a token."""
    sums = log_probs(model, sequences, how, what, pause)
    return [-total / sum(sequence.mask) for (total,), sequence in zip(sums, sequences, strict=True)]


def pair_log_probs(
    model: Any, pairs: Sequence[tuple[Encoded, Encoded]], how: "Execution", what: str, pause: Pause = no_pause
) -> list[tuple[float, float]]:
    """log p of each pair's chosen and rejected answer, nats."""
    return [(chosen, rejected) for chosen, rejected in log_probs(model, pairs, how, what, pause)]


def log_probs(
    model: Any, rows: "Sequence[Row]", how: "Execution", what: str, pause: Pause = no_pause, quiet: bool = False
) -> list[tuple[float, ...]]:
    """Of each row the log-probabilities of its trained tokens, summed, nats: of a pair those of chosen and rejected.

    In eval mode; each is float32 whatever the model computes in. When memory runs out, `how.pass_tokens` is halved and
    what is left is measured so. `quiet`: no progress is shown. Raises `StageFailed` when a row alone does not fit.
    """
    import torch

    from pipeline.train.passes import lay, size

    found: dict[int, tuple[float, ...]] = {}
    longest_first = sorted(range(len(rows)), key=lambda i: -size(rows[i]))  # alike lengths together: less padding
    unit = "pair" if rows and isinstance(rows[0], tuple) else "row"
    shown = nullcontext() if quiet else Progress(what, len(rows), unit)
    with _eval_mode(model), torch.inference_mode(), shown as progress:
        for start in range(0, len(rows), TOGETHER):
            while left := [i for i in longest_first[start : start + TOGETHER] if i not in found]:
                for batch in lay([rows[i] for i in left], how.pass_tokens, how.packed, how.pad_id):
                    pause()
                    sums = _sums(model, batch, how)
                    if sums is None:
                        _halve(how, batch, what)
                        break
                    found |= {left[row]: of_row for row, of_row in zip(batch.rows, sums, strict=True)}
                    if progress:
                        progress.advance(len(found))
    return [found[i] for i in range(len(rows))]


def _sums(model: Any, batch: "Pass", how: "Execution") -> list[tuple[float, ...]] | None:
    """Of each row of a pass, its sequences' sums; None when memory ran out."""
    from pipeline.train.head import sequence_sums, token_log_probs
    from pipeline.train.passes import out_of_memory

    try:
        with how.autocast(model.device):
            found = token_log_probs(model, batch.to(model.device))
        sums = sequence_sums(found.cpu().double(), batch).tolist()  # a GPU adds up in no fixed order
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    sides = batch.sequences // len(batch.rows)
    return [tuple(sums[start : start + sides]) for start in range(0, len(sums), sides)]


def _halve(how: "Execution", batch: "Pass", what: str) -> None:
    """Raises `StageFailed` when the pass that did not fit has one row."""
    import torch

    if len(batch.rows) == 1:
        raise StageFailed(
            f"out of memory in {what}, with one row of {batch.tokens:,} tokens in a pass",
            remedy="quantization: nf4, or a smaller max_length",
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    before = how.pass_tokens
    how.pass_tokens = min(before, batch.input_ids.numel()) // 2
    how.out_of_memory.append({"measuring": what, "pass_tokens": how.pass_tokens})
    say(f"\nout of memory in {what}: goes on with {how.pass_tokens:,} tokens a pass in place of {before:,}")


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """However the measurement ends, the model is left as it was found."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def write(folder: Path, ids: Sequence[str], before: Sequence[float], after: Sequence[float]) -> None:
    """`heldout.jsonl`, a line a row."""
    rows = [{"id": i, "before": b, "after": a} for i, b, a in zip(ids, before, after, strict=True)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
