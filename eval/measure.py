"""One model at a time: what it makes of the held-out rows, the benchmark items and the open questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval.benchmarks import harness
from pipeline.chat import Chat, Encoded
from pipeline.config import EvalConfig
from pipeline.data.rows import Conversation, Message, PreferencePair, Question
from pipeline.train import heldout
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import generate_all

if TYPE_CHECKING:
    from pipeline.train.trainer import Execution


@dataclass
class Items:
    """What both models are asked. All of it is the same for both, so every figure can be paired."""

    conversations: Sequence[Conversation] = ()
    pairs: Sequence[PreferencePair] = ()
    questions: Sequence[Question] = ()
    tasks: Sequence[dict[str, Any] | str] = ()


@dataclass
class Measurement:
    """One model's figures, item by item, in the order of `Items`."""

    losses: list[float] = field(default_factory=list)  # nats a token
    margins: list[float] = field(default_factory=list)  # log p(chosen) − log p(rejected), nats
    answers: list[Answer] = field(default_factory=list)
    scores: dict[str, harness.Scores] = field(default_factory=dict)


def measure(model: Any, chat: Chat, items: Items, config: EvalConfig, label: str) -> Measurement:
    result = Measurement()
    if items.conversations:
        rows = [chat.conversation(row.messages) for row in items.conversations]
        result.losses = heldout.losses(model, rows, _passes(model, rows, chat, config), f"{label}: held-out loss")
    if items.pairs:
        pairs = [chat.pair(pair) for pair in items.pairs]
        how = _passes(model, [side for pair in pairs for side in pair], chat, config)
        log_probs = heldout.pair_log_probs(model, pairs, how, f"{label}: held-out pairs")
        result.margins = [chosen - rejected for chosen, rejected in log_probs]
    if items.tasks:
        result.scores = harness.run(model, chat, items.tasks, config, label)
    if items.questions:
        prompts = [chat.prompt([Message(role="user", content=q.prompt)]) for q in items.questions]
        result.answers = generate_all(
            model, chat, prompts, Sampling(config.max_tokens, config.temperature), config.seed, f"{label}: answers"
        )
    return result


def _passes(model: Any, sequences: Sequence[Encoded], chat: Chat, config: EvalConfig) -> "Execution":
    """Padded: nothing has shown that this model can be packed, and generation wants its attention as it is."""
    from pipeline.train.packing import one_row_a_pass
    from pipeline.train.trainer import Execution

    alone = one_row_a_pass(model, sequences)
    longest = max(len(sequence.ids) for sequence in sequences)
    return Execution(1 if alone else config.batch_size * longest, packed=False, pad_id=chat.tokenizer.pad_token_id or 0)
