"""The `transformers` backend: continuous batching around one model, for the server and for evaluation.

    engine = TransformersEngine(model, chat, context=4096, max_concurrent=16)

One thread generates: each pass takes the next token of every running request, and a part of a waiting prompt. Scoring
pauses it for one short pass at a time. What one request gets does not depend on the others, but for rounding: sums in
another order, which bf16 shows and float32 hardly.
"""

import asyncio
import itertools
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.chat import Chat
from pipeline.errors import StageFailed
from pipeline.progress import Progress, say
from serving.engine import Answer, Sampling, TokenScore

PAGE = 256  # tokens in a page of the KV cache; transformers' default
PASS = 256  # prompt tokens in a pass: more would keep running answers waiting longer
CACHE_SHARE = 0.25  # of the free memory, at most, for the KV cache: uncapped it takes most of the machine
TOGETHER = 32  # answers that an evaluation generates at once


class TransformersEngine:
    """A model of this process behind a queue (`serving.engine.Engine`).

    `context` becomes smaller where the KV cache cannot hold one of that length. Raises `StageFailed` when the cache holds
    nothing or does not fit.
    """

    def __init__(
        self, model: Any, chat: Chat, context: int, max_concurrent: int, kv_cache_gb: float | None = None
    ) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from pipeline.private import take_over_batching
        from serving.transformers_backend.results import Router
        from serving.transformers_backend.sampling import Drawer

        self.chat, self.precision = chat, str(model.dtype).removeprefix("torch.")
        batch = max(PASS, max_concurrent)
        pages, self.context = _kv_cache(model, context, max_concurrent, batch, kv_cache_gb)
        self._model, self._vocabulary = model, int(model.config.get_text_config().vocab_size)
        self._names = (f"request-{n}" for n in itertools.count())
        self._scorer = ThreadPoolExecutor(1, "score")
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=chat.end_of_turn_id, pad_token_id=chat.tokenizer.pad_token_id
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=pages,
                max_batch_tokens=batch,
                max_requests_per_batch=max_concurrent,
                max_memory_percent=0.9,
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._drawer, self._router = Drawer(), Router(self._manager.cancel_request)
        take_over_batching(self._manager, self._drawer, self._router)
        try:
            self._manager.warmup()  # makes the cache here, where it can be told that it does not fit
        except MemoryError as error:
            raise StageFailed(
                f"the KV cache does not fit: {error}", remedy="a smaller serve_config.kv_cache_gb"
            ) from None

    def start(self) -> None:
        self._manager.start()

    def stop(self) -> None:
        """At once: what still runs fails. Who wants it answered waits before this."""
        self._scorer.shutdown(wait=False, cancel_futures=True)
        self._manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    @property
    def ended(self) -> str:
        from serving.transformers_backend.results import ENDED

        cause = self._manager.background_thread_status.fatal_error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        return f"{ENDED}: {lines[0][:300]}" if cause else ENDED

    @property
    def requests(self) -> int:
        """Answers under way, those that wait for a place included."""
        return len(self._router)

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of the KV cache, and how many of them no request holds."""
        from pipeline.private import cache_bytes

        return cache_bytes(self._manager)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        """Yields the answer as it grows; the last one has its finish reason. Closing the iterator frees the slot.

        Raises `ValueError` for what could never be answered, `RuntimeError` when the backend failed.
        """
        from serving.transformers_backend.results import ENDED
        from serving.transformers_backend.sampling import Draw

        self._check(prompt, sampling.max_tokens)
        if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and (sampling.top_logprobs or 0) >= 0):
            raise ValueError(f"{sampling} cannot be drawn")
        name, finished = next(self._names), False
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        scores = [] if sampling.top_logprobs is None else self._drawer.tell(name, sampling.top_logprobs)
        box = self._router.open(name)
        try:
            accepted = self._manager.add_request(
                list(prompt),
                request_id=name,
                max_new_tokens=sampling.max_tokens,
                streaming=True,
                eos_token_id=self.chat.end_of_turn_id,
                draw=Draw(sampling.temperature, sampling.top_p, seed),
            )
            if accepted is None:  # transformers drops it with a warning, and nothing would ever arrive
                raise RuntimeError(ENDED)
            while not finished:
                result = await box.take(lambda: self.alive)
                finished = result.is_finished()
                if result.error is not None:
                    raise RuntimeError(result.error)
                tokens = result.generated_tokens
                stopped = bool(tokens) and tokens[-1] == self.chat.end_of_turn_id
                tokens = tokens[:-1] if stopped else tokens
                reason = "stop" if stopped else "length" if finished else None
                yield Answer(tokens, reason, scores[: len(tokens)])
        finally:
            self._router.close(name)
            self._drawer.forget(name)
            if not finished:
                self._manager.cancel_request(name)

    async def score(self, tokens: Sequence[int], top: int) -> list[TokenScore | None]:
        """Each token given those before it; None for the first. Generation goes on between its passes of `PASS` tokens.

        Its keys and values are its own, not the cache's, and it holds the log-probs of one pass: PASS · vocabulary.
        Raises as `generate` does.
        """
        self._check(tokens, 0)
        given_up = threading.Event()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._scorer, self._score, list(tokens), top, given_up)
        finally:
            given_up.set()

    def _score(self, tokens: list[int], top: int, given_up: threading.Event) -> list[TokenScore | None]:
        import torch
        from transformers import DynamicCache

        from serving.transformers_backend.sampling import token_scores

        cache = DynamicCache(config=self._model.config)
        scores: list[TokenScore | None] = [None]
        for start in range(0, len(tokens) - 1, PASS):
            if given_up.is_set():
                break
            following = tokens[start + 1 : start + 1 + PASS]
            given = torch.tensor([tokens[start : start + len(following)]], device=self._model.device)
            with self._manager.pause(), self._plain_attention(), torch.inference_mode():
                logits = self._model(input_ids=given, past_key_values=cache, use_cache=True).logits[0]
                scores += token_scores(logits.float().log_softmax(-1), following, top)
        return scores

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Continuous batching puts `paged|eager` in the place of eager attention; no plain pass can use that."""
        paged = self._model.config._attn_implementation
        if not paged.startswith("paged|"):
            yield
            return
        self._model.set_attn_implementation(paged.removeprefix("paged|"))
        try:
            yield
        finally:
            self._model.set_attn_implementation(paged)

    def _check(self, prompt: Sequence[int], max_tokens: int) -> None:
        """What fails in the generation thread ends it and everyone's answers, as a token does that the model has not."""
        if not prompt or min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise ValueError("a prompt is at least one token, each of the model's vocabulary")
        if len(prompt) + max_tokens > self.context:
            raise ValueError(f"{len(prompt)} tokens and {max_tokens} to come exceed the context of {self.context}")


