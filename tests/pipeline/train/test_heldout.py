"""What a model makes of rows, against transformers' own padded forward pass: no code of the pipeline's."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from little import little_model, sequence
from little import pair as random_pair
from torch import Tensor

from pipeline.chat import Chat
from pipeline.data.rows import Conversation, Message, PreferencePair
from pipeline.encoded import Encoded
from pipeline.errors import Interrupted, StageFailed
from pipeline.model import Base
from pipeline.train import attention, heldout, passes
from pipeline.train.head import bare
from pipeline.train.passes import Row, supervised
from pipeline.train.trainer import Execution

ANSWERS = ("Yes.", "An index is a sorted copy of a column, and it costs writes.\n\n- one\n- two", "No", "é 你好 " * 20)
TOLERANCE = 1e-4  # nats a token, in float32
ON_A_CPU = "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(ON_A_CPU)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slowed down by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chat(base: Base) -> Chat:
    return base.chat()


@pytest.fixture(scope="module")
def model(base: Base) -> Any:
    made = base.load()
    attention.install(made)
    return made


@pytest.fixture(scope="module")
def rows(chat: Chat) -> list[Encoded]:
    """Of very different lengths, the longest neither first nor last, one with two turns."""
    turns = [[Message(role="user", content="What?"), Message(role="assistant", content=text)] for text in ANSWERS]
    conversations = [Conversation(messages=m) for m in (*turns, turns[0] + turns[1])]
    return [chat.conversation(row.messages) for row in conversations]


@pytest.fixture(scope="module")
def pairs(chat: Chat) -> list[tuple[Encoded, Encoded]]:
    answers = (("Yes.", "no way"), ("b" * 50, "Add an index."), (ANSWERS[3], "No"), (ANSWERS[1], ANSWERS[1] + "!"))
    return [chat.pair(pair_of(*sides)) for sides in answers]


@pytest.fixture
def given(rows: list[Encoded], pairs: list[tuple[Encoded, Encoded]], request: pytest.FixtureRequest) -> Sequence[Row]:
    return rows if request.param == "rows" else pairs


def pair_of(chosen: str, rejected: str) -> PreferencePair:
    sides = ([Message(role="assistant", content=text)] for text in (chosen, rejected))
    return PreferencePair(prompt=[Message(role="user", content="Why?")], chosen=next(sides), rejected=next(sides))


def plain(model: Any, given: Sequence[Row]) -> list[tuple[float, ...]]:
    """Of each row, its sequences' log-probs: one padded batch, transformers' own attention, full logits."""
    sides = [side for row in given for side in (row if isinstance(row, tuple) else (row,))]
    longest = max(len(side.ids) for side in sides)
    ids, real = torch.zeros((2, len(sides), longest), dtype=torch.long)
    for n, side in enumerate(sides):
        ids[n, : len(side.ids)], real[n, : len(side.ids)] = torch.tensor(side.ids), 1
    inner = bare(model)
    installed = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            scores = F.log_softmax(inner(input_ids=ids, attention_mask=real).logits.double(), dim=-1)
    finally:
        inner.set_attn_implementation(installed)
    sums = []
    for n, side in enumerate(sides):
        places = [place for place, trained in enumerate(side.mask) if trained]
        sums.append(scores[n, [place - 1 for place in places], [side.ids[place] for place in places]].sum().item())
    each = 2 if isinstance(given[0], tuple) else 1
    return [tuple(sums[start : start + each]) for start in range(0, len(sums), each)]


@contextmanager
def watched(
    model: Any, error: Exception | None = None, when: Callable[[list[int]], bool] = lambda begun: True
) -> Iterator[list[int]]:
    """The tokens of each pass that the model begins, padding included; it ends with `error` when it is so far."""
    begun: list[int] = []

    def look(module: Any, given: tuple[Tensor]) -> None:
        begun.append(given[0].numel())
        if error and when(begun):
            raise error

    handle = bare(model).get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield begun
    finally:
        handle.remove()


def off(found: Sequence[tuple[float, ...]], expected: Sequence[tuple[float, ...]], given: Sequence[Row]) -> float:
    """The most, nats a token."""
    assert len(found) == len(expected) == len(given)
    return max(
        abs(a - b) / supervised(row)
        for some, others, row in zip(found, expected, given, strict=True)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pass_tokens", [1, 90, 150, 10_000])
@pytest.mark.parametrize("given", ["rows", "pairs"], indirect=True)
def test_log_probs_are_those_of_transformers_padded_forward(
    model: Any, given: Sequence[Row], pass_tokens: int, packed: bool
) -> None:
    found = heldout.log_probs(model, given, Execution(pass_tokens, packed), "log p")
    assert off(found, plain(model, given), given) < TOLERANCE


@pytest.mark.parametrize("given", ["rows", "pairs"], indirect=True)
def test_a_leak_between_rows_or_answers_would_be_seen(
    model: Any, given: Sequence[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a whole pass is one document. The positions still are each row's own."""
    honest = passes.lay

    def one_document(*arguments: Any) -> list[passes.Pass]:
        return [replace(batch, documents=((batch.tokens, 0, 0),)) for batch in honest(*arguments)]

    monkeypatch.setattr(passes, "lay", one_document)
    found = heldout.log_probs(model, given, Execution(10_000, packed=True), "log p")
    assert off(found, plain(model, given), given) > 10 * TOLERANCE


