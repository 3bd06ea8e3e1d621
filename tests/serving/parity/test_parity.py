"""Parity: a sound server is equal, every planted fault is seen for what it is, and what cannot be asked is not passed."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.chat import Chat
from pipeline.config import ServeConfig
from pipeline.data.rows import Conversation, Message
from pipeline.model import Base
from pipeline.stage import Source
from serving.endpoint import Endpoint
from serving.engine import Answer, Sampling
from serving.front.app import Usage, build_app
from serving.parity.compared import REMEDIES, Compared
from serving.parity.plain import compare_plain
from serving.parity.probes import ANSWER_TOKENS, HARD, Probe, Reference, Spread, held_out, make_probes
from serving.parity.served import compare
from serving.serve import servable
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.in_process import serving

if TYPE_CHECKING:
    from tests.conftest import Trained

CONTEXT = 2048
FEW = ("a system prompt", "several turns", "unicode")  # and two rows: enough for a fault to show


@dataclass(frozen=True)
class Known:
    """The finished pipeline's merged model, and what plain transformers makes of some probes."""

    source: Source
    base: Base
    chat: Chat
    probes: list[Probe]
    reference: Reference
    plain: Compared

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source.output)

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.source.output).eval()

    def compare(self, address: str, precision: str | None = None) -> Compared:
        return compare(Endpoint(address), "ours", self.chat, self.probes, self.reference, precision)


@pytest.fixture(scope="module")
def known(trained: "Trained") -> Known:
    job = trained.job()
    source, base, chat = servable(job)
    every = make_probes(chat, held_out(job, source, Conversation))
    probes = [p for p in every if p.name not in HARD][:2] + [p for p in every if p.name in FEW]
    reference, plain = compare_plain(job, source, base, chat, probes, {None, "bfloat16"})
    return Known(source, base, chat, probes, reference, plain)


Serving = Callable[..., Compared]


@pytest.fixture(scope="module")
def served(known: Known) -> Serving:
    """`served(model, chat)`: parity of that model and template behind the project's own server."""

    def run(
        model: Any, chat: Chat, precision: str | None = None, engine: type = TransformersEngine, around: Any = None
    ) -> Compared:
        app: Any = build_app(engine(model, chat, CONTEXT, 4), "ours", ServeConfig(), Usage())
        with serving(around(app) if around else app) as address:
            return known.compare(address, precision)

    return run


def states(found: Compared) -> list[bool | None]:
    return [found[check] for check in REMEDIES]


# ── what is sound ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_probes_hold_real_rows_and_every_hard_case(trained: "Trained") -> None:
    job = trained.job()
    source, _, chat = servable(job)
    rows = held_out(job, source, Conversation)
    probes = make_probes(chat, rows)
    assert {p.name for p in probes} == {*HARD, *(row.id for row in rows)}
    for probe in probes:
        assert probe.prompt == chat.prompt(probe.messages) == probe.forced[: len(probe.prompt)]
        assert len(probe.forced) > len(probe.prompt)


def test_plain_transformers_is_equal(known: Known) -> None:
    assert states(known.plain) == [True] * 4, known.plain
    assert known.plain.verdict == "equal"


def test_our_server_is_equal(known: Known, served: Serving) -> None:
    found = served(known.model(), known.chat)
    assert states(found) == [True] * 4, found
    assert (found.verdict, found.problem, found.not_compared) == ("equal", None, {})
    assert found.spread is not None and found.bound is not None
    assert 0 < found.spread.mean < found.bound.mean


def test_the_bound_is_what_rounding_does_and_a_lost_adapter_is_beyond_it(known: Known) -> None:
    reference = known.reference
    exact, bfloat16 = reference.bound(None), reference.bound("bfloat16")
    assert exact is not None and bfloat16 is not None
    assert exact.mean < 1e-3 < bfloat16.mean < reference.moved.mean / 2
    assert reference.sees_the_base
    assert reference.bound("q8_0") is None


def test_a_server_in_another_precision_is_equal_when_that_is_said(known: Known, served: Serving) -> None:
    import torch

    model = known.model().to(torch.bfloat16)
    found = served(model, known.chat, "bfloat16")
    assert states(found) == [True] * 4, found
    unsaid = replace(found, bound=known.reference.bound(None), held=set())
    assert found.spread is not None and unsaid.bound is not None
    assert not found.spread.within(unsaid.bound)


def test_a_lost_adapter_is_seen_in_bfloat16_too(known: Known, served: Serving) -> None:
    import torch

    found = served(known.base.load().to(torch.bfloat16), known.chat, "bfloat16")
    assert states(found)[3] is False


def test_no_word_of_a_server_hides_the_base(known: Known) -> None:
    """Neither a precision whose rounding is as wide as what training moved, nor one of which nothing is known here."""
    narrow = replace(known.reference, moved=known.reference.noise["bfloat16"])
    assert (known.reference.believed("bfloat16"), narrow.believed("bfloat16")) == ("bfloat16", None)
    assert known.reference.believed("q4_k_m") == "q4_k_m"
    moved = known.reference.moved
    for differences, verdict in ([moved.mean / 10], "not compared"), ([moved.mean], "DIFFERS"):
        found = Compared("x", known.reference.bound("q4_k_m"), moved)
        found.judge(differences, "q4_k_m")
        assert found.verdict == verdict, found


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────


