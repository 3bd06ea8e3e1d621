"""What GGUF files lose against the model they were made from: the same rows through both, teacher-forced.

Of each row's trained tokens: the mean of −log p, the KL divergence from the model's distribution and how often both put
the same token first. Intervals are over rows. The model computes where and as it is loaded; llama.cpp on the CPU.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import statistics
from pipeline.encoded import Encoded
from pipeline.errors import StageFailed
from pipeline.model import Base
from pipeline.progress import Progress
from pipeline.to_gguf.llamacpp import BLOCK, LlamaCpp, Reader, compute_threads

FEWEST = 5  # rows: t's 97.5 % point is 2.8 here, 12.7 of two: that spans whole orders of magnitude of perplexity
ROUNDED = 0.05  # KL in nats a token that 16-bit floats stay far below: a model converted wrongly is whole nats away


@dataclass
class Loss:
    """Of one file, or of the model itself: a value a row."""

    nats: list[float] = field(default_factory=list)  # a trained token: mean of −log p
    kl: list[float] = field(default_factory=list)  # a trained token, from the model
    same_top: list[float] = field(default_factory=list)  # share of the trained tokens

    def figures(self, model: "Loss") -> dict[str, Any]:
        """As they stand in the record; the model's own have its perplexity alone."""
        nats = _mean(self.nats).model_dump(exclude_none=True)
        perplexity = {key: value if key == "n" else round(math.exp(value), 4) for key, value in nats.items()}
        if self is model:
            return {"perplexity": perplexity}
        return {"perplexity": perplexity} | statistics.as_record(
            {
                "eval_loss": self._change(model),
                "kl": _mean(self.kl, low=0),
                "same_top_token": _mean(self.same_top, low=0, high=1),
            }
        )

    def _change(self, model: "Loss") -> statistics.Change:
        deltas = [mine - its for mine, its in zip(self.nats, model.nats, strict=True)]
        return statistics.Change(before=_mean(model.nats), after=_mean(self.nats), delta=_mean(deltas))


def measure(model: Any, rows: Sequence[Encoded], llama: LlamaCpp, files: dict[str, Path]) -> dict[str, Loss]:
    """Each file by its name, and `model`: row by row, so that no more than one row's logits are held."""
    losses = {name: Loss() for name in ("model", *files)}
    context = max(len(row.ids) for row in rows)
    with ExitStack() as stack, Progress("measuring", len(rows)) as progress:
        readers = {
            name: stack.enter_context(Reader(llama, file, context, compute_threads())) for name, file in files.items()
        }
        for row in rows:
            places = [place for place, trained in enumerate(row.mask) if trained]
            before, targets = [place - 1 for place in places], [row.ids[place] for place in places]
            logits = _logits(model, row.ids, before)
            losses["model"].nats.append(_mean_nats(logits, targets))
            for name, reader in readers.items():
                _compare(logits, reader.logits(row.ids[: places[-1]], before), targets, losses[name])
            progress.advance()
    return losses


def widest(base: Base, stored: int) -> Base:
    """Computing in float32 where that fits: else the rounding of bf16 would be read as the files' loss.

    `stored`: bytes of the weights as they are, of 16 bits or 32.
    """
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if base.device == "cuda" else psutil.virtual_memory().available
    return replace(base, dtype="float32") if 3 * stored < free else base


def _logits(model: Any, ids: Sequence[int], positions: Sequence[int]) -> Any:
    """`(positions, vocabulary)` float32, on the CPU."""
    import torch

    with torch.inference_mode():
        at = torch.tensor(positions, device=model.device)
        return model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=at).logits[0].float().cpu()


def _mean_nats(logits: Any, targets: Sequence[int]) -> float:
    blocks = zip(logits.split(BLOCK), _blocks(targets), strict=True)
    return sum(_nats(block.double().log_softmax(-1), of) for block, of in blocks) / len(targets)


def _compare(logits: Any, others: Iterator[Any], targets: Sequence[int], loss: Loss) -> None:
    """One row of one file, a block at a time; in float64, for in float32 the KL of 16-bit floats is all rounding."""
    import torch

    nats = kl = same = 0.0
    for block, other, of in zip(logits.split(BLOCK), others, _blocks(targets), strict=True):
        p, q = block.double().log_softmax(-1), torch.from_numpy(other).double().log_softmax(-1)
        nats += _nats(q, of)
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
    loss.nats.append(nats / len(targets))
    loss.kl.append(kl / len(targets))
    loss.same_top.append(same / len(targets))


def _blocks(targets: Sequence[int]) -> list[Sequence[int]]:
    return [targets[start : start + BLOCK] for start in range(0, len(targets), BLOCK)]


def _mean(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> statistics.Figure:
    """With an interval cut to what the value can be; with none of fewer than `FEWEST` rows."""
    found = statistics.mean(values)
    if found.ci_low is None or found.ci_high is None:
        return found
    ends = (None, None) if found.n < FEWEST else (max(found.ci_low, low), min(found.ci_high, high))
    return found.model_copy(update=dict(zip(("ci_low", "ci_high"), ends, strict=True)))


def _nats(log_probs: Any, targets: Sequence[int]) -> float:
    return -float(log_probs[range(len(targets)), list(targets)].sum())


def check_conversion(loss: Loss) -> None:
    """Raises `StageFailed` when 16-bit floats are further from the model than their rounding can take them."""
    kl = sum(loss.kl) / len(loss.kl)
    if not kl < ROUNDED:
        raise StageFailed(f"converted wrongly: in 16-bit floats it is {kl:.3g} nats a token (KL) from the merged model")


def table(results: dict[str, Any]) -> list[str]:
    """Quantisation's impact, a line a format, from what an export's record holds."""
    stored, formats = results["model"]["bytes"], results["formats"]
    lines = [("format", "size", "of model", "perplexity", "KL, nats a token", "same top token")]
    lines.append(("model", _size(stored), "1.00", _shown(results["model"]["perplexity"], 2), "", ""))
    for kind, found in formats.items():
        figures = (found["perplexity"], 2), (found["kl"], 5), (found["same_top_token"], 3)
        shown = (_shown(figure, digits) for figure, digits in figures)
        lines.append((kind, _size(found["bytes"]), f"{found['bytes'] / stored:.2f}", *shown))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown_lines = ["  ".join(f"{c:<{width}}" for c, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"{kind}: {found['note']}" for kind, found in formats.items() if "note" in found]
    rows = results["model"]["perplexity"]["n"]
    few = [f"fewer than {FEWEST} rows are too few for an interval"] if rows < FEWEST else []
    return [*shown_lines, *notes, f"measured on {rows} {results['measured_on']}", *few]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _shown(figure: dict[str, Any], digits: int) -> str:
    return statistics.Figure.model_validate(figure).text(digits=digits)
