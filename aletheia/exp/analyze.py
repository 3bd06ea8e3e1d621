"""How a training went, from its log: epochs, best and latest, what stands out, and what to try, each with its reason.

    aletheia exp analyze EXP-2026-11-21-003

Reads `log.jsonl` beside an sft or dpo record, a running one's too. It judges by the log alone and trains nothing; what
it suggests is a next experiment, not a promise.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from aletheia.exp.analysis import SPIKE, Epoch, Log, parse
from aletheia.exp.reading import figure, number, plain, read_facts, table
from aletheia.output import print_json, print_table
from pipeline.errors import UserError
from pipeline.records import items
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Facts
from pipeline.stage import FEW_STEPS
from pipeline.workspace import Workspace

LOG = "log.jsonl"
SHOWN = 10  # steps named


@dataclass(frozen=True)
class Suggestion:
    """`set`: the assignments for `--set`; empty where no setting does it."""

    what: str
    why: str
    set: tuple[str, ...] = ()


def analyze(workspace: Workspace, name: str, as_json: bool) -> None:
    file, facts = read_facts(workspace, name)
    shown = workspace.shown(file.path)
    if facts.stage not in ("sft", "dpo"):
        raise UserError(f"is a {facts.stage} record; only a training, sft or dpo, has a log to analyze", where=shown)
    path = file.folder / LOG
    if not path.is_file():
        raise UserError(f"its log {workspace.shown(path)} is not there", where=shown)
    log = parse(items.read(path))
    if not log.steps:
        raise UserError("holds no step yet", where=workspace.shown(path))
    found = list(_findings(log, facts))
    tried = list(_suggestions(log, facts))
    if as_json:
        print_json(plain(_as_data(file.id, facts, log, found, tried)))
        return
    rows: list[tuple[str, Any]] = [
        (file.id, f"{facts.stage}, {liveness(facts)}, {len(log.steps)} steps in {len(log.epochs)} epochs"),
        ("", ""),
        ("epochs", _epochs(log)),
        ("", ""),
        ("train loss", _train(log)),
        ("valid loss", _valid(log)),
        *([("seen", found)] if found else []),
        ("", ""),
        ("what to try", [line for each in tried for line in _told(each)] or ["nothing stands out"]),
    ]
    print_table(rows[0], rows[1:], sys.stdout)


def _epochs(log: Log) -> list[str]:
    accuracy = any(e.valid and e.valid.accuracy for e in log.epochs)
    header = ("epoch", "steps", "train loss", "valid loss", "gap", *(["valid accuracy"] if accuracy else []))
    return table(header, [_epoch_row(e)[: len(header)] for e in log.epochs])


def _epoch_row(epoch: Epoch) -> tuple[str, ...]:
    valid = epoch.valid
    return (
        str(epoch.epoch),
        f"{epoch.first_step}–{epoch.last_step}",
        "" if epoch.train is None else number(epoch.train),
        figure(valid.loss) if valid else "",
        "" if epoch.gap is None else number(epoch.gap, "+"),
        figure(valid.accuracy) if valid and valid.accuracy else "",
    )


def _train(log: Log) -> list[str]:
    best, latest = log.best_train, log.epochs[-1]
    if best is None:
        return ["not finite in any step"]
    told = f"best in epoch {best.epoch} ({number(best.train or 0)})"
    return [told if best is latest else f"{told}, latest {latest.epoch} ({number(latest.train or 0)})"] + [
        "an epoch's is the mean over its steps, taken while the model still learnt; the gap is valid − train"
    ]


def _valid(log: Log) -> list[str]:
    best, latest = log.best_valid, log.latest_valid
    if best is None or latest is None:
        return ["not in the log: whether it overfits cannot be told"]
    told = f"best at step {best.step} ({figure(best.loss)})"
    if len(log.validations) == 1:
        return [f"{told}, the only one: whether it rose cannot be told"]
    if best is latest:
        return [f"{told}, the latest: no rise"]
    judged = {
        True: f"validation loss has risen since step {best.step}",
        False: "the latest is not distinguishable from its best",
        None: "the latest has no interval, so that it cannot be told from its best",
    }
    return [f"{told}, latest at step {latest.step} ({figure(latest.loss)})", judged[log.risen]]


def _findings(log: Log, facts: Facts) -> Iterator[str]:
    if log.unplaced:
        yield f"{log.unplaced} lines of the log without step, epoch or figure were passed over"
    if log.not_finite:
        yield f"loss or gradient not finite: {_steps(log.not_finite)}"
    if log.spikes:
        yield f"gradient norm over {SPIKE:g} × its running median: {_steps(log.spikes)}"
    if log.falls is False:
        yield f"train loss: no fall shown over all {len(log.steps)} steps"
    if log.level_since:
        yield f"train loss: no fall shown since step {log.level_since}, the second half"
    if log.without_rate:
        yield f"learning rate 0, where nothing is learnt: {_steps(log.without_rate)}"
    if log.throughput:
        begin, end = log.throughput
        yield f"throughput fell from {number(begin)} to {number(end)} tokens a second"
    if liveness(facts) != "complete":
        yield f"the run is {liveness(facts)}: this is what its log holds so far"


def _suggestions(log: Log, facts: Facts) -> Iterator[Suggestion]:
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
    if log.falls is False and not log.not_finite:
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
    idle = len(log.without_rate)
    if idle > max(1, 0.05 * len(log.steps)):
        yield Suggestion("a shorter warm-up", f"{idle} steps had a rate of 0", (f"{section}.warmup_ratio=0.0",))


def _about_validation(log: Log, facts: Facts, section: str) -> Iterator[Suggestion]:
    held_out = facts.data.get("held_out")
    rows = as_metric(held_out.get("rows")) if isinstance(held_out, dict) else None
    if rows and not rows.value:
        why = "no row is held out, so that overfitting cannot be seen"
        yield Suggestion("held-out rows", why, ("training_data.validation.fraction=0.1",))
    elif len(log.validations) < min(2, len(log.epochs)):
        why = "without a validation an epoch, overfitting cannot be seen"
        yield Suggestion("validation after each epoch", why, (f"{section}.evaluate_each_epoch=true",))


def _setting(facts: Facts, section: str, key: str) -> float | None:
    values = facts.configuration.get(section)
    found = as_metric(values.get(key)) if isinstance(values, dict) else None
    return found.value if found else None


def _steps(steps: list[int]) -> str:
    more = f" … {len(steps)} in all" if len(steps) > SHOWN else ""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps[:SHOWN]))}{more}"


def _told(suggestion: Suggestion) -> list[str]:
    return [f"{suggestion.what}: {suggestion.why}", *(f"    --set {each}" for each in suggestion.set)]


def _as_data(name: str, facts: Facts, log: Log, found: list[str], tried: list[Suggestion]) -> dict[str, Any]:
    best = log.best_train
    return {
        "id": name,
        "stage": facts.stage,
        "status": liveness(facts),
        "steps": len(log.steps),
        "epochs": [asdict(epoch) | {"gap": epoch.gap} for epoch in log.epochs],
        "train": {"best_epoch": best.epoch if best else None, "latest_epoch": log.epochs[-1].epoch},
        "valid": {
            "best": asdict(log.best_valid) if log.best_valid else None,
            "latest": asdict(log.latest_valid) if log.latest_valid else None,
            "risen": log.risen if len(log.validations) > 1 else None,
            "still_falling": log.still_falling,
        },
        "gradient_spikes": log.spikes,
        "not_finite": log.not_finite,
        "without_rate": log.without_rate,
        "train_loss_falls": log.falls,
        "level_since": log.level_since,
        "seen": found,
        "what_to_try": [asdict(each) for each in tried],
    }
