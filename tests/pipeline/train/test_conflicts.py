"""A setting that would do nothing, or crash, is refused in one line where the profile gave it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.dpo import Dpo
from pipeline.errors import UserError
from pipeline.profile import load_profile
from pipeline.records.find import records
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.workspace import Workspace

NONE_HELD_OUT = "training_data.validation.fraction=0.0"
STAGES: dict[str, Any] = {"sft_config": Sft, "dpo_config": Dpo}
REMEDY = "training_data.validation.fraction: 0.1, or"


@pytest.mark.parametrize("section", STAGES)
@pytest.mark.parametrize(
    ("setting", "without"),
    [
        ("early_stopping=2", "early_stopping: null"),
        ("schedule=reduce_on_plateau", "schedule: cosine"),
        ("keep=best", "keep: last"),
        ("evaluate_steps=5", "evaluate_steps: null"),
    ],
)
def test_what_needs_held_out_rows_is_refused_where_there_are_none(
    job: Callable[..., Job], section: str, setting: str, without: str
) -> None:
    key, _, value = setting.partition("=")
    plenty = (f"{section}.epochs=9.0",)
    assert job(*plenty, f"{section}.{setting}")  # with held-out rows it is a setting like others
    with pytest.raises(UserError) as refused:
        job(*plenty, f"{section}.{setting}", NONE_HELD_OUT)
    what = f"--set: {section}.{key}: {value} needs held-out rows, and there are none"
    assert str(refused.value) == f"{what}; try {REMEDY} {without}"


def test_the_refusal_names_the_line(workspace: Workspace) -> None:
    profile = workspace.configs / "small.yaml"
    plain = profile.read_text().replace("fraction: 0.34", "fraction: 0.0")
    profile.write_text(plain.replace("dpo_config: {", "dpo_config:\n  {\n    keep: best,\n    "))
    with pytest.raises(UserError, match=r"^configs/small\.yaml:9: dpo_config\.keep: best needs held-out rows"):
        load_profile(workspace, "small")


@pytest.mark.parametrize(
    ("settings", "key", "needs", "there"),
    [
        (["keep=best", "epochs=1.0"], "keep", 1, 0),
        (["keep=best", "evaluate_each_epoch=false"], "keep", 1, 0),
        (["keep=best", "epochs=1.5"], None, 1, 1),
        (["schedule=reduce_on_plateau", "epochs=2.0"], "schedule", 2, 1),
        (["schedule=reduce_on_plateau", "epochs=3.0"], None, 2, 2),
        (["early_stopping=1", "epochs=1.0"], "early_stopping", 2, 0),
        (["early_stopping=3", "epochs=4.0"], "early_stopping", 4, 3),
        (["early_stopping=3", "epochs=4.1"], None, 4, 4),
        (["early_stopping=3", "epochs=0.5", "evaluate_steps=1"], None, 4, 0),  # the rows tell
    ],
)
def test_what_needs_more_measurements_than_fall_due_is_refused(
    job: Callable[..., Job], settings: list[str], key: str | None, needs: int, there: int
) -> None:
    assignments = [f"sft_config.{setting}" for setting in settings]
    if key is None:
        job(*assignments)
        return
    pattern = rf"^--set: sft_config\.{key}: \w+ takes {needs} or more measurements .*, and there are {there}; try evaluate_steps"
    with pytest.raises(UserError, match=pattern):
        job(*assignments)


def no_rows_of_its_own(workspace: Workspace) -> str:
    """A folder of held-out rows with none of the stage's."""
    (workspace.root / "data/apart").mkdir()
    return "training_data.validation.path=data/apart"


@pytest.mark.parametrize("section", STAGES)
def test_a_held_out_part_that_came_out_empty_is_refused_before_a_record_exists(
    small_talk: Workspace, job: Callable[..., Job], section: str
) -> None:
    """Half a row is held out of ten; or the folder has rows of the other stage alone."""
    settings = [f"{section}.epochs=3.0", f"{section}.keep=best"]
    for empty in ("training_data.validation.fraction=0.01", no_rows_of_its_own(small_talk)):
        with pytest.raises(UserError, match=rf"^--set: {section}\.keep: best needs held-out rows, and there are none"):
            run_stage(STAGES[section], job(*settings, empty, source="base"))
    assert not list(records(small_talk))


