"""Did they do the same work? Runs a command in this process and notes what goes through its model with a gradient.

    python benchmarks/audit.py FOUND.json trl.scripts.sft --model_name_or_path …
    faults(bed.sequences("sft", "0"), found["sequences"])          # [] where all were trained, whole, and nothing else

It asks no trainer what it thinks it does. It stands at the door of `LlamaModel.forward`: the token ids that come in, padded,
packed end to end or with a prompt that two answers share, are taken apart into sequences; and where the loss sends a
gradient back into the last hidden state, there the next token is supervised. Passes without a gradient (a reference's)
do not count. Too slow for the model that is timed, so it watches an epoch of the bed's narrow one.
"""

import inspect
import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Found = tuple[tuple[int, ...], tuple[bool, ...]]  # token ids, and which of them are supervised


def faults(given: Iterable[Found], found: Iterable[Found], pairs: bool = False) -> list[str]:
    """How what was trained differs from what was given.

    `pairs`: of preference pairs the first token of an answer is let pass, for where a prompt is shared the gradients of two
    answers that begin alike cancel there.
    """
    wanted = {tuple(ids): tuple(mask) for ids, mask in given}
    trained = [(tuple(ids), tuple(mask)) for ids, mask in found]
    times = Counter(ids for ids, _ in trained)
    strange = [ids for ids in times if ids not in wanted]
    cut = [ids for ids in strange if any(whole[: len(ids)] == ids for whole in wanted)]
    missing = [ids for ids in wanted if ids not in times]
    again = [ids for ids, n in times.items() if n > 1 and ids in wanted]
    other = 0
    for ids, mask in trained:
        if ids in wanted:
            first = wanted[ids].index(True) if pairs else None
            other += any(a != b for i, (a, b) in enumerate(zip(mask, wanted[ids], strict=True)) if i != first)
    said = {
        "are cut": len(cut),
        "are not the bed's": len(strange) - len(cut),
        "are not trained": len(missing),
        "are trained more than once": len(again),
        "have other supervised tokens": other,
    }
    return [f"{n} of {len(wanted)} sequences {what}" for what, n in said.items() if n]


def sequences(ids: Sequence[int], positions: Sequence[int], graded: Sequence[bool]) -> list[Found]:
    """Takes one row apart. `graded`: where the loss sends a gradient, which is one before the token that it is about.

    Where positions begin again at 0 another document begins; where they go back to n > 0, another end of the same document
    after its first n tokens.
    """
    starts = [i for i in range(len(ids)) if i == 0 or positions[i] != positions[i - 1] + 1]
    found = []
    trunk: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        places = [*trunk[: positions[start]], *range(start, end)]
        if positions[start] == 0:
            trunk = places
        tokens = tuple(ids[i] for i in places)
        found.append((tokens, (False, *(bool(graded[i]) for i in places[:-1]))))
    return found


class Recorder:
    """What was trained: sequences, in how many passes and steps; which parameters, in which type, by which optimiser."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.passes = self.steps = 0
        self.optimiser = ""
        self.trained: dict[str, int] = {}  # parameters by type

    def listen(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from transformers.models.llama.modeling_llama import LlamaModel

        forward = LlamaModel.forward
        signature = inspect.signature(forward)

        def heard(model: Any, *given: Any, **named: Any) -> Any:
            output = forward(model, *given, **named)
            hidden = output[0]
            if torch.is_grad_enabled() and hidden.requires_grad:
                said = signature.bind(model, *given, **named).arguments
                said |= said.pop("kwargs", {})
                ids, mask, positions = (said.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
                hidden.register_hook(lambda gradient: self._pass(ids, mask, positions, gradient))
            return output

        LlamaModel.forward = heard
        register_optimizer_step_post_hook(self._step)

    def _pass(self, ids: Any, mask: Any, positions: Any, gradient: Any) -> None:
        self.passes += 1
        graded = (gradient != 0).any(-1)
        for row in range(len(ids)):
            real = mask[row].bool() if mask is not None and mask.dim() == 2 else ids[row] >= 0
            places = positions[min(row, len(positions) - 1)] if positions is not None else real.cumsum(0) - 1
            self.found += sequences(ids[row][real].tolist(), places[real].tolist(), graded[row][real].tolist())

    def _step(self, optimiser: Any, *_: Any) -> None:
        self.steps += 1
        self.optimiser = type(optimiser).__name__
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        types = {str(p.dtype) for p in parameters}
        self.trained = {t: sum(p.numel() for p in parameters if str(p.dtype) == t) for t in types}

    def as_json(self) -> dict[str, Any]:
        return {
            "sequences": self.found,
            "passes": self.passes,
            "steps": self.steps,
            "optimiser": self.optimiser,
            "trained": self.trained,
        }


def main() -> None:
    target, module, *arguments = sys.argv[1:]
    recorder = Recorder()
    recorder.listen()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    Path(target).write_text(json.dumps(recorder.as_json()), "utf-8")


if __name__ == "__main__":
    main()