def test_a_prompt_that_stands_once_gives_what_two_sequences_give(
    model: Any, pairs: list[tuple[Encoded, Encoded]]
) -> None:
    shared = heldout.pair_log_probs(model, pairs, Execution(150, packed=True), "pairs")
    flat = heldout.log_probs(model, [side for pair in pairs for side in pair], Execution(150, packed=True), "sides")
    apart = [(flat[i][0], flat[i + 1][0]) for i in range(0, len(flat), 2)]
    assert off(shared, apart, pairs) < 1e-5


@pytest.mark.parametrize("packed", [True, False])
def test_losses_are_the_mean_over_each_rows_trained_tokens(model: Any, rows: list[Encoded], packed: bool) -> None:
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([r.ids]), labels=torch.tensor([r.labels])).loss.item() for r in rows]
    assert heldout.losses(model, rows, Execution(150, packed), "loss") == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("packed", [True, False])
def test_each_row_keeps_its_place_whatever_stands_beside_it(
    model: Any, rows: list[Encoded], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Execution(150, packed)
    forward = heldout.losses(model, rows, how, "loss")
    assert heldout.losses(model, rows[::-1], how, "loss")[::-1] == pytest.approx(forward, abs=TOLERANCE)
    assert len({round(loss, 3) for loss in forward}) == len(rows), "rows alike could not show a mix-up"
    monkeypatch.setattr(heldout, "TOGETHER", 2)
    assert heldout.losses(model, rows, how, "loss") == pytest.approx(forward, abs=TOLERANCE)


@pytest.mark.parametrize("packed", [True, False])
def test_the_same_rows_weights_and_pass_size_give_the_same_bits(packed: bool) -> None:
    """Of a model in training, whose dropout would show."""
    model, source = little_model(adapter={"lora_dropout": 0.5}, dtype=torch.float32).train(), random.Random(0)
    attention.install(bare(model))
    given = [random_pair(source, 5, source.randint(1, 30), source.randint(1, 30)) for _ in range(12)]
    first = heldout.log_probs(model, given, Execution(100, packed), "before")
    assert heldout.log_probs(model, given, Execution(100, packed), "after") == first


def test_nothing_is_measured_of_no_rows(model: Any) -> None:
    assert heldout.log_probs(model, [], Execution(150, packed=True), "nothing") == []


# What it computes in


def test_log_probs_are_float32_whatever_the_model_computes_in(base: Base, rows: list[Encoded]) -> None:
    model = base.load().to(torch.bfloat16)
    found = heldout.log_probs(model, rows, Execution(1, packed=False), "log p")
    expected = [plain(model, [row])[0] for row in rows]
    assert [total for (total,) in found] == pytest.approx([total for (total,) in expected], rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_a_pass_is_computed_as_training_computes_it(model: Any, rows: list[Encoded], packed: bool) -> None:
    plainly = heldout.losses(model, rows, Execution(150, packed), "loss")
    found = heldout.losses(model, rows, Execution(150, packed, compute=torch.bfloat16), "loss")
    assert found != plainly and found == pytest.approx(plainly, abs=0.05)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["Llama", "Granite"])
def test_of_a_padded_pass_the_head_sees_trained_positions_alone(kind: str) -> None:
    """What the model does to its logits afterwards is done: Granite's are divided."""
    shape: dict[str, Any] = {"logits_scaling": 3.0} if kind == "Granite" else {}
    model = little_model(kind, **shape)
    source = random.Random(0)
    given = [sequence(source, (4, n), (2, 3)) for n in (1, 9, 5)]
    seen: list[Tensor] = []
    handle = bare(model).get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out))
    found = heldout.log_probs(model, given, Execution(1000, packed=False), "log p")
    handle.remove()
    assert [out.shape[:-1].numel() for out in seen] == [sum(map(supervised, given))]
    assert off(found, plain(model, given), given) < 1e-9


