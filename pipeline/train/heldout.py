"""What a model makes of rows as it is: their log-probabilities, in the same passes as training.

Of held-out rows that is one figure a row, so that differences can be paired; of DPO's training pairs, before the first
step, it is the reference (`pipeline.train.reference`). The same rows, weights and pass size give the same figures bit by bit.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.encoded import Encoded
from pipeline.errors import StageFailed
from pipeline.progress import Progress, say
from pipeline.statistics import Figure

if TYPE_CHECKING:
    from pipeline.train.passes import Pass, Row
    from pipeline.train.trainer import Execution

T = TypeVar("T")
Pause = Callable[[], None]  # called before each pass; what it raises ends the measurement
_NEVER = 1e-7  # a float32 log-probability tells no smaller chance of going on from none
TOGETHER = 1024  # rows laid at once: enough to fill passes well, few enough to hold


@dataclass(frozen=True)
class Measure:
    """How a training measures its held-out rows: one value a row, and the figures that they come to."""

    values: Callable[..., list[Any]]  # (model, what is shown, pause); one a row
    figures: Callable[[list[Any]], dict[str, Figure]]


@dataclass(frozen=True)
class Ends:
    """What a model makes of one conversation, and where it would end its answers."""

    loss: float  # nats a token
    at_ends: list[float]  # p(end-of-turn) where each answer ends
    inside: float  # p(end-of-turn) summed over the other trained places: so many false ends are expected
    surprise: float  # −log p of ending at each end, and of going on at each other place, summed, nats


def no_pause() -> None:
    """Measures to the end."""


def losses(
    model: Any, sequences: Sequence[Encoded], how: "Execution", what: str, pause: Pause = no_pause
) -> list[float]:
    """Mean negative log-likelihood of each sequence's trained tokens, nats a token."""
    sums = log_probs(model, sequences, how, what, pause)
    return [-total / sum(sequence.mask) for (total,), sequence in zip(sums, sequences, strict=True)]


def ends(model: Any, sequences: Sequence[Encoded], how: "Execution", what: str, end_of_turn: int) -> list[Ends]:
    """Of each sequence `losses`, and from the same passes the probability of ending at each trained place."""

    def of_pass(batch: "Pass") -> list[Ends]:
        from pipeline.train.head import token_log_probs

        with how.autocast(model.device):
            found = token_log_probs(model, batch.to(model.device), beside=end_of_turn).cpu().double()
        true_end, rows = batch.targets == end_of_turn, []
        for sequence in range(batch.sequences):
            mine = batch.sequence == sequence
            stops, at_end = found[mine, 1].exp(), true_end[mine]
            right = stops.where(at_end, 1 - stops).clamp_min(_NEVER)
            loss, surprise = -found[mine, 0].mean().item(), -right.log().sum().item()
            rows.append(Ends(loss, stops[at_end].tolist(), stops[~at_end].sum().item(), surprise))
        return rows

    return _each_row(model, sequences, how, what, of_pass)


def pair_log_probs(
    model: Any, pairs: Sequence[tuple[Encoded, Encoded]], how: "Execution", what: str, pause: Pause = no_pause
) -> list[tuple[float, float]]:
    """log p of each pair's chosen and rejected answer, nats."""
    return [(chosen, rejected) for chosen, rejected in log_probs(model, pairs, how, what, pause)]


def log_probs(
    model: Any, rows: "Sequence[Row]", how: "Execution", what: str, pause: Pause = no_pause, quiet: bool = False
) -> list[tuple[float, ...]]:
    """Of each row the log-probabilities of its trained tokens, summed, nats: of a pair those of chosen and rejected.

    Each is float32 whatever the model computes in.
    """
    return _each_row(model, rows, how, what, lambda batch: _sums(model, batch, how), pause, quiet)


def _each_row(
    model: Any,
    rows: "Sequence[Row]",
    how: "Execution",
    what: str,
    of_pass: "Callable[[Pass], list[T]]",
    pause: Pause = no_pause,
    quiet: bool = False,
) -> list[T]:
    """Of each row what `of_pass` makes of it, in eval mode. When memory runs out, `how.pass_tokens` is halved and what is
    left is measured so. `quiet`: no progress is shown. Raises `StageFailed` when a row alone does not fit.
    """
    import torch

    from pipeline.train.passes import lay, size

    found: dict[int, T] = {}
    longest_first = sorted(range(len(rows)), key=lambda i: -size(rows[i]))  # alike lengths together: less padding
    unit = "pair" if rows and isinstance(rows[0], tuple) else "row"
    shown = nullcontext() if quiet else Progress(what, len(rows), unit)
    with _eval_mode(model), torch.inference_mode(), shown as progress:
        for start in range(0, len(rows), TOGETHER):
            while left := [i for i in longest_first[start : start + TOGETHER] if i not in found]:
                for batch in lay([rows[i] for i in left], how.pass_tokens, how.packed, how.pad_id):
                    pause()
                    measured = _unless_full(of_pass, batch)
                    if measured is None:
                        _halve(how, batch, what)
                        break
                    found |= {left[row]: of_row for row, of_row in zip(batch.rows, measured, strict=True)}
                    if progress:
                        progress.advance(len(found))
    return [found[i] for i in range(len(rows))]


def _unless_full(of_pass: "Callable[[Pass], list[T]]", batch: "Pass") -> list[T] | None:
    """None when memory ran out."""
    from pipeline.train.passes import out_of_memory

    try:
        return of_pass(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def _sums(model: Any, batch: "Pass", how: "Execution") -> list[tuple[float, ...]]:
    """Of each row of a pass, its sequences' sums."""
    from pipeline.train.head import sequence_sums, token_log_probs

    with how.autocast(model.device):
        found = token_log_probs(model, batch.to(model.device))
    sums = sequence_sums(found.cpu().double(), batch).tolist()  # a GPU adds up in no fixed order
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
