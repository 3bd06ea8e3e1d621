"""The picture of what was built on what."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from aletheia.report import lineage
from aletheia.report.lineage import DOWN, HEIGHT, LIMIT, Picture, picture
from aletheia.report.project import Project
from tests.aletheia.report.conftest import Put

BASE = {"name": "tiny", "sha256": "ab" * 32}


def built_on(*names: str, base: bool = True) -> dict[str, object]:
    inputs = [{"id": name, "stage": "sft", "path": "p", "sha256": "s"} for name in names]
    return {"lineage": {"inputs": inputs} | ({"base": BASE} if base else {})}


def edges(found: Picture, dashed: bool = False) -> set[tuple[str, str]]:
    return {(edge.start.id[-5:], edge.end.id[-5:]) for edge in found.edges if edge.dashed == dashed}


def assert_readable(found: Picture) -> None:
    """No box covers another, and every line goes to the right."""
    for column in {box.column for box in found.boxes}:
        ys = sorted(box.y for box in found.boxes if box.column == column)
        assert all(b - a >= HEIGHT for a, b in pairwise(ys)), (column, ys)
    assert all(edge.start.x < edge.end.x for edge in found.edges)


def test_a_family_runs_from_base_and_data_to_what_was_judged(put: Put, project: Callable[[], Project]) -> None:
    rows = {"train": {"sha256": "77"}}
    put("EXP-2026-01-01-001", {"stage": "pipeline"})
    put("EXP-2026-01-01-002", {"stage": "data", "data": {"sft": rows}})
    put("EXP-2026-01-01-003", {"stage": "sft", "data": rows} | built_on())
    put("EXP-2026-01-01-004", {"stage": "dpo"} | built_on("EXP-2026-01-01-003"))
    put("EXP-2026-01-01-005", {"stage": "merge"} | built_on("EXP-2026-01-01-004"))
    put("EXP-2026-01-01-006", {"stage": "serve"} | built_on("EXP-2026-01-01-005"))
    put("EXP-2026-01-01-007", {"stage": "eval"} | built_on("EXP-2026-01-01-005"))
    found = picture(project())
    assert edges(found) == {
        ("tiny", "1-003"),
        ("1-003", "1-004"),
        ("1-004", "1-005"),
        ("1-005", "1-006"),
        ("1-005", "1-007"),
    }
    assert edges(found, dashed=True) == {("1-002", "1-003")}
    columns = {box.id[-3:]: box.column for box in found.boxes}
    assert columns == {"iny": 0, "002": 0, "003": 1, "004": 2, "005": 3, "006": 4, "007": 4}
    assert_readable(found)


def test_sixty_records_do_not_cover_each_other(put: Put, project: Callable[[], Project]) -> None:
    for day in range(1, 13):
        name = f"EXP-2026-01-{day:02d}-00"
        put(f"{name}1", {"stage": "sft"} | built_on())
        put(f"{name}2", {"stage": "dpo"} | built_on(f"{name}1"))
        put(f"{name}3", {"stage": "merge"} | built_on(f"{name}2"))
        put(f"{name}4", {"stage": "eval"} | built_on(f"{name}3"))
        put(f"{name}5", {"stage": "eval"} | built_on(f"{name}3"))
    found = picture(project())
    assert len(found.boxes) == 61 and found.not_drawn == 0
    assert_readable(found)


def test_what_is_not_drawn_is_counted(put: Put, project: Callable[[], Project]) -> None:
    for number in range(1, LIMIT + 6):
        put(f"EXP-2026-01-01-{number:03d}", built_on())
    found = picture(project())
    assert (len([box for box in found.boxes if box.entry]), found.not_drawn) == (LIMIT, 5)


def test_a_record_that_is_gone_is_drawn_as_such(put: Put, project: Callable[[], Project]) -> None:
    put("EXP-2026-01-01-002", {"stage": "dpo"} | built_on("EXP-2026-01-01-001"))
    found = picture(project())
    gone = next(box for box in found.boxes if box.id == "EXP-2026-01-01-001")
    assert gone.entry is None and gone.line == "no such record here"
    assert ("1-001", "1-002") in edges(found)


def test_records_that_name_each_other_or_themselves_end_too(put: Put, project: Callable[[], Project]) -> None:
    put("EXP-2026-01-01-001", built_on("EXP-2026-01-01-002"))
    put("EXP-2026-01-01-002", built_on("EXP-2026-01-01-001"))
    put("EXP-2026-01-01-003", built_on("EXP-2026-01-01-003"))
    found = picture(project())
    assert {box.id[-3:]: box.column for box in found.boxes} == {"iny": 0, "001": 1, "002": 2, "003": 1}


def test_a_chain_longer_than_the_picture_ends(
    put: Put, project: Callable[[], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage, "LIMIT", 10)
    put("EXP-2026-01-01-001", built_on())
    for number in range(2, 30):
        put(f"EXP-2026-01-01-{number:03d}", built_on(f"EXP-2026-01-01-{number - 1:03d}", base=False))
    found = picture(project())
    assert len(found.boxes) <= 20 and found.not_drawn > 0
    assert found.height < 4 * DOWN


def test_an_empty_project_has_no_picture(project: Callable[[], Project]) -> None:
    assert picture(project()).boxes == []
