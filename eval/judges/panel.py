"""The judges of a profile: made, refused where one would judge itself, and several of them beside one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from urllib.parse import urlsplit

from eval.contestants import Contestant
from eval.judges import key_points
from eval.judges.endpoint import Endpoint, is_here
from eval.judges.judge import Judge, Score, winner
from eval.judges.reward_model import RewardModel
from eval.statistics.agreement import alpha, on_decisive
from pipeline.config import EndpointJudge, RewardModelJudge
from pipeline.errors import UserError
from pipeline.stage import Job
from pipeline.statistics import Figure

MAJORITY = "majority of the judges"


def find_judges(job: Job) -> list[Judge]:
    """In the profile's order. Raises `UserError` for one that cannot judge, or that is named twice."""
    found: list[Judge] = []
    for settings in job.config.eval_config.judges:
        judge: Judge
        if isinstance(settings, EndpointJudge):
            judge = Endpoint(settings, job.workspace, job.config.cost.currency)
        elif isinstance(settings, RewardModelJudge):
            folder = job.workspace.path(settings.reward_model)
            judge = RewardModel(folder, job.workspace.shown(folder), job.config.device, settings.tie_margin)
        else:
            judge = key_points.judge()
        if any(_same(judge, other) for other in found):
            raise job.profile.error("eval_config.judges", f"{judge.name} judges twice", "each once")
        found.append(judge)
    return found


def _same(judge: Judge, other: Judge) -> bool:
    """By name, or two spellings of one address; weights that have two names are one judge too."""
    if not (isinstance(judge, Endpoint) and isinstance(other, Endpoint)):
        return judge.name == other.name
    known, others = (_forms(*each.known_as(each.model)) for each in (judge, other))
    return _place(judge.root) == _place(other.root) and bool(known & others)


def refuse_contestants(judges: Sequence[Judge], contestants: Sequence[Contestant]) -> None:
    """Raises `UserError` where a judge is one of those it would judge, by name, by place or by what its server shows."""
    for judge in judges:
        if not isinstance(judge, Endpoint):
            continue
        its = _forms(*judge.known_as(judge.model), judge.based_on)
        for who in contestants:
            theirs = [who.label.split(" ")[0], who.input.id if who.input else ""]  # `small-sft (EXP-…)` is `small-sft`
            if who.endpoint:
                theirs.append(who.endpoint.model)
                if _place(who.endpoint.root) == _place(judge.root):
                    theirs += judge.known_as(who.endpoint.model)
            if its & _forms(*theirs):
                what = f"the judge {judge.name} is {who.label}, which is judged"
                raise UserError(what, where="eval_config.judges", remedy="another model")


def _forms(*names: str) -> set[str]:
    """How a model may be called: `org/Model` is also `model`."""
    whole = {name.casefold().rstrip("/") for name in names if name}
    return whole | {name.rpartition("/")[2] for name in whole}


def _place(root: str) -> tuple[str, int | None]:
    parts = urlsplit(root)
    host = parts.hostname or ""
    return ("here" if is_here(host) else host), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@dataclass(frozen=True)
class Agreement:
    """Between judges: `alpha` of all, and of each two the share of prompts on which both name the same winner."""

    alpha: Figure | None
    pairs: dict[tuple[str, str], Figure | None]


def agreement(scores: Mapping[str, Sequence[Score]]) -> Agreement:
    """`scores`: each judge's, on the same prompts in the same order."""
    winners = {name: [winner(score) for score in own] for name, own in scores.items()}
    return Agreement(
        alpha=alpha([*zip(*winners.values(), strict=True)], "ordinal"),
        pairs={(a, b): on_decisive(winners[a], winners[b]) for a, b in combinations(winners, 2)},
    )


def majority(scores: Mapping[str, Sequence[Score]]) -> list[Score]:
    """Of each prompt the side that more of the judges that scored it prefer: 1, ½ or 0; None where none did."""
    found: list[Score] = []
    for votes in zip(*scores.values(), strict=True):
        cast = [won for vote in votes if (won := winner(vote)) is not None]
        found.append(winner(0.5 + sum(won - 0.5 for won in cast)) if cast else None)
    return found
