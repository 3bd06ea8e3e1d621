"""What the judges found, for the record and for whoever waits at the terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.judges.judge import Judge, Spent
from eval.judges.panel import MAJORITY, agreement, majority
from eval.statistics.bradley_terry import Ranking
from eval.winrate.duels import Duels
from eval.winrate.win_rate import Group, WinRate, families_of
from pipeline import statistics
from pipeline.progress import say
from pipeline.statistics import CONFIDENCE


def key(name: str) -> str:
    """A judge's name as one in the record, fit for a dotted path."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")


def figures(result: WinRate, judge: Judge) -> dict[str, Any]:
    """One judge's rate with all that stands beside it. Without a value where nothing is scored."""
    worst, best = result.worst, result.best
    beside = {
        "verdict": result.verdict, "wins": result.wins, "ties": result.ties, "losses": result.losses,
        "unscored": result.unscored, "sign_test_p": round(result.p_value, 4), "judge": judge.name,
        "weakness": judge.limits, "students_t": result.students_t, "if_unscored_lost": worst, "if_unscored_won": best,
        "base_against_itself": result.against_itself, "longest_wins": result.longest_wins,
        "at_equal_length": result.at_equal_length, "agrees_with_longest": result.agrees_with_longest,
        "by_domain": _groups(result.by_domain), "by_difficulty": _groups(result.by_difficulty),
    }  # fmt: skip
    if result.positions and not judge.order_blind:
        beside["positions"] = {
            "consistent": result.positions.consistent, "favoured_first": result.positions.favoured_first,
            "favoured_second": result.positions.favoured_second, "sign_test_p": round(result.positions.p_value, 4),
        }  # fmt: skip
    found = {name: value for name, value in beside.items() if value not in (None, {})}
    return dict(statistics.as_record(result.rate or {}) | statistics.as_record(found))


def _groups(groups: Mapping[str, Group]) -> dict[str, Any]:
    return {name: statistics.as_record(group.rate) | {"holm_p": group.holm_p} for name, group in groups.items()}


def spent(judge: Judge) -> dict[str, Any]:
    """Nothing of a judge that is not paid for."""
    took: Spent = judge.spent
    return {name: value for name, value in vars(took).items() if value is not None} if took.calls or took.kept else {}


def several(said: Sequence[Duels], rates: Sequence[WinRate], ours: str, theirs: str) -> dict[str, Any]:
    """Each further judge's own rate, how far all of them agree, and what most of them say."""
    scores = {duels.judge.name: duels.judged(ours, theirs).scores for duels in said}
    agreed, most = agreement(scores), majority(scores)
    cast, families = [score for score in most if score is not None], families_of(said[0].questions)
    clusters = families and [family for family, score in zip(families, most, strict=True) if score is not None]
    found: dict[str, Any] = {
        key(duels.judge.name): figures(rate, duels.judge) for duels, rate in zip(said[1:], rates[1:], strict=True)
    }
    between = {f"{key(a)}_and_{key(b)}": figure for (a, b), figure in agreed.pairs.items() if figure}
    found["agreement"] = ({"alpha": agreed.alpha} if agreed.alpha else {}) | between
    if cast:
        found["majority"] = statistics.as_record(statistics.rate(cast, clusters)) | {
            "judge": MAJORITY, "unscored": len(most) - len(cast)
        }  # fmt: skip
    return dict(statistics.as_record(found))


def ranking(ranked: Ranking) -> dict[str, Any]:
    """Strengths in log odds, best first, and the chance of each to win over each where one does."""
    wins = {f"{a}_over_{b}": figure for (a, b), figure in ranked.wins.items()}
    return dict(statistics.as_record({"strengths": ranked.strengths, "wins": wins}))


def tell(result: WinRate, judge: Judge, whose: str) -> None:
    rate = result.rate.text() if result.rate else "unknown"
    say(f"win-rate against the {whose} {rate}: {result.verdict}")
    say(f"  the judge, {judge.name}: {judge.limits}")
    for note in result.notes:
        say(f"  {note}")
    say(f"  if the longer simply won: {result.longest_wins.text()}")
    if result.at_equal_length:
        say(f"  were both answers equally long: {result.at_equal_length.text()}")
    for what, groups in (("domain", result.by_domain), ("difficulty", result.by_difficulty)):
        if groups:
            say(f"  by {what}: {_stand_out(groups)}")


def _stand_out(groups: Mapping[str, Group]) -> str:
    fewest = min(group.rate.n for group in groups.values())
    shown = [f"{name} {group.rate.text()}" for name, group in groups.items() if group.holm_p < 1 - CONFIDENCE]
    few = f"of {len(groups)}, the smallest of {fewest} questions"
    return f"{'; '.join(shown)} ({few})" if shown else f"no difference shown in any {few}"


def tell_ranking(ranked: Ranking) -> None:
    say("  in order of strength: " + "; ".join(f"{name} {figure.text()}" for name, figure in ranked.strengths.items()))


def tell_several(found: Mapping[str, Any]) -> None:
    """Of `several`, what the first judge's own lines have not said."""
    for facts in found.values():
        if "judge" in facts and "value" in facts:
            figure = statistics.Figure.model_validate(
                {name: facts[name] for name in ("value", "ci_low", "ci_high", "n") if name in facts}
            )
            say(f"  {facts['judge']}: {figure.text()}")
    if alpha := found["agreement"].get("alpha"):
        say(f"  agreement between them, Krippendorff's alpha: {statistics.Figure.model_validate(alpha).text()}")
