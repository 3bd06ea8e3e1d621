"""What tells a training that went wrong from one that goes well, from the figures of its steps alone.

    guards = Guards(settings, lines_of_the_log_so_far)
    guards.before_update(…)     after the passes of a step, before the optimiser: a trip keeps a bad gradient out
    guards.after_update(…)      after it; only then is the step remembered

Nothing here touches the run: what a trip does is the profile's `guards.policy`.

A false alarm ends a run that was sound, and a run that learns badly shows it anyway, so the bounds are wide. They were tried on
thousands of simulated runs, of 1 to 32 rows a step, and on logs of real ones (`tests/pipeline/test_guards.py`).

- Rows are met in random order, so that steps can be compared; in a curriculum only what follows a large update is told.
- A spike does no more than any other step, since gradients are clipped: it must be `spike` times the largest norm so far.
  Over the median would not do: the norm of a step of few tokens, or of a hard pair, can be 30 times that.
- One step's loss says little (a DPO loss of 1e-4 and then of 2 is no fault). An explosion is LASTING steps, all over
  `explosion` times the running median and the loss at the start, and most of them higher than any before.
- Adam moves each weight by about the learning rate, so a rate far too high shows in the size of the updates: up to 0.04
  of the adapter in good runs, 0.26 to 1.7 at 100 times their rate. The loss then rises, but to that of a model that
  only guesses, which may be near that of the base. After an update above LARGE_UPDATE a rise by RISE is enough.
- float32 keeps 7 digits: the losses of different rows differ by more than SAME, and an update under NO_UPDATE of the
  adapter is none.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

from pipeline import config

WINDOW = 50  # steps of a running median
LASTING = 5  # steps in a row that make an explosion, or a dead adapter
FIRST = 3  # steps that say what the loss was at the start
GRACE = 10  # steps that show what is usual
LARGE_UPDATE = 0.2  # ‖Δθ‖ / ‖θ‖
RISE = 1.25  # of the loss after a large update
FLAT = 10  # steps of one and the same loss
SAME = 1e-5  # relative: the sixth digit, to which losses are kept
NO_UPDATE = 1e-10  # ‖Δθ‖ / ‖θ‖
NOTHING_LEFT = 1e-6  # a loss this small has nothing more to teach: hinge's is exactly 0 once its pairs are apart
LOW_RATE = 0.01  # of the highest: a schedule's tail, which need not move anything
OVERFLOWS = 20  # fp16's scale starts at 2 ** 16 and is halved at each overflow; after so many it is not the scale

Kind = Literal[
    "nothing_supervised",
    "loss_not_finite",
    "gradient_not_finite",
    "gradient_spike",
    "loss_explosion",
    "flat_loss",
    "dead_adapter",
    "update_not_finite",
]
LOWER_RATE = "a lower learning_rate"


@dataclass(frozen=True)
class Trip:
    """What went wrong at a step, in a line that names the figures, and what to try."""

    kind: Kind
    message: str
    remedy: str


class Taken(NamedTuple):
    """A step that the optimiser took."""

    loss: float
    grad_norm: float  # before clipping
    update_norm: float  # ‖Δθ‖ / ‖θ‖
    learning_rate: float


class Guards:
    """Remembers the steps that were taken; one that tripped was not, nor one that fp16's scaler skipped."""

    def __init__(
        self,
        settings: config.Guards,
        history: Sequence[Mapping[str, Any]] = (),
        curriculum: bool = False,
        rows_differ: bool = True,
    ) -> None:
        """`history`: the log's lines of a run that goes on. Its decisions are those of one that was never interrupted.

        `curriculum`: later rows are harder, so that a higher loss or gradient alone says nothing. `rows_differ`: from step
        to step; where every step learns from all rows, a loss that hardly changes is none to wonder at.
        """
        self.settings, self.curriculum, self.rows_differ = settings, curriculum, rows_differ
        self._taken: deque[Taken] = deque(maxlen=WINDOW + LASTING - 1)
        self._first: list[float] = []
        self._sound: deque[float] = deque(maxlen=WINDOW)  # losses before the first large update
        self._largest_norm = self._largest_update = self._highest_rate = 0.0
        self._lowest = math.inf  # of the running medians: the loss of a slow explosion is usual at every step
        self._overflows = 0
        for line in history:
            if "trip" in line and settings.policy == "rollback":
                self.rolled_back()
            if "trip" not in line and all(figure in line for figure in Taken._fields):
                self._remember(Taken(*(line[figure] for figure in Taken._fields)))

    def before_update(self, *, step: int, loss: float, grad_norm: float, supervised: int) -> Trip | None:
        """`supervised`: tokens the step learns from. `grad_norm`: before clipping."""
        if supervised == 0:
            what = f"step {step} has nothing to learn from: none of its tokens is supervised"
            return Trip("nothing_supervised", what, "looking at these rows with `aletheia data show`")
        if not math.isfinite(loss):
            what = f"the loss is {loss} at step {step}"
            return Trip("loss_not_finite", what, f"{LOWER_RATE}, or bf16 in place of fp16")
        if not math.isfinite(grad_norm):
            what = f"the gradient norm is {grad_norm} at step {step}, with a loss of {loss:.4g}"
            return Trip("gradient_not_finite", what, f"{LOWER_RATE}, or bf16 in place of fp16")
        return self._explosion(step, loss) or self._spike(step, grad_norm)

    def after_update(
        self, *, step: int, loss: float, grad_norm: float, update_norm: float, learning_rate: float
    ) -> Trip | None:
        """`learning_rate`: the one this update was made with. `update_norm`: ‖Δθ‖ / ‖θ‖ over the adapter."""
        if not math.isfinite(update_norm):  # the next step's loss would show it, but there may be none
            what = f"the update of step {step} is {update_norm} of the adapter, whose weights are no numbers any more"
            return Trip("update_not_finite", what, LOWER_RATE)
        self._remember(Taken(loss, grad_norm, update_norm, learning_rate))
        if self._overflows >= OVERFLOWS:
            what = f"the gradient norm was not finite in {self._overflows} steps in a row, up to step {step}"
            return Trip("gradient_not_finite", what, "bf16 or fp32 in place of fp16")
        return self._dead(step) or self._flat(step)

    @property
    def ruined(self) -> bool:
        """Whether an update was so large that what comes after it is no place to go back to."""
        return self._largest_update > LARGE_UPDATE

    def rolled_back(self) -> None:
        """The adapter is as it was before its large updates."""
        self._largest_update = 0.0

    def _remember(self, step: Taken) -> None:
        if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
            self._overflows += 1
            return
        self._overflows = 0
        step = Taken(*(float(f"{figure:.6g}") for figure in step))  # as in the log, so that a resume knows the same
        self._taken.append(step)
        if len(self._taken) >= GRACE:
            self._lowest = min(self._lowest, median(taken.loss for taken in self._taken))
        if len(self._first) < FIRST:
            self._first.append(step.loss)
        if self._largest_update <= LARGE_UPDATE:
            self._sound.append(step.loss)
        self._largest_update = max(self._largest_update, step.update_norm)
        self._largest_norm = max(self._largest_norm, step.grad_norm)
        self._highest_rate = max(self._highest_rate, step.learning_rate)

    def _explosion(self, step: int, loss: float) -> Trip | None:
        losses = [taken.loss for taken in self._taken] + [loss]
        before, lasting = losses[:-LASTING], losses[-LASTING:]
        level, moved, what = median(lasting), self._largest_update, ""
        if before and not self.curriculum:
            usual = max(median(self._first), min(_usual(before), self._lowest), NOTHING_LEFT)
            times = self.settings.explosion
            if min(lasting) > times * usual and level > max(before):
                what = f"over {times:g} × the usual {usual:.4g} for {LASTING} steps"
        if not what and moved > LARGE_UPDATE and len(lasting) == LASTING:
            sound = _usual(self._sound)
            if level > RISE * sound:
                what = f"{level:.4g} over {LASTING} steps, {sound:.4g} before an update of {moved:.0%} of the adapter"
        return Trip("loss_explosion", f"the loss is {loss:.4g} at step {step}: {what}", LOWER_RATE) if what else None

    def _spike(self, step: int, grad_norm: float) -> Trip | None:
        if self.curriculum or len(self._taken) < GRACE or grad_norm <= self.settings.spike * self._largest_norm:
            return None
        what = f"the gradient norm is {grad_norm:.4g} at step {step}, and was {self._largest_norm:.4g} at most"
        return Trip("gradient_spike", what, f"looking at these rows, or {LOWER_RATE}")

    def _dead(self, step: int) -> Trip | None:
        lasting = list(self._taken)[-LASTING:]
        if len(lasting) < LASTING:
            return None
        if all(taken.learning_rate == 0 for taken in lasting):
            what = f"the learning rate was 0 in {LASTING} steps in a row, up to step {step}"
            return Trip("dead_adapter", what, "a higher learning_rate, or another schedule")
        if not all(self._should_move(taken) and taken.update_norm <= NO_UPDATE for taken in lasting):
            return None
        why = "its updates are too small" if any(taken.grad_norm for taken in lasting) else "it has no gradient"
        what = f"the adapter did not change in {LASTING} steps in a row, up to step {step}: {why}"
        return Trip("dead_adapter", what, "a higher learning_rate, or other target_modules")

    def _flat(self, step: int) -> Trip | None:
        lasting = list(self._taken)[-FLAT:]
        losses = [taken.loss for taken in lasting]
        if not self.rows_differ or len(lasting) < FLAT or max(losses) - min(losses) > SAME * abs(losses[-1]):
            return None
        if not all(map(self._should_move, lasting)):
            return None
        what = f"the loss was {losses[-1]:.6g} in {FLAT} steps in a row, up to step {step}, though their rows differ"
        return Trip("flat_loss", what, "looking at what these rows supervise with `aletheia data show`")

    def _should_move(self, taken: Taken) -> bool:
        """Not at the tail of a schedule, nor where all has been learnt: a loss of 0 from the first step on is a fault."""
        learnt = taken.loss <= NOTHING_LEFT < max(self._first)
        return not learnt and taken.learning_rate > LOW_RATE * self._highest_rate


def _usual(losses: Sequence[float]) -> float:
    """The median; of a few, which may all be low by chance, the highest."""
    return median(losses) if len(losses) >= GRACE else max(losses)
