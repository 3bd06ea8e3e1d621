"""What a model answered: the first few lines of `experiments/EXP-…/answers.jsonl`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 3


@dataclass
class Samples:
    """`of`: answers in the file; `unreadable`: lines among them that are no JSON object."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    of: int = 0
    unreadable: int = 0


def read_samples(path: Path) -> Samples:
    samples = Samples()
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                samples.of += 1
                if len(samples.shown) == SHOWN:
                    continue
                try:
                    answer = json.loads(line)
                except (ValueError, RecursionError):
                    answer = None
                if isinstance(answer, dict):
                    samples.shown.append(answer)
                else:
                    samples.unreadable += 1
    except OSError:
        return Samples()
    return samples
