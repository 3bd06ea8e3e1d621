"""What to try after a training, from what its log shows: none where nothing is wrong. It reads and prints nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aletheia.exp.analysis import Log
from aletheia.exp.reading import number
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Facts
from pipeline.stage import FEW_STEPS


@dataclass(frozen=True)
class Suggestion:
    """`set`: the assignments for `--set`; empty where no setting does it."""

    what: str
    why: str
    set: tuple[str, ...] = ()


def suggestions(log: Log, facts: Facts) -> Iterator[Suggestion]:
    section = f"{facts.stage}_config"
    rate, epochs = _setting(facts, section, "learning_rate"), _setting(facts, section, "epochs")
    slower = (f"{section}.learning_rate={number(rate / 2)}",) if rate else ()
    best = log.best_valid
    if log.not_finite:
        yield Suggestion("a lower rate", f"the run broke at step {log.not_finite[0]}", slower)
    if log.risen and best:
        fewer = (f"{section}.epochs={number(best.epoch)}",) if best.epoch != epochs else ()
        yield Suggestion("fewer epochs", f"validation was best after {number(best.epoch)} and has risen since", fewer)
        yield Suggestion("a lower rate", "the model then takes longer to learn the rows by heart", slower)
        yield Suggestion("more rows", "the surest cure of overfitting; --set has none")
    if log.spikes:
        yield Suggestion(
            "a lower rate", f"{len(log.spikes)} gradient spikes, the first at step {log.spikes[0]}", slower
        )
    tripped = (facts.results.get("training") or {}).get("trips") or ()
    if tripped and not log.not_finite and not log.spikes:
        lower = (f"{section}.learning_rate={number(rate / 10)}",) if rate else ()
        yield Suggestion("a lower rate", f"a guard tripped {len(tripped)} ×, first: {tripped[0]['message']}", lower)
    if log.falls is False and not log.not_finite and not tripped:
        faster = (f"{section}.learning_rate={number(rate * 3)}",) if rate else ()
        yield Suggestion("a higher rate", "the train loss does not fall", faster)
    if log.still_falling:
        longer = (f"{section}.epochs={number(epochs + 1)}",) if epochs else ()
        yield Suggestion("more epochs", "validation was still falling at the end", longer)
    yield from _about_steps(log, section, epochs)
    yield from _about_validation(log, facts, section)


def _about_steps(log: Log, section: str, epochs: float | None) -> Iterator[Suggestion]:
    if len(log.steps) < FEW_STEPS and epochs and log.steps[-1].epoch >= epochs:
        wanted = -(-FEW_STEPS * epochs // len(log.steps))
        why = f"{len(log.steps)} steps teach little (under {FEW_STEPS}); or a smaller batch, or more rows"
        yield Suggestion("more steps", why, (f"{section}.epochs={number(wanted)}",))
    if log.idle:
        yield Suggestion(
            "a shorter warm-up", f"{len(log.idle)} steps had a rate of 0", (f"{section}.warmup_ratio=0.0",)
        )


def _about_validation(log: Log, facts: Facts, section: str) -> Iterator[Suggestion]:
    held_out = facts.data.get("held_out")
    rows = as_metric(held_out.get("rows")) if isinstance(held_out, dict) else None
    asked = _values(facts, section).get("evaluate_each_epoch")
    if rows and not rows.value:
        why = "no row is held out, so that overfitting cannot be seen"
        yield Suggestion("held-out rows", why, ("training_data.validation.fraction=0.1",))
    elif not asked and len(log.validations) < min(2, int(log.steps[-1].epoch)):
        why = "without a validation an epoch, overfitting cannot be seen"
        yield Suggestion("validation after each epoch", why, (f"{section}.evaluate_each_epoch=true",))


def _setting(facts: Facts, section: str, key: str) -> float | None:
    found = as_metric(_values(facts, section).get(key))
    return found.value if found else None


def _values(facts: Facts, section: str) -> dict[str, Any]:
    values = facts.configuration.get(section)
    return values if isinstance(values, dict) else {}
