"""Benchmarks: lm-eval-harness tasks, each contestant on the same items, compared item by item.

    aletheia eval benchmarks --profile tiny --dry-run      which tasks can run here, and why the others cannot

Before it runs: what can (`preflight`), how many items and tokens that is, and, from the first model's first items, what it
will take (`estimate`). After: paired differences, and whether the guards held (`guards`). `benchmarks.jsonl` beside the record
has a line of each item that was generated: what each contestant wrote, and why code does not pass.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from eval.benchmarks import estimate, guards, harness, preflight
from eval.benchmarks.estimate import Expected
from eval.benchmarks.harness import Scores
from eval.contestants import Contestant
from eval.names import BASE, MODEL
from eval.part import Compared, against_each
from pipeline import statistics
from pipeline.config import Profile
from pipeline.data.rows import Row
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.stage import Job
from pipeline.tasks import find_tasks


@dataclass
class Benchmarks:
    name: ClassVar[str] = "benchmarks"

    config: Profile
    found: preflight.Preflight = field(default_factory=preflight.Preflight)
    chosen: dict[str, list[int]] = field(default_factory=dict)
    expected: Expected | None = None
    share: float = 1.0  # of these items, within `max_hours`
    through: dict[str, str] = field(default_factory=dict)  # by contestant
    seconds: float = 0.0

    @classmethod
    def prepare(cls, job: Job) -> Self:
        """Says which tasks run. Raises `UserError` where there are tasks, and none can."""
        config = job.config.eval_config
        if unknown := [name for name in config.guard_tasks if name not in config.tasks]:
            raise job.profile.error(
                "eval_config.guard_tasks",
                f"{unknown[0]} is not among eval_config.tasks",
                f"{unknown[0]} there too, or eval_config.guard_tasks=[]",
            )
        if not config.tasks:
            return cls(job.config)
        tasks = find_tasks(job.workspace.path(job.config.training_data.eval), config.tasks)
        found = preflight.check(tasks, config.run_code)
        for name, why in found.left_out.items():
            if why.startswith(preflight.UNKNOWN):  # a mistake, found now and not in the record tomorrow
                raise job.profile.error(
                    "eval_config.tasks", f"{name}: {why}", "one of lm-eval's names, or of data/eval/tasks"
                )
        if found.left_out:
            say("\n  ".join(["benchmarks:", *found.lines()]))
        if not found.ready:
            raise UserError(
                f"none of {', '.join(config.tasks)} can run here: {next(iter(found.left_out.values()))}",
                where="eval_config.tasks",
                remedy="eval_config.tasks=[aletheia_choices], or [] for none",
            )
        return cls(job.config, found, harness.choose(found.ready, config.limit, config.seed))

    @property
    def over_endpoint(self) -> bool:
        """Only where that is asked for: a server that computes otherwise shows a difference that training did not make."""
        return self.config.eval_config.benchmarks_endpoint

    def rows(self) -> dict[str, Sequence[Row]]:
        return {}

    def plan(self) -> list[tuple[str, str]]:
        if not self.config.eval_config.tasks:
            return [("benchmarks", "none")]
        asked = {each.name: sum(len(self.chosen[leaf]) for leaf in each.leaves) for each in self.found.ready}
        rows = [("benchmarks", f"{name}: {n} items") for name, n in asked.items()]
        return rows + [("left out", f"{name}: {why}") for name, why in self.found.left_out.items()]

    def measure(self, who: Contestant, model: Any) -> dict[str, Scores]:
        """By task. Nothing of a server that is not the judged model's: its tokens are not ours."""
        if not self.found.ready or (who.endpoint and who.name != MODEL):
            return {}
        config, ready = self.config.eval_config, self.found.ready
        there, chat = who.endpoint, who.chat
        lm = harness.served(there, chat) if there else harness.in_process(model, chat, config.batch_size)
        self.through[who.name] = there.root if there else "in process"
        start = time.monotonic()
        if self.expected is None:
            self._foretell(lm, who)
        say(f"{who.label}: benchmarks {', '.join(each.name for each in ready)}")
        scores = harness.run(lm, who.chat, ready, self.chosen, who.label, self.found.code_eval)
        self.seconds += time.monotonic() - start
        return scores

    def _foretell(self, lm: Any, who: Contestant) -> None:
        """Of all models, from the first. Fewer items where `max_hours` wants that."""
        config, ready = self.config.eval_config, self.found.ready
        models = 2 + sum("://" not in other for other in config.also)
        expected = estimate.expect(ready, self.chosen, who.chat, models)
        say(f"benchmarks: {expected.text()}")
        if max(expected.items.values()) > estimate.WORTH_A_TRY * config.batch_size or config.max_hours is not None:

            def ask(few: harness.Chosen) -> None:
                those = [preflight.Ready(name, {name: task}, each.runs_code) for each in ready
                         for name, task in each.leaves.items() if name in few]  # fmt: skip
                harness.run(lm, who.chat, those, few, who.label, self.found.code_eval)

            expected = estimate.timed(expected, ask, self.chosen, config.batch_size)
            expected = estimate.priced(expected, self.config.cost)
            say(f"benchmarks: about {expected.time()}")
        self.share = estimate.share_within(expected, config.max_hours)
        if self.share < 1:
            self.chosen = harness.choose(ready, config.limit, config.seed, self.share)
        self.expected = expected

    def compare(self, measured: dict[str, dict[str, Scores]], folder: Path) -> Compared:
        measured = {name: scores for name, scores in measured.items() if scores}
        if not measured:
            return Compared()
        _same_items(measured)
        _write(measured, folder / "benchmarks.jsonl")
        found = against_each(measured, self._compare)
        found.results |= {"benchmarks_left_out": self.found.left_out} if self.found.left_out else {}
        run: dict[str, Any] = {"through": self.through, "seconds": round(self.seconds, 1)}
        run |= {"predicted": self.expected.as_record()} if self.expected else {}
        run |= {"share_of_items": round(self.share, 4)} if self.share < 1 else {}
        found.results["benchmarks_run"] = run
        if "guards" in found.results:
            found.guardrails.append(guards.CRITERION)
            say("\n".join(guards.told(found.results["guards"])))
        return found

    def _compare(self, theirs: dict[str, Scores], ours: dict[str, Scores], whose: str) -> Compared:
        found, results, losses = Compared(), dict[str, dict[str, Any]](), dict[str, guards.Loss]()
        for name, scores in ours.items():
            before, after = ([s[name].items[i] for i in scores.items] for s in (theirs, ours))
            shares = set(before + after) <= {0.0, 1.0}
            change = statistics.paired(before, after, shares=shares)
            p = _mcnemar(before, after) if shares else _t_test(before, after)
            results[name] = statistics.as_record(
                {**change.model_dump(exclude_none=True), "metric": scores.metric, "version": scores.version}
            ) | {"mcnemar_p" if shares else "t_test_p": round(p, 4), "asked": scores.prompt | {"of": self._whole(name)}}
            losses[name] = guards.Loss(change, p, scores.lower_is_better)
            found.items[f"benchmarks.{name}"] = {i: (theirs[name].items[i], s) for i, s in scores.items.items()}
        for name, p in statistics.holm({name: loss.p for name, loss in losses.items()}).items():
            results[name]["holm_p"] = round(p, 4)  # of so many tasks
            change, doubted = losses[name].change, p >= guards.ALPHA
            verdict = "no difference shown" if doubted else change.verdict(losses[name].lower_is_better)
            than = "" if whose == BASE else f", from {whose}"
            say(f"{name} {ours[name].metric} {change.before.text()} → {change.after.text()}{than}: {verdict}")
        found.results["benchmarks"] = results
        if named := self.config.eval_config.guard_tasks:
            missing = {
                name: self.found.left_out.get(name, "it was not measured") for name in named if name not in losses
            }
            kept = {name: losses[name] for name in named if name in losses}
            found.results["guards"] = guards.judge(kept, self.config.eval_config.guard_margin, missing)
        return found

    def _whole(self, name: str) -> int | None:
        """How many items the task has, of which some were asked."""
        whole = {each.name: each.items for each in self.found.ready}
        whole |= {leaf: len(task.eval_docs) for each in self.found.ready for leaf, task in each.leaves.items()}
        return whole.get(name)


