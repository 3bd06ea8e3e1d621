"""The `transformers` backend: continuous batching around one model, for the server and for evaluation."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from pipeline.chat import Chat
from pipeline.progress import Progress
from serving.engine import Answer, Sampling

PAGE = 256  # tokens in a page of the KV cache; transformers' default
CACHE_SHARE = 0.25  # of the free memory, at most, for the KV cache: uncapped it takes most of the machine


class TransformersEngine:
    """A model of this process behind a queue (`serving.engine.Engine`)."""

    def __init__(self, model: Any, chat: Chat, context: int, max_concurrent: int) -> None:
        from transformers import GenerationConfig

        self.chat, self.context = chat, context
        self._names = (f"request-{n}" for n in itertools.count())
        # the values only make the per-request processors exist; every request brings its own
        config = GenerationConfig(
            do_sample=True,
            temperature=0.7,
            top_k=50,
            top_p=0.9,
            eos_token_id=chat.end_of_turn_id,
            pad_token_id=chat.tokenizer.pad_token_id,
        )
        self._vocabulary = int(model.config.vocab_size)
        self._manager = model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=_batching(model, context, max_concurrent, per_request=True),
        )

    def start(self) -> None:
        self._manager.start()

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=10)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        """Yields the answer as it grows; the last one has its finish reason. Closing the iterator frees the slot."""
        name = next(self._names)
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(name, arrived.put_nowait)
        greedy = sampling.temperature == 0
        finished = False
        try:
            accepted = self._manager.add_request(
                list(prompt),
                request_id=name,
                max_new_tokens=sampling.max_tokens,
                streaming=True,
                eos_token_id=self.chat.end_of_turn_id,
                temperature=1.0 if greedy else float(sampling.temperature),
                top_k=1 if greedy else self._vocabulary,
                top_p=1.0 if greedy else float(sampling.top_p),
            )
            if accepted is None:  # transformers drops it with a warning, and nothing would ever arrive
                raise RuntimeError("the generation thread has ended")
            while not finished:
                result = await arrived.get()
                if result.error is not None:
                    finished = True
                    raise RuntimeError(result.error)
                finished = result.is_finished()
                yield Answer(*self._ended(result.generated_tokens, finished))
        finally:
            if not finished:
                self._manager.cancel_request(name)

    def _ended(self, tokens: list[int], finished: bool) -> tuple[list[int], str | None]:
        if tokens and tokens[-1] == self.chat.end_of_turn_id:
            return tokens[:-1], "stop"
        return list(tokens), "length" if finished else None


def generate_all(
    model: Any, chat: Chat, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, what: str
) -> list[Answer]:
    """The answer to each prompt, in order, batched continuously. Raises RuntimeError when one fails."""
    from transformers import GenerationConfig

    drawn = (
        {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        if sampling.temperature
        else {"do_sample": False}
    )
    config = GenerationConfig(
        **drawn,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=chat.end_of_turn_id,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    longest = max(map(len, prompts)) + sampling.max_tokens
    batching = _batching(model, longest, min(len(prompts), 32), per_request=False, seed=seed)
    answers: list[Answer | None] = [None] * len(prompts)
    with (
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, timeout=10
        ) as manager,
        Progress(what, len(prompts), "answer") as progress,
    ):
        names = {f"prompt-{i}": i for i in range(len(prompts))}
        for name, index in names.items():
            manager.add_request(list(prompts[index]), request_id=name, max_new_tokens=sampling.max_tokens)
        while not all(answers):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread ended before all answers were there")
                continue
            if result.error is not None:
                raise RuntimeError(f"generation failed: {result.error}")
            tokens = list(result.generated_tokens)
            stopped = bool(tokens) and tokens[-1] == chat.end_of_turn_id
            answers[names[result.request_id]] = Answer(
                tokens[:-1] if stopped else tokens, "stop" if stopped else "length"
            )
            progress.advance()
    return [answer for answer in answers if answer is not None]


def _batching(model: Any, context: int, concurrent: int, per_request: bool, seed: int | None = None) -> Any:
    """A KV cache for `concurrent` sequences of `context` tokens, or for what `CACHE_SHARE` of the free memory holds."""
    import psutil
    import torch
    from transformers import ContinuousBatchingConfig

    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(model.dtype).bits // 8
    page_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size * PAGE
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    wanted = concurrent * -(-context // PAGE)
    affordable = max(int(free * CACHE_SHARE / page_bytes), -(-context // PAGE))
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=min(wanted, affordable) + 1,
        max_batch_tokens=max(2 * PAGE, concurrent),
        max_requests_per_batch=concurrent,
        per_request_processors=per_request,
        use_cuda_graph=False,
        seed=seed,
    )
