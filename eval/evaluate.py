"""Eval: the newest model against its base, on rows neither was trained on.

    aletheia eval --profile tiny        make eval PROFILE=tiny
    aletheia eval heldout winrate --profile tiny

`heldout`: loss, perplexity and preference accuracy on the rows that training held out. `benchmarks`: lm-eval-harness
tasks. `winrate`: answers to open questions, compared by the simplest judge, which says how weak it is; whether their code
parses, and with `eval_config.run_code` passes its tests (`eval/technical.py`). One model is in
memory at a time; every figure is paired item by item and carries its interval. What is compared is written item by item
beside the record. `latency`, only when named: a server under load (`eval/latency.py`).

Before anything is said of the model, parity is: that its prompts are those it was trained with, and with `--endpoint`,
over which the win-rate's answers then come, that the server there is this very model (`serving/parity/`).
"""

import gc
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from eval import latency, technical
from eval.judges import key_points
from eval.measure import Items, Measurement, measure
from eval.sandbox import sandbox
from eval.winrate import win_rate
from pipeline import statistics
from pipeline.chat import Chat
from pipeline.data import store
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, Message, PreferencePair, Question, describe, hashes
from pipeline.data.split import sample
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.records.metrics import benchmark_is_lower_better
from pipeline.records.schema import Input
from pipeline.stage import Job, Source
from pipeline.tasks import find_tasks
from serving.endpoint import Endpoint, answer_all, own_server
from serving.engine import Answer, Sampling
from serving.parity.check import names
from serving.parity.plain import compare_template
from serving.parity.probes import Probe, Reference, held_out, make_probes, make_reference
from serving.parity.served import compare, said_precision
from serving.serve import load_source, model_name, servable

EVALUATIONS = ("heldout", "benchmarks", "winrate")  # when none is named
NAMED = (*EVALUATIONS, "latency")


