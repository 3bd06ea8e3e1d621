"""Whether a model knows where an answer ends: p(end-of-turn) at each place of held-out answers, which all go on but one.

    surprise    −log p of ending where an answer ends and of going on where it goes on, summed, nats an answer: the log
                score, least for a model that says what it knows; neither of the next two is better or worse by itself
    at_end      at the true end: the mean, and `median`; `likely_at_end`: the share of answers where it is above ½
    inside      summed over the places where the answer goes on: so many false ends are expected in an answer
    expected    both together: ends expected in an answer, of which there is 1; more ends too early, fewer too late

The unit is the conversation, whose answers are averaged. It is what the model would do along texts that people wrote;
whether its own answers end by themselves is another question (`stops_by_itself`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eval.statistics.quantiles import quantile
from pipeline import statistics
from pipeline.statistics import Change

if TYPE_CHECKING:
    from pipeline.train.heldout import Ends

LIKELY = 0.5


def compare(theirs: "Sequence[Ends]", ours: "Sequence[Ends]") -> dict[str, Any]:
    """Figures and changes for a record, from the other model to ours on the same conversations."""

    def values(of: "Callable[[Ends], float]") -> tuple[list[float], list[float]]:
        return [of(row) for row in theirs], [of(row) for row in ours]

    at_end = values(_at_end)
    medians = [quantile(side, 0.5) for side in at_end]
    expected = [statistics.mean(side) for side in values(lambda row: _at_end(row) + _inside(row))]
    return {
        "surprise": statistics.paired(*values(lambda row: row.surprise / len(row.at_ends))),
        "at_end": statistics.paired(*at_end),
        "median": dict(zip(("before", "after"), medians, strict=True)),
        "likely_at_end": statistics.paired(*values(lambda row: float(_at_end(row) > LIKELY)), shares=True),
        "inside": statistics.paired(*values(_inside)),
        "expected": dict(zip(("before", "after"), expected, strict=True)) | {"actual": 1.0},
    }


def told(results: dict[str, Any]) -> str:
    """One line of `compare`'s results."""
    surprise, expected = results["surprise"], results["expected"]
    return (
        f"end of turn: surprise {_ends(surprise)} nats an answer: {surprise.verdict(True)}; "
        f"ends expected in an answer {expected['before'].text()} → {expected['after'].text()}, of which there is 1"
    )


def _ends(change: Change) -> str:
    return f"{change.before.text()} → {change.after.text()}"


def _at_end(row: "Ends") -> float:
    return sum(row.at_ends) / len(row.at_ends)


def _inside(row: "Ends") -> float:
    return row.inside / len(row.at_ends)
