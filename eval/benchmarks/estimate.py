"""What benchmarks will take, before they do: items, requests and tokens from the prompts themselves, time from a first try.

    found = expect(ready, chosen, chat, models=2)
    found.text()                                  "310 items, 1,240 requests a model, 2 models, 0.4 M tokens in"
    hours(found, [Pace("hellaswag", 8, 1.9)])     from so many items of each task, timed

Tokens are counted on `SAMPLE` items of each task and taken to be as many in the others; of what is generated only the most is
known. Time is that of the first model's first items, as if every model were as fast: the first batch on a GPU is slower than
those that follow, so it is rather too long than too short.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.benchmarks.harness import Chosen
from eval.benchmarks.preflight import Ready
from eval.benchmarks.prompts import check_start, renderer
from pipeline.chat import Chat
from pipeline.config import Cost
from pipeline.errors import StageFailed
from pipeline.progress import duration, say

SAMPLE = 16  # items of a task
FEWEST = 20  # items of a task: fewer say next to nothing
WORTH_A_TRY = 4  # batches of a task: fewer are done as soon as they are timed


@dataclass(frozen=True)
class Expected:
    """Of one model; `models` are asked."""

    items: dict[str, int]  # by task
    requests: int
    tokens_in: int
    tokens_out: int  # at the most
    models: int
    hours: float | None = None  # of all models
    price: float | None = None
    currency: str = ""

    def text(self) -> str:
        parts = [f"{sum(self.items.values()):,} items, {self.requests:,} requests a model"]
        parts += [f"{self.models} models", f"{_thousands(self.tokens_in)} tokens in"]
        parts += [f"at most {_thousands(self.tokens_out)} out"] if self.tokens_out else []
        return ", ".join(parts)

    def time(self) -> str:
        assert self.hours is not None
        money = f", {self.price:.2f} {self.currency}" if self.price else ""
        return f"{duration(self.hours * 3600)} for {self.models} models{money}"

    def as_record(self) -> dict[str, Any]:
        known = {"hours": self.hours, "price": self.price, "currency": self.currency or None}
        facts = {"items": sum(self.items.values()), "requests": self.requests, "tokens_in": self.tokens_in}
        facts |= {"tokens_out_at_most": self.tokens_out, "models": self.models}
        return facts | {k: round(v, 4) if isinstance(v, float) else v for k, v in known.items() if v is not None}


def expect(ready: Sequence[Ready], chosen: Chosen, chat: Chat, models: int) -> Expected:
    """Also looks at how prompts begin (`check_start`), before any model is in memory."""
    requests, tokens_in, tokens_out, items = 0.0, 0.0, 0.0, {}
    for leaf, task in ((leaf, task) for each in ready for leaf, task in each.leaves.items()):
        sample = list(chosen[leaf])[:SAMPLE]
        found = _requests(task, sample, chat)
        share = len(chosen[leaf]) / len(sample) * (task.get_config("repeats") or 1)
        items[leaf] = len(chosen[leaf])
        requests += share * len(found)
        for request in found:
            tokens_in += share * sum(len(_ids(text, chat)) for text in request.args if isinstance(text, str))
            if request.request_type == "generate_until":
                tokens_out += share * int(request.args[1].get("max_gen_toks", 256))
            if request.request_type in ("generate_until", "loglikelihood") and request.args[0]:
                check_start(_ids(request.args[0], chat), chat)
    return Expected(items, round(requests), round(tokens_in), round(tokens_out), models)


def _requests(task: Any, sample: list[int], chat: Chat) -> list[Any]:
    task.build_all_requests(
        samples=sample, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=renderer(chat)
    )
    found = list(task.instances)
    task._instances = None
    return found


def _ids(text: str, chat: Chat) -> list[int]:
    found: list[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def timed(
    expected: Expected, ask: Callable[[Mapping[str, Sequence[int]]], Any], chosen: Chosen, tries: int
) -> Expected:
    """With the time that `tries` items of each task take, all at once; `ask` asks the model those."""
    few = {leaf: list(items)[:tries] for leaf, items in chosen.items()}
    hours = 0.0
    for leaf, items in few.items():
        start = time.monotonic()
        ask({leaf: items})
        hours += (time.monotonic() - start) / 3600 * expected.items[leaf] / len(items)
    return replace(expected, hours=hours * expected.models)


def priced(expected: Expected, cost: Cost) -> Expected:
    """The price of the GPUs alone: what they draw is measured, not foretold."""
    import torch

    assert expected.hours is not None
    gpus = torch.cuda.device_count()
    return replace(expected, price=expected.hours * gpus * cost.gpu_hour, currency=cost.currency)


def share_within(expected: Expected, most: float | None) -> float:
    """Which share of the items fits into `most` hours. Raises `StageFailed` where too few of a task would be left."""
    if most is None or expected.hours is None or expected.hours <= most:
        return 1.0
    share = most / expected.hours
    smallest = min(expected.items, key=expected.items.__getitem__)
    left = int(expected.items[smallest] * share)
    if left < min(FEWEST, expected.items[smallest]):
        raise StageFailed(
            f"benchmarks would take {expected.time()}, and {duration(most * 3600)} are allowed: too few items would be left",
            remedy=f"eval_config.max_hours={1.1 * expected.hours:.2g}, or fewer eval_config.tasks",
        )
    say(
        f"benchmarks: {expected.time()} are more than eval_config.max_hours={most:g}: {share:.0%} of each task's items, drawn"
    )
    return share


def _thousands(number: int) -> str:
    return f"{number:,}" if number < 100_000 else f"{number / 1e6:.1f} M"
