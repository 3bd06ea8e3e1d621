"""What a record shows at a glance: its key figures, in lists and in the table at the end of a pipeline."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from aletheia.output import print_table
from eval.page.claims import NOTHING, claims
from pipeline.progress import duration
from pipeline.records.index import shuffled
from pipeline.records.lifecycle import liveness
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Facts


def summary_table(records: Sequence[tuple[str, Facts]]) -> None:
    """One row a record, on stderr: figures with their intervals, each on its own line."""
    header = ("record", "stage", "status", "time", "figures")
    table = [(i, f.stage, liveness(f), took(f), figures(f)) for i, f in records]
    print_table(header, table, sys.stderr)


def figures(facts: Facts) -> list[str]:
    """`key_figures`, of a record that may be older than this code or edited."""
    try:
        return list(key_figures(facts))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return [f"results of another shape ({type(error).__name__}: {error})"]


def seconds(facts: Facts) -> float | None:
    """Wall clock, of a record that may be edited: None for anything but a number."""
    found = as_metric(facts.resources.get("wall_seconds"))
    return found.value if found else None


def took(facts: Facts) -> str:
    wall = seconds(facts)
    return "" if wall is None else duration(wall)


def key_figures(facts: Facts) -> Iterator[str]:
    """The few figures by which one knows a record again."""
    results = facts.results
    if facts.failure:
        yield facts.failure.message.split("; ")[0]  # what; the batch and the remedy stand in the record
    if facts.stage == "data" and "rows" in results:
        yield f"{results['rows']} rows"
    if "eval_loss" in results:
        control = " (control: answers shuffled)" if facts.stage == "sft" and shuffled(facts) else ""
        yield f"held-out loss {_change(results['eval_loss'])}{control}"
    elif isinstance(training := results.get("training"), dict) and "train_loss" in training and facts.stage == "sft":
        loss = training["train_loss"]
        yield f"train loss {loss['first']:.2f} → {loss['last']:.2f}, nothing held out"
    if "preference_accuracy" in results:
        accuracy = results["preference_accuracy"]
        beside = f", length alone {accuracy['length_alone']:.2f}" if "length_alone" in accuracy else ""
        yield f"held-out preference accuracy {_figure(accuracy)}, chance 0.50{beside}"
    for task, change in results.get("benchmarks", {}).items():
        yield f"{task} {change['metric']} {_change(change)}"
    for task in (name for name, said in _guards(results).items() if said["finding"] != "held"):
        yield f"guard {task}: {results['guards']['tasks'][task]['finding']}"
    if "win_rate" in results:
        yield f"win-rate {_figure(results['win_rate'])}, the longer answer {_figure(results['win_rate']['longest_wins'])}"
    elif "win_rate_unknown" in results:
        yield "win-rate unknown: no verdict could be read"
    if share := results.get("human_review", {}).get("share_of_wins"):
        yield f"people's decisive votes {_figure(share)}"
    if "technical" in results:
        yield from _code(results["technical"])
    if "stops_by_itself" in results:
        lengths, stops = results["answer_tokens"], results["stops_by_itself"]
        yield (
            f"answers {lengths['before']['value']:.0f} → {lengths['after']['value']:.0f} tokens long, "
            f"{stops['before']['value']:.0%} → {stops['after']['value']:.0%} end by themselves"
        )
    if facts.stage == "eval":
        count = Counter(claim.verdict for claim in claims(results) if claim.lower_is_better is not None)
        if count.total() > 1:
            yield f"better in {count['better']}, worse in {count['worse']}, not known of {count[NOTHING]}"
    if "receipt" in results:
        receipt = results["receipt"]
        logits = f"; logits within {receipt['logits_max_difference']:.1g}" if "logits_max_difference" in receipt else ""
        yield f"{receipt['modules']} modules = base + adapter within rounding{logits}"
    if facts.stage == "export":
        for kind, found in results.get("formats", {}).items():
            yield f"{kind} {found['bytes'] / 1e6:,.1f} MB, KL {_figure(found['kl'], '.4f')} nats a token"
    if "requests" in results:
        yield f"{results['requests']} requests, {results['completion_tokens']} tokens, {results['errors']} failed"


def _guards(results: dict[str, Any]) -> dict[str, Any]:
    return dict(results["guards"]["tasks"]) if "guards" in results else {}


def _code(technical: dict[str, Any]) -> Iterator[str]:
    """Of both models; nothing where no answer could be judged."""
    for what, name, said in (("parses", "code", "code parses"), ("passes", "tests", "tests passed")):
        base, model = (technical[who][what].get(name) for who in ("base", "model"))
        if base or model:
            yield f"{said}: {' → '.join(_figure(figure) if figure else 'none' for figure in (base, model))}"


def _change(change: dict[str, Any]) -> str:
    return (
        f"{change['before']['value']:.2f} → {change['after']['value']:.2f}, change {_figure(change['delta'], '+.2f')}"
    )


def _figure(figure: dict[str, Any], form: str = ".2f") -> str:
    if "ci_low" not in figure:
        return f"{figure['value']:{form}} (n = {figure['n']})"
    return f"{figure['value']:{form}} [{figure['ci_low']:{form}}, {figure['ci_high']:{form}}] n={figure['n']}"
