"""The tables of a result: what stands behind its claims, and the controls beside them. Cells are text.

    tables(results)     [Table("Controls of the win-rate", ("control", "figure", "reads"), [[…], …], note), …]

Results that an edit or another version gave another shape make a table that says so, never an error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.page import words
from eval.page.claims import DOMAIN, NOTHING, SHARE, as_change, as_figure, by_domain, claims, doubt_of, part, spread
from pipeline import statistics
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Verdict
from pipeline.statistics import Figure

ODD = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(results: dict[str, Any]) -> list[Table]:
    """Those that have anything to tell."""
    makers: dict[str, Callable[[dict[str, Any]], Table]] = {
        "Guards": _guards,
        "The win-rate and its controls": _win_rate,
        "The win-rate by domain and difficulty": _groups,
        "Further judges": _judges,
        "All contestants in order": _ranking,
        "What people said": _people,
        "Held-out rows by domain": _by_domain,
        "Held-out pairs by fault": _by_fault,
        "Where answers end": _end_of_turn,
        "How long answers are": _lengths,
        "Code in answers": _technical,
        "Is it the model that was trained": _parity,
    }
    found = []
    for title, make in makers.items():
        try:
            table = make(results)
        except ODD as error:
            table = Table(title, (), [], [f"results of another shape ({type(error).__name__})"])
        if table.rows or table.notes:
            found.append(table)
    return [*found, *_others(results)]


def criteria(verdict: Verdict | None) -> Table:
    """What the person, or the profile, asked of this record, and what became of it."""
    rows = []
    for judged in verdict.judged if verdict else ():
        needed = f"; about {judged.n_needed:,} rows would decide it" if judged.n_needed else ""
        role = " (guardrail)" if judged.role == "guardrail" else ""
        rows.append([f"{judged.criterion}{role}", judged.finding, judged.observed, f"{judged.why}{needed}"])
    finding = [f"Together: {verdict.finding}."] if verdict and verdict.finding else []
    return Table("What was asked of it", ("criterion", "finding", "observed", "why"), rows, finding)


def _guards(results: dict[str, Any]) -> Table:
    """Tasks on which nothing may be lost."""
    guards = results.get("guards")
    rows, notes = [], []
    for name, said in (part(guards, "tasks") or {}).items():
        change, needed = as_change(part(results, "benchmarks", name)), as_metric(part(said, "n_needed"))
        told = f"{part(said, 'why') or ''}{f'; {needed.value:,.0f} items would show that it held' if needed else ''}"
        figure = words.figure(change.delta, sign="+") if change else ""
        rows.append([str(name), str(part(said, "finding") or "?"), figure, told])
    if margin := as_metric(part(guards, "margin")):
        notes.append(f"Held: a loss of {margin.value:g} or more is outside the interval.")
    return Table("Guards", ("task", "finding", "change", "why"), rows, notes if rows else [])


def _win_rate(results: dict[str, Any]) -> Table:
    facts = results.get("win_rate", results.get("win_rate_unknown"))
    title = "The win-rate and its controls"
    if not isinstance(facts, dict):
        return Table(title, (), [])
    rows = []
    for key, name, reads in (
        ("", "win-rate", "½: no difference; its interval is Wilson's"),
        ("students_t", "the same, Student's t", "beside Wilson's"),
        ("longest_wins", "if the longer answer simply won", "a judge that reads nothing"),
        ("at_equal_length", "were both equally long", "what is left of it without length"),
        ("agrees_with_longest", "judge agrees with the longer", "1: it may read nothing but length"),
        ("base_against_itself", "the base against itself", "must hold ½, or the judge is broken"),
        ("positions.consistent", "same verdict with sides swapped", "1: the order does not matter"),
        ("if_unscored_lost", "were all without a verdict lost", "the worst case"),
        ("if_unscored_won", "were all without a verdict won", "the best case"),
    ):
        figure = as_figure(part(facts, *key.split(".")) if key else facts)
        if figure:
            rows.append([name, words.figure(figure, SHARE), f"{figure.n:,}", reads])
    counts = [f"{facts[key]} {key}" for key in ("wins", "ties", "losses", "unscored") if key in facts]
    notes = [f"{', '.join(counts)}."] if counts else []
    if said := facts.get("verdict"):
        notes.append(f"Read together: {said}.")
    judge, weakness = facts.get("judge"), facts.get("weakness")
    if judge:
        notes.append(f"Judge: {judge}{f'; {weakness}' if weakness else ''}.")
    return Table(title, ("", "share", "n", "how to read it"), rows, notes)


def _groups(results: dict[str, Any]) -> Table:
    rows = []
    for by in ("by_domain", "by_difficulty"):
        for name, facts in (part(results, "win_rate", by) or {}).items():
            if figure := as_figure(facts):
                rows.append([str(name), words.figure(figure, SHARE), f"{figure.n:,}", _against_half(figure, facts)])
    notes = ["A group is above or below ½ where its p, adjusted for all groups of its kind (Holm), is below 5 % too."]
    return Table("The win-rate by domain and difficulty", ("", "win-rate", "n", ""), rows, notes if rows else [])


def _judges(results: dict[str, Any]) -> Table:
    rows = []
    for name, facts in (results.get("judges") or {}).items():
        if figure := as_figure(facts):
            verdict = str(facts.get("verdict") or _against_half(figure, {}))
            rows.append([str(facts.get("judge") or name), words.figure(figure, SHARE), f"{figure.n:,}", verdict])
    for pair, facts in (part(results, "judges", "agreement") or {}).items():
        if figure := as_figure(facts):
            what = "all agree (Krippendorff's alpha)" if pair == "alpha" else f"{pair.replace('_', ' ')} agree"
            rows.append([what, words.figure(figure, "" if pair == "alpha" else SHARE), f"{figure.n:,}", ""])
    return Table("Further judges", ("", "figure", "n", ""), rows)


def _ranking(results: dict[str, Any]) -> Table:
    strengths = part(results, "ranking", "strengths") or {}
    found = [(str(name), as_figure(facts)) for name, facts in strengths.items()]
    rows = [[name, words.figure(figure), f"{figure.n:,}"] for name, figure in found if figure]
    notes = ["Strengths that explain every pair's wins, in log odds (Bradley-Terry); their mean is 0."] if rows else []
    return Table("All contestants in order", ("", "strength", "n"), rows, notes)


def _people(results: dict[str, Any]) -> Table:
    facts, rows = results.get("human_review"), []
    if not isinstance(facts, dict):
        return Table("What people said", (), [])
    for key, name in (
        ("share_of_wins", "decisive votes for the model"),
        ("agreement", "reviewers agree (Krippendorff's alpha)"),
        ("self_consistency", "same verdict when shown again"),
        ("left", "decisive votes for the left side"),
    ):
        if figure := as_figure(facts.get(key)):
            unit = "" if key == "agreement" else SHARE
            rows.append([name, words.figure(figure, unit), f"{figure.n:,}"])
    for name, said in (facts.get("judges") or {}).items():
        if figure := as_figure(part(said, "with_people", "same")):
            rows.append([f"{name}: same verdict as people", words.figure(figure, SHARE), f"{figure.n:,}"])
        if figure := as_figure(part(said, "corrected", "rate")):
            rows.append([f"{name}: win-rate corrected by people", words.figure(figure, SHARE), f"{figure.n:,}"])
    for name, change in (facts.get("ratings") or {}).items():
        if found := as_change(change):
            rows.append([f"{name}, change", words.figure(found.delta, sign="+"), f"{found.delta.n:,}"])
    opened = facts.get("opened")
    counts = [f"{facts[key]} {key.replace('_', ' ')}" for key in ("wins", "ties", "losses", "both_bad") if key in facts]
    notes = [f"Opened {opened}." if opened else "", f"{', '.join(counts)}." if counts else ""]
    return Table("What people said", ("", "figure", "n"), rows, [note for note in notes if note])


def _by_domain(results: dict[str, Any]) -> Table:
    losses = {claim.path.removeprefix(DOMAIN): claim for claim in by_domain(results)}
    shares = part(results, "by_domain", "preference_accuracy") or {}
    rows = []
    for domain in dict.fromkeys([*losses, *shares]):
        cells, claim, accuracy = [str(domain)], losses.get(domain), as_figure(shares.get(domain))
        if claim:
            delta = claim.change.delta
            reads = f"{claim.verdict}: {claim.doubt}" if claim.doubt else claim.verdict
            cells += [words.change(claim), words.bare(claim), reads, f"{delta.n:,}", _least(delta)]
        else:
            cells += [""] * 5
        cells += [words.figure(accuracy, SHARE), f"{accuracy.n:,}"] if accuracy else ["", ""]
        rows.append(cells)
    notes = []
    if rows:
        notes.append(
            "A domain is called better or worse where its p, adjusted for all domains (Holm), is below 5 % too."
        )
    if by_token := as_change(results.get("eval_loss_by_token")):
        text = words.figure(by_token.delta, sign="+")
        notes.append(f"Every row weighs alike. Were it every token instead, the change in loss would be {text}.")
    if ratio := as_figure(part(results, "perplexity", "ratio")):
        notes.append(f"Perplexity is {words.figure(ratio)} times what it was.")
    header = ("domain", "loss, nats", "change", "reads", "n", "shows from", "prefers chosen", "pairs")
    return Table("Held-out rows by domain", header, rows, notes)


def _by_fault(results: dict[str, Any]) -> Table:
    found, rows = results.get("by_fault"), []
    for fault, facts in found.items() if isinstance(found, dict) else ():
        if figure := as_figure(facts):
            rows.append([str(fault), words.figure(figure, SHARE), f"{figure.n:,}", _against_half(figure, facts)])
    notes = ["Which fault of the rejected answer the model learnt to avoid; chance is 50 %."] if rows else []
    return Table("Held-out pairs by fault", ("fault", "prefers chosen", "n", "reads"), rows, notes)


def _against_half(figure: Figure, facts: Any) -> str:
    if figure.ci_low is None or figure.ci_high is None or doubt_of(facts):
        return NOTHING
    return "above ½" if figure.ci_low > 0.5 else "below ½" if figure.ci_high < 0.5 else NOTHING


def _end_of_turn(results: dict[str, Any]) -> Table:
    facts, rows = results.get("end_of_turn"), []
    for key, name, unit in (
        ("surprise", "surprise at where they end, nats an answer", ""),
        ("at_end", "p(end-of-turn) where an answer ends, mean", SHARE),
        ("median", "the same, median", SHARE),
        ("likely_at_end", "answers where it is above ½", SHARE),
        ("inside", "false ends expected in an answer", ""),
        ("expected", "ends expected in an answer, of which there is 1", ""),
    ):
        ends = [as_figure(part(facts, key, end)) for end in ("before", "after")]
        if all(ends):
            delta = as_figure(part(facts, key, "delta"))
            told = [words.figure(end, unit) for end in ends if end]
            n = ends[0].n if ends[0] else 0
            rows.append([name, *told, words.figure(delta, unit, "+") if delta else "", f"{n:,}"])
    notes = []
    if stops := as_change(results.get("stops_by_itself")):
        before, after = (words.figure(f, SHARE) for f in (stops.before, stops.after))
        notes.append(f"Of their own answers {before} and {after} end by themselves (n = {stops.delta.n:,}).")
    if rows:
        notes.insert(0, "Along held-out answers that people wrote, each of which goes on until its one end.")
    return Table("Where answers end", ("", "base", "model", "change", "n"), rows, notes if rows else [])


def _lengths(results: dict[str, Any]) -> Table:
    facts, rows = results.get("answer_length"), []
    for key, name in (("p10", "a tenth is shorter than"), ("p50", "half is shorter than"), ("p90", "nine tenths are")):
        ends = [as_figure(part(facts, key, end)) for end in ("before", "after")]
        if all(ends):
            rows.append([name, *(words.figure(end) for end in ends if end)])
    notes = []
    if change := as_figure(part(facts, "median_change")):
        notes.append(f"The median of the changes, answer by answer, is {words.figure(change, sign='+')} tokens.")
    return Table("How long answers are", ("tokens", "base", "model"), rows, notes)


def _technical(results: dict[str, Any]) -> Table:
    facts, rows = results.get("technical"), []
    sides = [part(facts, who) for who in ("base", "model")]
    for what, said in (("parses", "parses"), ("passes", "passes")):
        names = dict.fromkeys(name for side in sides for name in (part(side, what) or {}))
        for name in names:
            ends = [as_figure(part(side, what, name)) for side in sides]
            told = [f"{words.figure(end, SHARE)}, n = {end.n:,}" if end else "none" for end in ends]
            rows.append([f"{name} {said}" if what == "parses" else "tests passed", *told])
    for key in ("without_code", "unscored", "unclosed", "not_run"):
        ends_n = [as_metric(part(side, key)) for side in sides]
        if any(end and end.value for end in ends_n):
            rows.append([key.replace("_", " "), *(f"{end.value:,.0f} answers" if end else "" for end in ends_n)])
    notes = ["The two models' shares are of different answers; the change, of answers where both could be judged."]
    return Table("Code in answers", ("", "base", "model"), rows, notes if rows else [])


def _parity(results: dict[str, Any]) -> Table:
    facts, rows = results.get("parity"), []
    for way in ("in_process", "endpoint"):
        if isinstance(found := part(facts, way), dict):
            rows.append(
                [str(found.get("backend", way)), str(found.get("verdict", "")), _brief(found, "backend", "verdict")]
            )
    return Table("Is it the model that was trained", ("run by", "verdict", "compared"), rows)


def _others(results: dict[str, Any]) -> Iterator[Table]:
    """Against further contestants: the same claims, a table each."""
    for block in ("others", "against"):
        found = results.get(block)
        for name, theirs in found.items() if isinstance(found, dict) else ():
            if not isinstance(theirs, dict):
                continue
            rows = [
                [claim.name, words.change(claim), words.delta(claim), f"{claim.change.delta.n:,}", claim.verdict]
                for claim in claims(theirs)
            ]
            yield Table(f"Against {name}", ("", f"{name} → model", "change", "n", ""), rows)


def _least(delta: Figure) -> str:
    """The smallest difference that so many rows can show."""
    deviation = spread(delta)
    return f"±{words.number(statistics.smallest_difference(delta.n, deviation), 2)}" if deviation else ""


def _brief(values: dict[str, Any], *but: str) -> str:
    """A mapping in a line, figures and mappings within left out."""
    told = {k: v for k, v in values.items() if k not in but and not isinstance(v, dict | list)}
    return ", ".join(f"{str(key).replace('_', ' ')} {value}" for key, value in told.items())[:300]
