"""Promise 3, DPO starts from SFT, with its guard and the faults it must catch; and 5 for DPO's own source."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.chat import Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import PreferencePair
from pipeline.dpo import Dpo
from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.model import Base, find_base
from pipeline.profile import load_profile
from pipeline.records.find import records
from pipeline.records.lifecycle import Record
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train import adapter, reference
from pipeline.train.trainer import StepTrainer
from pipeline.training_data import read
from pipeline.workspace import Workspace
from tests.pipeline.shallow import make_shallow_talk, on_shallow

Losses = Callable[[Any, Encoded], list[float]]
SHORT = ("dpo_config.epochs=1.0", "dpo_config.warmup_ratio=0.0", "dpo_config.schedule=constant_with_warmup")


@dataclass(frozen=True)
class Taught:
    """A workspace with an SFT record and nothing after it, on the shallow base, with rows of few words."""

    workspace: Workspace
    sft: str

    @property
    def adapter(self) -> Path:
        return self.workspace.checkpoints / self.sft / "adapter"

    def job(self, *assignments: str, **options: Any) -> Job:
        return Job(self.workspace, load_profile(self.workspace, "small", list(assignments)), **options)


@pytest.fixture(scope="module")
def taught_once(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    workspace = make_shallow_talk(tmp_path_factory.mktemp("taught") / "root", shallow)
    return Taught(workspace, run_stage(Sft, Job(workspace, load_profile(workspace, "small"))).id)


@pytest.fixture
def taught(taught_once: Taught, tmp_path: Path) -> Taught:
    """That workspace as this test's own."""
    copy = shutil.copytree(taught_once.workspace.root, tmp_path / "taught", symlinks=True)
    return replace(taught_once, workspace=Workspace(copy))


@pytest.fixture
def small_talk(workspace: Workspace, shallow: Path) -> Workspace:
    """This test's workspace, with rows of few words, on the shallow base, and no record."""
    return on_shallow(workspace, shallow)


