"""Finished runs against each other and against the goals: ratios with their spread, what must be the same, the table, the plot.

A ratio is taken within a round, where both trained the same part of the bed one after the other; shown are the median over
the rounds and the smallest and largest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median
from typing import Any

LOSSES_AGREE = 0.02


@dataclass(frozen=True)
class Result:
    """One run. Seconds and bytes; `speed` is of the steps after the first."""

    task: str  # sft | dpo | help
    name: str
    round: int
    part: str
    wall: float  # the whole command
    cpu: float
    first_step: float = 0.0  # from the command to the end of its first optimiser step
    first_step_cpu: float = 0.0
    speed: float = 0.0  # a CPU second: non-padding tokens (sft), pairs (dpo)
    speed_wall: float = 0.0  # the same a second
    largest: int = 0  # peak resident memory of the largest process
    whole: int = 0  # and of all processes of the command
    losses: tuple[float, ...] = ()  # a step each
    adapter: Mapping[str, int] | None = None  # parameters by type, in the file that it leaves
    load: float = 0.0  # processes that wanted to run, on the machine, when it ended


@dataclass(frozen=True)
class Goal:
    """`measure` of ours against a peer's: at least or at most so many times it. No bound: shown without a goal."""

    task: str
    says: str
    measure: str
    peer: str
    faster: bool = False  # the peer's over ours, so that more is better
    at_least: float | None = None
    at_most: float | None = None

    def ratios(self, results: Iterable[Result]) -> list[float]:
        """A round each, of those where both ran."""
        by_round: dict[int, dict[str, float]] = {}
        for result in results:
            if result.task == self.task and result.name in ("ours", self.peer):
                by_round.setdefault(result.round, {})[result.name] = getattr(result, self.measure)
        both = [found for found in by_round.values() if len(found) == 2]
        return [f[self.peer] / f["ours"] if self.faster else f["ours"] / f[self.peer] for f in both]

    def reached(self, ratio: float) -> bool:
        return ratio >= (self.at_least or 0.0) and (self.at_most is None or ratio <= self.at_most)

    @property
    def bound(self) -> str:
        return f"≥ {self.at_least:g}×" if self.at_least else f"≤ {self.at_most:g}×" if self.at_most else ""


TOKENS, EPOCH = "non-padding tokens / CPU s", "one epoch, times faster"
START, MEMORY = "command to first step", "peak memory"
GOALS = (
    Goal("sft", TOKENS, "speed", "trl", at_least=2.5),
    Goal("sft", TOKENS, "speed", "trl-tuned", at_least=1.7),
    Goal("sft", TOKENS, "speed", "trl-fastest"),
    Goal("sft", TOKENS, "speed", "hand", at_least=1.0),
    Goal("sft", TOKENS, "speed", "hand-four-rows"),
    Goal("sft", f"{START}, s", "first_step", "trl", at_most=0.6),
    Goal("sft", f"{START}, CPU s", "first_step_cpu", "trl"),
    Goal("sft", MEMORY, "whole", "trl-tuned", at_most=0.65),
    Goal("sft", MEMORY, "whole", "trl-fastest"),
    Goal("sft", MEMORY, "largest", "trl-in-process", at_most=0.85),
    Goal("sft", MEMORY, "largest", "hand"),
    Goal("dpo", f"{EPOCH}, s", "wall", "trl", faster=True, at_least=2.4),
    Goal("dpo", f"{EPOCH}, s", "wall", "trl-precomputed", faster=True, at_least=2.2),
    Goal("dpo", f"{EPOCH}, s", "wall", "trl-tuned", faster=True),
    Goal("dpo", f"{EPOCH}, CPU s", "cpu", "trl", faster=True),
    Goal("dpo", f"{EPOCH}, CPU s", "cpu", "trl-precomputed", faster=True),
    Goal("dpo", f"{EPOCH}, CPU s", "cpu", "trl-tuned", faster=True),
    Goal("dpo", "pairs / CPU s", "speed", "trl-tuned"),
    Goal("dpo", MEMORY, "largest", "trl-tuned", at_most=0.85),
)
HELP_GOAL = 0.2  # seconds


def differences(results: Sequence[Result]) -> list[str]:
    """How runs of one task differ in what must be the same: parameters trained, their type, and the losses.

    A loss is compared with ours over the steps that both took: a step is four rows, or for a packed contestant more, but
    the rate and the number of updates behind the loss are the same.
    """
    said = []
    ours = {(r.task, r.round): r for r in results if r.name == "ours"}
    for result in results:
        mine = ours.get((result.task, result.round))
        if mine is None or mine is result or result.task == "help":
            continue
        who = f"{result.task}, {result.name}, round {result.round}"
        if result.adapter != mine.adapter:
            said.append(f"{who}: trains {result.adapter}, ours {mine.adapter}")
        steps = min(len(mine.losses), len(result.losses))
        theirs, own = mean(result.losses[:steps]), mean(mine.losses[:steps])
        if not abs(theirs / own - 1) <= LOSSES_AGREE:
            said.append(f"{who}: mean loss of the first {steps} steps {theirs:.4f}, ours {own:.4f}")
    return said


