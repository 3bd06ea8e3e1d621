"""A training's state on disk: a checkpoint counts once it is sealed, by a file with the hashes of all others, written last.

What is torn is passed over aloud. The best adapters so far lie beside the checkpoints, each under its step: a run that goes
on from a checkpoint also goes on from the best that it knew.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import yamlio
from pipeline.progress import say
from pipeline.records.find import sha256

if TYPE_CHECKING:
    from pipeline.train.trainer import Execution

SEAL = "sealed.json"
EXECUTION = "execution.json"  # how its steps were computed
BEST = "adapter-best"
NEEDED = {  # by a resume
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    EXECUTION,
}


def seal(checkpoint: Path, how: "Execution", quantization: str, ranks: int, configuration: dict[str, Any]) -> None:
    """Completes a checkpoint that the trainer has just written."""
    computed = {"pass_tokens": how.pass_tokens, "packed": how.packed, "quantization": quantization, "ranks": ranks}
    (checkpoint / EXECUTION).write_text(json.dumps(computed))
    (checkpoint / "configuration.yaml").write_text(yamlio.dump(configuration), "utf-8")
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != SEAL]
    unsealed = checkpoint / f".{SEAL}"
    unsealed.write_text(json.dumps({str(p.relative_to(checkpoint)): sha256(p) for p in files}, indent=1))
    os.replace(unsealed, checkpoint / SEAL)


def newest_sealed(folder: Path, aloud: bool = True) -> Path | None:
    """The newest checkpoint whose files are all there and whole."""
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        try:
            sealed = json.loads((checkpoint / SEAL).read_text())
            if sealed.keys() >= NEEDED and all(sha256(checkpoint / name) == digest for name, digest in sealed.items()):
                return checkpoint
        except (OSError, ValueError, AttributeError, TypeError):
            pass
        if aloud:
            say(f"note: {checkpoint.name} is torn and passed over")
    return None


def computed(checkpoint: Path) -> dict[str, Any]:
    """How its steps were: pass_tokens, packed, quantization (None: not known), ranks. Older ones do not say the last two."""
    found: dict[str, Any] = {"quantization": None, "ranks": 1} | json.loads((checkpoint / EXECUTION).read_text())
    return found


def step_of(folder: Path) -> int:
    """Of a checkpoint, or of a best adapter."""
    return int(folder.name.rpartition("-")[2])


def best_at(folder: Path, step: int) -> Path:
    """Where the adapter lies that was the best when it was measured at `step`."""
    return folder / f"{BEST}-{step}"


def forget(folder: Path) -> None:
    """All that only a resume needs."""
    for left in (*_checkpoints(folder), *_numbered(folder, BEST), *folder.glob(f"{BEST}-*.partial")):
        shutil.rmtree(left)


def forget_worse(folder: Path, validations: Iterable[dict[str, Any]]) -> None:
    """Keeps the best adapter as of now and as of each checkpoint, and no other."""
    known = list(validations)
    ends = [step_of(checkpoint) for checkpoint in _checkpoints(folder)]
    until = [[v for v in known if v["step"] <= end] for end in ends] + [known]
    kept = {min(some, key=lambda v: v["eval_loss"])["step"] for some in until if some}
    for best in _numbered(folder, BEST):
        if step_of(best) not in kept:
            shutil.rmtree(best)


def _checkpoints(folder: Path) -> list[Path]:
    return _numbered(folder, "checkpoint")


def _numbered(folder: Path, name: str) -> list[Path]:
    """The program's own folders: a copy that a person has made, `checkpoint-4-backup`, is none."""
    return [path for path in folder.glob(f"{name}-*") if path.name[len(name) + 1 :].isdecimal() and path.is_dir()]
