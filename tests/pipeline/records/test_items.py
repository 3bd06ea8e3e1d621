"""What lies beside a record line by line: written so that it is read again, and read whatever it holds."""

from pathlib import Path

import pytest

from pipeline.data.rows import Conversation, Question, describe, hashes
from pipeline.records import items


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [Conversation.model_validate({"id": i, "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": i}]}) for i in ("é", "b")]  # fmt: skip
    parts = {"train": hashes(rows[:1]), "sft.held_out": hashes(rows[1:])}
    items.write_rows(tmp_path, parts)
    assert items.rows(tmp_path) == parts


def test_the_hash_of_a_set_of_rows_is_the_one_that_its_record_describes() -> None:
    rows = [Question(id=str(i), prompt="p", key_points=[str(i)]) for i in range(3)]
    assert items.digest(hashes(rows).values()) == describe(rows)["sha256"]
    assert items.digest(hashes(rows[::-1]).values()) == describe(rows)["sha256"]


def test_a_change_gives_its_end_its_beginning_and_its_difference(tmp_path: Path) -> None:
    items.write_changes(tmp_path, {"eval_loss": {"a": (6.0, 5.0)}})
    assert items.values(tmp_path, "eval") == {
        "eval_loss": {"a": 5.0}, "eval_loss.before": {"a": 6.0}, "eval_loss.delta": {"a": -1.0},
    }  # fmt: skip


@pytest.mark.parametrize(("stage", "figures"), [("sft", {"eval_loss"}), ("dpo", {"margin"}), ("merge", set())])
def test_held_out_rows_are_the_figure_of_their_stage(tmp_path: Path, stage: str, figures: set[str]) -> None:
    (tmp_path / "heldout.jsonl").write_text('{"id": "a", "before": 1, "after": 2}\n')
    found = items.values(tmp_path, stage)
    assert {path for path in found if "." not in path and path != "preference_accuracy"} == figures
    if stage == "dpo":
        assert found["preference_accuracy"] == {"a": 1.0}


def test_nothing_is_nothing_and_a_torn_line_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert items.read(tmp_path / "log.jsonl") == []
    assert items.rows(tmp_path) == items.values(tmp_path, "sft") == {}
    assert capsys.readouterr().err == ""
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n\n[2]\n\xff\n{"b"')
    assert items.read(tmp_path / "log.jsonl") == [{"a": 1}]
    assert "log.jsonl: 3 lines, the first 3, are torn or no JSON object" in capsys.readouterr().err