def _mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """Exact: the sign test of the items that changed."""
    pairs = list(zip(before, after, strict=True))
    return statistics.sign_test(sum(a > b for b, a in pairs), sum(a < b for b, a in pairs))


def _t_test(before: Sequence[float], after: Sequence[float]) -> float:
    """Paired; 1 where no item changed, or all did alike."""
    from scipy import stats

    p = (
        float(stats.ttest_rel(after, before).pvalue)
        if len({a - b for b, a in zip(before, after, strict=True)}) > 1
        else 1
    )
    return min(p, 1.0)


def _same_items(measured: Mapping[str, Mapping[str, Scores]]) -> None:
    """Raises `StageFailed` where two contestants were not asked the same: nothing could be paired."""
    first, *others = measured.items()
    for name, scores in others:
        for task, own in scores.items():
            other = first[1][task].asked
            if own.asked != other:
                item = next(i for i in {**own.asked, **other} if own.asked.get(i) != other.get(i))
                raise StageFailed(f"{task}: {first[0]} and {name} were not asked the same, first at item {item}")


def _write(measured: Mapping[str, Mapping[str, Scores]], path: Path) -> None:
    """What was generated, a line of each item; no file where nothing was."""
    model = measured[MODEL]
    lines = []
    for task, scores in model.items():
        for item in scores.written:
            line: dict[str, Any] = {"task": task, "item": item, "asked_sha256": scores.asked[item]}
            for name, other in measured.items():
                line[name] = {"written": other[task].written[item], "score": other[task].items[item]}
                line[name] |= {"problem": other[task].problems[item]} if item in other[task].problems else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if lines:
        path.write_text("".join(lines), "utf-8")
