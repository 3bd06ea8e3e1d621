"""The merge's receipt: the model on disk is base + adapter, checked tensor by tensor and by its logits.

The tensors are read back and compared with base + adapter computed anew in float64. The logits are compared with plain
peft's, on real prompts, where the model fits in memory: that the adapter was read as peft reads it. A base that
training saw in 4 or 8 bits is merged as it is stored; how far that takes the answers from those trained is measured too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import AletheiaError, StageFailed
from pipeline.lora import Adapter, Update
from pipeline.model import Base, load_model
from pipeline.progress import Progress, say
from pipeline.shards import shards, size, stored_dtypes, tensor_names

POSITIONS = 64  # logits compared of each prompt: the last ones
HIDDEN = 0.25  # of the update's norm: rounding above it is said


@dataclass
class Figures:
    """Of the tensors compared so far. `update` and `rounding` are sums of squares."""

    worst: float = 0.0  # share of the bound
    least_change: float = float("inf")  # norm of a module's update over that of its weight
    update: float = 0.0
    rounding: float = 0.0

    @property
    def rounding_share(self) -> float:
        return float((self.rounding / self.update) ** 0.5) if self.update else float("inf")


def check_weights(base: Path, merged: Path, adapter: Adapter) -> dict[str, Any]:
    """Reads the merged model back and compares every tensor with base + adapter.

    Raises `StageFailed` when a merged tensor is further from it than its dtype's rounding, when a targeted tensor did
    not change, when any other did, or when a tensor is missing or extra.
    """
    import torch
    from safetensors import safe_open

    names = tensor_names(base)
    if names != tensor_names(merged):
        raise StageFailed("the merged model has other tensors than the base")
    figures = Figures()
    with Progress("checking", len(names), "tensor") as progress:
        for shard in shards(base):
            with safe_open(shard, framework="pt") as before, safe_open(merged / shard.name, framework="pt") as after:
                for name in before.keys():  # noqa: SIM118  (not a dict)
                    old, new = before.get_tensor(name), after.get_tensor(name)
                    if old.dtype != new.dtype or old.shape != new.shape:
                        raise StageFailed(f"{name} has another dtype or shape than the base's")
                    if name in adapter.updates:
                        _compare(name, old, new, adapter.updates[name], figures)
                    elif not torch.equal(_bits(old), _bits(new)):
                        raise StageFailed(f"{name} is not targeted by the adapter and changed")
                    progress.advance()
    if figures.rounding_share > HIDDEN:
        say(f"note: rounding to the base's dtype hides {figures.rounding_share:.0%} of what the adapter changes")
    return {
        "adapter": adapter.kind,
        "modules": len(adapter.updates),
        "unchanged_tensors": len(names) - len(adapter.updates),
        "worst_share_of_rounding_bound": round(figures.worst, 3),
        "smallest_relative_change": _short(figures.least_change),
        "rounding_share_of_update": _short(figures.rounding_share),
    }


def _compare(name: str, old: Any, new: Any, update: Update, figures: Figures) -> None:
    import torch

    limits = torch.finfo(new.dtype)
    worst = change = weight = 0.0
    for rows, exact, error in update.exact(old):
        was, off = old[rows].double(), new[rows].double().sub_(exact)
        # half a unit in the last place, also below the smallest normal number, over what float32 had got wrong before
        allowed = error.add_(exact.abs(), alpha=limits.eps / 2).add_(limits.tiny * limits.eps / 2)
        figures.rounding += _square(off)
        change += _square(exact.sub_(was))
        weight += _square(was)
        excess = off.abs_().div_(allowed).max().item()
        if not excess <= 1:
            raise StageFailed(f"{name} is {excess:.1f} × the rounding of {new.dtype} away from base + adapter")
        worst = max(worst, excess)
    if torch.equal(old, new):
        raise StageFailed(f"{name} is targeted by the adapter and did not change")
    figures.worst = max(figures.worst, worst)
    figures.least_change = min(figures.least_change, (change / weight) ** 0.5 if weight else float("inf"))
    figures.update += change


def check_logits(
    base: Base, merged: Path, adapter: Path, prompts: Sequence[Sequence[int]], rounding_share: float, trained_over: str
) -> dict[str, Any]:
    """The merged model against base + adapter through plain peft, computed in float32 where that fits in memory.

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
    adapted, untouched = _adapted(base, adapter, prompts, "none")
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
            drift = _kl(_adapted(base, adapter, prompts, trained_over)[0], found)
        except AletheiaError:  # someone asked to stop
            raise
        except Exception as error:  # a figure, no check: not every kind of adapter runs on every quantised layer
            say(f"note: the model as trained over {trained_over} cannot run here ({type(error).__name__}: {error})")
        else:
            receipt["kl_from_trained_nats_a_token"] = _short(drift)
            say(f"note: merged as stored, the model is {drift:.3g} nats a token (KL) from the one over {trained_over}")
    return receipt


def _adapted(base: Base, adapter: Path, prompts: Sequence[Sequence[int]], quantization: str) -> tuple[Any, Any]:
    """Logits `(positions, vocabulary)` of base + adapter and of the base alone."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base.folder, base, quantization), adapter).eval()
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


def _bits(tensor: Any) -> Any:
    """Its bytes: unlike its numbers, they are equal to themselves where one is no number."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
