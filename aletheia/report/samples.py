"""What a model answered: the first few lines of `experiments/EXP-…/answers.jsonl`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from aletheia.report.project import text

SHOWN = 3
PARTS = ("prompt", "model", "base")


@dataclass(frozen=True)
class Answer:
    """`said`: prompt, model's and base's answer, those that are there. `score`: 1 for the model's, 0 for the base's."""

    id: str
    said: dict[str, str]
    score: float | None


@dataclass
class Samples:
    """`of`: lines in the file; `unreadable`: those before the last one shown that are no answer."""

    shown: list[Answer] = field(default_factory=list)
    of: int = 0
    unreadable: int = 0


def read_samples(path: Path) -> Samples:
    """Empty where there are none."""
    samples = Samples()
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                samples.of += 1
                if len(samples.shown) == SHOWN:
                    continue
                try:
                    samples.shown.append(_answer(line))
                except (ValueError, TypeError, AttributeError, RecursionError):
                    samples.unreadable += 1
    except OSError:
        return Samples()
    return samples


def _answer(line: str) -> Answer:
    values = json.loads(line)
    score = values.get("score")
    known = isinstance(score, int | float) and not isinstance(score, bool)
    said = {part: text(values[part]) for part in PARTS if values.get(part) is not None}
    return Answer(text(values.get("id")), said, score if known else None)
