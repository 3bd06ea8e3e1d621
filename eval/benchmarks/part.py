"""Benchmarks: lm-eval-harness tasks, each model on the same items, compared item by item."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from eval.benchmarks import harness
from eval.benchmarks.harness import Scores
from eval.contestants import BASE, Contestant
from eval.part import Compared, against_each
from pipeline import statistics
from pipeline.config import EvalConfig
from pipeline.data.rows import Row
from pipeline.progress import say
from pipeline.records.metrics import benchmark_is_lower_better
from pipeline.stage import Job
from pipeline.tasks import find_tasks


@dataclass
class Benchmarks:
    name: ClassVar[str] = "benchmarks"
    over_endpoint: ClassVar[bool] = False

    config: EvalConfig
    tasks: Sequence[dict[str, Any] | str] = ()

    @classmethod
    def prepare(cls, job: Job) -> Self:
        config = job.config
        return cls(
            config.eval_config, find_tasks(job.workspace.path(config.training_data.eval), config.eval_config.tasks)
        )

    def rows(self) -> dict[str, Sequence[Row]]:
        return {}

    def plan(self) -> list[tuple[str, str]]:
        return [("benchmarks", ", ".join(self.config.tasks) or "none")]

    def measure(self, who: Contestant, model: Any) -> dict[str, Scores]:
        return harness.run(model, who.chat, self.tasks, self.config, who.label) if self.tasks else {}

    def compare(self, measured: dict[str, dict[str, Scores]], folder: Path) -> Compared:
        return against_each(measured, _compare) if self.tasks else Compared()


def _compare(theirs: dict[str, Scores], ours: dict[str, Scores], whose: str) -> Compared:
    found, results = Compared(), {}
    for name, scores in ours.items():
        before, after = ([s[name].items[i] for i in sorted(scores.items)] for s in (theirs, ours))
        change = statistics.paired(before, after, shares=set(before + after) <= {0.0, 1.0})
        gained = sum(a > b for b, a in zip(before, after, strict=True))
        lost = sum(a < b for b, a in zip(before, after, strict=True))
        p_value = statistics.sign_test(gained, lost)  # on 0/1 items: McNemar's exact test
        verdict = change.verdict(benchmark_is_lower_better(scores.metric))
        than = "" if whose == BASE else f", from {whose}"
        say(f"{name} {scores.metric} {change.before.text()} → {change.after.text()}{than}: {verdict}")
        facts = {"metric": scores.metric, "version": scores.version, "mcnemar_p": round(p_value, 4)}
        results[name] = statistics.as_record(change) | facts
        found.items[f"benchmarks.{name}"] = {str(i): (theirs[name].items[i], s) for i, s in scores.items.items()}
    for name, p in statistics.holm({name: task["mcnemar_p"] for name, task in results.items()}).items():
        results[name]["holm_p"] = round(p, 4)  # of so many tasks
    found.results["benchmarks"] = results
    return found
