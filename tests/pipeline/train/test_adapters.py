"""Every kind of adapter goes all the way: SFT, DPO that continues it, and a merge whose receipt holds."""

from collections.abc import Callable

import pytest

from pipeline.dpo import Dpo
from pipeline.merge import Merge
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.workspace import Workspace


@pytest.mark.parametrize(
    "settings",
    [("sft_config.adapter=rslora",), ("sft_config.adapter=dora",), ("quantization=nf4",)],
    ids=["rslora", "dora", "nf4"],
)
def test_sft_dpo_and_merge(small_talk: Workspace, job: Callable[..., Job], settings: tuple[str, ...]) -> None:
    sft = run_stage(Sft, job(*settings, "sft_config.epochs=1.0"))
    dpo = run_stage(Dpo, job(*settings, "dpo_config.epochs=1.0"))
    merge = run_stage(Merge, job(*settings))
    assert dpo.facts.lineage.inputs[0].id == sft.id and merge.facts.lineage.inputs[0].id == dpo.id
    assert dpo.facts.results["reference"]["loss_at_step_0"] == pytest.approx(0.693147, abs=1e-4)
    assert [record.facts.status for record in (sft, dpo, merge)] == ["complete"] * 3
    assert merge.facts.results["receipt"]["smallest_relative_change"] > 0
