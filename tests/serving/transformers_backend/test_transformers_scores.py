"""Log-probs, of what is generated and of given tokens: the model's own, as one plain pass gives them."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat import Chat
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import PASS, TransformersEngine
from tests.serving.transformers_backend.asking import answer, log_probs, prompts


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.6, 0.5)])
def test_log_probs_are_the_models_own_before_temperature_and_top_p(
    engine: TransformersEngine, model: Any, tuned_chat: Chat, temperature: float, top_p: float
) -> None:
    asked = prompts(tuned_chat, 5)
    sampling = Sampling(16, temperature, top_p, seed=3, top_logprobs=4)

    async def some_ask() -> list[Answer]:
        plain = replace(sampling, top_logprobs=None)
        return list(
            await asyncio.gather(*(answer(engine, p, sampling if i % 2 else plain) for i, p in enumerate(asked)))
        )

    for index, (prompt, found) in enumerate(zip(asked, asyncio.run(some_ask()), strict=True)):
        assert len(found.scores) == (len(found.tokens) if index % 2 else 0)
        expected = log_probs(model, prompt + found.tokens)[len(prompt) - 1 :]
        for score, token, row in zip(found.scores, found.tokens, expected, strict=False):
            assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(4)
            assert list(score.top) == best.indices.tolist()
            assert list(score.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, PASS, PASS + 1, 2 * PASS + 40])
def test_a_scored_sequence_is_one_plain_pass_also_while_others_generate(
    engine: TransformersEngine, model: Any, tuned_chat: Chat, length: int
) -> None:
    tokens = (tuned_chat.tokenizer("A lock is held by one. " * 120)["input_ids"])[:length]
    asked, sampling = prompts(tuned_chat, 4), Sampling(24, 1.0, seed=5)

    async def scene() -> tuple[Any, list[Answer]]:
        running = [asyncio.create_task(answer(engine, prompt, sampling)) for prompt in asked]
        await asyncio.sleep(0.02)
        return await engine.score(tokens, 2), [await task for task in running]

    async def undisturbed() -> list[Answer]:
        return list(await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in asked)))

    scores, answers = asyncio.run(scene())
    assert scores[0] is None and len(scores) == length
    expected = log_probs(model, tokens)
    for score, token, row in zip(scores[1:], tokens[1:], expected, strict=False):
        assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert list(score.top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert answers == asyncio.run(undisturbed())


def test_a_model_with_eager_attention_is_scored_and_generates_alike(
    folder: Path, start: Callable[..., TransformersEngine], tuned_chat: Chat, greedy: Callable[..., list[int]]
) -> None:
    """Continuous batching gives it `paged|eager`, with which a plain pass would fail."""
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    engine, prompt = start(eager), prompts(tuned_chat, 1)[0]
    tokens = greedy(folder, prompt, 12)

    async def scene() -> tuple[Any, list[int]]:
        return await engine.score(prompt, 1), (await answer(engine, prompt, Sampling(12, 0.0))).tokens

    scores, generated = asyncio.run(scene())
    assert generated == [token for token in tokens if token != tuned_chat.end_of_turn_id]
    engine.stop()
    assert eager.config._attn_implementation == "eager"
    expected = [row[token].item() for row, token in zip(log_probs(eager, prompt), prompt[1:], strict=False)]
    assert [score.logprob for score in scores[1:]] == pytest.approx(expected, abs=1e-4)
