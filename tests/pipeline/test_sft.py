"""Promises 1, 6 and 8 on the real SFT trainer: what is trained, how a step is computed, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.chat import Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base
from pipeline.records.find import records
from pipeline.records.lifecycle import Record
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.training_data import read
from pipeline.workspace import Workspace

Losses = Callable[[Any, Encoded], list[float]]
ONE_STEP = ("sft_config.batch_size=10", "sft_config.epochs=1.0", "sft_config.warmup_ratio=0.0")


def plain(base: Base, adapter: Path | None = None) -> Any:
    """The base, or base + adapter, through plain transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder)
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def logged(record: Record) -> list[dict[str, Any]]:
    lines = (record.folder / "log.jsonl").read_text("utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def adapter_of(record: Record) -> dict[str, torch.Tensor]:
    return load_file(record.output / "adapter" / "adapter_model.safetensors")


def test_held_out_loss_falls_with_an_interval_that_excludes_0(trained: Any) -> None:
    loss = trained.record("sft").facts().results["eval_loss"]
    assert loss["delta"]["ci_high"] < 0
    assert loss["after"]["value"] < loss["before"]["value"]


def test_recorded_held_out_losses_are_those_of_base_and_adapter(
    trained: Any, base: Base, answer_losses: Losses
) -> None:
    held_out = read(trained.workspace, trained.job().config, Conversation).held_out
    recorded = [
        json.loads(line) for line in (trained.record("sft").folder / "heldout.jsonl").read_text("utf-8").splitlines()
    ]
    assert [row["id"] for row in recorded] == [row.id for row in held_out]
    chat = base.chat()
    for when, model in (("before", plain(base)), ("after", plain(base, trained.output("sft")))):
        for row, told in zip(held_out, recorded, strict=True):
            assert told[when] == pytest.approx(mean(answer_losses(model, chat.conversation(row.messages))), abs=1e-4)


def test_the_steps_planned_are_the_steps_taken(trained: Any) -> None:
    planned = dict(Sft.prepare(trained.job()).plan())["steps"]
    assert int(planned.split()[0]) == trained.record("sft").facts().results["training"]["steps"]


def test_loss_of_the_first_step_is_the_mean_over_supervised_tokens(
    small_talk: Workspace, job: Callable[..., Job], base: Base, answer_losses: Losses
) -> None:
    """Nothing has moved at step 1 and the batch is every row, so the loss can be worked out from the base alone."""
    record = run_stage(Sft, job(*ONE_STEP))
    model, chat, supervised = plain(base), base.chat(), []
    for row in read_rows(small_talk, "data/sft", Conversation):
        encoded = chat.conversation(row.messages)
        trained_text = chat.tokenizer.decode([t for t, on in zip(encoded.ids, encoded.mask, strict=True) if on])
        answers = [m.content for m in row.messages if m.role == "assistant"]
        assert trained_text == "".join(f"{answer}\n<|EOT|>" for answer in answers)
        supervised += answer_losses(model, encoded)
    assert logged(record)[0]["loss"] == pytest.approx(mean(supervised), abs=2e-5)
    assert record.facts.results["training"]["trained_tokens_an_epoch"] == len(supervised)


def test_how_a_step_is_executed_does_not_change_what_it_learns(small_talk: Workspace, job: Callable[..., Job]) -> None:
    """10 rows, 4 a step, the last step short: rows of unlike length, so a mean of means would show."""
    common = ("sft_config.epochs=1.0", "sft_config.warmup_ratio=0.0", "sft_config.schedule=constant_with_warmup")
    ways = {
        "4 × 1": (4, 1, False),
        "2 × 2": (2, 2, False),
        "1 × 4": (1, 4, False),
        "2 × 2, activations recomputed": (2, 2, True),
    }
    found = {}
    for way, (batch, accumulation, recomputed) in ways.items():
        chosen = (f"sft_config.batch_size={batch}", f"sft_config.gradient_accumulation={accumulation}")
        recompute = f"sft_config.gradient_checkpointing={str(recomputed).lower()}"
        found[way] = run_stage(Sft, job(*common, *chosen, recompute))
    losses = {way: [entry["loss"] for entry in logged(record)] for way, record in found.items()}
    expected = adapter_of(found["4 × 1"])
    size = torch.cat([tensor.flatten() for name, tensor in expected.items() if "lora_B" in name]).norm()
    for way, record in found.items():
        assert losses[way] == pytest.approx(losses["4 × 1"], abs=1e-5), way
        difference = torch.cat([(adapter_of(record)[name] - expected[name]).flatten() for name in expected]).norm()
        assert difference < 1e-3 * size, way
    assert len(losses["4 × 1"]) == 3


BAD = [
    {"id": "long", "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so " * 300}]},
    {"id": "good", "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
    {"id": "forged", "messages": [{"role": "user", "content": "a<|EOT|>b"}, {"role": "assistant", "content": "So."}]},
]


def plant_bad_rows(workspace: Workspace) -> None:
    lines = [json.dumps(row) + "\n" for row in BAD]
    (workspace.root / "data/sft/bad.jsonl").write_text("".join(lines))


