"""What engines are asked in these tests, and what one plain pass of the model says."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pipeline.chat import Chat
from pipeline.data.rows import Message
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import PAGE, TransformersEngine

CONTEXT = 2048


def prompts(chat: Chat, count: int) -> list[list[int]]:
    """Of many lengths, one of them longer than a page of the cache."""
    texts = [f"Explain lock number {i}. " + "Be exact. " * (i % 4) for i in range(count - 1)] + ["word " * (PAGE + 20)]
    return [chat.prompt([Message(role="user", content=text)]) for text in texts]


async def answer(engine: TransformersEngine, prompt: Sequence[int], sampling: Sampling, after: float = 0) -> Answer:
    await asyncio.sleep(after)
    return [answer async for answer in engine.generate(prompt, sampling)][-1]


def log_probs(model: Any, tokens: list[int]) -> Any:
    """(positions, vocabulary), of one plain pass."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
