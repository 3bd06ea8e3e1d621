"""`config explain`: every value, where it came from, and what follows from it."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.model import Base
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said, Trained


def explained(aletheia: "Callable[..., Said]", workspace: Workspace, *sets: str) -> tuple[Any, Any]:
    words = [word for text in sets for word in ("--set", text)]
    said = aletheia(workspace, "config", "explain", "--profile", "small", *words, "--json")
    assert (said.code, said.err) == (0, ""), said.err
    found = json.loads(said.out)
    return found["values"], found["follows"]


def test_every_value_says_where_it_came_from(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    lines = (workspace.configs / "small.yaml").read_text().splitlines()
    values, _ = explained(aletheia, workspace, "sft_config.lora_rank=4", "eval_config.limit=null")
    assert values["sft_config.lora_rank"] == {"value": 4, "from": "--set"}
    assert values["eval_config.limit"] == {"value": None, "from": "--set"}
    assert values["dpo_config.beta"] == {"value": 0.1, "from": "default"}
    for key in (
        "name",
        "device",
        "training_data.validation.seed",
        "sft_config.learning_rate",
        "eval_config.max_tokens",
    ):
        file, _, line = values[key]["from"].rpartition(":")
        assert file == "configs/small.yaml"
        assert f"{key.split('.')[-1]}: " in lines[int(line) - 1]
    assert values["sft_config.learning_rate"]["value"] == 2e-3


def test_no_value_is_left_out(aletheia: "Callable[..., Said]", trained: "Trained") -> None:
    def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
        return {
            inner
            for key, value in values.items()
            for inner in (keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"})
        }

    facts = trained.record("sft").facts()
    assert facts is not None
    assert set(explained(aletheia, trained.workspace)[0]) == keys(facts.configuration)


def test_the_table_shows_value_origin_and_meaning(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    said = aletheia(workspace, "config", "explain", "--profile", "small", "--set", "dpo_config.beta=0.2")
    [line] = [line for line in said.out.splitlines() if line.startswith("dpo_config.beta ")]
    assert line.split()[:3] == ["dpo_config.beta", "0.2", "--set"]
    assert line.endswith("how strongly the policy is held to the reference")


def test_what_follows_is_what_the_run_did(aletheia: "Callable[..., Said]", trained: "Trained") -> None:
    _, follows = explained(aletheia, trained.workspace)
    for stage in ("sft", "dpo"):
        facts = trained.record(stage).facts()
        assert facts is not None
        train, kept = facts.data["train"]["rows"], facts.data["held_out"]["rows"]
        assert follows[f"{stage} rows"] == f"{train} to train, {kept} held out"
        assert follows[f"{stage} steps"].startswith(f"{facts.results['training']['steps']} of 2 rows, ")
        assert follows[f"{stage} time"].endswith(f"at the pace of {getattr(trained, stage)}")


def test_the_time_before_a_first_run_says_what_it_rests_on(
    aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    time = explained(aletheia, workspace)[1]["sft time"]
    assert time.startswith("about ") and time.endswith("assumed: no run was measured here yet")


def test_what_it_takes_is_predicted(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    _, follows = explained(aletheia, workspace)
    for stage in ("sft", "dpo"):
        for label in ("tokens", "passes", "memory", "memory by part", "disk", "energy", "cost"):
            assert any(letter.isdigit() for letter in follows[f"{stage} {label}"])


def test_what_cannot_fit_is_said_with_remedies(
    aletheia: "Callable[..., Said]", workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.train import preflight
    from pipeline.train.machine import Machine

    monkeypatch.setattr(preflight, "this_machine", lambda device: Machine("cpu", "small", 700 * 10**6))
    _, follows = explained(aletheia, workspace, "sft_config.gradient_checkpointing=false")
    assert " and small has 0.70 GB; try sft_config." in follows["sft memory"]
    assert "dpo rows" in follows


def test_few_steps_are_warned_of(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    assert "fewer than 20 steps" in explained(aletheia, workspace)[1]["sft steps"]
    assert "fewer" not in explained(aletheia, workspace, "sft_config.epochs=4.0")[1]["sft steps"]


def test_the_parameters_are_counted_not_guessed(
    aletheia: "Callable[..., Said]", workspace: Workspace, base: Base
) -> None:
    from safetensors import safe_open

    with safe_open(base.folder / "model.safetensors", framework="pt") as tensors:
        count = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118  (not a dict)
    assert explained(aletheia, workspace)[1]["parameters"] == f"{count / 1e6:,.1f} M"


def test_what_cannot_be_known_is_said_and_the_rest_is_shown(
    aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    values, follows = explained(aletheia, workspace, "training_data.sft=data/none", "base_model=/no/such/model")
    assert follows["sft"].startswith("unknown: data/none")
    assert follows["memory"].startswith("unknown: ")
    assert follows["dpo rows"] == "10 to train, 5 held out"
    assert follows["dpo steps"].startswith("5 of 2 rows, ")
    assert values["training_data.sft"]["value"] == "data/none"


def test_a_record_of_odd_results_is_no_obstacle(aletheia: "Callable[..., Said]", copied: "Trained") -> None:
    facts = copied.record("sft").facts()
    assert facts is not None
    for training in ([1], {"seconds": "x", "steps": 0}, {"seconds": 1.0}, 5):
        facts.results["training"] = training
        copied.record("sft").write(facts)
        assert explained(aletheia, copied.workspace)[1]["sft time"].endswith("no run was measured here yet")
