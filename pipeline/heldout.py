"""What a model makes of rows it was not trained on: one figure a row, so that differences can be paired."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Encoded
from pipeline.progress import track
from pipeline.statistics import Figure

Pause = Callable[[], None]  # called before each batch; what it raises ends the measurement


@dataclass(frozen=True)
class Measure:
    """How a training measures its held-out rows: one value a row, and the figures that they come to."""

    values: Callable[..., list[Any]]  # (model, what is shown, pause); one a row
    figures: Callable[[list[Any]], dict[str, Figure]]


def no_pause() -> None:
    """Measures to the end."""


def losses(
    model: Any, encoded: Sequence[Encoded], pad_id: int | None, batch_size: int, what: str, pause: Pause = no_pause
) -> list[float]:
    """Mean negative log-likelihood of each row's trained tokens, nats a token."""
    sums = log_probs(model, encoded, pad_id, batch_size, what, pause)
    return [-total / sum(e.mask[1:]) for total, e in zip(sums, encoded, strict=True)]


def margins(
    model: Any, pairs: Sequence[tuple[Encoded, Encoded]], pad_id: int | None, batch_size: int, what: str
) -> list[float]:
    """log p(chosen) − log p(rejected) of each pair, nats. A positive change under training is a right preference."""
    return [chosen - rejected for chosen, rejected in pair_log_probs(model, pairs, pad_id, batch_size, what)]


def pair_log_probs(
    model: Any,
    pairs: Sequence[tuple[Encoded, Encoded]],
    pad_id: int | None,
    batch_size: int,
    what: str,
    pause: Pause = no_pause,
) -> list[tuple[float, float]]:
    """log p of each pair's chosen and rejected answer, nats."""
    flat = [side for pair in pairs for side in pair]
    scores = log_probs(model, flat, pad_id, batch_size, what, pause)
    return list(zip(scores[::2], scores[1::2], strict=True))


def log_probs(
    model: Any, encoded: Sequence[Encoded], pad_id: int | None, batch_size: int, what: str, pause: Pause = no_pause
) -> list[float]:
    """Sum of the log-probabilities of each sequence's trained tokens, nats; float32 whatever the model computes in."""
    import torch

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))  # alike lengths together: less padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    totals = [0.0] * len(encoded)
    with _eval_mode(model), torch.inference_mode():
        for batch in track(batches, what, unit="batch"):
            pause()
            longest = max(len(encoded[i].ids) for i in batch)
            ids = torch.full((len(batch), longest), pad_id or 0)  # masked, so any id does; some tokenizers have none
            trained = torch.zeros((len(batch), longest), dtype=torch.bool)
            attention = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, i in enumerate(batch):
                length = len(encoded[i].ids)
                ids[row, :length] = torch.tensor(encoded[i].ids)
                trained[row, :length] = torch.tensor(encoded[i].mask)
                attention[row, :length] = 1
            ids, trained, attention = (t.to(model.device) for t in (ids, trained, attention))
            logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
            for row, i in enumerate(batch):
                wanted = trained[row, 1:]
                targets = ids[row, 1:][wanted]
                chosen = torch.log_softmax(logits[row][wanted].float(), -1).gather(-1, targets[:, None])
                totals[i] = chosen.sum().item()
    return totals


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
