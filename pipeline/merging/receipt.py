"""The merge's receipt: the model on disk is base + adapter, checked tensor by tensor and by its logits.

The tensors are read back and compared with base + adapter computed anew, one precision wider. The logits are compared
with plain peft's, on real prompts, where the model fits in memory: that the adapter was read as peft reads it. A base
that training saw in 4 or 8 bits is merged as it is stored; how far that takes the answers from those trained is measured.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.errors import AletheiaError, StageFailed
from pipeline.merging.blocks import over_blocks
from pipeline.merging.shards import OnDisk, same_bytes, size, stored_dtypes, tensors
from pipeline.merging.update import Adapter, Arithmetic, LowRank, Update
from pipeline.model import Base, load_model
from pipeline.progress import Progress, say

POSITIONS = 64  # logits compared of each prompt: the last ones
HIDDEN, LOST = 0.25, 0.9  # of the update's norm: rounding above it is said


@dataclass(frozen=True)
class Changed:
    """One tensor that the adapter changed. Norms are over all its elements."""

    tensor: str
    kind: str  # linear | embedding | replaced | tokens
    relative_change: float  # norm of the update over that of the weight
    rounding_share: float  # norm of the rounding over that of the update
    share_of_bound: float  # the largest


@dataclass
class Figures:
    """Of the tensors compared so far. `update` and `rounding` are sums of squares."""

    changed: list[Changed] = field(default_factory=list)
    update: float = 0.0
    rounding: float = 0.0

    @property
    def rounding_share(self) -> float:
        return _ratio(self.rounding, self.update)

    def receipt(self) -> dict[str, Any]:
        ordered = sorted(self.changed, key=lambda one: one.relative_change)
        middle = median(one.relative_change for one in ordered)
        return {
            "worst_share_of_rounding_bound": round(max(one.share_of_bound for one in ordered), 3),
            "smallest_relative_change": _short(ordered[0].relative_change),
            "relative_change": {
                "least": {"tensor": ordered[0].tensor, "value": _short(ordered[0].relative_change)},
                "median": _short(middle),
                "most": {"tensor": ordered[-1].tensor, "value": _short(ordered[-1].relative_change)},
            },
            "rounding_share_of_update": _short(self.rounding_share),
        }


def check_weights(
    base: Path, merged: Path, adapter: Adapter, arithmetic: Arithmetic = "float32"
) -> tuple[dict[str, Any], list[Changed]]:
    """Reads the merged model back and compares every tensor with base + adapter. Returns also what each changed by.

    Raises `StageFailed` when a merged tensor is further from it than its arithmetic's rounding, when a tensor with a
    LoRA did not change, when one without any update did, or when a tensor is missing or extra.
    """
    before, after = tensors(base), tensors(merged)
    if before.keys() != after.keys():
        raise StageFailed("the merged model has other tensors than the base")
    figures = Figures()
    with Progress("checking", len(before), "tensor") as progress:
        for name, old in before.items():
            new = after[name]
            if old.dtype != new.dtype or old.shape != new.shape:
                raise StageFailed(f"{name} has another dtype or shape than the base's")
            if name in adapter.updates:
                _compare(name, OnDisk(old), OnDisk(new), adapter.updates[name], arithmetic, figures)
            elif not same_bytes(old, new):
                raise StageFailed(f"{name} is not targeted by the adapter and changed")
            new.forget()
            progress.advance()
    if figures.rounding_share > LOST:
        say("note: rounding to the base's dtype hides nearly all of what the adapter changes; serve it unmerged")
    elif figures.rounding_share > HIDDEN:
        say(f"note: rounding to the base's dtype hides {figures.rounding_share:.0%} of what the adapter changes")
    receipt = {
        "adapter": adapter.kind,
        "arithmetic": arithmetic,
        "modules": len(figures.changed),
        "kinds": dict(Counter(one.kind for one in figures.changed)),
        "unchanged_tensors": len(before) - len(figures.changed),
    }
    return receipt | figures.receipt(), figures.changed


def _compare(name: str, old: Any, new: Any, update: Update, arithmetic: Arithmetic, figures: Figures) -> None:
    import torch

    exact = update.exact(old, arithmetic)
    differ = threading.Event()  # once two blocks do, no other is asked: that takes as long as all the rest

    def compare(rows: slice) -> tuple[float, float, float, float]:
        before, after = old[rows], new[rows]
        was, expected, allowed = exact(rows, before)
        off = after.to(expected.dtype).sub_(expected)
        sums = _square(off), _square(expected.sub_(was)), _square(was)
        low, high = torch.aminmax(off.div_(allowed))
        excess = max(-low.item(), high.item())
        if excess != excess:
            raise StageFailed(f"{name} holds NaN or infinity, or base + adapter does")
        if not excess <= 1:
            how = "" if arithmetic == "float32" else " in peft's arithmetic"
            raise StageFailed(f"{name} is {excess:.1f} × the rounding of {new.dtype}{how} away from base + adapter")
        if not differ.is_set() and not torch.equal(before, after):
            differ.set()
        return *sums, excess

    each = over_blocks(old, compare)
    rounding, change, weight = (sum(one[at] for one in each) for at in range(3))
    worst = max((excess for *_, excess in each), default=0.0)
    if isinstance(update, LowRank) and not differ.is_set():
        raise StageFailed(f"{name} is targeted by the adapter and did not change")
    figures.changed.append(
        Changed(name, update.kind, _ratio(change, weight), _ratio(rounding, change), round(worst, 4))
    )
    figures.update += change
    figures.rounding += rounding


def check_logits(
    base: Base,
    merged: Path,
    adapters: Sequence[Path],
    prompts: Sequence[Sequence[int]],
    rounding_share: float,
    trained_over: str,
) -> dict[str, Any]:
    """The merged model against base + adapters through plain peft, computed in float32 where that fits in memory.

    `trained_over` is the base's quantization in training. The difference, a root mean square over all logits compared,
    may be 4 × the share of the update that rounding is of what the adapter moves the logits by (0.6 to 2.8 × measured,
    LoRA, rsLoRA and DoRA of all strengths), and what the computing itself rounds. Raises `StageFailed` above that.
    """
    stored, narrow = size(merged), stored_dtypes(merged) != {"F32"}
    wide = 2 * stored if narrow else stored
    if _fits(wide, base.device):
        base, noise = replace(base, dtype="float32"), 1e-4
    elif _fits(stored, base.device):
        noise = 0.03
    else:
        say("note: the model does not fit in memory: logits are not compared, the tensors are")
        return {"logits": "not compared: the model does not fit in memory"}
    adapted, untouched = _adapted(base, adapters, prompts, "none")
    found = _logits(load_model(merged, base), prompts)
    difference, effect = _rms(found - adapted), _rms(adapted - untouched)
    bound = max(4 * rounding_share, 0.02) * effect + noise * _rms(adapted)
    if not difference <= bound:
        raise StageFailed(f"merged logits differ from base + adapter by {difference:.3g} (RMS), more than {bound:.3g}")
    if bound > effect / 2:
        say("note: the adapter moves the logits so little that their comparison could not tell it from rounding")
    receipt: dict[str, Any] = {
        "logits": f"merged, against the base as stored + adapter, computed in {base.dtype or 'the stored dtype'}",
        "prompts": len(prompts),
        "logits_max_difference": _short((found - adapted).abs().max().item()),
        "logits_rms_difference": _short(difference),
        "logits_rms_bound": _short(bound),
        "logits_rms_moved_by_adapter": _short(effect),
    }
    if trained_over in ("nf4", "int8"):
        receipt |= {"trained_over": trained_over, "kl_from_trained_nats_a_token": None}
        try:
            drift = _kl(_adapted(base, adapters, prompts, trained_over)[0], found)
        except AletheiaError:  # someone asked to stop
            raise
        except Exception as error:  # a figure, no check: not every kind of adapter runs on every quantised layer
            say(f"note: the model as trained over {trained_over} cannot run here ({type(error).__name__}: {error})")
        else:
            receipt["kl_from_trained_nats_a_token"] = _short(drift)
            say(f"note: merged as stored, the model is {drift:.3g} nats a token (KL) from the one over {trained_over}")
    return receipt


def _adapted(
    base: Base, adapters: Sequence[Path], prompts: Sequence[Sequence[int]], quantization: str
) -> tuple[Any, Any]:
    """Logits `(positions, vocabulary)` of base + adapters and of the base alone."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base.folder, base, quantization), adapters[0])
    names = ["default", *map(str, range(1, len(adapters)))]
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, name)
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    model.eval()
    adapted = _logits(model, prompts)
    with model.disable_adapter():
        return adapted, _logits(model, prompts)


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
    import torch

    with torch.inference_mode():
        passes = (model(input_ids=torch.tensor([p], device=model.device)).logits[0, -POSITIONS:] for p in prompts)
        return torch.cat([logits.float().cpu() for logits in passes])


def _square(values: Any) -> float:
    """Sum of the squares."""
    flat = values.flatten()
    return float(flat.dot(flat))


def _rms(values: Any) -> float:
    return float(values.double().pow(2).mean().sqrt())


def _kl(true: Any, other: Any) -> float:
    """Mean KL(true ‖ other) over the positions, nats."""
    p, q = true.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _fits(weights: int, device: str) -> bool:
    """Whether a model of so many bytes fits in what is free, with half as much again to compute in."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return 1.5 * weights < free


def _ratio(one: float, other: float) -> float:
    """Of two norms, given as sums of squares."""
    return float((one / other) ** 0.5) if other else float("inf") if one else 0.0


def _short(value: float) -> float:
    return float(f"{value:.3g}")
