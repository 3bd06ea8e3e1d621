"""Held-out rows: loss, perplexity and preference accuracy on what the training of this very model never saw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from eval.contestants import BASE, Contestant
from eval.part import Compared, Ends, against_each
from pipeline import statistics
from pipeline.chat import Chat, Encoded
from pipeline.config import EvalConfig
from pipeline.data.rows import Conversation, PreferencePair, Row
from pipeline.progress import say
from pipeline.stage import Job, Source
from pipeline.train import heldout
from serving.parity.probes import held_out

if TYPE_CHECKING:
    from pipeline.train.trainer import Execution


@dataclass
class Measured:
    losses: list[float] = field(default_factory=list)  # of each conversation, nats a token
    margins: list[float] = field(default_factory=list)  # of each pair, log p(chosen) − log p(rejected), nats


@dataclass
class HeldOut:
    name: ClassVar[str] = "heldout"
    over_endpoint: ClassVar[bool] = False

    config: EvalConfig
    conversations: Sequence[Conversation] = ()
    pairs: Sequence[PreferencePair] = ()

    @classmethod
    def prepare(cls, job: Job, source: Source) -> Self:
        config = job.config.eval_config
        return cls(config, held_out(job, source, Conversation), held_out(job, source, PreferencePair))

    def rows(self) -> dict[str, Sequence[Row]]:
        return {"conversations": self.conversations, "pairs": self.pairs}

    def plan(self) -> list[tuple[str, str]]:
        return [("held out", f"{len(self.conversations)} conversations, {len(self.pairs)} pairs")]

    def measure(self, who: Contestant, model: Any) -> Measured:
        found, chat = Measured(), who.chat
        if self.conversations:
            rows = [chat.conversation(row.messages) for row in self.conversations]
            how = passes(model, rows, chat, self.config)
            found.losses = heldout.losses(model, rows, how, f"{who.label}: held-out loss")
        if self.pairs:
            pairs = [chat.pair(pair) for pair in self.pairs]
            how = passes(model, [side for pair in pairs for side in pair], chat, self.config)
            log_probs = heldout.pair_log_probs(model, pairs, how, f"{who.label}: held-out pairs")
            found.margins = [chosen - rejected for chosen, rejected in log_probs]
        return found

    def compare(self, measured: dict[str, Measured], folder: Path) -> Compared:
        return against_each(measured, self._compare)

    def _compare(self, theirs: Measured, ours: Measured, whose: str) -> Compared:
        found = Compared()
        if self.conversations:
            found.results |= _losses(theirs, ours, whose)
            found.items["eval_loss"] = _paired(self.conversations, theirs.losses, ours.losses)
        if self.pairs:
            found.results |= _preferences(theirs, ours, whose)
            found.items["margin"] = _paired(self.pairs, theirs.margins, ours.margins)
        return found


def passes(model: Any, sequences: Sequence[Encoded], chat: Chat, config: EvalConfig) -> "Execution":
    """Padded: nothing has shown that this model can be packed, and generation wants its attention as it is."""
    from pipeline.train.packing import one_row_a_pass
    from pipeline.train.trainer import Execution

    alone = one_row_a_pass(model, sequences)
    longest = max(len(sequence.ids) for sequence in sequences)
    return Execution(1 if alone else config.batch_size * longest, packed=False, pad_id=chat.tokenizer.pad_token_id or 0)


def _losses(theirs: Measured, ours: Measured, whose: str) -> dict[str, Any]:
    change = statistics.paired(theirs.losses, ours.losses)
    ends = {end: round(math.exp(getattr(change, end).value), 2) for end in ("before", "after")}
    say(f"held-out loss {_told(change)} nats a token{_than(whose)}: {change.verdict(True)}")
    return {"eval_loss": statistics.as_record(change) | {"unit": "nats a token"}, "perplexity": ends}


def _preferences(theirs: Measured, ours: Measured, whose: str) -> dict[str, Any]:
    """Share of held-out pairs where the model prefers the chosen more than the other does."""
    gained = sum(after > before for before, after in zip(theirs.margins, ours.margins, strict=True))
    accuracy = statistics.proportion(gained, len(ours.margins))
    margin = statistics.as_record(statistics.paired(theirs.margins, ours.margins))
    say(f"held-out preference accuracy {accuracy.text()} against the {whose}; chance is 0.5")
    return {
        "preference_accuracy": statistics.as_record(accuracy) | {"chance": 0.5},
        "margin": margin | {"unit": "nats"},
    }


def _told(change: statistics.Change) -> str:
    return f"{change.before.text()} → {change.after.text()}"


def _than(whose: str) -> str:
    return "" if whose == BASE else f", from {whose}"


def _paired(rows: Sequence[Row], before: list[float], after: list[float]) -> Ends:
    return {row.id: (b, a) for row, b, a in zip(rows, before, after, strict=True)}
