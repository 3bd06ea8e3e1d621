import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.records import find
from pipeline.records.file import LINE, RecordFile
from pipeline.records.schema import Facts, Input, Lineage
from pipeline.workspace import Workspace

Keep = Callable[..., RecordFile]
CONTROL = {"sft_config": {"shuffle_answers": True}}


def built_on(file: RecordFile) -> Lineage:
    return Lineage(inputs=[Input(id=file.id, stage="sft", path="", sha256="")])


def taken(place: Workspace, stages: list[str], wanted: str | None = None) -> str:
    return find.source(place, "small", stages, wanted)[0].id[15:]


def test_the_newest_complete_record_of_the_profile_is_taken(place: Workspace, kept: Keep) -> None:
    kept(1)
    kept(2)
    kept(3, status="failed")
    kept(4, status="cancelled")
    kept(5, status="running")
    kept(6, profile="other")
    kept(7, stage="dpo")
    assert taken(place, ["sft"]) == "002"


def test_a_higher_number_is_newer_past_999(place: Workspace, kept: Keep) -> None:
    kept(1000)
    kept(999)
    assert taken(place, ["sft"]) == "1000"


def test_the_first_stage_that_has_any_wins(place: Workspace, kept: Keep) -> None:
    kept(1, stage="dpo")
    kept(2)
    assert taken(place, ["dpo", "sft"]) == "001"
    kept(3, stage="dpo", status="failed")
    assert taken(place, ["dpo", "sft"]) == "001"
    assert taken(place, ["merge", "sft"]) == "002"


def test_a_control_is_never_taken_unless_named(place: Workspace, kept: Keep) -> None:
    kept(1)
    kept(2, configuration=CONTROL)
    assert taken(place, ["sft"]) == "001"
    assert taken(place, ["sft"], "EXP-2026-11-20-002") == "002"


def test_what_was_built_on_a_control_is_never_taken_unless_named(place: Workspace, kept: Keep) -> None:
    right, control = kept(1), kept(2, configuration=CONTROL)
    kept(3, stage="dpo", lineage=built_on(right))
    bad = kept(4, stage="dpo", lineage=built_on(control))
    kept(5, stage="merge", lineage=built_on(bad))
    assert taken(place, ["dpo"]) == "003"
    assert taken(place, ["dpo"], bad.id) == "004"
    with pytest.raises(UserError, match="no complete merge record"):
        taken(place, ["merge"])


def test_a_record_whose_source_was_deleted_is_still_taken(place: Workspace, kept: Keep) -> None:
    gone = kept(1)
    kept(2, stage="dpo", lineage=built_on(gone))
    gone.path.unlink()
    assert taken(place, ["dpo"]) == "002"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("EXP-2026-11-20-001", "experiments/EXP-2026-11-20-001.yaml: is failed, not complete"),
        ("EXP-2026-11-20-002", "experiments/EXP-2026-11-20-002.yaml: is no sft or dpo record"),
        ("EXP-2026-11-20-003", "experiments/EXP-2026-11-20-003.yaml: is no sft or dpo record"),
        ("EXP-2026-11-20-009", "experiments: there is no record `EXP-2026-11-20-009`; try EXP-2026-11-20-003"),
    ],
)
def test_a_named_record_that_will_not_do_is_refused(place: Workspace, kept: Keep, wanted: str, why: str) -> None:
    kept(1, status="failed")
    kept(2, stage="merge")
    (place.experiments / "EXP-2026-11-20-003.yaml").write_text("description: a plan\n")
    with pytest.raises(UserError, match=why):
        find.source(place, "small", ["sft", "dpo"], wanted)


def test_nothing_to_build_on_names_the_command(place: Workspace) -> None:
    with pytest.raises(
        UserError, match="no complete dpo or sft record of profile `small` yet; try make dpo PROFILE=small"
    ):
        find.source(place, "small", ["dpo", "sft"], None)


