import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.records import ids
from pipeline.workspace import CHECKOUT, Workspace

SIXTEEN = """
import multiprocessing, os, sys
from pathlib import Path
from pipeline.records import ids
from pipeline.workspace import Workspace

def start(gate):
    gate.wait()
    ids.allocate(Workspace(Path(sys.argv[1])), lambda experiment_id, date: f"{experiment_id} {os.getpid()}".encode())

fork = multiprocessing.get_context("fork")
gate = fork.Barrier(16)
started = [fork.Process(target=start, args=(gate,)) for _ in range(16)]
for process in started:
    process.start()
for process in started:
    process.join()
sys.exit(sum(process.exitcode != 0 for process in started))
"""


def render(experiment_id: str, date: str) -> bytes:
    return f"{experiment_id} {date}".encode()


def days() -> list[str]:
    """Today, and tomorrow in case the test runs at midnight."""
    now = datetime.now(UTC)
    return [(now + timedelta(days=n)).strftime("%Y-%m-%d") for n in (0, 1)]


def test_sixteen_processes_that_start_at_once_get_sixteen_ids(place: Workspace) -> None:
    subprocess.run([sys.executable, "-c", SIXTEEN, str(place.root)], cwd=CHECKOUT, check=True, timeout=60)
    records = [path for path in place.experiments.iterdir() if path.name != ids.ALLOCATED]  # no temporary file either
    assert len(records) == 16
    assert sorted((place.experiments / ids.ALLOCATED).read_text().split()) == sorted(path.stem for path in records)
    assert {path.read_text().split()[0] for path in records} == {path.stem for path in records}
    assert len({path.read_text().split()[1] for path in records}) == 16


def test_an_id_has_the_utc_date_and_counts_from_one(place: Workspace) -> None:
    first, second = ids.allocate(place, render), ids.allocate(place, render)
    assert re.fullmatch(r"EXP-\d{4}-\d{2}-\d{2}-001\.yaml", first.name)
    assert second.name in {f"EXP-{day}-{number}.yaml" for day in days() for number in ("001", "002")}
    assert first.stem[4:14] in days()
    assert first.read_text() == f"{first.stem} {first.stem[4:14]}"


def test_numbers_pass_999(place: Workspace) -> None:
    for day in days():
        (place.experiments / f"EXP-{day}-999.yaml").touch()
    assert [ids.allocate(place, render).stem[15:] for _ in range(2)] == ["1000", "1001"]


def test_numbers_pass_999_of_records_that_are_gone(place: Workspace) -> None:
    (place.experiments / ids.ALLOCATED).write_text("".join(f"EXP-{day}-1234\n" for day in days()))
    assert ids.allocate(place, render).stem[15:] == "1235"


def test_an_id_is_not_used_again_when_its_record_and_folders_are_deleted(place: Workspace) -> None:
    first = ids.allocate(place, render)
    for folder in (place.experiments, place.checkpoints):
        (folder / first.stem).mkdir()
        shutil.rmtree(folder / first.stem)
    first.unlink()
    assert ids.allocate(place, render).stem[15:] == "002"


def test_an_id_of_another_day_counts_on_that_day(place: Workspace) -> None:
    names = [ids.allocate(place, render, date="2024-02-29").name for _ in range(2)]
    assert names == ["EXP-2024-02-29-001.yaml", "EXP-2024-02-29-002.yaml"]
    assert ids.allocate(place, render).stem[15:] == "001"


def test_what_stands_wrongly_among_the_ids_given_out_is_passed_over(place: Workspace) -> None:
    (place.experiments / ids.ALLOCATED).write_bytes(b"\xff\x00\n\nEXP-\nnonsense\n" + f"EXP-{days()[0]}-x\n".encode())
    assert ids.allocate(place, render).stem[15:] == "001"


@pytest.mark.parametrize("remains", ["experiments/EXP-{day}-007", "checkpoints/EXP-{day}-007"])
def test_an_id_is_not_used_again_when_its_record_is_deleted(place: Workspace, remains: str) -> None:
    for day in days():
        (place.root / remains.format(day=day)).mkdir()
    assert ids.allocate(place, render).stem[15:] == "008"


def test_a_gap_is_not_filled(place: Workspace) -> None:
    for day in days():
        (place.experiments / f"EXP-{day}-005.yaml").touch()
    assert ids.allocate(place, render).stem[15:] == "006"


def test_a_record_taken_in_the_meantime_is_left_alone(place: Workspace) -> None:
    """Another starter takes the number between the look and the link."""

    def overtaken(experiment_id: str, date: str) -> bytes:
        (place.experiments / f"EXP-{date}-001.yaml").write_text("another's")
        return render(experiment_id, date)

    mine = ids.allocate(place, overtaken)
    assert mine.stem[15:] == "002"
    assert mine.read_text().startswith(mine.stem)
    assert mine.with_name(mine.name.replace("-002", "-001")).read_text() == "another's"


def test_a_failed_start_leaves_nothing(place: Workspace) -> None:
    with pytest.raises(ZeroDivisionError):
        ids.allocate(place, lambda experiment_id, date: bytes(1 // 0))
    assert os.listdir(place.experiments) == []


def test_the_newest_is_by_date_then_number_not_by_spelling(place: Workspace) -> None:
    order = ["EXP-2026-11-20-1000", "EXP-2026-11-20-999", "EXP-2026-11-20-002", "EXP-2026-11-19-1001"]
    for name in [*sorted(order), "EXP-notes", "EXP-2026-11-20-01", "EXP-2026-11-21-001.bak"]:
        (place.experiments / f"{name}.yaml").touch()
    (place.experiments / "EXP-2026-11-21-001").mkdir()
    assert [path.stem for path in ids.newest_first(place)] == order


def test_a_place_without_folders_gets_them(tmp_path: Path) -> None:
    assert ids.allocate(Workspace(tmp_path / "new"), render).exists()


def test_an_id_that_cannot_be_remembered_leaves_no_file(place: Workspace) -> None:
    (place.experiments / ids.ALLOCATED).mkdir()
    with pytest.raises(OSError, match="directory"):
        ids.allocate(place, render)
    assert [path.name for path in place.experiments.iterdir()] == [ids.ALLOCATED]
