"""A request's answers: taken from the engine side by side, each in its turn, and told in parts."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from serving.engine import Answer, Engine, Sampling, TokenScore
from serving.front.limits import Gate, Places
from serving.front.metrics import Metrics
from serving.front.protocol import ApiError
from serving.front.text import AnswerText, Token, Vocabulary, echoed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text as it is echoed."""

    ids: list[int]
    text: str = ""


@dataclass(frozen=True)
class Order:
    """What one request wants: `n` answers to each prompt. Each draws its own, with a seed of its own where one is given."""

    prompts: list[Prompt]
    n: int
    sampling: Sampling
    stops: Sequence[str]
    echo: bool = False
    continues: bool = False  # the answer goes on with the prompt's text, as of a completion

    @property
    def count(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.n]

    def sampling_of(self, index: int) -> Sampling:
        seed = self.sampling.seed
        return self.sampling if seed is None else replace(self.sampling, seed=(seed + index % self.n) % 2**63)


@dataclass(frozen=True)
class Piece:
    """A part of one answer; the last has the finish reason. `count`: tokens generated for it so far."""

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None = None
    count: int = 0


class Generator:
    """Answers orders from an engine, and counts what they took."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, gate: Gate, metrics: Metrics) -> None:
        self.engine, self.vocabulary, self.gate, self.metrics = engine, vocabulary, gate, metrics
        self._end = engine.chat.end_of_turn_id

    async def pieces(self, order: Order, places: Places, began: float) -> AsyncGenerator[Piece]:
        """Of all answers, as they come; closing it frees the slots. Raises `ApiError` when the engine fails.

        The answers do not wait for a reader that is slow: what it has not read is kept, `max_tokens` at most.
        """
        come: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        tasks = [asyncio.create_task(self._produce(order, index, places, come)) for index in range(order.count)]
        unfinished, first = order.count, True
        try:
            while unfinished:
                piece = await come.get()
                if isinstance(piece, ApiError):
                    raise piece
                if first and piece.count:
                    self.metrics.first_token.observe(time.monotonic() - began)
                    first = False
                unfinished -= piece.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _produce(self, order: Order, index: int, places: Places, come: "asyncio.Queue[Piece | ApiError]") -> None:
        try:
            async with self.gate.slot(places):
                if index % order.n == 0:
                    self.metrics.usage.prompt_tokens += len(order.prompt(index).ids)
                async with aclosing(self._answer(order, index)) as pieces:
                    async for piece in pieces:
                        come.put_nowait(piece)
        except ApiError as error:
            come.put_nowait(error)
        except Exception as error:
            if not isinstance(error, RuntimeError):
                log.exception("a fault of the server")
            come.put_nowait(ApiError(500 if self.engine.alive else 503, f"generation failed: {error}"))

    async def _answer(self, order: Order, index: int) -> AsyncGenerator[Piece]:
        """One answer, after its prompt where that is echoed."""
        prompt, sampling = order.prompt(index), order.sampling_of(index)
        answers, begin = self._answers(prompt.ids, sampling), 0
        tokens: list[Token] = []
        ending: list[Token] = []
        if order.echo:
            begin = len(prompt.text)
            if sampling.top_logprobs is not None:
                scores, after = await self._scores(prompt.ids, sampling)
                tokens = echoed(self.vocabulary, prompt.ids, prompt.text, scores)
                if after:
                    answers, ending = self._greedy(after, begin)
            yield Piece(index, prompt.text, tokens)
        text = AnswerText(self.vocabulary, order.stops, prompt.ids if order.continues else (), begin)
        taken = 0
        async with aclosing(answers):
            async for answer in answers:
                self.metrics.usage.completion_tokens += len(answer.tokens) - taken
                for n in range(taken, len(answer.tokens)):
                    if not text.stopped:
                        text.push(answer.tokens[n], answer.scores[n] if answer.scores else None)
                taken = len(answer.tokens)
                reason = "stop" if text.stopped else answer.finish_reason
                if reason:
                    text.close()
                told, tokens = text.take()
                if reason:
                    yield Piece(index, told, tokens + ending, reason, text.count)
                    return
                if told or tokens:
                    yield Piece(index, told, tokens, None, text.count)
        raise RuntimeError("the answer has no end")

    async def _answers(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        if not sampling.max_tokens:
            yield Answer([], "length")
            return
        with _refusals():
            async with aclosing(self.engine.generate(prompt, sampling)) as answers:
                async for answer in answers:
                    yield answer

    async def _scores(self, prompt: list[int], sampling: Sampling) -> tuple[list[TokenScore | None], TokenScore | None]:
        """The prompt's; and where one greedy token is all that follows, that place's, since the same pass tells it.

        This is what lm-eval asks for each choice of a question.
        """
        assert sampling.top_logprobs is not None
        with _refusals():
            if (sampling.max_tokens, sampling.temperature) != (1, 0):
                return await self.engine.score(prompt, sampling.top_logprobs), None
            *scores, after = await self.engine.score([*prompt, self._end], max(sampling.top_logprobs, 1))
            return scores, after

    def _greedy(self, after: TokenScore, begin: int) -> tuple[AsyncGenerator[Answer], list[Token]]:
        """The likeliest token as an answer; an end of turn is no text, but told too: lm-eval drops what is told last."""
        token = max(after.top, key=after.top.__getitem__)
        score = TokenScore(after.top[token], after.top)
        if token == self._end:
            return _once(Answer([], "stop")), [Token(token, begin, score)]
        return _once(Answer([token], "length", [score])), []


@contextmanager
def _refusals() -> Iterator[None]:
    """ValueError is an engine's word for what it could never answer: the client's mistake."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from None


async def _once(answer: Answer) -> AsyncGenerator[Answer]:
    yield answer
