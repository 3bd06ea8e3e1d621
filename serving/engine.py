"""What the front asks of a backend: token ids in, token ids out, so that what is served is what the template contract says."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.chat import Chat


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Temperature 0 is greedy; the same seed draws the same answer, but for rounding."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None  # most likely tokens told beside each one; None: no log-probs


@dataclass(frozen=True)
class TokenScore:
    """Log-probs in nats, of the model itself: before temperature and top_p."""

    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """All tokens generated so far, without the end-of-turn, and why it ended: stop, length, or None while it goes on."""

    tokens: list[int]
    finish_reason: str | None
    scores: list[TokenScore] = field(default_factory=list)  # one a token, where they were asked for


class Engine(Protocol):
    """A model behind a queue. `start` and `stop` once; the rest from any number of coroutines of one event loop."""

    chat: Chat
    context: int  # tokens, prompt and answer together
    precision: str  # that it computes in: float32, bfloat16, float16; or a GGUF type of fewer bits

    def start(self) -> None: ...

    def stop(self) -> None: ...

    @property
    def alive(self) -> bool: ...

    @property
    def ended(self) -> str:
        """Once it is not alive: how it ended, in one line."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        """Yields the answer as it grows; the last one has its finish reason. Closing the iterator frees the slot.

        Raises `RuntimeError` when the backend failed.
        """
        ...

    async def score(self, tokens: Sequence[int], top: int) -> list[TokenScore | None]:
        """Each token given those before it, one forward pass; None for the first, which nothing precedes."""
        ...
