"""What benchmarks will take: counted from the prompts, timed on the first items, and held against the limit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmarks import estimate, harness, preflight
from eval.benchmarks.estimate import Expected
from pipeline.chat import Chat
from pipeline.config import Cost
from pipeline.errors import StageFailed
from pipeline.tasks import find_tasks

if TYPE_CHECKING:
    from tests.conftest import Trained

EXPECTED = Expected({"small": 100, "large": 1000}, 4400, 1_000_000, 0, models=3)


@pytest.fixture(scope="module")
def ready(trained: "Trained") -> list[preflight.Ready]:
    tasks = find_tasks(trained.workspace.path("data/eval"), ["aletheia_choices", "aletheia_questions"])
    return preflight.check(tasks, run_code=False).ready


def test_requests_and_tokens_are_those_that_are_sent(
    ready: list[preflight.Ready], model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = ready[:1]
    chosen = harness.choose(choices, 3, 42)
    lm, sent = harness.in_process(model, chat, 1), list[int]()
    real = lm._loglikelihood_tokens
    monkeypatch.setattr(
        lm, "_loglikelihood_tokens",
        lambda asked, **rest: sent.extend(len(c) + len(e) for _, c, e in asked) or real(asked, **rest),
    )  # fmt: skip
    expected = estimate.expect(choices, chosen, chat, models=2)
    harness.run(lm, chat, choices, chosen, "test")
    assert (expected.items, expected.requests, expected.tokens_out) == ({"aletheia_choices": 3}, 12, 0)
    assert (len(sent), sum(sent)) == (expected.requests, expected.tokens_in)


def test_more_items_than_the_sample_count_as_many_as_they_are(
    ready: list[preflight.Ready], chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = harness.choose(ready, 20, 42)
    whole = estimate.expect(ready, chosen, chat, models=2)
    monkeypatch.setattr(estimate, "SAMPLE", 5)
    few = estimate.expect(ready, chosen, chat, models=2)
    assert (few.items, few.requests, few.tokens_out) == (whole.items, whole.requests, whole.tokens_out)
    assert few.tokens_in == pytest.approx(whole.tokens_in, rel=0.25) and few.tokens_in != whole.tokens_in
    assert whole.tokens_out == 20 * 512


def test_time_is_that_of_the_first_items_times_all_items_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0])  # 10 items of the one in 2 s, of the other in 3 s
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    asked: list[Mapping[str, Sequence[int]]] = []
    timed = estimate.timed(EXPECTED, asked.append, {"small": range(100), "large": range(1000)}, tries=10)
    assert [{name: len(items) for name, items in few.items()} for few in asked] == [{"small": 10}, {"large": 10}]
    assert timed.hours == pytest.approx(3 * (2.0 * 10 + 3.0 * 100) / 3600)


def test_the_price_is_that_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expected = estimate.priced(replace(EXPECTED, hours=1.5), Cost(gpu_hour=2.0, currency="EUR"))
    assert expected.price == 6.0
    assert expected.time() == "1 h 30 min for 3 models, 6.00 EUR"
    assert expected.as_record()["price"] == 6.0 and expected.as_record()["currency"] == "EUR"


@pytest.mark.parametrize(
    ("hours", "most", "share"), [(None, 1.0, 1.0), (1.0, None, 1.0), (1.0, 1.0, 1.0), (2.0, 1.0, 0.5)]
)
def test_what_does_not_fit_is_asked_less(
    hours: float | None, most: float | None, share: float, capfd: pytest.CaptureFixture[str]
) -> None:

    assert estimate.share_within(replace(EXPECTED, hours=hours), most) == share
    assert ("50% of each task's items, drawn" in capfd.readouterr().err) == (share < 1)


def test_where_too_little_would_be_left_it_is_refused() -> None:

    with pytest.raises(StageFailed, match=r"too few items would be left; try eval_config.max_hours=11, or fewer"):
        estimate.share_within(replace(EXPECTED, hours=10.0), 1.0)
