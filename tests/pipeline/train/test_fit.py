"""The choice of how to train: what fits, what is preferred, and remedies that truly make it fit."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from pipeline.config import DpoConfig, SftConfig
from pipeline.errors import UserError
from pipeline.train.fit import Lengths, Task, choose
from pipeline.train.footprint import Shape
from pipeline.train.machine import Machine

LONG = Lengths([300, 2000, 1500, 700] * 25)


@pytest.fixture(scope="module")
def shape() -> Shape:
    """Of deepseek-coder-7b-instruct-v1.5."""
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32}
    return Shape.of(LlamaConfig(**config, vocab_size=102400, dtype="bfloat16"))


def task(shape: Shape, gb: float, lengths: Lengths = LONG, dpo: bool = False, **changes: Any) -> Task:
    own = {key: changes.pop(key) for key in ("precision", "quantization", "correction") if key in changes}
    config: Any = DpoConfig(**changes) if dpo else SftConfig(**changes)
    lora = SftConfig() if dpo else config
    machine = Machine("cuda", "a card", round(gb * 1e9))
    stage = "dpo" if dpo else "sft"
    return Task(stage, shape, config, lora, machine, lengths, where="configs/x.yaml", **own)


@pytest.mark.parametrize(
    ("gb", "quantization", "checkpointing", "most"),
    [(80, "none", False, True), (24, "none", True, True), (16.6, "none", True, False), (12, "nf4", True, True)],
)
def test_the_least_that_costs_quality_or_speed_is_taken(
    shape: Shape, gb: float, quantization: str, checkpointing: bool, most: bool
) -> None:
    wanted = task(shape, gb)
    chosen = choose(wanted)
    assert (chosen.quantization, chosen.checkpointing) == (quantization, checkpointing)
    assert (chosen.pass_tokens == 2 * 2048) == most
    assert 2000 <= chosen.pass_tokens <= 4096
    assert wanted.needs(chosen) <= gb * 1e9


def test_a_pass_is_as_large_as_fits_and_no_larger(shape: Shape) -> None:
    wanted = task(shape, 24, quantization="nf4", gradient_checkpointing=False)
    chosen = choose(wanted)
    assert chosen.pass_tokens % 256 == 0
    assert wanted.needs(chosen) <= 24e9 < wanted.needs(chosen, chosen.pass_tokens + 256)


def test_the_profiles_word_is_kept(shape: Shape) -> None:
    assert choose(task(shape, 80, gradient_checkpointing=True)).checkpointing
    assert not choose(task(shape, 40, gradient_checkpointing=False)).checkpointing
    assert choose(task(shape, 80, quantization="nf4")).quantization == "nf4"
    assert choose(task(shape, 80, pass_tokens=3000)).pass_tokens == 3000
    assert choose(task(shape, 80, pass_tokens=100)).pass_tokens == 2000  # the longest row


def test_the_longest_row_counts_where_rows_have_been_counted(shape: Shape) -> None:
    with pytest.raises(UserError, match="a row of 2,048 tokens"):
        choose(task(shape, 15.9, Lengths([300] * 9, counted=False), quantization="none"))
    assert choose(task(shape, 15.9, Lengths([300] * 100), quantization="none")).pass_tokens >= 300


def test_a_pass_takes_no_more_than_a_step_has(shape: Shape) -> None:
    few = Lengths([10, 20, 30, 40])
    assert choose(task(shape, 80, few, batch_size=2, gradient_accumulation=1)).pass_tokens == 70
    padded = task(shape, 80, few, batch_size=2, gradient_accumulation=1, packing=False)
    assert choose(padded).pass_tokens == 80


def test_an_uncounted_pair_may_be_two_whole_sequences(shape: Shape) -> None:
    assert task(shape, 80, Lengths([], counted=False), dpo=True).longest == 2 * 2048


def test_what_past_records_measured_counts(shape: Shape) -> None:
    assert not choose(task(shape, 40)).checkpointing
    assert choose(task(shape, 40, correction=1.6)).checkpointing


def test_without_checkpointing_a_pass_must_be_worth_it(shape: Shape) -> None:
    short = Lengths([200] * 100)
    chosen = choose(task(shape, 17, short))
    assert task(shape, 17, short).needs(replace(chosen, checkpointing=False, pass_tokens=300)) < 17e9
    assert chosen.checkpointing
    assert chosen.pass_tokens > 1024


def changes_in(remedy: str) -> dict[str, Any]:
    found = dict(re.findall(r"([a-z_.]+)=([^ ]+)", remedy))
    numbers_and_words = {key.rpartition(".")[2]: value for key, value in found.items()}
    return {
        k: json.loads(v) if v in ("true", "false", "null") or v.isdigit() else v for k, v in numbers_and_words.items()
    }


REFUSED: list[tuple[float, dict[str, Any], list[str]]] = [
    (24, {"quantization": "none", "gradient_checkpointing": False}, ["gradient_checkpointing", "quantization", "max_length"]),
    (20, {"precision": "fp32", "quantization": "none"}, ["precision", "quantization"]),
    (12, {"quantization": "none", "gradient_checkpointing": True}, ["quantization"]),
    (10, {"quantization": "none", "gradient_checkpointing": False}, ["gradient_checkpointing quantization"]),
    (7.2, {}, ["max_length", "lora_rank"]),
    (16, {"lora_rank": 512, "quantization": "nf4"}, ["lora_rank"]),
    (20, {"pass_tokens": 20_000, "quantization": "none"}, ["pass_tokens", "quantization"]),
]  # fmt: skip


@pytest.mark.parametrize(("gb", "changes", "wanted"), REFUSED)
def test_each_remedy_makes_it_fit(shape: Shape, gb: float, changes: dict[str, Any], wanted: list[str]) -> None:
    refused = task(shape, gb, **changes)
    with pytest.raises(UserError) as error:
        choose(refused)
    assert str(error.value).startswith("configs/x.yaml: sft: a row of 2,000 tokens needs ")
    remedies = str(error.value).partition("; try ")[2].split(" or ")
    assert [" ".join(changes_in(remedy)) for remedy in remedies] == wanted
    for remedy in remedies:
        mended = refused.changed(changes_in(remedy))
        said = re.search(r"\(([\d.]+) GB", remedy)
        assert said
        assert mended.needs(choose(mended)) / 1e9 == pytest.approx(float(said[1]), abs=0.051) and float(said[1]) <= gb


def test_a_shorter_max_length_says_whom_it_costs(shape: Shape) -> None:
    with pytest.raises(UserError, match=r"max_length=\d+ \(7.0 GB, rejects 50 of 100 rows\)"):
        choose(task(shape, 7.1))


def test_what_nothing_can_help_is_said(shape: Shape) -> None:
    with pytest.raises(UserError, match=r"try a smaller base_model, or a device with 7\.\d GB$"):
        choose(task(shape, 3))


def test_lengths_are_those_of_the_passes() -> None:
    import random

    from pipeline.train.passes import lay
    from tests.pipeline.little import pair, sequence

    source = random.Random(0)
    rows: list[Any] = [sequence(source, (3, 4), (2, 5)), sequence(source, (1, 2))]
    pairs: list[Any] = [pair(source, 5, 3, 4)]
    assert Lengths.of(rows, rows[:1]) == Lengths([14, 3], [14], supervised=11)
    assert Lengths.of(pairs) == Lengths([12], [], supervised=7)
    assert sum(Lengths.of(pairs).train) == sum(batch.tokens for batch in lay(pairs, 99, True))