def test_a_record_that_cannot_be_read_is_passed_over(place: Workspace, kept: Keep) -> None:
    kept(1)
    broken = kept(2)
    shutil.rmtree(broken.folder)  # with it the copy that would put it right
    broken.path.write_text(f"{LINE}\n]: [", "utf-8")
    assert taken(place, ["sft"]) == "001"


@pytest.mark.parametrize("status", ["failed", "cancelled", "running"])
def test_the_newest_unfinished_run_is_resumed(place: Workspace, kept: Keep, status: str) -> None:
    kept(1)
    history = [{"status": "running", "at": "", "host": os.uname().nodename, "pid": os.getpid(), "started": 1.0}]
    kept(2, status=status, history=history)  # a process of this pid that started in 1970
    kept(3, stage="dpo")
    kept(4, profile="other")
    assert find.resumable(place, "small", "sft")[0].id == "EXP-2026-11-20-002"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, "nothing to resume: it is complete; try make sft PROFILE=small, without RESUME"),
        (
            {"status": "running", "history": [{"status": "running", "at": "", "host": "elsewhere", "pid": 1}]},
            "nothing to resume: it is running on elsewhere; try waiting for it to end",
        ),
    ],
)
def test_a_run_that_ended_or_still_runs_is_not_resumed(
    place: Workspace, kept: Keep, facts: dict[str, Any], why: str
) -> None:
    kept(1, status="failed")
    kept(2, **facts)
    with pytest.raises(UserError, match=why):
        find.resumable(place, "small", "sft")


def test_without_any_run_there_is_nothing_to_resume(place: Workspace, kept: Keep) -> None:
    kept(1, stage="dpo")
    with pytest.raises(UserError, match="nothing to resume: no sft record of profile `small`"):
        find.resumable(place, "small", "sft")


def test_the_lineage_is_followed_to_the_stage_asked_for(place: Workspace, kept: Keep) -> None:
    sft = kept(1)
    dpo = kept(2, stage="dpo", lineage=built_on(sft))
    merge = kept(3, stage="merge", lineage=built_on(dpo))
    facts = merge.facts()
    assert facts is not None
    for stage, expected in (("sft", sft.id), ("dpo", dpo.id), ("merge", merge.id)):
        found = find.ancestor(place, merge, facts, stage)
        assert found is not None
        assert found[0].id == expected
    assert find.ancestor(place, merge, facts, "data") is None


@pytest.fixture
def made(place: Workspace, kept: Keep) -> tuple[RecordFile, Facts, Path]:
    """A record with an output of two files, and its folder."""
    folder = place.checkpoints / "EXP-2026-11-20-001" / "adapter"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 3_000_000)
    (folder / "inner" / "config.json").write_text("{}")
    file = kept(1, artifacts=find.artifacts(place, folder))
    facts = file.facts()
    assert facts is not None
    return file, facts, folder


def test_an_output_that_is_as_it_was_made_is_taken_by_its_hash(
    place: Workspace, made: tuple[RecordFile, Facts, Path]
) -> None:
    file, facts, folder = made
    output, taken_input = find.checked_output(place, file, facts, "adapter")
    assert output == folder
    assert (taken_input.id, taken_input.stage, taken_input.path) == (
        file.id,
        "sft",
        f"checkpoints/{file.id}/adapter",
    )
    assert [(a.path.rpartition("/")[2], a.bytes) for a in facts.artifacts] == [
        ("config.json", 2),
        ("weights", 3_000_000),
    ]
    assert taken_input.sha256 == find.checked_output(place, file, facts, "adapter")[1].sha256


def test_a_changed_artifact_is_refused(place: Workspace, made: tuple[RecordFile, Facts, Path]) -> None:
    file, facts, folder = made
    with (folder / "weights").open("r+b") as weights:  # one byte, the size stays
        weights.seek(2_000_000)
        weights.write(b"x")
    with pytest.raises(UserError, match=r"001.yaml: its artifact .*/weights was changed since; try make sft again"):
        find.checked_output(place, file, facts, "adapter")


