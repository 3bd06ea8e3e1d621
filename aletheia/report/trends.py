"""Figures over time: one trend a stage and a figure that at least two of its records have."""

from dataclasses import dataclass
from typing import Any

from aletheia.report.project import Entry, Project

DRAWN = 1000  # records in a chart


@dataclass(frozen=True)
class Trend:
    """Records oldest first. `main`: some of the figures carry an interval, and they are not what was before a change."""

    stage: str
    figure: str
    entries: list[Entry]

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.figure}"

    @property
    def main(self) -> bool:
        sure = any(entry.metrics[self.figure].ci_low is not None for entry in self.entries)
        return sure and not self.figure.endswith(".before")

    @property
    def note(self) -> str:
        count = len(self.entries)
        return f"the newest {DRAWN:,} of {count:,} records" if count > DRAWN else f"{count} records"

    def points(self) -> list[list[Any]]:
        """`[id, started, profile, value, low, high, n]` of each record."""
        found = [(entry, entry.metrics[self.figure]) for entry in self.entries]
        return [[e.id, e.started, e.profile, m.value, m.ci_low, m.ci_high, m.n] for e, m in found]


def trends(project: Project) -> dict[str, list[Trend]]:
    """By stage, in the order the records have them."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in reversed(project.entries):
        for figure in entry.metrics:
            found.setdefault((entry.stage, figure), []).append(entry)
    stages: dict[str, list[Trend]] = {}
    for (stage, figure), entries in found.items():
        if len(entries) >= 2:
            stages.setdefault(stage, []).append(Trend(stage, figure, entries))
    return dict(sorted(stages.items()))