def test_rows_that_cannot_be_used_are_named_with_file_line_and_reason(
    small_talk: Workspace, job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    plant_bad_rows(small_talk)
    limits = ("sft_config.max_length=256", "training_data.max_reject_share=0.5", "sft_config.batch_size=11")
    record = run_stage(Sft, job(*ONE_STEP[1:], *limits))
    rejects = [json.loads(line) for line in (record.folder / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [(r["file"], r["line"], r["rule"], r["id"]) for r in rejects] == [
        ("data/sft/bad.jsonl", 1, "D301", "long"),
        ("data/sft/bad.jsonl", 3, "D201", "forged"),
    ]
    assert "max_length is 256" in rejects[0]["reason"]
    assert "<|EOT|>" in rejects[1]["reason"]
    assert record.facts.data["rejected"] == 2
    assert "note: 2 of 13 rows cannot be used, first data/sft/bad.jsonl:1" in capsys.readouterr().err


def test_too_many_rows_that_cannot_be_used_stop_the_stage(small_talk: Workspace, job: Callable[..., Job]) -> None:
    plant_bad_rows(small_talk)
    with pytest.raises(UserError, match=r"^data/sft/bad\.jsonl:1: 2 of 13 rows cannot be used.*; try .*max_length"):
        run_stage(Sft, job(*ONE_STEP, "sft_config.max_length=256"))
    assert not list(small_talk.checkpoints.glob("*/adapter"))


def test_max_length_beyond_the_context_is_refused_with_its_line(small_talk: Workspace, job: Callable[..., Job]) -> None:
    profile = small_talk.configs / "small.yaml"
    profile.write_text(
        profile.read_text()
        .replace("2e-3, batch_size: 2", "2e-3, max_length: 4096, batch_size: 2")
        .replace("2.0, max_length: 2048", "2.0")
    )
    with pytest.raises(UserError, match=r"^configs/small\.yaml:6: sft_config\.max_length: 4096 .* 2048; try 2048$"):
        Sft.prepare(job())


@pytest.mark.parametrize("planted", ["rate", "weight"])
def test_a_loss_that_is_no_number_fails_the_run_with_its_step(
    small_talk: Workspace, job: Callable[..., Job], base: Base, tmp_path: Path, planted: str
) -> None:
    fault = "sft_config.learning_rate=1e30"
    if planted == "weight":
        model = plain(base)
        model.model.layers[2].mlp.up_proj.weight.data[5, 7] = float("nan")
        model.save_pretrained(tmp_path / "broken")
        base.tokenizer().save_pretrained(tmp_path / "broken")
        fault = f"base_model={tmp_path / 'broken'}"
    with pytest.raises(StageFailed, match=r"(loss is (nan|inf) at step \d|the update of step \d is (nan|inf))"):
        run_stage(Sft, job("sft_config.batch_size=2", "sft_config.warmup_ratio=0.0", fault))
    ((_, facts),) = records(small_talk)
    assert facts.status == "failed"
    assert facts.failure is not None
    assert facts.failure.step == 1
    assert len(set(facts.failure.rows)) == 2
    assert not list(small_talk.checkpoints.glob("*/adapter")) and not list(small_talk.checkpoints.glob("small-*"))


def test_a_step_that_fails_names_the_rows_it_saw(
    small_talk: Workspace, job: Callable[..., Job], base: Base, tmp_path: Path, answer_losses: Losses
) -> None:
    """Which row came first is told by the loss of a sound run: only one row has that loss."""
    settings = ("sft_config.batch_size=1", "sft_config.epochs=1.0", "sft_config.warmup_ratio=0.0")
    first = logged(run_stage(Sft, job(*settings)))[0]["loss"]
    model, chat = plain(base), base.chat()
    losses = {
        row.id: mean(answer_losses(model, chat.conversation(row.messages)))
        for row in read_rows(small_talk, "data/sft", Conversation)
    }
    (expected,) = [name for name, loss in losses.items() if loss == pytest.approx(first, abs=1e-4)]

    model.model.layers[2].mlp.up_proj.weight.data[5, 7] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    base.tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(StageFailed, match="at step 1") as failed:
        run_stage(Sft, job(*settings, f"base_model={tmp_path / 'broken'}"))
    assert failed.value.rows == [expected]


def test_sft_from_a_record_goes_on_from_its_adapter(
    small_talk: Workspace, job: Callable[..., Job], base: Base, answer_losses: Losses
) -> None:
    first = run_stage(Sft, job("sft_config.epochs=3.0"))
    more = run_stage(Sft, job(*ONE_STEP, source=first.id))
    assert [taken.id for taken in more.facts.lineage.inputs] == [first.id]
    chat, rows = base.chat(), read_rows(small_talk, "data/sft", Conversation)

    def loss(adapter: Path | None) -> float:
        model = plain(base, adapter)
        found = [loss for row in rows for loss in answer_losses(model, chat.conversation(row.messages))]
        return sum(found) / len(found)

    assert logged(more)[0]["loss"] == pytest.approx(loss(first.output / "adapter"), abs=1e-3)
    assert logged(more)[0]["loss"] < loss(None) - 0.05
    with pytest.raises(UserError, match=r"sft_config\.lora_rank: is 3, the adapter of .* has \d+; try --set"):
        Sft.prepare(job("sft_config.lora_rank=3", source=first.id))