def spread(values: Sequence[float], form: str = ".2f") -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def goals_table(results: Sequence[Result], names: Mapping[str, str]) -> str:
    rows = [("", "", "against", "ours / theirs, median (least–most)", "goal", "")]
    for goal in GOALS:
        if ratios := goal.ratios(results):
            verdict = ("reached" if goal.reached(median(ratios)) else "MISSED") if goal.bound else ""
            rows.append((goal.task, goal.says, names[goal.peer], spread(ratios), goal.bound, verdict))
    if helps := [r.wall for r in results if r.task == "help"]:
        verdict = "reached" if median(helps) <= HELP_GOAL else "MISSED"
        rows.append(("", "aletheia --help", "", f"{spread(helps)} s", f"≤ {HELP_GOAL} s", verdict))
        rows.append(("", "", "", f"{spread([r.cpu for r in results if r.task == 'help'])} CPU s", "", ""))
    return aligned(rows)


def cautions(results: Sequence[Result], cores: int) -> list[str]:
    """What the figures are not good for."""
    said = []
    loads = [r.load for r in results if r.task != "help"]
    if loads and median(loads) > cores:
        said.append(
            f"{median(loads):.0f} processes shared {cores} cores: read CPU seconds; seconds are of the others too"
        )
    if any(r.part == "quick" for r in results):
        said.append("three steps of a few rows: no figures")
    return said


def runs_table(results: Sequence[Result], names: Mapping[str, str]) -> str:
    """Each contestant's medians."""
    rows = [
        ("", "", "tokens or pairs / CPU s", "to first step, s (CPU s)", "epoch, s (CPU s)", "peak MB, largest (all)",
         "steps", "loss first → last"),
    ]  # fmt: skip
    for task, name in dict.fromkeys((r.task, r.name) for r in results if r.task != "help"):
        own = [r for r in results if (r.task, r.name) == (task, name)]
        mid = {key: median(getattr(r, key) for r in own) for key in ("first_step", "first_step_cpu", "wall", "cpu")}
        rows.append(
            (
                task,
                names[name],
                spread([r.speed for r in own], ".0f" if task == "sft" else ".2f"),
                f"{mid['first_step']:.1f} ({mid['first_step_cpu']:.1f})",
                f"{mid['wall']:.1f} ({mid['cpu']:.1f})",
                f"{median(r.largest for r in own) / 1e6:,.0f} ({median(r.whole for r in own) / 1e6:,.0f})",
                str(len(own[0].losses)),
                f"{median(r.losses[0] for r in own):.3f} → {median(r.losses[-1] for r in own):.3f}",
            )
        )
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def draw(path: Path, results: Sequence[Result], names: Mapping[str, str]) -> None:
    """A panel a measure, a bar a contestant (its median), a dot a run."""
    from matplotlib.figure import Figure

    from pipeline.train.curves import BLUE, GREY

    panels = [
        (task, title, measure, unit)
        for task, title, measure, unit in (
            ("sft", "SFT: non-padding tokens a CPU second, more is better", "speed", 1.0),
            ("sft", "SFT: peak memory of the command, MB", "whole", 1e6),
            ("sft", "SFT: CPU seconds from the command to the first step", "first_step_cpu", 1.0),
            ("dpo", "DPO: CPU seconds of one epoch, the whole command", "cpu", 1.0),
            ("dpo", "DPO: peak memory of the command, MB", "whole", 1e6),
        )
        if any(r.task == task for r in results)
    ]
    if not panels:
        return
    figure = Figure(figsize=(8, 2.1 * len(panels)), dpi=144, layout="constrained")
    for ax, (task, title, measure, unit) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        of_task = [r for r in results if r.task == task]
        who = list(dict.fromkeys(r.name for r in of_task))[::-1]
        values: list[list[Any]] = [[getattr(r, measure) / unit for r in of_task if r.name == name] for name in who]
        ax.barh(
            [names[n] for n in who], [median(v) for v in values], color=[BLUE if n == "ours" else GREY for n in who]
        )
        for place, dots in enumerate(values):
            ax.plot(dots, [place] * len(dots), "o", color="black", markersize=3, alpha=0.6)
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
