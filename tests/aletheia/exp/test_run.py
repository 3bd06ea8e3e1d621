"""`exp run`, mostly with stages that take no time and leave a file, as real ones do. The last test trains."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import pytest

from aletheia.exp.chain import Rows
from aletheia.exp.plan import plan
from aletheia.exp.run import TAKES, run
from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.records import find
from pipeline.records.file import LINE, RecordFile
from pipeline.records.lifecycle import Record, liveness
from pipeline.records.schema import Facts, Input
from pipeline.stage import Job, take
from pipeline.workspace import Workspace
from tests.conftest import few_words


class Killed(Exception):
    pass


@dataclass
class World:
    """What ran, in this order, and what is to go wrong in which stage."""

    workspace: Workspace
    ran: list[str] = field(default_factory=list)
    breaks: dict[str, BaseException] = field(default_factory=dict)
    figure: float = 1.0

    def plan(self, stages: str, *assignments: str, **options: Any) -> RecordFile:
        defaults: dict[str, Any] = {
            "source": None,
            "hypothesis": None,
            "criterion": [],
            "description": None,
            "tags": [],
        }
        return RecordFile(plan(self.workspace, stages.split(), "small", assignments, **defaults | options))

    def run(self, file: RecordFile) -> list[str]:
        """What ran now."""
        before = len(self.ran)
        run(self.workspace, file.id)
        return self.ran[before:]

    def fails(self, file: RecordFile) -> list[str]:
        before = len(self.ran)
        with pytest.raises((StageFailed, Interrupted, UserError)):
            run(self.workspace, file.id)
        self.breaks.clear()
        return self.ran[before:]

    def children(self, file: RecordFile) -> list[tuple[str, str, str]]:
        """Id, stage and status of each, oldest first."""
        return [(f.id, facts.stage, facts.status) for f, facts in find.children(self.workspace, file.id)]


def facts_of(file: RecordFile) -> Facts:
    facts = file.facts()
    assert facts is not None
    return facts


def one_to_evaluate_on(workspace: Workspace) -> None:
    """One open question and one multiple choice: each is looked for in the training rows."""
    for kind in ("questions", "choices"):
        _, *others = sorted((workspace.root / "data" / "eval" / kind).glob("*.jsonl"))
        for path in others:
            path.unlink()


@pytest.fixture
def world(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, parsed_once: None) -> World:
    few_words(workspace)  # each stage reads them anew, and so does each look at whether they have changed
    one_to_evaluate_on(workspace)
    profile = workspace.configs / "small.yaml"
    profile.write_text(profile.read_text().replace("fraction: 0.0", "fraction: 0.34"))
    world = World(workspace)

    def stage_class(stage: str) -> Any:
        @dataclass
        class Instant:
            name: ClassVar[str] = stage

            job: Job
            inputs: list[Input] = field(default_factory=list)

            @classmethod
            def prepare(cls, job: Job) -> Self:
                if isinstance(world.breaks.get(stage), UserError):
                    raise world.breaks[stage]
                takes = TAKES.get(stage) if job.source != "base" else None
                return cls(job, [take(job, takes, "out").input] if takes else [])

            def run(self, record: Record) -> None:
                world.ran.append(f"{stage}, going on" if self.job.resume else stage)
                self.describe_rows(record)
                (record.output / "out").mkdir(exist_ok=True)
                (record.output / "out" / "weights").write_text(f"{record.id}\n")
                record.facts.results = {"loss": {"value": world.figure, "ci_low": 0.5, "ci_high": 1.5, "n": 10}}
                if isinstance(world.breaks.get(stage), Killed):
                    os.kill(os.getpid(), signal.SIGKILL)
                if stage in world.breaks:
                    raise world.breaks[stage]
                record.facts.artifacts = find.artifacts(self.job.workspace, record.output)

            def describe_rows(self, record: Record) -> None:
                if stage in ("sft", "dpo"):
                    config, rows = self.job.config, Rows(self.job.workspace)
                    parts = ("train", "held_out")
                    record.facts.data = {part: rows.describe(config, f"{stage}.{part}", set()) for part in parts}

        return Instant

    monkeypatch.setattr("aletheia.exp.run.stage_class", stage_class)
    monkeypatch.setattr("pipeline.records.capture.code", lambda folder: {"commit": None})  # both take half a second
    monkeypatch.setattr("pipeline.records.capture.environment", dict)
    return world


def test_a_plan_of_one_stage_becomes_that_stages_record(world: World) -> None:
    file = world.plan("sft", "sft_config.epochs=1.0", criterion=["loss < 2"])
    above = file.path.read_bytes()
    assert world.run(file) == ["sft"]
    facts = facts_of(file)
    assert (facts.stage, facts.status, facts.lineage.parent) == ("sft", "complete", None)
    assert facts.configuration["sft_config"]["epochs"] == 1.0
    assert facts.overrides == {"sft_config.epochs": 1.0}
    assert facts.verdict is not None
    assert facts.verdict.finding == "supported"
    assert file.path.read_bytes().startswith(above + LINE.encode())
    assert len(list(world.workspace.experiments.glob("*.yaml"))) == 1


def test_several_stages_get_records_of_their_own_below_the_plans(world: World) -> None:
    file = world.plan("sft dpo merge eval", criterion=["sft.loss < 2", "eval.loss.ci_low > 1"])
    above = file.path.read_bytes()
    assert world.run(file) == ["sft", "dpo", "merge", "eval"]
    facts = facts_of(file)
    children = find.children(world.workspace, file.id)
    assert (facts.stage, facts.status) == ("pipeline", "complete")
    assert [one.stage for _, one in children] == ["sft", "dpo", "merge", "eval"]
    assert facts.lineage.children == [child.id for child, _ in children]
    assert [[taken.id for taken in one.lineage.inputs] for _, one in children] == [
        [],
        *[[child.id] for child, _ in children[:3]],  # each takes what the one before it made
    ]
    assert facts.verdict is not None
    assert [one.finding for one in facts.verdict.judged] == ["supported", "inconclusive"]
    assert facts.verdict.finding == "inconclusive"
    assert all(one.verdict is None for _, one in children)  # the criteria are the plan's
    assert file.path.read_bytes().startswith(above + LINE.encode())


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_what_a_person_edits_in_a_plan_holds_and_stays_byte_for_byte(world: World, ends: str) -> None:
    file = world.plan("sft dpo", "sft_config.epochs=1.0")
    text = file.path.read_text().replace("  - dpo\n", "  - dpo   # no merge\n")
    text = (
        text.replace("sft_config.epochs: 1.0", "sft_config.epochs: 0.5   # quick")
        + "# 🚀 mine\nmy_key:   [ a,b ]\n\n\n"
    )
    above = b"\xef\xbb\xbf" + text.replace("\n", ends).encode()
    file.path.write_bytes(above)
    world.run(file)
    assert file.path.read_bytes().startswith(above + LINE.encode() + ends.encode())
    assert facts_of(file).configuration["sft_config"]["epochs"] == 0.5


@pytest.mark.parametrize("text", ["stages: [data]\nprofile: small", "profile: small\nstages:\n  - sft\n  - dpo\n"])
def test_a_plan_written_by_hand_needs_no_more_than_stages_and_profile(world: World, text: str) -> None:
    file = RecordFile(world.workspace.experiments / "EXP-2026-01-01-001.yaml")
    file.path.parent.mkdir()
    file.path.write_text(text)
    world.run(file)
    assert facts_of(file).status == "complete"
    assert file.path.read_text().startswith(text)


def test_overrides_may_be_written_as_sections(world: World) -> None:
    file = world.plan("sft")
    text = file.path.read_text()
    file.path.write_text(text.replace("overrides: {}", "overrides:\n  sft_config:\n    lora_rank: 8"))
    world.run(file)
    configuration = facts_of(file).configuration["sft_config"]
    assert (configuration["lora_rank"], configuration["learning_rate"]) == (8, 0.002)  # the profile's stays


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("profile: small\n", "", "{file}: profile: names no profile; try `profile: tiny`"),
        ("profile: small", "profile:", "{file}:4: profile: names no profile"),
        ("profile: small", "profile: smal", "{file}: configs/smal.yaml: no profile `smal`; try profile: small"),
        ("stages:\n  - sft\n  - dpo\n", "", "{file}: stages: no stage is named"),
        ("- dpo", "- fly", "{file}:7:5: stages[2]: is `fly`, not one of data, sft, dpo, merge, export, serve, eval"),
        ("- dpo", "- data", "{file}:5: stages: sft, data is not the order they run in; try data, sft"),
        ("- dpo", "- sft", "{file}:5: stages: the stage `sft` stands twice"),
        ("overrides: {}", "overrides: {sft_config.rank: 8}", "{file}: overrides: sft_config.rank: there is no such key"),
        ("overrides: {}", "overrides: {name: 2026-11-20}", "{file}:11: overrides: name is a date; try quotes around it"),
        ("success_criteria: []", "success_criteria:\n  - sft.loss is low", "{file}:11: success_criteria[1]: `sft.loss is"),
        ("success_criteria: []", "success_criteria: [loss < 2]", "{file}:10: success_criteria: `loss < 2` names none of"),
        ("next_steps: []", "from: EXP-2026-01-01-009", "{file}:14: from: no stage of sft, dpo would take EXP-2026-01-01-009"),
        ("next_steps: []", "from: 009", "{file}:14:1: from: is `009`, not EXP-YYYY-MM-DD-### or base"),
        ("next_steps: []", "next_steps: [", "{file}:16:1: did not find expected node content"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_plan_is_told_with_its_place_and_nothing_runs(
    world: World, old: str, new: str, told: str
) -> None:
    file = world.plan("sft dpo")
    text = file.path.read_text()
    assert old in text
    file.path.write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        run(world.workspace, file.id)
    assert str(error.value).startswith(told.format(file=f"experiments/{file.path.name}"))
    assert file.path.read_text() == text.replace(old, new)
    assert world.ran == []


def test_from_is_what_the_first_stage_takes(world: World) -> None:
    first, second = world.plan("sft"), world.plan("sft")
    world.run(first)
    world.run(second)
    file = world.plan("dpo merge", source=first.id)
    world.run(file)
    (_, dpo), (_, merge) = find.children(world.workspace, file.id)
    assert [taken.id for taken in dpo.lineage.inputs] == [first.id]
    assert [taken.stage for taken in merge.lineage.inputs] == ["dpo"]
    on_base = world.plan("dpo", source="base")
    world.run(on_base)
    assert facts_of(on_base).lineage.inputs == []


def test_a_from_that_is_gone_is_told_before_anything_is_opened(world: World) -> None:
    sft = world.plan("sft")
    world.run(sft)
    file = world.plan("data dpo", source=sft.id)
    sft.path.unlink()
    with pytest.raises(UserError, match=f"there is no record `{sft.id}`"):
        run(world.workspace, file.id)
    assert (world.ran, file.facts()) == (["sft"], None)


@pytest.mark.parametrize(
    ("error", "status"),
    [(StageFailed("no room", step=3), "failed"), (Interrupted("interrupted by SIGTERM"), "cancelled")],
)
def test_a_run_that_ends_half_way_goes_on_at_that_stage(world: World, error: Exception, status: str) -> None:
    file = world.plan("data sft dpo merge", criterion=["merge.loss < 2", "sft.loss < 2"])
    world.breaks["dpo"] = error
    assert world.fails(file) == ["data", "sft", "dpo"]
    assert facts_of(file).status == status
    before = world.children(file)
    assert [(stage, how) for _, stage, how in before] == [("data", "complete"), ("sft", "complete"), ("dpo", status)]
    assert world.run(file) == ["dpo, going on", "merge"]
    after = world.children(file)
    assert after[:3] == [*before[:2], (before[2][0], "dpo", "complete")]  # in the same record
    facts = facts_of(file)
    assert [change.status for change in facts.history] == ["running", status, "running", "complete"]
    assert facts.history[2].note == "resumed"
    assert facts.verdict is not None
    assert facts.verdict.finding == "supported"  # the kept stage's figures count as well


def test_a_stage_that_could_not_be_prepared_is_begun_when_it_can(world: World) -> None:
    """As with rows that were broken: no record of that stage exists yet."""
    file = world.plan("sft dpo")
    world.breaks["dpo"] = UserError("row 3 has no prompt", where="data/dpo/few.jsonl:3")
    assert world.fails(file) == ["sft"]
    failure = facts_of(file).failure
    assert failure is not None
    assert failure.message == "data/dpo/few.jsonl:3: row 3 has no prompt"
    assert world.run(file) == ["dpo"]
    assert facts_of(file).failure is None


def test_a_stage_whose_from_vanished_in_between_leaves_what_is_finished(world: World) -> None:
    sft = world.plan("sft")
    world.run(sft)
    file = world.plan("dpo merge", source=sft.id)
    world.breaks["merge"] = StageFailed("no room")
    world.fails(file)
    sft.path.unlink()
    assert world.run(file) == ["merge, going on"]


def test_a_finished_stage_whose_output_is_gone_is_run_anew_only_if_it_is_needed(world: World) -> None:
    file = world.plan("sft dpo merge")
    world.breaks["dpo"] = StageFailed("no room")
    world.fails(file)
    (world.workspace.checkpoints / world.children(file)[0][0] / "out" / "weights").unlink()
    world.breaks["merge"] = StageFailed("no room")
    assert world.fails(file) == ["sft", "dpo", "merge"]
    (world.workspace.checkpoints / world.children(file)[2][0] / "out" / "weights").unlink()  # sft: dpo has taken it
    assert world.run(file) == ["merge, going on"]


@pytest.mark.parametrize(
    ("change", "ran", "told"),
    [
        ("dpo_config.beta: 0.3", ["dpo", "merge"], "dpo_config.beta 0.1 → 0.3"),
        ("sft_config.epochs: 1.0", ["sft", "dpo", "merge"], "sft_config.epochs 2.0 → 1.0"),
        ("merge_config.check_logits: false", ["dpo, going on", "merge"], "merge_config.check_logits True → False"),
        ("eval_config.limit: 3", ["dpo, going on", "merge"], "eval_config.limit None → 3"),
        ("seed: 7", ["sft", "dpo", "merge"], "seed 42 → 7"),
    ],
)
def test_after_a_change_of_the_plan_what_depends_on_it_runs_anew_and_the_rest_is_kept(
    world: World, change: str, ran: list[str], told: str
) -> None:
    file = world.plan("sft dpo merge")
    world.breaks["dpo"] = StageFailed("no room")
    assert world.fails(file) == ["sft", "dpo"]
    text = file.path.read_text()
    file.path.write_text(text.replace("overrides: {}", f"overrides: {{{change}}}", 1))
    assert world.run(file) == ran
    facts = facts_of(file)
    assert facts.history[2].note == f"resumed; the plan had been changed: {told}"
    key, value = change.split(": ")
    assert facts.overrides == {key: json.loads(value)}
    section, _, name = key.partition(".")
    now = facts.configuration[section]
    assert (now[name] if name else now) == json.loads(value)
    known = {name: status for name, _, status in world.children(file)}
    assert [known[name] for name in facts.lineage.children] == ["complete"] * 3  # without those that are superseded


def test_what_was_run_anew_is_kept_in_turn(world: World) -> None:
    file = world.plan("sft dpo merge")
    world.breaks["dpo"] = StageFailed("no room")
    world.fails(file)
    file.path.write_text(file.path.read_text().replace("overrides: {}", "overrides: {sft_config.epochs: 1.0}", 1))
    world.breaks["merge"] = StageFailed("no room")
    assert world.fails(file) == ["sft", "dpo", "merge"]
    assert world.run(file) == ["merge, going on"]
    inputs = [taken.id for _, facts in find.children(world.workspace, file.id)[-2:] for taken in facts.lineage.inputs]
    assert inputs == [world.children(file)[2][0], world.children(file)[3][0]]  # the second sft's dpo, and that dpo


def test_another_cost_is_no_reason_to_run_anew(world: World) -> None:
    file = world.plan("sft dpo")
    world.breaks["dpo"] = UserError("not yet")
    world.fails(file)
    file.path.write_text(file.path.read_text().replace("overrides: {}", "overrides: {cost.gpu_hour: 2.0}", 1))
    assert world.run(file) == ["dpo"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{sft_config.epochs: 1.0}", "{sft_config.epochs: 3.0}", "sft_config.epochs is 3.0, the run to resume has 1.0; "
         "try `sft_config.epochs: 1.0` in its overrides, or another plan"),
        ("{sft_config.epochs: 1.0}", "{}", "sft_config.epochs is 2.0, the run to resume has 1.0"),
        ("  - sft\n", "  - sft\n  - dpo\n", "was begun as sft, and its stages are now sft, dpo; try aletheia exp plan sft dpo"),
    ],
)  # fmt: skip
def test_a_single_stage_goes_on_only_as_it_was_begun(world: World, old: str, new: str, told: str) -> None:
    file = world.plan("sft", "sft_config.epochs=1.0")
    text = file.path.read_text().replace("overrides:\n  sft_config.epochs: 1.0", "overrides: {sft_config.epochs: 1.0}")
    file.path.write_text(text)
    world.breaks["sft"] = StageFailed("no room")
    world.fails(file)
    whole = file.path.read_text()
    file.path.write_text(whole.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        run(world.workspace, file.id)
    assert told in str(error.value)
    file.path.write_text(whole)
    assert world.run(file) == ["sft, going on"]


def test_several_stages_do_not_become_one(world: World) -> None:
    file = world.plan("sft dpo")
    world.breaks["dpo"] = StageFailed("no room")
    world.fails(file)
    file.path.write_text(file.path.read_text().replace("  - dpo\n", "", 1))
    with pytest.raises(UserError, match="was begun as pipeline, and its stages are now sft"):
        run(world.workspace, file.id)


def test_another_profile_runs_anew_and_is_told(world: World) -> None:
    other = world.workspace.configs / "other.yaml"
    other.write_text((world.workspace.configs / "small.yaml").read_text().replace("name: small", "name: other"))
    file = world.plan("sft dpo")
    world.breaks["dpo"] = StageFailed("no room")
    world.fails(file)
    file.path.write_text(file.path.read_text().replace("profile: small", "profile: other", 1))
    assert world.run(file) == ["sft", "dpo"]
    facts = facts_of(file)
    assert facts.profile == "other"
    assert "profile small → other" in (facts.history[2].note or "")


def test_a_record_is_run_once(world: World) -> None:
    file = world.plan("sft")
    world.run(file)
    with pytest.raises(UserError, match=f"^experiments/{file.id}.yaml: is complete: a record is run once"):
        run(world.workspace, file.id)
    with pytest.raises(UserError, match="there is no record `EXP-1`"):
        run(world.workspace, "EXP-1")


def test_a_record_that_runs_is_not_run_again(world: World) -> None:
    file = world.plan("sft dpo")
    told = []

    def again() -> None:
        with pytest.raises(UserError) as error:
            run(world.workspace, file.id)
        told.append(str(error.value))

    class Ran(list[str]):
        def append(self, what: str) -> None:
            again()
            super().append(what)

    world.ran = Ran()
    world.run(file)
    assert told == [f"experiments/{file.id}.yaml: is running: a record is run once; try waiting for it to end"] * 2


def test_the_command_prints_the_records_path_alone(world: World, aletheia: Callable[..., Any]) -> None:
    file = world.plan("sft")
    said = aletheia(world.workspace, "exp", "run", file.id)
    assert (said.code, said.out) == (0, f"experiments/{file.id}.yaml\n")
    assert "sft  experiments/" in said.err


def test_a_run_that_was_killed_goes_on_at_that_stage_and_keeps_what_was_finished(world: World) -> None:
    file = world.plan("sft dpo merge", criterion=["sft.loss < 2"])
    child = os.fork()
    if child == 0:  # ends by SIGKILL inside dpo
        try:
            world.breaks["dpo"] = Killed()
            run(world.workspace, file.id)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert liveness(facts_of(file)) == "dead"
    (sft, kept), (dpo, begun) = find.children(world.workspace, file.id)
    assert (kept.status, liveness(begun)) == ("complete", "dead")
    assert world.run(file) == ["dpo, going on", "merge"]
    assert [name for name, _, _ in world.children(file)][:2] == [sft.id, dpo.id]
    assert facts_of(sft) == kept
    facts = facts_of(file)
    assert [(change.status, change.note) for change in facts.history] == [
        ("running", None),
        ("running", "resumed"),
        ("complete", None),
    ]
    assert facts.verdict is not None
    assert facts.verdict.finding == "supported"


def test_real_stages_go_on_where_broken_rows_stopped_them(small_talk: Workspace, aletheia: Callable[..., Any]) -> None:
    (profile := small_talk.configs / "small.yaml").write_text(profile.read_text().replace("epochs: 2.0", "epochs: 1.0"))
    for path in (small_talk.root / "data").glob("[sd]*/*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))  # two steps
    said = aletheia(small_talk, "exp", "plan", "sft", "dpo", "--profile", "small", "--criterion", "sft.steps > 0")
    file = RecordFile(small_talk.root / said.out.strip())
    above = file.path.read_bytes()
    (rows,) = (small_talk.root / "data" / "dpo").glob("*.jsonl")
    whole = rows.read_text()
    rows.write_text(whole.replace('"prompt"', '"promt"', 1))
    said = aletheia(small_talk, "exp", "run", file.id)
    assert (said.code, said.out) == (2, "")
    assert "error: data/dpo/few.jsonl:1: " in said.err
    stopped = [(facts.stage, facts.status) for _, facts in find.children(small_talk, file.id)]
    assert stopped == [("sft", "complete"), ("dpo", "failed")]

    rows.write_text(whole)
    said = aletheia(small_talk, "exp", "run", file.id)
    assert (said.code, said.out) == (0, f"experiments/{file.id}.yaml\n")
    (sft, _), *_, (_, dpo) = find.children(small_talk, file.id)
    assert dpo.status == "complete" and f"sft: {sft.id} is complete and kept" in said.err
    assert [taken.id for taken in dpo.lineage.inputs] == [sft.id]
    assert [change.status for change in facts_of(file).history] == ["running", "failed", "running", "complete"]
    assert "verdict: supported" in said.err
    assert file.path.read_bytes().startswith(above + LINE.encode())


def test_rows_that_changed_between_two_attempts_are_trained_on_anew(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    file = world.plan("sft dpo merge")
    world.breaks["merge"] = StageFailed("no room")
    assert world.fails(file) == ["sft", "dpo", "merge"]
    rows = next((world.workspace.root / "data" / "sft").glob("*.jsonl"))
    rows.write_text("".join(rows.read_text("utf-8").splitlines(keepends=True)[1:]), "utf-8")
    assert world.run(file) == ["sft", "dpo", "merge"]
    assert "is complete, but the rows of sft." in capsys.readouterr().err


def test_prices_and_ports_change_nothing_that_was_done(world: World) -> None:
    file = world.plan("sft dpo")
    world.breaks["dpo"] = StageFailed("no room")
    assert world.fails(file) == ["sft", "dpo"]
    text = file.path.read_text()
    file.path.write_text(text.replace("overrides: {}", "overrides: {cost.kwh: 0.7, serve_config.port: 9000}", 1))
    assert world.run(file) == ["dpo, going on"]


def test_an_output_that_was_tampered_with_is_made_anew(world: World) -> None:
    file = world.plan("sft dpo")
    world.breaks["dpo"] = StageFailed("no room")
    assert world.fails(file) == ["sft", "dpo"]
    (sft,) = [name for name, stage, _ in world.children(file) if stage == "sft"]
    (world.workspace.checkpoints / sft / "out" / "weights").write_text("another model")
    assert world.run(file) == ["sft", "dpo"]
