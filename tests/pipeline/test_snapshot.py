"""`aletheia data snapshot`: what it counts is what training will read, and it refuses what training would refuse."""

import json
from collections.abc import Callable

import pytest

from pipeline.data import store
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, describe
from pipeline.data.split import split
from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.snapshot import Snapshot
from pipeline.stage import Job, run_stage


def test_snapshot_records_the_hashes_of_the_very_rows_that_training_reads(job: Callable[..., Job]) -> None:
    asked = job()
    facts = RecordFile(run_stage(Snapshot, asked).file.path).facts()
    assert facts is not None and facts.status == "complete"
    for part, kind in (("sft", Conversation), ("dpo", PreferencePair)):
        rows = read_rows(asked.workspace, f"data/{part}", kind)
        train, held_out = split(rows, asked.config.training_data.validation)
        found = facts.data[part]
        assert (found["train"], found["held_out"]) == (describe(train), describe(held_out))
        assert (found["rejected"], found["findings"], found["order_seed"]) == (0, {}, 42)
        assert found["split"] == {"strategy": "stratified", "fraction": 0.34, "seed": 1}
        assert found["snapshot"]["sha256"] == describe(rows)["sha256"] and found["snapshot"]["rows"] == len(rows)
        assert store.load(asked.workspace, found["snapshot"]["sha256"], kind)
    assert facts.data["questions"]["rows"] == facts.data["choices"]["rows"] == 30
    assert facts.results == {"rows": 15 + 15 + 30 + 30}


def test_the_seed_of_the_order_is_no_part_of_the_set(job: Callable[..., Job]) -> None:
    one, other = (run_stage(Snapshot, job(f"seed={seed}")).facts.data["sft"] for seed in (1, 2))
    assert one | {"order_seed": 2} == other


def test_snapshot_plan_shows_how_many_rows_are_held_out(job: Callable[..., Job]) -> None:
    assert Snapshot.prepare(job()).plan() == [
        ("sft", "10 to train, 5 held out"),
        ("dpo", "10 to train, 5 held out"),
        ("eval", "30 open questions, 30 multiple choice"),
    ]


def test_snapshot_changes_with_a_single_character_of_a_row(job: Callable[..., Job]) -> None:
    asked = job()
    before = Snapshot.prepare(asked).sft.every
    path = asked.workspace.root / "data/sft/devops.jsonl"
    path.write_text(path.read_text().replace("high", "hign", 1))
    assert describe(before)["sha256"] != describe(Snapshot.prepare(asked).sft.every)["sha256"]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_more_bad_rows_than_allowed_stop_the_stage_and_all_are_named(job: Callable[..., Job], name: str) -> None:
    asked = job()
    path = asked.workspace.root / f"data/{name}/devops.jsonl"
    path.write_text(path.read_text() + "{}\n[]\n")
    with pytest.raises(
        UserError, match=rf"^data/{name}/devops.jsonl:4: 2 of 17 rows cannot be used.*has no .*rejects.jsonl"
    ):
        run_stage(Snapshot, asked)
    [folder] = [p for p in asked.workspace.experiments.glob("EXP-*") if p.is_dir()]
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["name"]) for r in rejects] == [
        (f"data/{name}/devops.jsonl", 4, "missing-field"),
        (f"data/{name}/devops.jsonl", 5, "wrong-type"),
    ]
    facts = RecordFile(folder.with_suffix(".yaml")).facts()
    assert facts is not None and facts.status == "failed"


def test_a_few_bad_rows_are_left_out_and_counted(job: Callable[..., Job], capsys: pytest.CaptureFixture[str]) -> None:
    asked = job("training_data.max_reject_share=0.1")
    path = asked.workspace.root / "data/sft/devops.jsonl"
    path.write_text(path.read_text() + "{}\n")
    record = run_stage(Snapshot, asked)
    assert record.facts.data["sft"]["rejected"] == 1 and record.facts.data["sft"]["findings"] == {"missing-field": 1}
    assert len((record.folder / "rejects.jsonl").read_text().splitlines()) == 1
    assert "note: 1 of 16 rows cannot be used, first data/sft/devops.jsonl:4: D105" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["questions", "choices"])
def test_a_bad_evaluation_row_says_where_and_leaves_no_record(job: Callable[..., Job], name: str) -> None:
    asked = job()
    path = asked.workspace.root / f"data/eval/{name}/devops.jsonl"
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(UserError, match=f"^data/eval/{name}/devops.jsonl:7: has no "):
        run_stage(Snapshot, asked)
    assert not asked.workspace.experiments.exists() or not list(asked.workspace.experiments.glob("EXP-*"))
