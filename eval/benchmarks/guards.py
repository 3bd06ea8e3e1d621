"""Guard tasks: what a model must not lose while it gains elsewhere (`eval_config.guard_tasks`).

A guard has *held* where the whole interval of its paired change lies above −`guard_margin`: no loss that large is left
possible. It has *regressed* where it has not held and is worse than the base beyond chance: the sign of the change is that
of a loss, and its p, adjusted for as many guards (Holm), is below 0.05. Else nothing is *known*, and `n_needed` says how
many items would show that it held, were the change to stay.

Guards are of the judged model against its base; what other contestants did to them is shown beside, and decides nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import statistics

ALPHA = 0.05
HELD, REGRESSED, NOT_KNOWN = "held", "regressed", "not known"
CRITERION = "guards.regressed < 1"  # refuted where one has; inconclusive where one may have


@dataclass(frozen=True)
class Loss:
    """A guard's paired change. `p` is two-sided; `lower_is_better` None where lm-eval does not say."""

    change: statistics.Change
    p: float
    lower_is_better: bool | None


def judge(losses: Mapping[str, Loss], margin: float, missing: Mapping[str, str]) -> dict[str, Any]:
    """For the record. `missing`: guards that could not be measured, and why: nothing is known of them.

    `regressed` is the number of those that have, and its interval reaches up to those that may have.
    """
    adjusted = statistics.holm({name: loss.p for name, loss in losses.items()})
    tasks = {name: _finding(loss, adjusted[name], margin) for name, loss in losses.items()}
    tasks |= {name: {"finding": NOT_KNOWN, "why": why} for name, why in missing.items()}
    regressed, unknown = (sum(t["finding"] == what for t in tasks.values()) for what in (REGRESSED, NOT_KNOWN))
    return {
        "regressed": {"value": regressed, "ci_low": regressed, "ci_high": regressed + unknown},
        "margin": margin,
        "tasks": tasks,
    }


def told(guards: Mapping[str, Any]) -> list[str]:
    """A line of each guard that has not held, else one that all have."""
    lines = []
    for name, task in guards["tasks"].items():
        needed = f"; {task['n_needed']} items would show that it held" if task.get("n_needed") else ""
        if task["finding"] != HELD:
            lines.append(f"guard {name}: {task['finding']} ({task['why']}{needed})")
    return lines or [f"guards held: {', '.join(guards['tasks'])}"]


def _finding(loss: Loss, p: float, margin: float) -> dict[str, Any]:
    delta, found = loss.change.delta, {"holm_p": round(p, 4)}
    if loss.lower_is_better is None:
        return {"finding": NOT_KNOWN, "why": "whether lower is better is not known"} | found
    if delta.ci_low is None or delta.ci_high is None:
        same = delta.value == 0 and delta.n > 1
        return {"finding": NOT_KNOWN, "why": "no item changed" if same else f"n = {delta.n} gives no interval"} | found
    sign = -1 if loss.lower_is_better else 1
    gain, low = sign * delta.value, min(sign * delta.ci_low, sign * delta.ci_high)
    if low > -margin:
        return {"finding": HELD, "why": f"no loss of {margin:g} is in its interval"} | found
    if gain < 0 and p < ALPHA:
        return {"finding": REGRESSED, "why": f"{_signed(gain)}, p {p:.2g} among the guards"} | found
    found |= {"n_needed": needed} if (needed := _n_needed(gain, low, margin, delta.n)) else {}
    return {"finding": NOT_KNOWN, "why": f"{_signed(gain)}, and a loss of {-low:.3g} is not excluded"} | found


def _n_needed(gain: float, low: float, margin: float, n: int) -> int | None:
    """Intervals narrow as 1/√n; None where the change itself is beyond the margin."""
    distance = gain + margin
    return math.floor(n * ((gain - low) / distance) ** 2) + 1 if distance > 0 else None


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")