class LostBos(Chat):
    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return super().prompt(messages)[1:]


class DoubledBos(Chat):
    def prompt(self, messages: Sequence[Message]) -> list[int]:
        ids = super().prompt(messages)
        return [ids[0], *ids]


class AnotherSystemText(Chat):
    """What a server does that puts its own in front where there is none."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        own = [] if messages[0].role == "system" else [Message(role="system", content="You are helpful.\n")]
        return super().prompt([*own, *messages])


class AnotherEnd(Chat):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.end_of_turn_id = self.tokenizer("!", add_special_tokens=False)["input_ids"][-1]


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        (LostBos, ["token ids", "BOS"]),
        (DoubledBos, ["token ids", "BOS"]),
        (AnotherSystemText, ["token ids"]),
        (AnotherEnd, ["stop"]),
    ],
)
def test_another_template_is_seen(known: Known, served: Serving, template: type[Chat], seen: list[str]) -> None:
    found = served(known.model(), template(known.tokenizer(), "faulty"))
    assert found.verdict == "DIFFERS"
    assert set(seen) <= set(found.problems), found
    assert found.problem is not None and found.problem[1] == REMEDIES[seen[0]]
    assert ("stop" in found.problems) == ("stop" in seen)


def without_adapter(known: Known) -> Any:
    return known.base.load()


def another_base(known: Known) -> Any:
    """One matrix of the base is 2 % larger, the adapter is applied."""
    import torch

    model = known.model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.02)
    return model


@pytest.mark.parametrize("weights", [without_adapter, another_base])
def test_other_weights_are_seen_by_their_log_probs_alone(
    known: Known, served: Serving, weights: Callable[[Known], Any]
) -> None:
    found = served(weights(known), known.chat)
    assert (found.verdict, states(found)[:2], states(found)[3]) == ("DIFFERS", [True, True], False)
    assert found.problem is not None
    assert "log-probs differ" in found.problems["log-probs"] and "float32 allows" in found.problems["log-probs"]


class AnotherChat(TransformersEngine):
    """A chat's prompt is not the one that /tokenize tells, though as long."""

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        asked = list(prompt)
        if sampling.top_logprobs == 0 and sampling.max_tokens == ANSWER_TOKENS:
            asked[-4] = asked[-4] + 1
        async for answer in super().generate(asked, sampling):
            yield answer


def test_a_chat_rendered_otherwise_than_it_is_tokenised_is_seen(known: Known, served: Serving) -> None:
    found = served(known.model(), known.chat, engine=AnotherChat)
    assert list(found.problems) == ["log-probs"]


# ── what cannot be asked ─────────────────────────────────────────────────────────────────────────────────────────────


def lacking(*paths: str, echo: bool = True) -> Callable[[Any], Any]:
    """Around an app: it does not know these paths, nor without `echo` that parameter."""

    def around(app: Any) -> Any:
        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            body, message = b"", {"more_body": True}
            while message.get("more_body"):
                message = await receive()
                body += message.get("body", b"")
            asked = json.loads(body or b"{}")
            refused = 404 if scope["path"] in paths else 400 if asked.get("echo") and not echo else None
            if refused:
                await send({"type": "http.response.start", "status": refused, "headers": []})
                await send({"type": "http.response.body", "body": b'{"error": {"message": "no such thing"}}'})
                return None

            waiting = [{"type": "http.request", "body": body}]

            async def again() -> Any:
                return waiting.pop() if waiting else await receive()

            return await app(scope, again, send)

        return asgi

    return around


def test_without_tokenize_and_echo_a_server_is_not_passed_in_them(known: Known, served: Serving) -> None:
    found = served(known.model(), known.chat, around=lacking("/tokenize", echo=False))
    assert states(found) == [None, None, True, None], found
    assert found.verdict == "equal where compared"
    assert set(found.not_compared) == {"token ids", "BOS", "log-probs"}
    assert "404 no such thing" in found.not_compared["BOS"]


def test_without_tokenize_and_echo_what_is_told_still_shows_a_fault(known: Known, served: Serving) -> None:
    around = lacking("/tokenize", echo=False)
    doubled = served(known.model(), DoubledBos(known.tokenizer(), "faulty"), around=around)
    assert states(doubled)[0] is False  # the usage of a chat tells one token more
    assert states(served(without_adapter(known), known.chat, around=around))[3] is False


def test_nothing_that_could_be_asked_is_no_pass(known: Known, served: Serving) -> None:
    found = served(known.model(), known.chat, around=lacking("/tokenize", "/v1/chat/completions", "/v1/completions"))
    assert (states(found), found.verdict) == ([None] * 4, "not compared")


def test_a_log_prob_that_is_no_number_does_not_pass() -> None:
    assert not Spread.of([0.0, float("nan"), 0.0]).within(Spread(1.0, 1.0))
    assert not Spread.of([float("nan"), 0.0]).within(Spread(1.0, 1.0))


def test_one_failure_among_many_observations_is_a_failure() -> None:
    found = Compared("x")
    for ok in (True, False, True):
        found.saw("token ids", ok, "the second")
    assert (found["token ids"], found.problems) == (False, {"token ids": "the second"})
