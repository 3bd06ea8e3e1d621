"""`aletheia data snapshot`: what it counts is what training will read, and it refuses what training would refuse."""

from collections.abc import Callable

import pytest

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
        assert facts.data[part] == {"train": describe(train), "held_out": describe(held_out)}
        assert len(train) + len(held_out) == len(rows)
    assert facts.data["questions"]["rows"] == facts.data["choices"]["rows"] == 30
    assert facts.results == {"rows": 15 + 15 + 30 + 30}


def test_snapshot_plan_shows_how_many_rows_are_held_out(job: Callable[..., Job]) -> None:
    assert Snapshot.prepare(job()).plan() == [
        ("sft", "10 rows to train, 5 held out"),
        ("dpo", "10 rows to train, 5 held out"),
        ("eval", "30 open questions, 30 multiple choice"),
    ]


def test_snapshot_changes_with_a_single_character_of_a_row(job: Callable[..., Job]) -> None:
    asked = job()
    before = Snapshot.prepare(asked).sft
    path = asked.workspace.root / "data/sft/devops.jsonl"
    path.write_text(path.read_text().replace("high", "hign", 1))
    assert describe(before)["sha256"] != describe(Snapshot.prepare(asked).sft)["sha256"]


@pytest.mark.parametrize("name", ["sft", "dpo", "eval/questions", "eval/choices"])
def test_snapshot_of_a_bad_row_says_where_and_leaves_no_record(job: Callable[..., Job], name: str) -> None:
    asked = job()
    path = asked.workspace.root / f"data/{name}/devops.jsonl"
    path.write_text(path.read_text() + "{}\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(UserError, match=f"^data/{name}/devops.jsonl:{line}: has no "):
        run_stage(Snapshot, asked)
    assert not asked.workspace.experiments.exists() or not list(asked.workspace.experiments.glob("EXP-*"))