@dataclass
class Evaluate:
    name: ClassVar[str] = "eval"

    job: Job
    base: Base
    chat: Chat
    source: Source
    items: Items
    endpoint: Endpoint | None
    prompts: list[str]  # of `latency`
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source, base, chat = servable(job)
        if chat.contract != base.chat().contract:
            raise UserError("its chat template is not its base's", where=chat.name)
        items, prompts = _items(job, source, job.parts or EVALUATIONS), []
        if "latency" in job.parts:
            latency.guidellm()
            prompts = [q.prompt for q in _questions(job)]
        if items.questions:
            say(f"win-rate: {win_rate.planned_precision(len(items.questions))}")
        if job.config.eval_config.run_code:
            _check_tests(items.questions)
        url = job.config.eval_config.endpoint
        endpoint = Endpoint(url, names(job, source)) if url else None
        return cls(job, base, chat, source, items, endpoint, prompts, [source.input])

    def plan(self) -> list[tuple[str, str]]:
        items = self.items
        return [
            ("model", f"{model_name(self.job, self.source)} ({self.source.file.id}) against {self.base.name}"),
            ("held out", f"{len(items.conversations)} conversations, {len(items.pairs)} pairs"),
            ("benchmarks", ", ".join(self.job.config.eval_config.tasks) if items.tasks else "none"),
            ("open questions", str(len(items.questions))),
            ("endpoint", f"{self.endpoint.root}, its model {self.endpoint.model}" if self.endpoint else "none"),
            ("latency", f"{self.job.config.eval_config.latency_requests} requests a loop" if self.prompts else "no"),
        ]

    def run(self, record: Record) -> None:
        record.facts.lineage.base = self.base.identity()
        record.facts.data = {"contract": self.chat.contract.sha256, "template": self.chat.contract.facts()} | {
            name: describe(rows) for name, rows in vars(self.items).items() if rows and name != "tasks"
        }
        items.write_rows(record.folder, {n: hashes(r) for n, r in vars(self.items).items() if r and n != "tasks"})
        if self.items.questions:
            store.keep(self.job.workspace, self.items.questions)
        record.facts.results = {"model": model_name(self.job, self.source), "against": self.base.name}
        if any(vars(self.items).values()):
            self._judge(record)
        if self.prompts:
            record.facts.results["latency"] = self._latency(record)

    def _judge(self, record: Record) -> None:
        config, label, results = self.job.config.eval_config, model_name(self.job, self.source), record.facts.results
        base = measure(self.base.load(), self.chat, self.items, config, "base")
        gc.collect()
        model = load_source(self.source, self.base)
        asked = replace(self.items, questions=()) if self.endpoint else self.items
        tuned = measure(model, self.chat, asked, config, label)
        probes = make_probes(self.chat, list(self.items.conversations))
        found, scores = compare_template(model, self.source, self.base, self.chat, probes)
        results["parity"] = {"prompts": len(probes), "in_process": found.as_record()}
        if found.problem:
            say(f"note: parity: {found.problem[0]}; try {found.problem[1]}")
        if self.endpoint:
            stored = str(model.dtype).removeprefix("torch.")
            del model
            said = said_precision(self.endpoint)
            reference = make_reference(scores, stored, self.source, self.base, self.chat, probes, {said})
            tuned.answers = self._served_answers(self.endpoint, reference, said, probes, results["parity"])

        items.write_changes(record.folder, self._by_item(base, tuned))
        if self.items.conversations:
            results |= self._losses(base, tuned)
        if self.items.pairs:
            results |= self._preferences(base, tuned)
        if self.items.tasks:
            results |= self._benchmarks(base, tuned)
        if self.items.questions:
            results |= self._win_rate(record, base, tuned)

    def _served_answers(
        self,
        endpoint: Endpoint,
        reference: Reference,
        precision: str | None,
        probes: list[Probe],
        facts: dict[str, Any],
    ) -> list[Answer]:
        """To the open questions. Raises `StageFailed` when it is another model that answers there."""
        config, label = self.job.config.eval_config, model_name(self.job, self.source)
        served = compare(endpoint, endpoint.root, self.chat, probes, reference, reference.believed(precision))
        facts["endpoint"] = served.as_record()
        if served.problem:
            what, remedy = served.problem
            raise StageFailed(f"{endpoint.root} is not {label}: {what}", remedy=remedy)
        say(f"{endpoint.root}: {served.verdict}")
        chats = [[Message(role="user", content=question.prompt)] for question in self.items.questions]
        sampling = Sampling(config.max_tokens, config.temperature)
        return answer_all(endpoint, self.chat, chats, sampling, config.seed, f"{label}: answers")

    def _latency(self, record: Record) -> dict[str, Any]:
        """Of the endpoint, else of a server of our own, started for it."""
        config = self.job.config
        with ExitStack() as stack:
            endpoint = self.endpoint
            if endpoint is None:
                backend = config.serve_config.backend
                address = stack.enter_context(own_server(self.job, self.source.file.id, backend))
                endpoint = Endpoint(address, names(self.job, self.source))
            results = latency.measure(endpoint, self.prompts, config.eval_config, record.folder)
        latency.tell(results)
        return results

    def _by_item(self, base: Measurement, tuned: Measurement) -> dict[str, dict[str, tuple[float, float]]]:
        """Both models' values of every item, by the figure that they make up: evaluations are paired by these."""
        changes = {
            "eval_loss": _paired(self.items.conversations, base.losses, tuned.losses),
            "margin": _paired(self.items.pairs, base.margins, tuned.margins),
        }
        for name, scores in tuned.scores.items():
            before = base.scores[name].items
            changes[f"benchmarks.{name}"] = {str(i): (before[i], after) for i, after in scores.items.items()}
        return changes

    def _losses(self, base: Measurement, tuned: Measurement) -> dict[str, Any]:
        change = statistics.paired(base.losses, tuned.losses)
        ends = {end: round(math.exp(getattr(change, end).value), 2) for end in ("before", "after")}
        say(f"held-out loss {change.before.text()} → {change.after.text()} nats a token: {change.verdict(True)}")
        return {"eval_loss": _plain(change) | {"unit": "nats a token"}, "perplexity": ends}

    def _preferences(self, base: Measurement, tuned: Measurement) -> dict[str, Any]:
        """Share of held-out pairs where the model prefers the chosen more than its base does."""
        gained = sum(after > before for before, after in zip(base.margins, tuned.margins, strict=True))
        accuracy = statistics.proportion(gained, len(tuned.margins))
        margin = statistics.paired(base.margins, tuned.margins)
        say(f"held-out preference accuracy {accuracy.text()} against the base; chance is 0.5")
        return {"preference_accuracy": _plain(accuracy) | {"chance": 0.5}, "margin": _plain(margin) | {"unit": "nats"}}

    def _benchmarks(self, base: Measurement, tuned: Measurement) -> dict[str, Any]:
        results = {}
        for name, scores in tuned.scores.items():
            before, after = ([m.scores[name].items[i] for i in sorted(scores.items)] for m in (base, tuned))
            change = statistics.paired(before, after, shares=set(before + after) <= {0.0, 1.0})
            gained = sum(a > b for b, a in zip(before, after, strict=True))
            lost = sum(a < b for b, a in zip(before, after, strict=True))
            p_value = statistics.sign_test(gained, lost)  # on 0/1 items: McNemar's exact test
            verdict = change.verdict(benchmark_is_lower_better(scores.metric))
            say(f"{name} {scores.metric} {change.before.text()} → {change.after.text()}: {verdict}")
            facts = {"metric": scores.metric, "version": scores.version, "mcnemar_p": round(p_value, 4)}
            results[name] = _plain(change) | facts
        for name, p in statistics.holm({name: found["mcnemar_p"] for name, found in results.items()}).items():
            results[name]["holm_p"] = round(p, 4)  # of so many tasks
        return {"benchmarks": results}

    def _win_rate(self, record: Record, base: Measurement, tuned: Measurement) -> dict[str, Any]:
        decode = self.chat.tokenizer.decode
        ours, theirs = ([decode(a.tokens).strip() for a in m.answers] for m in (tuned, base))
        result = win_rate.win_rate(self.items.questions, ours, theirs)
        before, after = ([float(a.finish_reason == "stop") for a in m.answers] for m in (base, tuned))
        stops = statistics.paired(before, after, shares=True)
        before, after = ([float(len(a.tokens)) for a in m.answers] for m in (base, tuned))
        lengths = statistics.paired(before, after)
        with (record.folder / "answers.jsonl").open("w", encoding="utf-8") as out:
            for question, a, b, score in zip(self.items.questions, ours, theirs, result.scores, strict=True):
                row = {"id": question.id, "prompt": question.prompt, "model": a, "base": b, "score": score}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        code = self._code(record, ours, theirs)
        say(f"win-rate against the base {result.rate.text()}: {result.verdict}")
        say(f"  the judge is weak: {key_points.WEAKNESS}; if the longer simply won: {result.longest_wins.text()}")
        if result.at_equal_length:
            say(f"  were both answers equally long: {result.at_equal_length.text()}")
        tokens = f"{lengths.before.value:.0f} → {lengths.after.value:.0f} tokens long"
        ending = f"{stops.before.value:.0%} → {stops.after.value:.0%} end by themselves"
        say(f"answers: {tokens}, {ending} within {self.job.config.eval_config.max_tokens}")
        return {
            "win_rate": _plain(result.rate) | {
                "wins": result.wins, "ties": result.ties, "losses": result.losses,
                "sign_test_p": round(result.p_value, 4), "judge": key_points.NAME, "weakness": key_points.WEAKNESS,
                "students_t": _plain(result.students_t), "base_against_itself": _plain(result.against_itself),
                "longest_wins": _plain(result.longest_wins),
                "at_equal_length": _plain(result.at_equal_length) if result.at_equal_length else None,
                "agrees_with_longest": _plain(result.agrees_with_longest) if result.agrees_with_longest else None,
            },
            "stops_by_itself": _plain(stops),
            "answer_tokens": _plain(lengths),
            "technical": statistics.as_record(code),
        }  # fmt: skip

    def _code(self, record: Record, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
        """Whether the code in the answers parses, and where that is allowed passes its tests (`eval/technical.py`)."""
        questions, run = self.items.questions, self.job.config.eval_config.run_code
        model, base = (
            [technical.inspect(question, answer, run) for question, answer in zip(questions, answers, strict=True)]
            for answers in (ours, theirs)
        )
        with (record.folder / "technical.jsonl").open("w", encoding="utf-8") as out:
            for question, a, b in zip(questions, model, base, strict=True):
                row = {"id": question.id, "model": a.as_row(), "base": b.as_row()}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        results = technical.compare(model, base)
        say(technical.told(results))
        return results


def _items(job: Job, source: Source, parts: tuple[str, ...] | list[str]) -> Items:
    """What the parts need. Held-out rows are those that the training of this very model held out."""
    paths, items = job.config.training_data, Items()
    folder = job.workspace.path(paths.eval)
    if "heldout" in parts:
        items.conversations = held_out(job, source, Conversation)
        items.pairs = held_out(job, source, PreferencePair)
    if "benchmarks" in parts:
        items.tasks = find_tasks(folder, job.config.eval_config.tasks)
    if "winrate" in parts:
        questions = _questions(job)
        items.questions = sample(questions, job.config.eval_config.questions)
        if len(items.questions) < len(questions):
            say(f"win-rate: {len(items.questions)} of {len(questions)} open questions (eval_config.questions)")
    return items


def _check_tests(questions: Sequence[Question]) -> None:
    """Raises `UserError` where there are tests, and nowhere to run them."""
    tested = sum(technical.tests_of(question) is not None for question in questions)
    if tested and (problem := sandbox.available()):
        raise UserError(
            f"no sandbox here: {problem}", where="eval_config.run_code", remedy="false: code is only parsed"
        )
    say(f"tests: {tested} of {len(questions)} open questions have some")


def _questions(job: Job) -> list[Question]:
    return read_rows(job.workspace, f"{job.config.training_data.eval}/questions", Question)


def _plain(figures: statistics.Figure | statistics.Change) -> dict[str, Any]:
    return figures.model_dump(exclude_none=True)


def _paired(rows: Sequence[Any], before: list[float], after: list[float]) -> dict[str, tuple[float, float]]:
    return {row.id: (b, a) for row, b, a in zip(rows, before, after, strict=True)}
