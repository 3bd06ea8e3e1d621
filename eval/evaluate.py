"""Eval: the newest model against its base, on rows neither was trained on.

    aletheia eval --profile tiny        make eval PROFILE=tiny
    aletheia eval heldout winrate --profile tiny

`heldout`: loss, perplexity and preference accuracy on the rows that training held out (`eval/heldout.py`). `benchmarks`:
lm-eval-harness tasks (`eval/benchmarks/`). `winrate`: answers to open questions, judged (`eval/winrate/`). Each contestant
(`eval/contestants.py`) is in memory alone; every figure is paired item by item and carries its interval. What is compared is
written item by item beside the record. `latency`, only when named: a server under load (`eval/latency.py`).

Before anything is said of the model, parity is: that its prompts are those it was trained with, and with `--endpoint`,
over which the win-rate's answers then come, that the server there is this very model (`serving/parity/`).
"""

import gc
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from eval import contestants, latency
from eval.benchmarks.part import Benchmarks
from eval.contestants import Contestant
from eval.heldout import HeldOut
from eval.names import BASE, MODEL
from eval.page.page import write_page
from eval.page.spent import spent
from eval.page.told import print_result
from eval.part import Ends, Part
from eval.verified import Verified
from eval.winrate.part import WinRate, open_questions
from pipeline.chat import Chat
from pipeline.data import store
from pipeline.data.rows import describe, hashes
from pipeline.errors import AletheiaError, UserError
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source
from serving.endpoint import Endpoint, own_server
from serving.parity.check import names
from serving.serve import model_name, servable

EVALUATIONS = ("heldout", "benchmarks", "winrate")  # when none is named
NAMED = (*EVALUATIONS, "latency")


@dataclass
class Evaluate:
    name: ClassVar[str] = "eval"

    job: Job
    base: Base
    chat: Chat
    source: Source
    parts: list[Part]
    contestants: list[Contestant]
    verified: Verified
    endpoint: Endpoint | None
    prompts: list[str]  # of `latency`
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source, base, chat = servable(job)
        if chat.contract != base.chat().contract:
            raise UserError("its chat template is not its base's", where=chat.name)
        named, parts = job.parts or EVALUATIONS, list[Part]()
        who = [contestants.the_base(base, chat), *contestants.the_model(job, source, base, chat)]
        who += contestants.others(job, source, base, chat) if {*named} & {*EVALUATIONS} else []
        if "heldout" in named:
            parts.append(HeldOut.prepare(job, source))
        if "benchmarks" in named:
            parts.append(Benchmarks.prepare(job))
        if "winrate" in named:
            parts.append(WinRate.prepare(job, who))
        prompts = []
        if "latency" in named:
            latency.guidellm()
            prompts = [question.prompt for question in open_questions(job)]
        endpoint = next((c.endpoint for c in who if c.name == MODEL and c.endpoint), None)
        verified = Verified(job, source, base, chat)
        return cls(job, base, chat, source, parts, who, verified, endpoint, prompts, [c.input for c in who if c.input])

    def plan(self) -> list[tuple[str, str]]:
        also = [c.label for c in self.contestants if c.name not in (BASE, MODEL)]
        return [
            ("model", f"{model_name(self.job, self.source)} ({self.source.file.id}) against {self.base.name}"),
            *([("also against", ", ".join(also))] if also else []),
            *(line for part in self.parts for line in part.plan()),
            ("endpoint", f"{self.endpoint.root}, its model {self.endpoint.model}" if self.endpoint else "none"),
            ("latency", f"{self.job.config.eval_config.latency_requests} requests a loop" if self.prompts else "no"),
        ]

    def run(self, record: Record) -> None:
        rows = {name: found for part in self.parts for name, found in part.rows().items() if found}
        record.facts.lineage.base = self.base.identity()
        record.facts.data = {"contract": self.chat.contract.sha256, "template": self.chat.contract.facts()}
        record.facts.data |= {name: describe(found) for name, found in rows.items()}
        items.write_rows(record.folder, {name: hashes(found) for name, found in rows.items()})
        if "questions" in rows:
            store.keep(self.job.workspace, rows["questions"])
        record.facts.results = {"model": model_name(self.job, self.source), "against": self.base.name}
        if self.parts:
            self._compare(record, self._measure(record))
        if self.prompts:
            record.facts.results["latency"] = self._latency(record)
        if self.parts:
            record.when_complete.append(lambda: _show(record))

    def _measure(self, record: Record) -> dict[str, dict[str, Any]]:
        """By part and contestant; one model in memory at a time."""
        measured: dict[str, dict[str, Any]] = defaultdict(dict)
        for who in self.contestants:
            model = self._verified(who, record) if who.name == MODEL else who.load()
            for part in self.parts:
                if self._asks(part, who):
                    measured[part.name][who.name] = part.measure(who, model)
            del model
            gc.collect()
        return measured

    def _asks(self, part: Part, who: Contestant) -> bool:
        """Where a server answers for the model, it is asked what it can be, and the model here the rest."""
        if who.endpoint:
            return part.over_endpoint
        return not (part.over_endpoint and who.name == MODEL and self.endpoint)

    def _compare(self, record: Record, measured: dict[str, dict[str, Any]]) -> None:
        results, ends = record.facts.results, dict[str, Ends]()
        for part in self.parts:
            found = part.compare(measured[part.name], record.folder)
            for name, figures in found.results.pop("others", {}).items():
                results.setdefault("others", {}).setdefault(name, {}).update(figures)
            results |= found.results
            if "others" in results:  # after the model's own
                results["others"] = results.pop("others")
            for criterion in found.guardrails:
                record.guard(criterion)
            ends |= found.items
            items.write_changes(record.folder, ends)

    def _verified(self, who: Contestant, record: Record) -> Any:
        """The model, its prompts compared with training's; where a server answers for it, the server with the model."""
        if who.endpoint:
            self.verified.server(who.endpoint)
            return None
        model = who.load()
        record.facts.results["parity"] = self.verified.facts
        self.verified.model(model)
        return model

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


def _show(record: Record) -> None:
    """What is better, what is worse and what is not known: in lines, and on a page beside the record."""
    say("")
    print_result(record.facts, spent(record.file, record.facts), sys.stderr, whole=False)
    try:
        say(f"page: {record.workspace.shown(write_page(record.file))}")
    except (AletheiaError, OSError) as error:  # the record is complete, and says the same
        say(f"note: no page of results: {error}")
