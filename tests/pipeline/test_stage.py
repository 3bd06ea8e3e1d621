"""What every stage goes through, with a stage that takes no time. Its first run is interrupted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import pytest

from pipeline.config import SftConfig
from pipeline.errors import Interrupted, UserError
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, dry_run, run_stage
from pipeline.train.plan import steps_in_all
from pipeline.workspace import Workspace

MakeJob = Callable[..., Job]


@dataclass
class Halting:
    name: ClassVar[str] = "sft"

    job: Job
    inputs: list[Input] = field(default_factory=list)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        if not (job.workspace.root / "data" / "sft").exists():
            raise UserError("no rows", where="data/sft")
        return cls(job)

    def plan(self) -> list[tuple[str, str]]:
        return [("epochs", str(self.job.config.sft_config.epochs)), ("rate", "high")]

    def run(self, record: Record) -> None:
        record.facts.results["epochs"] = self.job.config.sft_config.epochs
        if not self.job.resume:
            raise Interrupted("interrupted by SIGTERM after step 3")


def records(workspace: Workspace) -> list[Path]:
    return sorted(workspace.experiments.glob("*.yaml"))


@pytest.fixture
def halted(job: MakeJob, workspace: Workspace) -> RecordFile:
    """A run begun with `--set sft_config.epochs=3.0 --set cost.currency=€` and interrupted."""
    with pytest.raises(Interrupted):
        run_stage(Halting, job("sft_config.epochs=3.0", "cost.currency=€😀"))
    return RecordFile(records(workspace)[0])


def test_a_resume_takes_up_the_overrides_it_began_with(job: MakeJob, halted: RecordFile, workspace: Workspace) -> None:
    record = run_stage(Halting, job(resume=True))
    assert records(workspace) == [halted.path]
    facts = halted.facts()
    assert facts is not None
    assert record.id == halted.id
    assert facts.results == {"epochs": 3.0}
    assert facts.overrides == {"sft_config.epochs": 3.0, "cost.currency": "€😀"}
    assert [change.status for change in facts.history] == ["running", "cancelled", "running", "complete"]
    assert facts.history[2].note == "resumed"


def test_a_resume_with_the_same_overrides_typed_again_goes_on(job: MakeJob, halted: RecordFile) -> None:
    assert run_stage(Halting, job("sft_config.epochs=3.0", "cost.currency=€😀", resume=True)).id == halted.id


@pytest.mark.parametrize(
    ("assignments", "key", "now", "then"),
    [
        (["sft_config.epochs=4.0", "cost.currency=€😀"], "sft_config.epochs", "4.0", "3.0"),
        (["cost.currency=€😀"], "sft_config.epochs", "2.0", "3.0"),
        (["sft_config.epochs=3.0", "seed=7"], "seed", "7", "42"),
    ],
)
def test_a_resume_with_another_configuration_is_refused_by_key(
    job: MakeJob, halted: RecordFile, assignments: list[str], key: str, now: str, then: str
) -> None:
    before = halted.path.read_bytes()
    with pytest.raises(
        UserError, match=f"{halted.id}.yaml: {key} is {now}, the run to resume has {then}; try --set {key}"
    ):
        run_stage(Halting, job(*assignments, resume=True))
    assert halted.path.read_bytes() == before


@pytest.mark.parametrize("assignment", ["cost.gpu_hour=3.0", "dpo_config.beta=0.3", "eval_config.limit=2"])
def test_what_the_stage_does_not_depend_on_may_differ(job: MakeJob, halted: RecordFile, assignment: str) -> None:
    assert run_stage(Halting, job("sft_config.epochs=3.0", assignment, resume=True)).id == halted.id


def test_a_resume_after_the_profile_was_edited_is_refused(
    job: MakeJob, halted: RecordFile, workspace: Workspace
) -> None:
    profile = workspace.configs / "small.yaml"
    profile.write_text(profile.read_text().replace("max_length: 2048", "max_length: 1024", 1))
    with pytest.raises(UserError, match=r"sft_config\.max_length is 1024, the run to resume has 2048"):
        run_stage(Halting, job(resume=True))


def test_a_finished_run_is_not_resumed(job: MakeJob, halted: RecordFile) -> None:
    run_stage(Halting, job(resume=True))
    with pytest.raises(UserError, match="nothing to resume: it is complete"):
        run_stage(Halting, job(resume=True))


def test_without_resume_a_run_is_an_experiment_of_its_own(
    job: MakeJob, halted: RecordFile, workspace: Workspace
) -> None:
    with pytest.raises(Interrupted):
        run_stage(Halting, job())
    assert len(records(workspace)) == 2


def test_a_mistake_found_in_preparation_leaves_no_record(job: MakeJob, workspace: Workspace) -> None:
    (workspace.root / "data" / "sft").rename(workspace.root / "data" / "elsewhere")
    with pytest.raises(UserError, match="data/sft: no rows"):
        run_stage(Halting, job())
    assert records(workspace) == []


def test_a_dry_run_says_its_plan_and_leaves_no_record(
    job: MakeJob, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(Halting, job("sft_config.epochs=5.0"))
    assert capsys.readouterr() == ("", "epochs  5.0\nrate    high\n")
    assert records(workspace) == []


def test_a_record_says_what_was_asked(job: MakeJob, workspace: Workspace) -> None:
    with pytest.raises(Interrupted):
        run_stage(Halting, job("sft_config.epochs=1.0", hypothesis="More: is it # better?", description="a try"))
    file = RecordFile(records(workspace)[0])
    person, facts = file.person(), file.facts()
    assert facts is not None
    assert (person["experiment_id"], person["profile"], person["stages"]) == (file.id, "small", ["sft"])
    assert (person["hypothesis"], person["description"]) == ("More: is it # better?", "a try")
    assert person["overrides"] == facts.overrides == {"sft_config.epochs": 1.0}
    assert facts.configuration["sft_config"]["epochs"] == 1.0
    assert facts.configuration["sft_config"]["lora_rank"] == 16


def test_steps_are_counted_as_the_trainer_counts_them(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Linear(1, 1)
    for rows, batch, accumulation, epochs in [
        (1, 1, 1, 1.0),
        (10, 2, 16, 2.0),
        (64, 2, 16, 2.0),
        (65, 2, 16, 2.0),
        (7, 4, 1, 6.0),
        (33, 2, 4, 0.5),
        (33, 2, 4, 2.3),
    ]:
        config = SftConfig(batch_size=batch, gradient_accumulation=accumulation, epochs=epochs)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            use_cpu=True,
            report_to="none",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=list(range(rows)))
        *_, counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
        assert steps_in_all(config, rows) == counted
