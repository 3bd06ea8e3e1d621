"""Log-probs of the reference policy, computed once before DPO's first step and kept; and the check of them (promise 3).

The policy starts as the SFT policy, so its own log-probs before the first step are the reference's, and no second model
or adapter is held in memory. They lie in `checkpoints/.reference/KEY.json`, where KEY is a hash over all that they depend
on but the rows: base, adapter, template, how they are computed. A row is known by a hash of its tokens. A file that was
made for another key, or changed since, is refused; one that is torn is computed anew, aloud.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import DpoConfig
from pipeline.encoded import Encoded
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.train.heldout import log_probs as measure
from pipeline.train.preference import PairLogProbs, PairSums, loss_at_start, losses
from pipeline.train.trainer import Execution
from pipeline.workspace import Workspace

FOLDER = ".reference"
PAIRS_CHECKED = 4  # enough to show a wrong reference, cheap enough to run every time

Pair = tuple[Encoded, Encoded]  # prompt + chosen, prompt + rejected


def key(**parts: Any) -> str:
    """`parts`: everything that the log-probs depend on, but the rows."""
    return _sha256(parts)


def log_probs(workspace: Workspace, known_as: str, model: Any, how: Execution, pairs: Sequence[Pair]) -> list[PairSums]:
    """Of each pair; from the file where it has them.

    Raises `UserError` for a file that was made for another key, was changed, or cannot be read.
    """
    path = workspace.checkpoints / FOLDER / f"{known_as[:16]}.json"
    known = _read(workspace, path, known_as)
    rows = [_sha256([(side.ids, side.mask) for side in pair]) for pair in pairs]
    missing = [i for i, row in enumerate(rows) if row not in known]
    if missing:
        measured = measure(model, [pairs[i] for i in missing], how, "reference log-probs")
        known |= {rows[i]: found for i, found in zip(missing, measured, strict=True)}
        _write(path, known_as, known)
    else:
        say(f"reference log-probs of {len(pairs)} pairs: from {workspace.shown(path)}")
    return [known[row] for row in rows]


def check(
    policy: Any,
    pairs: Sequence[Pair],
    reference: Sequence[PairSums],
    how: Execution,
    config: DpoConfig,
    adapter: Path | None,
) -> dict[str, float]:
    """Promise 3, by the first pairs; returns what was found, for the record. `adapter`: SFT's; None: straight on the base.

    Raises `StageFailed` when the reference is not the policy that DPO starts from, or that is not the SFT adapter.
    """
    few = pairs[:PAIRS_CHECKED]
    start = measure(policy, few, how, "policy before the first step")
    with policy.disable_adapter():
        base = measure(policy, few, how, "base")
    known = PairLogProbs.of(few, start, reference[: len(few)])
    loss, expected = losses(config, known).mean().item(), loss_at_start(config)
    off, distance = _furthest(start, reference), _furthest(base, reference)
    longest = max(len(side.ids) for pair in few for side in pair)
    allowed = longest * (0.01 if how.compute else 1e-5)  # nats: rounding, of other passes than the reference's
    if not off <= allowed:  # a NaN is not
        raise StageFailed(f"the policy's log-probs are {off:.2g} nats off the reference's before step 1", step=0)
    if not (expected is None or how.compute or abs(loss - expected) <= 1e-3 * max(1.0, expected)):
        raise StageFailed(f"at step 0 the {config.loss_type} loss is {loss:.6f}, not {expected:.6f}", step=0)
    if adapter is not None:
        _check_tensors(policy, adapter)
        if not distance >= max(1e-3, off):
            raise StageFailed("the reference gives the base's log-probs: it is not the SFT policy", step=0)
    margin = (known.chosen - known.reference_chosen - known.rejected + known.reference_rejected).mean().item()
    is_expected = "no reference" if expected is None else f"= {expected:.4f} as it must"
    say(f"reference checked: loss {loss:.4f} {is_expected}, margin {margin:.1g}, {distance:.2f} nats from the base")
    return {
        "loss_at_step_0": round(loss, 6),
        "margin_at_step_0": round(config.beta * margin, 6),
        "max_log_prob_distance_from_policy": round(off, 6),
        "max_log_prob_distance_from_base": round(distance, 3),
    }


def _check_tensors(policy: Any, adapter: Path) -> None:
    """The policy's tensors are, bit for bit, those of the SFT record's file."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(adapter / "adapter_model.safetensors")
    start = get_peft_model_state_dict(policy)
    different = [k for k, v in stored.items() if k not in start or not start[k].cpu().float().equal(v.float())]
    if different or len(stored) != len(start):
        raise StageFailed(f"the policy starts apart from the SFT adapter in {different[:3] or 'its keys'}", step=0)


def _furthest(some: Sequence[PairSums], others: Sequence[PairSums]) -> float:
    """Nats. Of the pairs that both have."""
    return max(abs(a - b) for one, other in zip(some, others, strict=False) for a, b in zip(one, other, strict=True))


def _read(workspace: Workspace, path: Path, known_as: str) -> dict[str, PairSums]:
    """By the rows' hashes; empty where there is no whole file."""
    shown, anew = workspace.shown(path), "deleting the file: they are computed anew"
    try:
        kept = json.loads(path.read_text("utf-8"))
        rows: dict[str, PairSums] = {str(row): (float(c), float(r)) for row, (c, r) in kept["rows"].items()}
        made_for, sha256 = kept["key"], kept["sha256"]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=shown, remedy=anew) from error
    except (ValueError, TypeError, KeyError, AttributeError):
        say(f"note: {shown} is torn, or no file of reference log-probs: they are computed anew")
        return {}
    if sha256 != _sha256([made_for, kept["rows"]]):
        raise UserError("are reference log-probs that were changed since they were written", where=shown, remedy=anew)
    if made_for != known_as:
        what = "are reference log-probs of another model, adapter or template"
        raise UserError(what, where=shown, remedy=anew)
    return rows


def _write(path: Path, known_as: str, rows: dict[str, PairSums]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"key": known_as, "sha256": _sha256([known_as, rows]), "rows": rows}
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(kept) + "\n", "utf-8")
    os.replace(partial, path)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
