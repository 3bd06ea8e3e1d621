"""Held-out rows: loss, perplexity, preference accuracy and the end of turn, on what the training of this model never saw.

In the record: `eval_loss`, every row alike; `perplexity`, its exp; `eval_loss_by_token`, every token alike; `end_of_turn`;
`preference_accuracy` and `margin` of pairs; `by_domain` and `by_fault`, the same rows taken apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from eval import breakdown, endings
from eval.contestants import Contestant
from eval.names import BASE
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
    ends: list[heldout.Ends] = field(default_factory=list)  # of each conversation
    tokens: list[int] = field(default_factory=list)  # of its answers
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
            found.ends = heldout.ends(model, rows, how, f"{who.label}: held-out loss", chat.end_of_turn_id)
            found.tokens = [sum(row.mask) for row in rows]
        if self.pairs:
            pairs = [chat.pair(pair) for pair in self.pairs]
            how = passes(model, [side for pair in pairs for side in pair], chat, self.config)
            log_probs = heldout.pair_log_probs(model, pairs, how, f"{who.label}: held-out pairs")
            found.margins = [chosen - rejected for chosen, rejected in log_probs]
        return found

    def compare(self, measured: dict[str, Measured], folder: Path) -> Compared:
        return against_each(measured, self._compare)

    def _compare(self, theirs: Measured, ours: Measured, whose: str) -> Compared:
        found, by_domain = Compared(), dict[str, Any]()
        if self.conversations:
            domains, losses = [row.domain for row in self.conversations], (_losses(theirs), _losses(ours))
            found.results |= _loss(*losses, ours.tokens, whose)
            by_domain["eval_loss"] = breakdown.changes_by(domains, *losses)
            say(f"  by domain: {breakdown.told(by_domain['eval_loss'], lower_is_better=True)}")
            found.results |= _end_of_turn(theirs, ours)
            found.items["eval_loss"] = _paired(self.conversations, *losses)
        if self.pairs:
            found.results |= _preferences(theirs, ours, whose)
            margins = [after - before for before, after in zip(theirs.margins, ours.margins, strict=True)]
            by_domain["preference_accuracy"] = breakdown.shares_by([pair.domain for pair in self.pairs], margins)
            found.results["by_fault"] = breakdown.shares_by([pair.fault for pair in self.pairs], margins)
            found.items["margin"] = _paired(self.pairs, theirs.margins, ours.margins)
        if by_domain:
            found.results["by_domain"] = by_domain
        return found


def passes(model: Any, sequences: Sequence[Encoded], chat: Chat, config: EvalConfig) -> "Execution":
    """Padded: nothing has shown that this model can be packed, and generation wants its attention as it is."""
    from pipeline.train.packing import one_row_a_pass
    from pipeline.train.trainer import Execution

    alone = one_row_a_pass(model, sequences)
    longest = max(len(sequence.ids) for sequence in sequences)
    return Execution(1 if alone else config.batch_size * longest, packed=False, pad_id=chat.tokenizer.pad_token_id or 0)


def _losses(measured: Measured) -> list[float]:
    return [row.loss for row in measured.ends]


def _loss(theirs: list[float], ours: list[float], tokens: list[int], whose: str) -> dict[str, Any]:
    change, by_token = statistics.paired(theirs, ours), breakdown.by_token(theirs, ours, tokens)
    say(f"held-out loss {_told(change)} nats a token{_than(whose)}: {change.verdict(True)}")
    say(f"  were every token worth the same, and not every row: change {by_token.delta.text()}")
    unit = {"unit": "nats a token"}
    return {
        "eval_loss": statistics.as_record(change) | unit,
        "perplexity": statistics.as_record(breakdown.perplexity(change)),
        "eval_loss_by_token": statistics.as_record(by_token) | unit,
    }


def _end_of_turn(theirs: Measured, ours: Measured) -> dict[str, Any]:
    found = endings.compare(theirs.ends, ours.ends)
    say(endings.told(found))
    return {"end_of_turn": statistics.as_record(found)}


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
