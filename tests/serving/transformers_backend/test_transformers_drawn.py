"""Drawn answers: a seed's own, whoever else asks, and of the distribution that is asked for."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.chat import Chat
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import PAGE, PASS, TransformersEngine, generate_all
from tests.serving.transformers_backend.asking import answer, log_probs, prompts

SEEDED = [Sampling(20, 1.0, seed=seed) for seed in range(8)]


async def crowd(engine: TransformersEngine, asked: list[list[int]], stagger: float = 0) -> list[list[int]]:
    """Request i comes in the 7·i-th place."""
    after = [stagger * (7 * i % len(asked)) for i in range(len(asked))]
    answers = await asyncio.gather(*map(answer, [engine] * len(asked), asked, SEEDED, after))
    return [answer.tokens for answer in answers]


async def one_by_one(engine: TransformersEngine, asked: list[list[int]]) -> list[list[int]]:
    return [(await answer(engine, prompt, sampling)).tokens for prompt, sampling in zip(asked, SEEDED, strict=False)]


def test_a_seed_draws_the_same_answer_alone_and_in_any_crowd(engine: TransformersEngine, tuned_chat: Chat) -> None:
    asked = prompts(tuned_chat, 8)
    alone = asyncio.run(one_by_one(engine, asked))
    assert asyncio.run(crowd(engine, asked)) == asyncio.run(crowd(engine, asked, 0.01)) == alone
    assert len({tuple(tokens) for tokens in alone}) == 8
    other = asyncio.run(answer(engine, asked[0], replace(SEEDED[0], seed=99))).tokens
    assert other != alone[0]


def test_a_request_that_is_evicted_and_computed_again_goes_on_as_it_would_have(
    model: Any, engine: TransformersEngine, start: Callable[..., TransformersEngine], tuned_chat: Chat
) -> None:
    """Each outgrows its page while it is answered, and the cache has but four."""
    config, evicted = model.config, list[bool]()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 + PASS * 4 + 8
    narrow = start(model, kv_cache_gb=(4 + 2.5) * PAGE * token / 1e9)
    assert narrow.context == 4 * PAGE
    manager = narrow._manager.batch_processor.offloading_manager
    offload = manager.offload_requests

    def seen() -> bool:
        evicted.append(offload())
        return evicted[-1]

    manager.offload_requests = seen
    text = tuned_chat.tokenizer("A lock is held by one. " * 60)["input_ids"]
    asked = [text[i : PAGE - 10] for i in range(6)]

    async def with_log_probs() -> list[Answer]:
        samplings = [replace(sampling, top_logprobs=1) for sampling in SEEDED[:6]]
        return list(await asyncio.gather(*map(answer, [narrow] * 6, asked, samplings)))

    alone = asyncio.run(one_by_one(engine, asked))
    found = asyncio.run(with_log_probs())
    assert any(evicted)
    assert [a.tokens for a in found] == alone
    for prompt, a in zip(asked, found, strict=True):
        rows = log_probs(model, prompt + a.tokens)[len(prompt) - 1 :]
        expected = [row[token].item() for row, token in zip(rows, a.tokens, strict=False)]
        assert [score.logprob for score in a.scores] == pytest.approx(expected, abs=1e-4)


def test_a_whole_evaluation_is_drawn_again_by_its_seed(model: Any, tuned_chat: Chat) -> None:
    asked = [prompts(tuned_chat, 2)[0]] * 4  # one prompt: the answers must differ all the same
    first, again, other = (
        [a.tokens for a in generate_all(model, tuned_chat, asked, Sampling(8, 1.0), seed=seed, what="test")]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert len({tuple(tokens) for tokens in [*first, *other]}) == 8


def test_temperature_and_top_p_draw_from_what_they_name(
    engine: TransformersEngine, model: Any, tuned_chat: Chat
) -> None:
    """400 first tokens against softmax(logits / temperature): the 50 likeliest are not the only ones drawn."""
    import torch

    prompt, count = tuned_chat.tokenizer("The cache")["input_ids"], 400

    async def first_tokens(temperature: float, top_p: float = 1.0) -> list[int]:
        samplings = [Sampling(1, temperature, top_p, seed=seed) for seed in range(count)]
        answers = await asyncio.gather(*(answer(engine, prompt, sampling) for sampling in samplings))
        return [a.tokens[0] if a.tokens else tuned_chat.end_of_turn_id for a in answers]

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    likeliest = logits.argsort(descending=True).tolist()
    for temperature in (0.7, 2.0):
        share = torch.softmax(logits / temperature, -1)[likeliest[:50]].sum().item()
        inside = sum(token in likeliest[:50] for token in asyncio.run(first_tokens(temperature)))
        assert abs(inside - share * count) < 5 * (count * share * (1 - share)) ** 0.5
    cumulated = torch.softmax(logits, -1)[likeliest].cumsum(0)
    nucleus = likeliest[: int((cumulated < 0.5).sum()) + 1]
    drawn = asyncio.run(first_tokens(1.0, top_p=0.5))
    assert set(drawn) <= set(nucleus)
    assert len(set(drawn)) > 1


def test_without_a_seed_every_answer_is_another(engine: TransformersEngine, tuned_chat: Chat) -> None:
    prompt = prompts(tuned_chat, 1)[0]
    drawn = [tuple(asyncio.run(answer(engine, prompt, Sampling(12, 1.0))).tokens) for _ in range(3)]
    assert len(set(drawn)) == 3
