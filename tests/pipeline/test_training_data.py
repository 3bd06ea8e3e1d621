"""What a training is given: the same rows whatever their files, each rejected one named, and counts that add up."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, Row, describe
from pipeline.data.store import load
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.records import items
from pipeline.sft import Sft
from pipeline.snapshot import Snapshot
from pipeline.stage import Job, dry_run, run_stage
from pipeline.training_data import read, say_what_the_other_holds_out
from pipeline.workspace import Workspace

Make = Callable[..., Job]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(n: int, answer: str = "", **more: Any) -> dict[str, Any]:
    said = answer or f"It is number {n}, and {'so on, ' * (n % 7)}nothing else of {n * 7919}."
    return {"messages": [turn("user", f"What is the {n * n} for, in words of {n}?"), turn("assistant", said)]} | more


def put(workspace: Workspace, name: str, *rows: dict[str, Any]) -> None:
    path = workspace.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_order_of_rows_and_files_changes_nothing_of_what_is_trained_or_when(job: Make) -> None:
    asked = job()
    before = read(asked.workspace, asked.config, Conversation)
    for path in sorted((asked.workspace.root / "data/sft").glob("*.jsonl")):
        path.write_text("".join(reversed(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")
        path.rename(path.with_name(f"{'zyxw'[len(path.stem) % 4]}{path.name}"))
    after = read(asked.workspace, asked.config, Conversation)
    assert [r.id for r in before.train] == [r.id for r in after.train]
    assert [r.id for r in before.held_out] == [r.id for r in after.held_out]


def test_rows_that_do_not_fit_are_in_no_part_no_snapshot_and_no_count(job: Make, base: Base) -> None:
    asked = job("sft_config.max_length=1024", "training_data.max_reject_share=1.0")
    put(asked.workspace, "data/sft/long.jsonl", *[talk(n, f"{n} word " * 600) for n in range(3)])
    record = run_stage(Snapshot, asked)
    found = record.facts.data["sft"]
    assert found["rejected"] == found["findings"]["too-long"] == 3
    assert found["train"]["rows"] + found["held_out"]["rows"] + found["rejected"] == found["read"] == 18
    parts = items.rows(record.folder)
    assert len(parts["sft.train"]) + len(parts["sft.held_out"]) == found["snapshot"]["rows"] == 15
    assert len(parts["sft.unfit"]) == 3
    kept = load(asked.workspace, found["snapshot"]["sha256"], Conversation)
    assert not [row for row in kept if "word word" in row.answers[0] or row.file.endswith("long.jsonl")]


def test_dry_run_counts_what_the_run_will(job: Make, base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    asked = job("sft_config.max_length=1024")
    put(asked.workspace, "data/sft/long.jsonl", *[talk(n, f"{n} word " * 600) for n in range(3)])
    dry_run(Sft, asked)
    said = "10 to train, 5 held out, 3 of 18 rejected: more than max_reject_share allows, it would stop"
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="3 of 18 rows cannot be used, more than max_reject_share allows"):
        run_stage(Sft, asked)


def test_rows_of_one_line_are_counted_one_by_one(job: Make) -> None:
    asked = job("training_data.sft=dump.json")
    rows = [talk(n, " " if n % 2 else "") for n in range(40)]
    asked.workspace.path("dump.json").write_text(json.dumps(rows))
    found = read(asked.workspace, asked.config, Conversation)
    assert (found.read, len(found.every), len(found.rejects)) == (40, 20, 20)
    assert len({reject.where for reject in found.rejects}) == 20
    with pytest.raises(UserError, match="20 of 40 rows cannot be used"):
        run_stage(Snapshot, asked)


def test_a_missing_evaluation_folder_stops_since_nothing_could_tell_leaks(job: Make) -> None:
    asked = job("training_data.eval=data/evals")
    with pytest.raises(UserError, match=r"^training_data.eval: data/evals: there is no such folder"):
        read(asked.workspace, asked.config, Conversation)


# ── Rows held out by a path ──────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_a_path_are_held_out_and_the_others_all_trained(job: Make) -> None:
    asked = job("training_data.validation.path=val")
    put(asked.workspace, "val/sft/rows.jsonl", *[talk(n) for n in range(4)])
    found = read(asked.workspace, asked.config, Conversation)
    assert (len(found.train), len(found.held_out)) == (15, 4)
    pairs = read(asked.workspace, asked.config, PreferencePair)
    assert len(pairs.held_out) == 5, "no val/dpo: a share of the pairs, as without a path"


def test_training_rows_that_are_held_out_are_rejected_however_short(job: Make) -> None:
    asked = job("training_data.validation.path=val", "training_data.sft=mine")
    short = [{"messages": [turn("user", f"Is {n} ok?"), turn("assistant", f"Yes {n}.")]} for n in range(20)]
    put(asked.workspace, "mine/rows.jsonl", *short)
    put(asked.workspace, "val/sft/rows.jsonl", *short[:2])
    found = read(asked.workspace, asked.config, Conversation)
    assert (len(found.train), len(found.held_out), found.read) == (18, 2, 22)
    assert {(r.rule.name, r.line) for r in found.rejects} == {("leak", 1), ("leak", 2)}


def test_a_path_that_holds_the_training_rows_is_told_as_such(job: Make) -> None:
    asked = job("training_data.validation.path=val")
    shutil.copytree(asked.workspace.root / "data/sft", asked.workspace.root / "val/sft")
    with pytest.raises(UserError, match=r"none of 15 rows can be used: D40[34] .*validation.path"):
        read(asked.workspace, asked.config, Conversation)


@pytest.mark.parametrize("name", ["nowhere", "data/sft/devops.jsonl"])
def test_a_path_that_is_no_folder_is_refused(job: Make, name: str) -> None:
    asked = job(f"training_data.validation.path={name}")
    with pytest.raises(UserError, match=rf"^training_data.validation.path: {name}: there is no such folder"):
        read(asked.workspace, asked.config, Conversation)


def test_pairs_made_of_held_out_conversations_are_said(job: Make, capsys: pytest.CaptureFixture[str]) -> None:
    asked = job("training_data.dpo=pairs.jsonl", "training_data.validation.fraction=0.34")
    held_out = read(asked.workspace, asked.config, Conversation).held_out
    other = [turn("assistant", "Something else altogether.")]
    pairs = [
        {
            "id": f"own-{n}",
            "prompt": [turn("user", f"Is {n} prime, and why?")],
            "chosen": [turn("assistant", f"It is {n}.")],
        }
        for n in range(5)
    ]
    for row in held_out:
        *prompt, chosen = (m.model_dump() for m in row.messages)
        pairs.append({"id": f"shared-{row.id}", "prompt": prompt, "chosen": [chosen]})
    put(asked.workspace, "pairs.jsonl", *(pair | {"rejected": other} for pair in pairs))
    rows = read(asked.workspace, asked.config, PreferencePair)
    expected = sum(row.id.startswith("shared-") for row in rows.train)
    assert len(rows.every) == 10 and len(rows.train) > expected >= 5 - len(rows.held_out) >= 1, (
        "some of both are trained"
    )
    assert say_what_the_other_holds_out(asked.workspace, asked.config, rows, PreferencePair) == expected
    assert "not of unseen rows" in capsys.readouterr().err
    none = replace(rows, train=[row for row in rows.train if row.id.startswith("own-")])
    assert say_what_the_other_holds_out(asked.workspace, asked.config, none, PreferencePair) == 0
    assert "not of unseen rows" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Conversation, PreferencePair])
def test_the_parts_are_those_of_the_rows_as_they_are_read(job: Make, kind: type[Row]) -> None:
    asked = job()
    found = read(asked.workspace, asked.config, kind)
    rows: list[Row] = list(read_rows(asked.workspace, "data/sft" if kind is Conversation else "data/dpo", kind))
    assert describe(found.every) == describe(rows) and found.rejects == []
