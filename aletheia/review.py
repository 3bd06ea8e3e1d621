"""Human review of an evaluation's answers: the page for the people, and what they said once it may be opened.

    aletheia review EXP-2026-11-21-007                 until Ctrl-C; the next time it goes on
    aletheia review EXP-2026-11-21-007 --result        into the record, and printed

Reads `answers.jsonl` beside the record (and `verdicts.jsonl`, of automatic judges); writes `review/<against>/` there: the
votes, and the key that sides were drawn with. The record gets the plan with the key's commitment before the first vote,
every opening, and the result; never a reviewer's name.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aletheia.exp.exporters.record import Finished, finished
from aletheia.output import print_json, print_table
from eval.names import BASE
from eval.review.judges import scores
from eval.review.result import Judge, Result, judged_at_all, result
from eval.review.session import Review, name_of, now, read_rows
from eval.review.store import RATINGS, VOTES, Told
from eval.statistics import sequential
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import criteria, items
from pipeline.records.schema import Facts
from pipeline.statistics import Change, Figure
from pipeline.workspace import Workspace

NAME = "human_review"


def serve_review(
    workspace: Workspace, exp: str, against: str, reviewer: str, n: int | None, each: int | None, port: int
) -> None:
    """Serves the page until Ctrl-C, then says how far the review is."""
    from eval.review.server import HOST, build_app, listen, serve

    try:
        reviewer = name_of(reviewer) if reviewer else ""
    except ValueError as error:
        raise UserError(str(error), where="--reviewer") from None
    record = _record(workspace, exp)
    listener = listen(port)
    review = _open(record, against, n, each)
    _note_plan(record, review)
    say(f"{record.id}: {_planned(review)}")
    print(f"http://{HOST}:{listener.getsockname()[1]}/", flush=True)
    say("Ctrl-C ends it; every vote is kept as it is cast")
    with suppress(KeyboardInterrupt):
        serve(build_app(review, reviewer), listener)
    say(_stands(record, review))


def show_result(workspace: Workspace, exp: str, against: str, early: bool, as_json: bool) -> None:
    """Opens the review: writes its result into the record, and prints it. Raises `UserError` where it may not be yet."""
    record = _record(workspace, exp)
    if not (_folder(record, against) / VOTES).is_file():
        raise UserError("nobody has reviewed it", where=record.id, remedy=f"aletheia review {record.id}")
    review = _open(record, against)
    with review.store.held() as told:
        if told.torn:
            lines = ", ".join(map(str, told.torn))
            say(f"note: {review.store.path}: lines torn by a crash, which nobody was told are kept: {lines}")
        tally = review.tally(told)
        if not tally.may_open and not early:
            raise UserError(
                _stands(record, review, told), where=record.id, remedy="waiting, or --open-early, which is recorded"
            )
        facts = _facts(record)
        judged = scores(record.file.folder, against, _primary(facts))
        found = result(tally, judged_at_all(judged, tally))
        if not found.votes:
            raise UserError("holds no vote yet", where=record.id)
        _write(record, facts, review, found, told, early=not tally.may_open)
    if as_json:
        print_json(found.as_record())
    else:
        names = (str(facts.results.get("model", "model")), _label(facts, against))
        print_table(
            (record.id, f"{names[0]} against {names[1]}, as people see it"), list(_rows(found, names)), sys.stdout
        )


def _record(workspace: Workspace, exp: str) -> Finished:
    record = finished(workspace, exp)
    if not (record.file.folder / items.ANSWERS).is_file():
        where, remedy = workspace.shown(record.file.path), "an eval record made here, with winrate among its parts"
        raise UserError(f"has no {items.ANSWERS} beside it", where=where, remedy=remedy)
    return record


def _folder(record: Finished, against: str) -> Path:
    return record.file.folder / "review" / quote(against, safe="")


def _open(record: Finished, against: str, n: int | None = None, each: int | None = None) -> Review:
    answers = record.file.folder / items.ANSWERS
    rows = read_rows(answers, against, record.workspace.shown(answers))
    return Review(_folder(record, against), rows, against, n, each)


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _facts(record: Finished) -> Facts:
    """What the record says by now."""
    facts = record.file.facts()
    assert facts is not None
    return facts


def _note_plan(record: Finished, review: Review) -> None:
    """Before the first vote: the commitment in the record is what shows later that the key was there first."""
    facts = _facts(record)
    known, against = facts.data.setdefault(NAME, {}), review.plan.against
    noted = known.get(against)
    before = dict(noted) if isinstance(noted, dict) else {}
    if before.get("commitment") == review.plan.commitment:
        return
    earlier = {"abandoned": [*before.pop("abandoned", []), before]} if before else {}
    if earlier:
        say(f"note: {record.id}: an earlier review of the same answers was abandoned, and the record says so")
    known[against] = asdict(review.plan) | earlier
    record.file.write(facts)


def _write(record: Finished, facts: Facts, review: Review, found: Result, told: Told, early: bool) -> None:
    against = review.plan.against
    plan = facts.data.setdefault(NAME, {}).setdefault(against, asdict(review.plan))
    decided = found.wins + found.losses + found.ties + found.both_bad
    plan.setdefault("opened", []).append({"at": now(), "decided": decided} | ({"early": True} if early else {}))
    place = facts.results if against == BASE else facts.results.setdefault("others", {}).setdefault(against, {})
    place[NAME] = found.as_record()
    if looks := sum("early" in look for look in plan["opened"]):
        place[NAME]["early_looks"] = looks
    if late := sum(line.at > plan["opened"][0]["at"] for line in told.lines):
        place[NAME]["votes_after_opening"] = late
        say(f"note: {late} votes or undos came after it was first opened: they count, and the record says so")
    verdict = facts.verdict
    if verdict and any(NAME in one.criterion for one in verdict.criteria):  # frozen before, and only now to be judged
        facts.verdict = criteria.judge(verdict, facts.results)
    record.file.write(facts)


def _primary(facts: Facts) -> str:
    """What the judge of the win-rate is called, whose scores stand in `answers.jsonl`."""
    rates = (facts.results.get(name) for name in ("win_rate", "win_rate_unknown"))
    return next((str(rate["judge"]) for rate in rates if isinstance(rate, dict) and "judge" in rate), "judge")


def _label(facts: Facts, against: str) -> str:
    return str(facts.results.get("against", against)) if against == BASE else against


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _planned(review: Review) -> str:
    plan, n = review.plan, review.plan.planned
    people = f", {plan.votes_each} people each" if plan.votes_each > 1 else ""
    enough = next((w for w in range(n // 2 + 1, n + 1) if sequential.log_e_value(w, n - w) >= sequential.ENOUGH), None)
    shows = f"one side must win {enough} of {n}" if enough else f"{n} are too few, at least 8 are needed"
    return f"{n} prompts of {len(review.rows.prompts)}{people}; to show a difference at the end {shows}"


def _stands(record: Finished, review: Review, told: Any = None) -> str:
    """How far it is, and nothing of what was said."""
    tally = review.tally(told)
    decided = len(tally.verdicts) + tally.skipped
    if tally.may_open:
        return f"may be opened: aletheia review {record.id} --result"
    return f"{decided} of {review.plan.planned} prompts are judged, and it may not be opened yet"


def _rows(found: Result, names: tuple[str, str]) -> Iterator[tuple[str, Any]]:
    ours, theirs = names
    yield "opened", f"{found.opened}; planned were {found.planned} prompts"
    yield (
        "prompts",
        (
            f"{found.wins} for {ours}, {found.losses} for {theirs}, {found.ties} ties, {found.both_bad} both bad, "
            f"{found.skipped} skipped"
        ),
    )
    if found.share_of_wins:
        share = found.share_of_wins.text()
        yield "won", f"{share} of the {found.share_of_wins.n} decisive ones by {ours}: {found.verdict}"
    yield "evidence", f"e-value {found.e_value:g}, 20 is enough{_more(found)}"
    yield "people", f"{found.reviewers}, {found.votes} votes"
    yield "agreement", f"alpha {_text(found.agreement)}; with themselves {_text(found.self_consistency)}"
    yield "left side", f"{_text(found.left)} of decisive votes; 0.5 were it of no matter"
    for name, change in found.ratings.items():
        yield RATINGS[name].lower(), _change(change)  # type: ignore[index]
    for name, judge in found.judges.items():
        yield f"judge {name}", _judge(judge)


def _more(found: Result) -> str:
    return f"; at this share {found.decisive_needed} decisive prompts would be" if found.decisive_needed else ""


def _text(figure: Figure | None) -> str:
    return figure.text() if figure else "not known"


def _change(change: Change) -> str:
    return (
        f"{change.before.value:.2f} → {change.after.value:.2f}, {change.delta.text(digits=2)}: {change.verdict(False)}"
    )


def _judge(judge: Judge) -> list[str]:
    beside, rate = judge.with_people, judge.corrected
    same = f"says the same on {beside.same.text()}; where both name a winner, {_text(beside.on_decisive)}"
    alpha = f"alpha {_text(beside.alpha)}, people among themselves {_text(beside.among_people)}"
    if rate is None:
        return [same, alpha, f"no corrected win-rate: {judge.without}"]
    alone = f"people alone {rate.people_alone.text()}, the judge alone {rate.judge_alone.text()}"
    return [same, alpha, f"win-rate corrected by people {rate.rate.text()}, as {rate.worth} prompts of theirs; {alone}"]