def test_a_missing_artifact_is_refused(place: Workspace, made: tuple[RecordFile, Facts, Path]) -> None:
    file, facts, folder = made
    (folder / "inner" / "config.json").unlink()
    with pytest.raises(UserError, match=r"its artifact .*/config.json is gone; try make sft again"):
        find.checked_output(place, file, facts, "adapter")


def test_a_missing_output_is_refused(place: Workspace, made: tuple[RecordFile, Facts, Path]) -> None:
    file, facts, folder = made
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(
        UserError, match="its output checkpoints/EXP-2026-11-20-001/adapter is gone; try make sft again"
    ):
        find.checked_output(place, file, facts, "adapter")


def test_an_output_that_the_record_does_not_name_is_refused(place: Workspace, kept: Keep) -> None:
    file = kept(1)
    facts = file.facts()
    (place.checkpoints / file.id / "adapter").mkdir(parents=True)
    assert facts is not None
    with pytest.raises(UserError, match="names no artifacts"):
        find.checked_output(place, file, facts, "adapter")


def test_a_link_is_moved_at_once_or_not_at_all(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (place.checkpoints / name / "adapter" for name in ("EXP-1", "EXP-2"))
    for target in (old, new):
        target.mkdir(parents=True)
    link = find.link_newest(place, "small-sft", old)
    replace = os.replace

    def just_before(source: Path, target: Path) -> None:
        assert link.resolve() == old
        replace(source, target)

    monkeypatch.setattr(os, "replace", just_before)
    assert find.link_newest(place, "small-sft", new).resolve() == new
    assert sorted(path.name for path in place.checkpoints.iterdir()) == ["EXP-1", "EXP-2", "small-sft"]
    assert not Path(os.readlink(link)).is_absolute()  # it still points right when the workspace is moved


def test_a_link_whose_target_is_gone_is_replaced(place: Workspace) -> None:
    (place.checkpoints / "small-sft").symlink_to("gone")
    (place.checkpoints / "EXP-1").mkdir()
    assert find.link_newest(place, "small-sft", place.checkpoints / "EXP-1").is_dir()


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_a_link_never_replaces_what_is_real(place: Workspace, kind: str) -> None:
    real = place.checkpoints / "small-sft"
    if kind == "file":
        real.write_text("mine")
    else:
        real.mkdir()
    if kind == "folder":
        (real / "weights").write_text("mine")
    (place.checkpoints / "EXP-1").mkdir()
    with pytest.raises(UserError, match="checkpoints/small-sft: is not a link; move it away"):
        find.link_newest(place, "small-sft", place.checkpoints / "EXP-1")
    assert not real.is_symlink()
    assert sorted(path.name for path in place.checkpoints.iterdir()) == ["EXP-1", "small-sft"]


def test_merge_takes_an_sft_made_after_the_last_dpo(place: Workspace, kept: Keep) -> None:
    kept(1)
    kept(2, stage="dpo")
    assert taken(place, find.latest_first(place, "small", ["dpo", "sft"])) == "002"
    kept(3, configuration=CONTROL)
    kept(4, status="cancelled")
    assert taken(place, find.latest_first(place, "small", ["dpo", "sft"])) == "002"
    kept(5)
    assert taken(place, find.latest_first(place, "small", ["dpo", "sft"])) == "005"
    assert find.latest_first(place, "other", ["dpo", "sft"]) == ["dpo", "sft"]


def test_a_lineage_that_goes_in_circles_ends(place: Workspace, kept: Keep) -> None:
    kept(1, stage="dpo")
    file = RecordFile(place.experiments / "EXP-2026-11-20-001.yaml")
    facts = file.facts()
    assert facts is not None
    me = Input(id=file.id, stage="dpo", path="x", sha256="y")
    facts.lineage.inputs = [me, me.model_copy(update={"id": "../../x"}), me.model_copy(update={"id": "a\0b"})]
    file.write(facts)
    assert find.source(place, facts.profile, ["dpo"], None)[0].id == file.id
    with pytest.raises(UserError, match="there is no record"):
        find.ancestor(place, file, facts, "sft")