# How the model is left


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(base: Base, rows: list[Encoded], training: bool) -> None:
    model = base.load().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heldout.losses(model, rows, Execution(150, packed=False), "loss")
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    assert not bare(model).get_output_embeddings()._forward_pre_hooks


def test_measuring_is_in_eval_mode(model: Any, rows: list[Encoded]) -> None:
    seen: list[bool] = []
    hook: Callable[..., None] = lambda module, *_: seen.append(module.training)  # noqa: E731
    handle = model.train().get_decoder().register_forward_hook(hook)
    try:
        heldout.losses(model, rows, Execution(10_000, packed=True), "loss")
    finally:
        handle.remove()
        model.eval()
    assert seen == [False]


def test_what_pause_raises_before_a_pass_ends_the_measurement(model: Any, rows: list[Encoded]) -> None:
    asked: list[int] = []

    def pause() -> None:
        asked.append(len(begun))
        if len(asked) == 3:
            raise Interrupted("planted")

    model.train()
    try:
        with watched(model) as begun, pytest.raises(Interrupted):
            heldout.losses(model, rows, Execution(1, packed=True), "loss", pause)
        assert asked == [0, 1, 2] and model.training
    finally:
        model.eval()


# How rows are laid


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("of_pairs", [True, False])
def test_little_is_wasted(packed: bool, of_pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 rows that vary eightfold: packed passes have no padding and are nearly full; padded ones have little."""
    model, source = little_model(adapter={}), random.Random(0)
    attention.install(model)
    given: list[Row] = [
        random_pair(source, 8, n, max(1, n // 2)) if of_pairs else sequence(source, (8, n))
        for n in (source.randint(1, 70) for _ in range(300))
    ]
    tokens = sum(map(passes.size, given))
    monkeypatch.setattr(heldout, "TOGETHER", 100)
    with watched(model) as begun:
        heldout.log_probs(model, given, Execution(1000, packed), "log p")
    assert max(begun) <= 1000
    if packed:
        assert sum(begun) == tokens and len(begun) <= 1.25 * math.ceil(tokens / 1000)
    else:
        alone = sum(len(side.ids) for row in given for side in (row if isinstance(row, tuple) else (row,)))
        assert sum(begun) <= (1.3 if of_pairs else 1.1) * alone


# Out of memory


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu"])
def test_out_of_memory_halves_the_pass_and_goes_on(
    model: Any, rows: list[Encoded], error: Exception, packed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    longest, how = max(len(row.ids) for row in rows), Execution(10_000, packed)
    untroubled = heldout.losses(model, rows, Execution(10_000, packed), "loss")
    with watched(model, error, lambda begun: begun[-1] > longest) as begun:
        found = heldout.losses(model, rows, how, "held-out rows")
    assert found == pytest.approx(untroubled, abs=TOLERANCE)
    assert begun[0] > longest and sum(tokens > longest for tokens in begun) == len(how.out_of_memory)
    assert longest <= how.pass_tokens < begun[0]
    assert how.out_of_memory[-1] == {"measuring": "held-out rows", "pass_tokens": how.pass_tokens}
    said = capfd.readouterr().err
    assert f"out of memory in held-out rows: goes on with {how.pass_tokens} tokens a pass in place of" in said


def test_what_was_measured_before_memory_ran_out_is_kept(model: Any, rows: list[Encoded]) -> None:
    given = [*rows, *rows, *rows]
    with watched(model, MemoryError(), lambda begun: len(begun) == 2) as begun:
        found = heldout.log_probs(model, given, Execution(900, packed=True), "log p")
    assert len(begun) > 3 and sum(begun) - begun[1] == sum(len(row.ids) for row in given)
    assert off(found, plain(model, given), given) < TOLERANCE


def test_a_row_that_does_not_fit_alone_is_a_line(model: Any, rows: list[Encoded]) -> None:
    longest = max(len(row.ids) for row in rows)
    model.train()
    try:
        with watched(model, MemoryError(), lambda begun: begun[-1] == longest), pytest.raises(StageFailed) as failed:
            heldout.losses(model, rows, Execution(1, packed=True), "held-out rows")
        assert model.training
    finally:
        model.eval()
    said = f"out of memory in held-out rows, with one row of {longest} tokens in a pass; try quantization: nf4, or"
    assert str(failed.value).startswith(said) and "\n" not in str(failed.value)


def test_another_error_is_not_taken_for_out_of_memory(model: Any, rows: list[Encoded]) -> None:
    with watched(model, RuntimeError("planted")), pytest.raises(RuntimeError, match="planted"):
        heldout.losses(model, rows, Execution(150, packed=True), "loss")


# What is measured


def test_only_the_completions_of_a_pair_count(chat: Chat) -> None:
    pair = pair_of("Yes.", "no way")
    prompt = chat.prompt(pair.prompt)
    for side, text in zip(chat.pair(pair), ("Yes.", "no way"), strict=True):
        assert side.ids[: len(prompt)] == prompt and not any(side.mask[: len(prompt)])
        assert all(side.mask[len(prompt) :])
        assert chat.tokenizer.decode(side.ids[len(prompt) :]) == f"{text}\n<|EOT|>"


def test_pair_is_encoded_as_the_conversation_it_would_be(chat: Chat) -> None:
    """What DPO scores is what SFT trains: one way to make tokens."""
    pair = pair_of("Yes.", "no way")
    assert chat.pair(pair)[0] == chat.conversation([*pair.prompt, *pair.chosen])


def test_embedded_base_knows_more_than_nothing_and_less_than_all(model: Any, rows: list[Encoded]) -> None:
    """Uniform guessing over the vocabulary costs ln 4096 = 8.3 nats a token."""
    for loss in heldout.losses(model, rows[:2], Execution(150, packed=True), "loss"):
        assert 1.0 < loss < 0.9 * math.log(4096)


@pytest.mark.parametrize("packed", [True, False])
def test_ends_are_read_off_the_full_distribution(
    model: Any, chat: Chat, rows: list[Encoded], packed: bool, answer_losses: Callable[..., list[float]]
) -> None:
    end = chat.end_of_turn_id
    found = heldout.ends(model, rows, Execution(150, packed), "ends", end)
    inner = bare(model)
    installed = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa")
    for row, of_row in zip(rows, found, strict=True):
        with torch.no_grad():
            likely = model(input_ids=torch.tensor([row.ids])).logits[0].double().softmax(-1)[:, end].tolist()
        ended, inside, surprise = [], 0.0, 0.0
        for place in (i for i, trained in enumerate(row.mask) if trained):
            if row.ids[place] == end:
                ended.append(likely[place - 1])
                surprise -= math.log(likely[place - 1])
            else:
                inside += likely[place - 1]
                surprise -= math.log(1 - likely[place - 1])
        assert of_row.at_ends == pytest.approx(ended, rel=1e-3) and of_row.inside == pytest.approx(inside, rel=1e-3)
        assert of_row.surprise == pytest.approx(surprise, rel=1e-3)
        losses = answer_losses(model, row)
        assert of_row.loss == pytest.approx(sum(losses) / len(losses), abs=TOLERANCE)
    inner.set_attn_implementation(installed)
    assert [len(of_row.at_ends) for of_row in found] == [1, 1, 1, 1, 2]  # the last has two turns


def test_ends_go_on_with_less_when_memory_runs_out(model: Any, chat: Chat, rows: list[Encoded]) -> None:
    whole = heldout.ends(model, rows, Execution(10_000, False), "ends", chat.end_of_turn_id)
    how = Execution(10_000, False)
    with watched(model, MemoryError(), lambda begun: len(begun) == 1):
        again = heldout.ends(model, rows, how, "ends", chat.end_of_turn_id)
    assert len(how.out_of_memory) == 1
    assert [r.loss for r in again] == pytest.approx([r.loss for r in whole], abs=TOLERANCE)