def test_measurements_that_the_rows_leave_no_room_for_are_refused(
    small_talk: Workspace, job: Callable[..., Job]
) -> None:
    """Seven rows, two a step: eight steps in two epochs."""
    common = ("training_data.validation.fraction=0.3", "sft_config.keep=best", "sft_config.evaluate_each_epoch=false")
    assert Sft.prepare(job(*common, "sft_config.evaluate_steps=7"))
    with pytest.raises(
        UserError, match=r"^--set: sft_config\.keep: best takes 1 or more measurements .*, and there are 0"
    ):
        Sft.prepare(job(*common, "sft_config.evaluate_steps=8"))
    assert Sft.prepare(job(*common, "sft_config.evaluate_steps=8", "sft_config.domain_sampling={unknown: 2.0}"))


@pytest.mark.parametrize("key", ["domain_weights", "domain_sampling"])
@pytest.mark.parametrize("section", STAGES)
def test_a_domain_that_no_row_has_is_refused_with_its_line(
    small_talk: Workspace, job: Callable[..., Job], section: str, key: str
) -> None:
    profile = small_talk.configs / "small.yaml"
    profile.write_text(
        profile.read_text().replace(f"{section}: {{", f"{section}:\n  {{\n    {key}: {{apis: 2.0}},\n    ")
    )
    line = profile.read_text().splitlines().index(f"    {key}: {{apis: 2.0}},") + 1
    with pytest.raises(UserError) as refused:
        STAGES[section].prepare(job(source="base"))
    what = f"configs/small.yaml:{line}: {section}.{key}.apis: no row to train has this domain"
    assert str(refused.value) == f"{what}; try one of: unknown"


@pytest.mark.parametrize("section", STAGES)
def test_weights_that_cancel_out_are_refused(small_talk: Workspace, job: Callable[..., Job], section: str) -> None:
    """Between rows of one step they act, and nowhere else."""
    path = small_talk.root / f"data/{section.removesuffix('_config')}/few.jsonl"
    first, *others = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"domain": "databases"}), *others]) + "\n", "utf-8")
    weighted, one_row = f"{section}.domain_weights={{databases: 2.0}}", f"{section}.batch_size=1"
    assert STAGES[section].prepare(job(weighted, source="base"))
    with pytest.raises(UserError, match=rf"^--set: {section}\.domain_weights: .* where a step has one row; try grad"):
        STAGES[section].prepare(job(weighted, one_row, source="base"))


def test_a_weight_that_all_rows_have_is_refused(small_talk: Workspace, job: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match=r"domain_weights: all rows to train have one and the same weight"):
        Sft.prepare(job("sft_config.domain_weights={unknown: 2.0}"))


def test_a_curriculum_over_rows_that_are_all_alike_is_refused(small_talk: Workspace, job: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match=r"^--set: sft_config\.curriculum: all rows to train are of one difficulty"):
        Sft.prepare(job("sft_config.curriculum=true"))
    path = small_talk.root / "data/sft/few.jsonl"
    first, *others = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"difficulty": "expert"}), *others]) + "\n", "utf-8")
    assert Sft.prepare(job("sft_config.curriculum=true"))


DORA_8_BIT = ("quantization=int8", "sft_config.adapter=dora")


def test_dora_over_an_8_bit_base_is_refused_on_a_cpu_before_a_record_exists(
    small_talk: Workspace, job: Callable[..., Job]
) -> None:
    for stage, source in ((Sft, None), (Dpo, "base")):
        with pytest.raises(UserError, match=r"^--set: quantization: an int8 base .* DoRA .*; try nf4 or none"):
            run_stage(stage, job(*DORA_8_BIT, source=source))
    assert not list(records(small_talk))
    for other in (("quantization=int8",), ("quantization=nf4", "sft_config.adapter=dora")):
        assert Sft.prepare(job(*other))


def test_it_is_the_adapter_that_goes_on_which_counts(small_talk: Workspace, job: Callable[..., Job]) -> None:
    """Whatever the profile says of new ones."""
    sft: Any = run_stage(Sft, job("sft_config.adapter=dora", "sft_config.epochs=0.5", "sft_config.warmup_ratio=0.0"))
    with pytest.raises(UserError, match="an int8 base cannot be trained with a DoRA adapter"):
        Dpo.prepare(job("quantization=int8", source=sft.id))