def generate_all(
    model: Any, chat: Chat, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, what: str
) -> list[Answer]:
    """The answer to each prompt, in order, batched continuously; each prompt draws with noise of its own, from `seed`.

    Raises `RuntimeError` when one fails, `StageFailed` when the KV cache cannot hold the longest.
    """
    longest = max(map(len, prompts)) + sampling.max_tokens
    engine = TransformersEngine(model, chat, longest, min(len(prompts), TOGETHER))
    if engine.context < longest:
        what = (
            f"the free memory holds {engine.context} tokens of a prompt and its answer, and the longest has {longest}"
        )
        raise StageFailed(what, remedy="a smaller eval_config.max_tokens")

    async def one(index: int, progress: Progress) -> Answer:
        own = replace(sampling, seed=(index << 64) + seed % 2**64)
        answer = [answer async for answer in engine.generate(prompts[index], own)][-1]
        progress.advance()
        return answer

    async def all_of_them() -> list[Answer]:
        with Progress(what, len(prompts), "answer") as progress:
            return await asyncio.gather(*(one(index, progress) for index in range(len(prompts))))

    engine.start()
    try:
        return asyncio.run(all_of_them())
    finally:
        engine.stop()


def use_threads(threads: int | None) -> int:
    """Sets torch's compute threads: OMP_NUM_THREADS where it is set, else `threads`, else one a physical core."""
    import psutil
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        allowed = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads or min(psutil.cpu_count(logical=False) or allowed, allowed))
    return torch.get_num_threads()


def _kv_cache(model: Any, context: int, concurrent: int, batch: int, cap_gb: float | None) -> tuple[int, int]:
    """Its pages, for `concurrent` sequences of `context` tokens or as many as the cap holds, and the context that fits.

    A page's bytes are its keys and values, and its part of the cache's index and of the mask of shape (batch, cache).
    """
    import psutil
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(model.dtype).bits // 8
    page_bytes = PAGE * (2 * config.num_hidden_layers * heads * head * size + batch * size + 8)
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    cap = int(cap_gb * 1e9) if cap_gb else int(free * CACHE_SHARE)
    each = -(-context // PAGE)
    pages = min(concurrent * each, cap // page_bytes - 2)  # two pages are transformers' own
    fits = min(context, pages * PAGE)
    if fits <= 0:
        what = (
            f"a KV cache of {cap / 1e9:.3f} GB holds nothing: a page of {PAGE} tokens takes {page_bytes / 1e6:.1f} MB"
        )
        raise StageFailed(what, remedy=f"serve_config.kv_cache_gb={3 * page_bytes / 1e9:.3f} or more")
    if fits < context:
        say(f"note: the KV cache of {cap / 1e9:.1f} GB holds {fits} tokens, so the context is that, not {context}")
    elif pages < concurrent * each:
        say(
            f"note: the KV cache of {cap / 1e9:.1f} GB holds {pages // each} whole contexts of {context} tokens, "
            f"not {concurrent}: where requests are that long, some wait"
        )
    return pages, fits