def plain(base: Base, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), adapter)


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def logged(record: Record) -> list[dict[str, Any]]:
    lines = (record.folder / "log.jsonl").read_text("utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def curve(record: Record) -> list[dict[str, Any]]:
    """Every line of the log, but how long the step took and in how much memory."""
    lines = map(json.loads, (record.folder / "log.jsonl").read_text("utf-8").splitlines())
    clock = ("seconds", "tokens_per_second", "all_tokens_per_second", "memory_gb", "energy_kwh")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def test_dpo_starts_at_ln_2_with_the_sft_policy_as_its_reference(trained: Any) -> None:
    facts = trained.record("dpo").facts()
    found = facts.results["reference"]
    assert found["is"] == trained.sft == facts.lineage.inputs[0].id
    assert found["loss_at_step_0"] == pytest.approx(0.693147, abs=1e-4)
    assert found["margin_at_step_0"] == pytest.approx(0, abs=1e-4)
    assert found["max_log_prob_distance_from_base"] > 1


def test_recorded_margins_are_those_of_the_sft_and_the_dpo_adapter(
    trained: Any, base: Base, answer_losses: Losses
) -> None:
    """Before DPO the policy gives the SFT adapter's figures, and what plain peft loads afterwards gives the others."""
    held_out = read(trained.workspace, trained.job().config, PreferencePair).held_out
    told = [
        json.loads(line) for line in (trained.record("dpo").folder / "heldout.jsonl").read_text("utf-8").splitlines()
    ]
    assert [row["id"] for row in told] == [pair.id for pair in held_out]
    chat = base.chat()
    for when, stage in (("before", "sft"), ("after", "dpo")):
        model = plain(base, trained.output(stage))
        for pair, row in zip(held_out, told, strict=True):
            chosen, rejected = (-sum(answer_losses(model, side)) for side in chat.pair(pair))
            assert row[when] == pytest.approx(chosen - rejected, abs=2e-2)  # of sums of hundreds of nats


def test_validation_is_dpo_s_own_loss_and_the_share_of_pairs_whose_margin_rose(trained: Any) -> None:
    folder = trained.record("dpo").folder
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    (validation,) = [line for line in lines if "eval_loss" in line]
    pairs = [json.loads(line) for line in (folder / "heldout.jsonl").read_text("utf-8").splitlines()]
    beta = trained.job().config.dpo_config.beta
    losses = [-torch.nn.functional.logsigmoid(torch.tensor(beta * (p["after"] - p["before"]))).item() for p in pairs]
    assert validation["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert validation["eval_loss_ci_low"] < validation["eval_loss"] < validation["eval_loss_ci_high"]
    assert (validation["epoch"], validation["eval_n"]) == (1.0, len(pairs))
    results = trained.record("dpo").facts().results
    accuracy = results["preference_accuracy"]
    for end, key in (("value", ""), ("ci_low", "_ci_low"), ("ci_high", "_ci_high")):
        assert validation[f"eval_preference_accuracy{key}"] == accuracy[end]
    figures = {key: validation[key] for key in ("epoch", "step", "eval_loss")}
    assert results["training"]["best"] == results["training"]["latest"] == figures


def test_the_result_is_one_adapter_that_continues_the_sft_adapter(trained: Any) -> None:
    sft, dpo = tensors(trained.output("sft")), tensors(trained.output("dpo"))
    assert sft.keys() == dpo.keys()
    assert not [path for path in trained.output("dpo").iterdir() if path.is_dir()]  # no `ref` beside it
    assert all(tensor.dtype == torch.float32 for tensor in dpo.values())
    assert all(not torch.equal(sft[name], dpo[name]) for name in sft)

    def size(values: dict[str, torch.Tensor]) -> float:
        return torch.cat([value.flatten() for value in values.values()]).norm().item()

    step = size({name: dpo[name] - sft[name] for name in sft})
    assert step < 0.2 * size(sft)  # a new adapter would be as far away as it is large


def changed(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = change(parameter.data)
    return model


def one_weight_by(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 2] += value
        return tensor

    return change


def assert_fails_at_step_0(taught: Taught, said: str) -> None:
    with pytest.raises(StageFailed, match=said):
        run_stage(Dpo, taught.job())
    facts = newest(taught.workspace)
    assert facts.status == "failed" and facts.failure.step == 0
    assert not (taught.workspace.checkpoints / newest_id(taught.workspace) / "adapter").exists()


@pytest.mark.parametrize(
    "fault",
    [
        lambda model, log_probs: changed(model, lambda b: b * 1.05) and log_probs,
        lambda model, log_probs: changed(model, one_weight_by(math.nan)) and log_probs,
        lambda model, log_probs: [(chosen, rejected + 0.5) for chosen, rejected in log_probs],
        lambda model, log_probs: log_probs[1:] + log_probs[:1],
    ],
    ids=["the policy moved", "the policy is broken", "another reference", "of other pairs"],
)
def test_a_reference_that_is_not_the_policy_fails_the_run_at_step_0(
    taught: Taught, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]
) -> None:
    honest = reference.log_probs
    monkeypatch.setattr(reference, "log_probs", lambda w, k, model, *given: fault(model, honest(w, k, model, *given)))
    assert_fails_at_step_0(taught, "nats off the reference's before step 1")


@pytest.mark.parametrize(
    "change",
    [one_weight_by(1e-6), lambda b: b.bfloat16().float(), torch.zeros_like],
    ids=["one weight", "rounded", "the base"],
)
def test_a_policy_that_is_not_the_sft_adapter_fails_the_run_at_step_0(
    taught: Taught, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Policy and reference agree, and the loss is ln 2."""
    honest = adapter.start
    monkeypatch.setattr(adapter, "start", lambda *given: changed(honest(*given), change))
    assert_fails_at_step_0(taught, "the policy starts apart from the SFT adapter")


def test_an_sft_adapter_that_changes_nothing_is_no_reference(taught: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third guard alone: tensors agree and the loss is ln 2, but the log-probs are the base's."""
    honest = adapter.start
    monkeypatch.setattr(adapter, "start", lambda *given: changed(honest(*given), torch.zeros_like))
    monkeypatch.setattr(reference, "_check_tensors", lambda *given: None)
    assert_fails_at_step_0(taught, "it is not the SFT policy")


def test_reference_log_probs_are_kept_and_not_taken_for_another_adapters(taught: Taught) -> None:
    run_stage(Dpo, taught.job(*SHORT))
    (kept,) = (taught.workspace.checkpoints / reference.FOLDER).iterdir()
    before = kept.read_bytes()
    run_stage(Dpo, taught.job(*SHORT, "dpo_config.beta=0.2"))
    assert [*kept.parent.iterdir()] == [kept] and kept.read_bytes() == before
    run_stage(Dpo, taught.job(*SHORT, source="base"))
    assert len([*kept.parent.iterdir()]) == 2


@pytest.mark.parametrize("loss", ["ipo", "robust", "hinge", "apo_zero", "kto", "sppo_hard", "orpo"])
def test_every_loss_trains(taught: Taught, loss: str) -> None:
    chosen = [f"dpo_config.loss_type={loss}", "dpo_config.learning_rate=1e-3"]
    chosen += ["dpo_config.label_smoothing=0.1"] * (loss == "robust") + ["dpo_config.sft_weight=1.0"] * (loss == "orpo")
    record = run_stage(Dpo, taught.job(*SHORT, "dpo_config.epochs=2.0", *chosen))
    margins = [line["rewards/margins"] for line in logged(record)]
    assert margins[-1] > margins[0]


def newest(workspace: Workspace) -> Any:
    return next(records(workspace))[1]


def newest_id(workspace: Workspace) -> str:
    return next(records(workspace))[0].id


def test_dpo_straight_on_the_base_when_asked(small_talk: Workspace, job: Callable[..., Job]) -> None:
    record = run_stage(Dpo, asked := job(*SHORT, source="base"))
    found = record.facts.results["reference"]
    assert found["is"] == "base" and record.facts.lineage.inputs == []
    assert found["max_log_prob_distance_from_base"] == 0
    losses = [entry["loss"] for entry in logged(record)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[-1] < losses[0]
    plain(find_base(small_talk, asked.profile), record.output / "adapter")


def test_dpo_without_an_sft_record_says_what_to_run(small_talk: Workspace, job: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match=r"^no complete sft record of profile `small` yet; try make sft PROFILE=small$"):
        run_stage(Dpo, job())
    assert not small_talk.experiments.exists()


def test_log_probs_of_the_first_step_are_those_of_the_completions(
    small_talk: Workspace, job: Callable[..., Job], answer_losses: Losses
) -> None:
    """The mask promise on the real trainer: trl's own figure for a batch of every pair, worked out from the base."""
    from transformers import AutoModelForCausalLM

    record = run_stage(Dpo, asked := job(*SHORT, "dpo_config.batch_size=6", source="base"))
    base = find_base(small_talk, asked.profile)
    model, chat = AutoModelForCausalLM.from_pretrained(base.folder), base.chat()
    sums: list[list[float]] = [[], []]
    for pair in read_rows(small_talk, "data/dpo", PreferencePair):
        for side, encoded, answer in zip(sums, chat.pair(pair), (pair.chosen, pair.rejected), strict=True):
            trained_ids = [t for t, on in zip(encoded.ids, encoded.mask, strict=True) if on]
            assert chat.tokenizer.decode(trained_ids) == f"{answer[0].content}\n<|EOT|>"
            side.append(-sum(answer_losses(model, encoded)))
    entry = logged(record)[0]
    assert entry["logps/chosen"] == pytest.approx(sum(sums[0]) / 6, abs=1e-2)
    assert entry["logps/rejected"] == pytest.approx(sum(sums[1]) / 6, abs=1e-2)


@pytest.mark.parametrize(("pairs", "loss"), [(6, "sigmoid"), (3, "sigmoid"), (6, "kto")])
def test_how_a_step_is_executed_does_not_change_what_it_learns(
    small_talk: Workspace, job: Callable[..., Job], pairs: int, loss: str
) -> None:
    """6 pairs: steps of 4 and 2. 3 pairs: one step of passes of unlike size."""
    file = small_talk.root / "data/dpo/few.jsonl"
    file.write_text("\n".join(file.read_text("utf-8").splitlines()[:pairs]) + "\n", "utf-8")
    found = []
    for batch, accumulation, pass_tokens in ((4, 1, 1000), (2, 2, 40)):
        chosen = [f"dpo_config.batch_size={batch}", f"dpo_config.gradient_accumulation={accumulation}"]
        chosen += [f"dpo_config.pass_tokens={pass_tokens}", f"dpo_config.loss_type={loss}"]
        found.append(run_stage(Dpo, job(*SHORT, *chosen, "dpo_config.learning_rate=1e-3", source="base")))
    assert all(one["passes"] < other["passes"] for one, other in zip(*map(logged, found), strict=True))
    whole, parts = ([entry["loss"] for entry in logged(record)] for record in found)
    assert len(whole) == math.ceil(pairs / 4)
    assert parts == pytest.approx(whole, abs=1e-5)
    whole_adapter, parts_adapter = (tensors(record.output / "adapter") for record in found)
    size = torch.cat([t.flatten() for n, t in whole_adapter.items() if "lora_B" in n]).norm()
    difference = torch.cat([(parts_adapter[n] - t).flatten() for n, t in whole_adapter.items()]).norm()
    assert difference < 1e-3 * size


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM to this process in the middle of the training step of that number, once."""
    honest, seen = StepTrainer.training_step, []

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *arguments, **options)

    monkeypatch.setattr(StepTrainer, "training_step", training_step)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_interrupted_dpo_resumed_equals_uninterrupted_on_the_source_it_began_from(
    taught: Taught, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """It began on the base; the resume names no source, and an SFT adapter is there to be taken by mistake."""
    held_out = "training_data.validation.fraction=0.34"
    settings = (*SHORT, held_out, f"dpo_config.loss_type={loss}", "dpo_config.learning_rate=1e-3")
    settings += ("dpo_config.batch_size=1", "dpo_config.epochs=2.0")
    whole = run_stage(Dpo, taught.job(*settings, source="base"))
    interrupt_at(monkeypatch, step=3)
    with pytest.raises(Interrupted, match="after step 3/8"):
        run_stage(Dpo, taught.job(*settings, source="base"))
    resumed = run_stage(Dpo, taught.job(resume=True))
    assert [change.status for change in resumed.facts.history] == ["running", "cancelled", "running", "complete"]
    assert resumed.facts.results["reference"] == whole.facts.results["reference"]
    assert curve(resumed) == curve(whole)
    assert [line["step"] for line in curve(whole) if "eval_preference_accuracy" in line] == [4, 8]
    expected, found = tensors(whole.output / "adapter"), tensors(resumed.output / "adapter")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resume_from_another_source_is_refused(taught: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, step=1)
    with pytest.raises(Interrupted):
        run_stage(Dpo, taught.job())
    with pytest.raises(UserError, match=f"began from {taught.sft}, not base"):
        run_stage(Dpo, taught.job(source="base", resume=True))


def test_a_changed_sft_adapter_is_refused(taught: Taught) -> None:
    adapter = taught.adapter / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors was changed since"):
        run_stage(Dpo, taught.job())


def test_an_adapter_made_for_another_base_is_refused(taught: Taught, shallow: Path, tmp_path: Path) -> None:
    """The reference would otherwise be another base with the SFT adapter on it: not the SFT policy."""
    other = shutil.copytree(shallow, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="was trained on other weights than this base's"):
        run_stage(Dpo, taught.job(f"base_model={other}"))
