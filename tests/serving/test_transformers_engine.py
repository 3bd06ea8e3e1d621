"""The engine in this process: what it generates is what plain transformers would."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.chat import Chat
from pipeline.data.rows import Message
from serving.engine import Sampling
from serving.transformers_engine import PAGE, TransformersEngine, generate_all

if TYPE_CHECKING:
    from tests.conftest import Trained

MERGED_CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(trained: "Trained") -> Path:
    return trained.output("merge")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def engine(model: Any, tuned_chat: Chat) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, tuned_chat, MERGED_CONTEXT, max_concurrent=16)
    engine.start()
    yield engine
    engine.stop()


def prompts(chat: Chat, count: int) -> list[list[int]]:
    """Of many lengths, one of them longer than a page of the cache."""
    texts = [f"Explain lock number {i}. " + "Be exact. " * (i % 4) for i in range(count - 1)] + ["word " * (PAGE + 20)]
    return [chat.prompt([Message(role="user", content=text)]) for text in texts]


def test_batched_greedy_answers_are_those_of_plain_generate(
    model: Any, folder: Path, tuned_chat: Chat, greedy: Callable[..., list[int]]
) -> None:
    asked = prompts(tuned_chat, 7)
    answers = generate_all(model, tuned_chat, asked, Sampling(24, 0.0), seed=1, what="test")
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = greedy(folder, prompt, 24)
        ended = tokens[-1] == tuned_chat.end_of_turn_id
        assert (answer.tokens, answer.finish_reason) == ((tokens[:-1], "stop") if ended else (tokens, "length"))


def test_the_same_seed_draws_the_same_answers(model: Any, tuned_chat: Chat) -> None:
    asked = prompts(tuned_chat, 12)
    first, again, other = (
        [a.tokens for a in generate_all(model, tuned_chat, asked, Sampling(12, 1.0), seed=seed, what="test")]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


async def first_tokens(engine: TransformersEngine, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    async def one() -> int:
        answers = [answer async for answer in engine.generate(prompt, sampling)]
        return answers[-1].tokens[0] if answers[-1].tokens else engine.chat.end_of_turn_id

    return list(await asyncio.gather(*(one() for _ in range(count))))


def test_temperature_and_top_p_draw_from_what_they_name(
    engine: TransformersEngine, model: Any, tuned_chat: Chat
) -> None:
    """400 first tokens against softmax(logits / temperature): the 50 likeliest are not the only ones drawn."""
    import torch

    prompt, count = tuned_chat.tokenizer("The cache")["input_ids"], 400
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    likeliest = logits.argsort(descending=True).tolist()
    for temperature in (0.7, 2.0):
        share = torch.softmax(logits / temperature, -1)[likeliest[:50]].sum().item()
        drawn = asyncio.run(first_tokens(engine, prompt, Sampling(1, temperature), count))
        inside = sum(token in likeliest[:50] for token in drawn)
        assert abs(inside - share * count) < 5 * (count * share * (1 - share)) ** 0.5
    cumulated = torch.softmax(logits, -1)[likeliest].cumsum(0)
    nucleus = likeliest[: int((cumulated < 0.5).sum()) + 1]
    drawn = asyncio.run(first_tokens(engine, prompt, Sampling(1, 1.0, top_p=0.5), count))
    assert set(drawn) <= set(nucleus)
    assert len(set(drawn)) > 1
    assert set(asyncio.run(first_tokens(engine, prompt, Sampling(1, 0.0), 8))) == {likeliest[0]}


def test_an_answer_grows_and_only_its_last_part_is_finished(engine: TransformersEngine, tuned_chat: Chat) -> None:
    async def grow() -> list[Any]:
        return [answer async for answer in engine.generate(prompts(tuned_chat, 1)[0], Sampling(6, 0.0))]

    answers = asyncio.run(grow())
    assert [len(a.tokens) for a in answers] == sorted({len(a.tokens) for a in answers})
    assert [a.finish_reason for a in answers[:-1]] == [None] * (len(answers) - 1)
    assert answers[-1].finish_reason == "length"
    assert len(answers[-1].tokens) == 6


async def outcome(engine: TransformersEngine) -> list[int] | str:
    """The tokens of one answer, or what went wrong; never waits for ever."""
    try:
        return await asyncio.wait_for(first_tokens(engine, [1, 2, 3], Sampling(4, 0.0), 1), timeout=60)
    except RuntimeError as error:
        return str(error)


def test_a_stopped_engine_refuses_instead_of_keeping_one_waiting(model: Any, tuned_chat: Chat) -> None:
    engine = TransformersEngine(model, tuned_chat, MERGED_CONTEXT, max_concurrent=1)
    engine.start()
    assert engine.alive
    engine.stop()
    assert not engine.alive
    assert asyncio.run(outcome(engine)) == "the generation thread has ended"


def test_a_model_that_breaks_fails_every_request_and_shows(engine: TransformersEngine, model: Any) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("out of memory")

    async def has_ended() -> None:
        while engine.alive:  # the thread tells its callers first, and then ends
            await asyncio.sleep(0.01)

    async def scene() -> list[Any]:
        hook = model.register_forward_pre_hook(breaks)
        try:
            first = await outcome(engine)
            await asyncio.wait_for(has_ended(), timeout=60)
            return [first, await outcome(engine)]
        finally:
            hook.remove()

    assert asyncio.run(scene()) == ["out of memory", "the generation thread has ended"]
    assert not engine.alive
