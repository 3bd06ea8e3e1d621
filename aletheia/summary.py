"""What records show at a glance: the list of all, and the table at the end of a pipeline."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from aletheia.output import print_json, print_table
from pipeline.errors import UserError
from pipeline.progress import duration
from pipeline.records import ids
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace


def list_records(workspace: Workspace, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for path in ids.newest_first(workspace):
        file = RecordFile(path)
        try:
            facts = file.facts()
        except UserError as error:
            rows.append(
                {
                    "id": file.id,
                    "stage": "?",
                    "profile": "?",
                    "status": "unreadable",
                    "seconds": None,
                    "figures": [str(error)],
                }
            )
            continue
        if facts is None:
            rows.append(
                {"id": file.id, "stage": "?", "profile": "?", "status": "planned", "seconds": None, "figures": []}
            )
            continue
        rows.append(
            {
                "id": file.id,
                "stage": facts.stage,
                "profile": facts.profile,
                "status": liveness(facts),
                "seconds": _seconds(facts),
                "figures": figures(facts),
            }
        )
    if as_json:
        print_json(rows)
        return
    header = ("record", "stage", "profile", "status", "time", "figures")
    table = [(r["id"], r["stage"], r["profile"], r["status"], _time(r["seconds"]), r["figures"]) for r in rows]
    print_table(header, table, sys.stdout)
    if not rows:
        print(f"no records in {workspace.shown(workspace.experiments)} yet; try make demo", file=sys.stderr)


def summary_table(records: Sequence[tuple[str, Facts]]) -> None:
    """One row a record, on stderr: figures with their intervals, each on its own line."""
    header = ("record", "stage", "status", "time", "figures")
    table = [(i, f.stage, liveness(f), _time(_seconds(f)), figures(f)) for i, f in records]
    print_table(header, table, sys.stderr)


def figures(facts: Facts) -> list[str]:
    """`key_figures`, of a record that may be older than this code or edited."""
    try:
        return list(key_figures(facts))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"results of another shape ({type(error).__name__}: {error})"]


def key_figures(facts: Facts) -> Iterator[str]:
    """The few figures by which one knows a record again."""
    results = facts.results
    if facts.failure:
        yield facts.failure.message
    if facts.stage == "data" and "rows" in results:
        yield f"{results['rows']} rows"
    if "eval_loss" in results:
        control = (
            " (control: answers shuffled)" if facts.configuration.get("sft_config", {}).get("shuffle_answers") else ""
        )
        yield f"held-out loss {_change(results['eval_loss'])}{control if facts.stage == 'sft' else ''}"
    if "preference_accuracy" in results:
        accuracy = results["preference_accuracy"]
        beside = f", length alone {accuracy['length_alone']:.2f}" if "length_alone" in accuracy else ""
        yield f"held-out preference accuracy {_figure(accuracy)}, chance 0.50{beside}"
    for task, change in results.get("benchmarks", {}).items():
        yield f"{task} {change['metric']} {_change(change)}"
    if "win_rate" in results:
        yield f"win-rate {_figure(results['win_rate'])}, the longer answer {_figure(results['win_rate']['longest_wins'])}"
    if "stops_by_itself" in results:
        lengths, stops = results["answer_tokens"], results["stops_by_itself"]
        yield (
            f"answers {lengths['before']['value']:.0f} → {lengths['after']['value']:.0f} tokens long, "
            f"{stops['before']['value']:.0%} → {stops['after']['value']:.0%} end by themselves"
        )
    if "receipt" in results:
        receipt = results["receipt"]
        logits = f"; logits within {receipt['logits_max_difference']:.1g}" if "logits_max_difference" in receipt else ""
        yield f"{receipt['modules']} modules = base + adapter within rounding{logits}"
    if "requests" in results:
        yield f"{results['requests']} requests, {results['completion_tokens']} tokens, {results['errors']} failed"


def _change(change: dict[str, Any]) -> str:
    return (
        f"{change['before']['value']:.2f} → {change['after']['value']:.2f}, change {_figure(change['delta'], '+.2f')}"
    )


def _figure(figure: dict[str, Any], form: str = ".2f") -> str:
    if "ci_low" not in figure:
        return f"{figure['value']:{form}} (n = {figure['n']})"
    return f"{figure['value']:{form}} [{figure['ci_low']:{form}}, {figure['ci_high']:{form}}] n={figure['n']}"


def _seconds(facts: Facts) -> float | None:
    """Of a record that may be edited: None for anything but a number."""
    seconds = facts.resources.get("wall_seconds")
    return seconds if isinstance(seconds, int | float) and math.isfinite(seconds) else None


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
