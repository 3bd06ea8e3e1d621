"""The merge's receipt: the model on disk is base + adapter, checked tensor by tensor and by its logits.

The tensors are read back and compared with base + adapter computed anew, one precision wider: each element is the number
nearest to that, or no further from it than its arithmetic's rounding. The logits are compared with plain peft's, on real
prompts, where the model fits in memory: that the adapter was read as peft reads it. A base that training saw in 4 or 8
bits is merged as it is stored; how far that takes the answers from those trained is measured.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.beside import in_processes
from pipeline.errors import AletheiaError, StageFailed
from pipeline.merging.blocks import Memory, blocks
from pipeline.merging.shards import OnDisk, same_bytes, size, stored_dtypes, tensors
from pipeline.merging.update import Adapter, Arithmetic, LowRank, Update
from pipeline.model import Base, load_model
from pipeline.progress import say

POSITIONS = 64  # logits compared of each prompt: the last ones
CHECKERS = 8  # processes at most: so many keep up with what is hashed on its way to the disk
HIDDEN, LOST = 0.25, 0.9  # of the update's norm: rounding above it is said


class NotMerged(StageFailed):
    """What is on the disk is not base + adapter."""


@dataclass(frozen=True)
class Changed:
    """One tensor that the adapter changed. Norms are over all its elements."""

    tensor: str
    kind: str  # linear | embedding | replaced | tokens
    relative_change: float  # norm of the update over that of the weight
    rounding_share: float  # norm of the rounding over that of the update
    elements: int
    not_nearest: int  # elements that are another number than the one nearest to base + adapter
    share_of_bound: float  # the largest, of the blocks with such elements; 0: there are none


@dataclass(frozen=True)
class Compared:
    changed: Changed
    update: float  # sums of squares
    rounding: float


class WeightCheck:
    """Of a model that is merged from `base`: each tensor is read back and compared, in processes beside the merge's.

    Processes, because threads of so many small operations wait for one another in Python. They write nothing that the
    merge reads.
    """

    def __init__(self, base: Path, merged: Path, adapter: Adapter, arithmetic: Arithmetic = "float32") -> None:
        self._merged, self._adapter, self._arithmetic = merged, adapter, arithmetic
        self._before = tensors(base)
        self._expected = {name: replace(one, file=merged / one.file.name) for name, one in self._before.items()}
        self._found: dict[str, Compared | None] = {}
        self._memories = Memory(), Memory(), Memory(), Memory()

    def each(self, names: Iterable[str]) -> Iterator[str]:
        """Takes the names of tensors that are on the disk; yields each once it has passed.

        Raises `NotMerged` when one is further from base + adapter than its arithmetic's rounding, when one with a LoRA
        did not change, or one without any update did.
        """
        import torch

        for name, found in in_processes(self.compare, names, min(CHECKERS, torch.get_num_threads())):
            self._found[name] = found
            yield name

    def compare(self, name: str) -> Compared | None:
        """Of a tensor that the adapter changed, what by. Raises what `each` does."""
        old, new = self._before[name], self._expected[name]
        found = None
        if name in self._adapter.updates:
            with old.file.open("rb") as one, new.file.open("rb") as other:
                found = self._compare(name, OnDisk(old, one), OnDisk(new, other), self._adapter.updates[name])
        elif not same_bytes(old, new):
            raise NotMerged(f"{name} is not targeted by the adapter and changed")
        new.forget()
        return found

    def files(self) -> None:
        """Raises `NotMerged` when the files do not say of themselves that they hold the base's tensors, where it has them."""
        found = tensors(self._merged)
        if found.keys() != self._expected.keys():
            raise NotMerged("the merged model has other tensors than the base")
        for name, one in self._expected.items():
            if found[name] != one:
                raise NotMerged(f"{name} has another dtype, shape or place in its file than the base's")

    def receipt(self) -> dict[str, Any]:
        """Once all was compared. Raises what `files` raises."""
        self.files()
        assert self._found.keys() == self._before.keys()
        compared = [one for one in self._found.values() if one]
        share = _ratio(sum(one.rounding for one in compared), sum(one.update for one in compared))
        if share > LOST:
            say("note: rounding to the base's dtype hides nearly all of what the adapter changes; serve it unmerged")
        elif share > HIDDEN:
            say(f"note: rounding to the base's dtype hides {share:.0%} of what the adapter changes")
        ordered = sorted(self.changed(), key=lambda one: one.relative_change)
        middle = median(one.relative_change for one in ordered)
        return {
            "adapter": self._adapter.kind,
            "arithmetic": self._arithmetic,
            "modules": len(ordered),
            "kinds": dict(Counter(one.kind for one in ordered)),
            "unchanged_tensors": len(self._before) - len(ordered),
            "elements": sum(one.elements for one in ordered),
            "not_nearest": sum(one.not_nearest for one in ordered),
            "worst_share_of_rounding_bound": round(max(one.share_of_bound for one in ordered), 3),
            "smallest_relative_change": _short(ordered[0].relative_change),
            "relative_change": {
                "least": {"tensor": ordered[0].tensor, "value": _short(ordered[0].relative_change)},
                "median": _short(middle),
                "most": {"tensor": ordered[-1].tensor, "value": _short(ordered[-1].relative_change)},
            },
            "rounding_share_of_update": _short(share),
        }

    def changed(self) -> list[Changed]:
        """Sorted by name."""
        return [one.changed for _, one in sorted(self._found.items()) if one]

    def _compare(self, name: str, old: OnDisk, new: OnDisk, update: Update) -> Compared:
        import torch

        exact = update.exact(old, self._arithmetic)
        before_block, after_block, nearest_block, off_block = self._memories
        differ, rounding, change, weight, worst, others = False, 0.0, 0.0, 0.0, 0.0, 0
        for rows in blocks(old):
            before, after = old.read(rows, before_block), new.read(rows, after_block)
            differ = differ or not torch.equal(before, after)  # as numbers: an update of nothing makes +0 of -0
            was, expected, allowed = exact(rows, before)
            nearest = nearest_block.take(after.dtype, after.shape).copy_(expected)
            off = off_block.take(expected.dtype, expected.shape).copy_(after).sub_(expected)
            rounded = _square(off)
            rounding, weight = rounding + rounded, weight + _square(was)
            change += _square(was.sub_(expected))
            if _same(nearest, after) and math.isfinite(rounded):
                continue
            excess = off.abs_().div_(allowed()).max().item()
            if excess != excess:
                raise NotMerged(f"{name} holds NaN or infinity, or base + adapter does")
            if not excess <= 1:
                how = "" if self._arithmetic == "float32" else " in peft's arithmetic"
                raise NotMerged(f"{name} is {excess:.1f} × the rounding of {new.dtype}{how} away from base + adapter")
            worst, others = max(worst, excess), others + int((nearest != after).sum())
        if isinstance(update, LowRank) and not differ:
            raise NotMerged(f"{name} is targeted by the adapter and did not change")
        shares = _ratio(change, weight), _ratio(rounding, change)
        changed = Changed(name, update.kind, *shares, old.numel(), others, round(worst, 4))
        return Compared(changed, change, rounding)


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
    LoRA, rsLoRA and DoRA of all strengths), and what the computing itself rounds. Raises `NotMerged` above that.
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
        raise NotMerged(f"merged logits differ from base + adapter by {difference:.3g} (RMS), more than {bound:.3g}")
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


def _same(one: Any, other: Any) -> bool:
    """Bit for bit; by numpy, five times as fast at it as `torch.equal`."""
    import torch

    mine, its = (values.flatten().view(torch.uint8).numpy() for values in (one, other))
    return bool((mine == its).all())


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
