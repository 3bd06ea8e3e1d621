"""What every part of an evaluation has in common: what it asks each model, and what it makes of the answers.

A part measures one model at a time, and compares when all have been measured. The model that is judged is `model`, what it
began from is `base`; further ones (`eval_config.also`) stand below `others`, each with the same figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from eval.contestants import Contestant
from eval.names import BASE, MODEL
from pipeline.data.rows import Row

Ends = dict[str, tuple[float, float]]  # before and after by item


@dataclass
class Compared:
    """For the record: figures, by the figure that they make up both values of every item, and criteria that must hold."""

    results: dict[str, Any] = field(default_factory=dict)
    items: dict[str, Ends] = field(default_factory=dict)
    guardrails: list[str] = field(default_factory=list)


class Part(Protocol):
    name: ClassVar[str]

    @property
    def over_endpoint(self) -> bool:
        """Whether a server is asked in the place of the model."""

    def rows(self) -> dict[str, Sequence[Row]]:
        """What every model is asked, by its name in the record's `data`."""

    def plan(self) -> list[tuple[str, str]]:
        """What `--dry-run` shows: label and value."""

    def measure(self, who: Contestant, model: Any) -> Any:
        """This model's values, item by item, in the order of the rows; `model` is None where a server is asked."""

    def compare(self, measured: dict[str, Any], folder: Path) -> Compared:
        """`measured`: what `measure` gave, by contestant. What is too long for the record is written to `folder`."""


def against_each(measured: dict[str, Any], compare: Callable[[Any, Any, str], Compared]) -> Compared:
    """`compare(theirs, ours, whose)` of the model against its base, and below `others` against every other."""
    found = compare(measured[BASE], measured[MODEL], BASE)
    for name, theirs in measured.items():
        if name in (BASE, MODEL):
            continue
        other = compare(theirs, measured[MODEL], name)
        found.results.setdefault("others", {})[name] = other.results
        found.items |= {f"others.{name}.{figure}": ends for figure, ends in other.items.items()}
    return found
