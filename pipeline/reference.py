"""Log-probs of the reference policy, computed once before DPO's first step and kept.

The policy starts as the SFT policy, so its own log-probs before the first step are the reference's, and no second model
or adapter is held in memory. They lie in `checkpoints/.reference/KEY.json`, where KEY is a hash over all that they depend
on: base, adapter, template, how they are computed. A file that was made for another key is refused.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.head import sequence_sums, token_log_probs
from pipeline.objective import PairSums
from pipeline.passes import Row, lay
from pipeline.progress import Progress, say
from pipeline.trainer import Execution
from pipeline.workspace import Workspace

FOLDER = ".reference"


def key(**parts: Any) -> str:
    """`parts`: everything that the log-probs depend on, but the rows."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def log_probs(
    workspace: Workspace, known_as: str, model: Any, pairs: Sequence[Row], hashes: Sequence[str], how: Execution
) -> list[PairSums]:
    """Of each pair, chosen and rejected, nats; from the file where it has them. `hashes` are the pairs'.

    Raises `UserError` for a file that was made for another key.
    """
    path = workspace.checkpoints / FOLDER / f"{known_as[:16]}.json"
    known = _read(workspace, path, known_as)
    missing = [i for i, sha256 in enumerate(hashes) if sha256 not in known]
    if missing:
        measured = measure(model, [pairs[i] for i in missing], how, "reference log-probs")
        known |= {hashes[i]: found for i, found in zip(missing, measured, strict=True)}
        _write(path, known_as, known)
    else:
        say(f"reference log-probs of {len(pairs)} pairs: from {workspace.shown(path)}")
    return [known[sha256] for sha256 in hashes]


def measure(model: Any, pairs: Sequence[Row], how: Execution, what: str) -> list[PairSums]:
    """Log-probs of chosen and rejected, nats, in eval mode."""
    device, was_training = model.device, model.training
    found: dict[int, PairSums] = {}
    model.eval()
    try:
        with torch.inference_mode(), Progress(what, len(pairs), "pair") as progress:
            for batch in lay(pairs, how.pass_tokens, how.packed, how.pad_id):
                with how.autocast(device):
                    sums = sequence_sums(token_log_probs(model, batch.to(device)), batch.to(device)).tolist()
                found |= {row: (sums[2 * i], sums[2 * i + 1]) for i, row in enumerate(batch.rows)}
                progress.advance(len(found))
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(pairs))]


def _read(workspace: Workspace, path: Path, known_as: str) -> dict[str, PairSums]:
    try:
        kept = json.loads(path.read_text("utf-8"))
        rows = {str(sha256): (float(c), float(r)) for sha256, (c, r) in kept["rows"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        kept, rows = {}, {}
    if not isinstance(kept, dict) or kept.get("key") != known_as:
        raise UserError(
            "are reference log-probs of another model, adapter or template",
            where=workspace.shown(path),
            remedy="deleting the file: they are computed anew",
        )
    return rows


def _write(path: Path, known_as: str, rows: dict[str, PairSums]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"key": known_as, "rows": rows}) + "\n", "utf-8")
    os.replace(partial, path)
