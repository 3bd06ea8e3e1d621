"""One model at a time: what it makes of the held-out rows, the benchmark items and the open questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval import benchmarks
from pipeline import heldout
from pipeline.chat import Chat
from pipeline.config import EvalConfig
from pipeline.data.rows import Conversation, Message, PreferencePair, Question
from serving.engine import Answer, Sampling, generate_all


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
    scores: dict[str, benchmarks.Scores] = field(default_factory=dict)


def measure(model: Any, chat: Chat, items: Items, config: EvalConfig, label: str) -> Measurement:
    result, pad = Measurement(), chat.tokenizer.pad_token_id
    if items.conversations:
        encoded = [chat.conversation(row.messages) for row in items.conversations]
        result.losses = heldout.losses(model, encoded, pad, config.batch_size, f"{label}: held-out loss")
    if items.pairs:
        pairs = [chat.pair(pair) for pair in items.pairs]
        result.margins = heldout.margins(model, pairs, pad, config.batch_size, f"{label}: held-out pairs")
    if items.tasks:
        result.scores = benchmarks.run(model, chat, items.tasks, config, label)
    if items.questions:
        prompts = [chat.prompt([Message(role="user", content=q.prompt)]) for q in items.questions]
        result.answers = generate_all(
            model, chat, prompts, Sampling(config.max_tokens, config.temperature), config.seed, f"{label}: answers"
        )
    return result
