"""How a training went, from its log: epochs, best and latest, what stands out, and what to try, each with its reason.

    aletheia exp analyze EXP-2026-11-21-003

Reads `log.jsonl` beside an sft or dpo record, a running one's too. It judges by the log alone and trains nothing; what
it suggests is a next experiment, not a promise.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from aletheia.exp.advice import Suggestion, suggestions
from aletheia.exp.analysis import LITTLE, SPIKE, Epoch, Log, parse
from aletheia.exp.reading import figure, number, plain, read_facts, table
from aletheia.output import print_json, print_table
from pipeline.errors import UserError
from pipeline.records import items
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

LOG = "log.jsonl"
SHOWN = 10  # steps named


def analyze(workspace: Workspace, name: str, as_json: bool) -> None:
    file, facts = read_facts(workspace, name)
    shown = workspace.shown(file.path)
    if facts.stage not in ("sft", "dpo"):
        raise UserError(
            f"is no training but of stage {facts.stage}; only sft and dpo have a log to analyze", where=shown
        )
    path = file.folder / LOG
    if not path.is_file():
        raise UserError(f"its log {workspace.shown(path)} is not there", where=shown)
    log = parse(items.read(path))
    if not log.steps:
        raise UserError("holds no step yet", where=workspace.shown(path))
    found = list(_findings(log, facts))
    tried = list(suggestions(log, facts))
    if as_json:
        print_json(plain(_as_data(file.id, facts, log, found, tried)))
        return
    rows: list[tuple[str, Any]] = [
        (file.id, f"{facts.stage}, {liveness(facts)}, {len(log.steps)} steps, {len(log.epochs)} epochs begun"),
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
    header = ("epoch", "steps", "train loss", "valid loss", "gap", "valid accuracy")
    return table(header, [_epoch_row(epoch) for epoch in log.epochs])


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
    gap = "; the gap is valid − train" if log.validations else ""
    last = "not finite" if latest.train is None else number(latest.train)
    return [
        f"{told}, the latest" if best is latest else f"{told}, latest {latest.epoch} ({last})",
        f"an epoch's is the mean over its steps, taken while the model still learnt{gap}",
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
        yield f"train loss: level since step {log.level_since}; the last third brought under {LITTLE:.0%} of its fall"
    if log.idle:
        yield f"learning rate 0, where nothing is learnt: {_steps(log.idle)}"
    if log.throughput:
        begin, end = log.throughput
        yield f"throughput fell from {number(begin)} to {number(end)} tokens a second"
    if liveness(facts) != "complete":
        yield f"the run is {liveness(facts)}: this is what its log holds so far"


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
