"""The tree from the base to what was served: every record of it once, what is gone included, and no circle without end."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.records.file import LINE, RecordFile
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

Run = Callable[..., "Said"]
Write = Callable[..., RecordFile]
PIPELINE, SFT, DPO, MERGE, SERVE, EVAL, OTHER = (f"EXP-2026-01-01-00{number}" for number in range(1, 8))
BASE = {"name": "tiny", "sha256": "b" * 64}


def taken(*names: str, stage: str = "sft") -> dict[str, Any]:
    """A lineage that names these as what it was built on."""
    return {"base": BASE, "inputs": [{"id": n, "stage": stage, "path": "x", "sha256": "a" * 64} for n in names]}


@pytest.fixture
def demo(place: Workspace, write_record: Write) -> Workspace:
    """base → SFT → DPO → merge → serve and eval, all parts of one pipeline; and another SFT beside it."""
    write_record(place, PIPELINE, {"stage": "pipeline", "lineage": {"children": [SFT, DPO, MERGE, SERVE, EVAL]}})
    part = {"parent": PIPELINE}
    write_record(place, SFT, {"lineage": taken() | part, "artifacts": [{"path": "a", "sha256": "c", "bytes": 1}]})
    write_record(place, DPO, {"stage": "dpo", "lineage": taken(SFT) | part})
    write_record(place, MERGE, {"stage": "merge", "lineage": taken(DPO, stage="dpo") | part})
    write_record(place, SERVE, {"stage": "serve", "lineage": taken(MERGE, stage="merge") | part})
    write_record(
        place, EVAL, {"stage": "eval", "results": {"requests": 1}, "lineage": taken(MERGE, stage="merge") | part}
    )
    write_record(place, OTHER, {"lineage": taken()})
    return place


def tree(said: "Said") -> list[tuple[int, str]]:
    """Depth and id of each line below the header."""
    assert said.code == 0, said.err
    lines = [line for line in said.out.splitlines() if line and not line.startswith(("part of", "record"))]
    return [((len(line) - len(line.lstrip("│├└─ "))) // 4, line.lstrip("│├└─ ").split()[0]) for line in lines]


def test_the_tree_goes_from_the_base_to_what_was_served_and_judged(aletheia: Run, demo: Workspace) -> None:
    expected = [(0, "tiny"), (1, SFT), (2, DPO), (3, MERGE), (4, SERVE), (4, EVAL)]
    for asked in (SFT, DPO, MERGE, EVAL):  # the same tree, wherever one stands in it
        said = aletheia(demo, "exp", "lineage", asked)
        assert tree(said) == expected
        assert next(line for line in said.out.splitlines() if "◀" in line).split("◀")[0].split()[-1] == asked
        assert said.out.startswith(f"part of  {PIPELINE}  pipeline  complete\n")
        assert OTHER not in said.out


def test_it_shows_stage_status_what_was_made_and_the_key_figure(aletheia: Run, demo: Workspace) -> None:
    lines = aletheia(demo, "exp", "lineage", MERGE).out.splitlines()
    base, sft = (next(line for line in lines if name in line).split() for name in ("tiny", SFT))
    assert base == ["tiny", "base", "b" * 12]
    assert sft[2:4] == ["sft", "complete"]
    made = json.loads(aletheia(demo, "exp", "lineage", MERGE, "--json").out)["nodes"][1]["sha256"]
    assert made == "2e7d2c03a9507ae265ecf5b5356885a53393a2029d241394997265a1a25aefc6"  # of the artifacts' hashes, "c"
    assert sft[4] == made[:12]


def test_of_a_pipeline_experiment_it_shows_the_trees_of_its_stages(aletheia: Run, demo: Workspace) -> None:
    assert tree(aletheia(demo, "exp", "lineage", PIPELINE)) == [
        (0, PIPELINE), (1, "tiny"), (2, SFT), (3, DPO), (4, MERGE), (5, SERVE), (5, EVAL),
    ]  # fmt: skip


def test_json_is_the_tree_in_order_with_depths(aletheia: Run, demo: Workspace) -> None:
    said = aletheia(demo, "exp", "lineage", DPO, "--json")
    data = json.loads(said.out)
    assert (data["id"], data["part_of"]) == (DPO, PIPELINE)
    assert [(node["depth"], node["id"]) for node in data["nodes"]] == tree(aletheia(demo, "exp", "lineage", DPO))
    assert [node["id"] for node in data["nodes"] if node["asked"]] == [DPO]


def test_a_record_that_is_not_there_is_shown_as_gone(aletheia: Run, place: Workspace, write_record: Write) -> None:
    write_record(place, DPO, {"stage": "dpo", "lineage": taken(SFT) | {"parent": PIPELINE}})
    said = aletheia(place, "exp", "lineage", DPO)
    assert tree(said) == [(0, "tiny"), (1, SFT), (2, DPO)]
    gone = next(line for line in said.out.splitlines() if SFT in line)
    assert gone.split()[1:] == [SFT, "sft", "gone", "a" * 12]
    assert f"part of  {PIPELINE}  ?  gone\n" in said.out


def test_a_record_that_cannot_be_read_is_shown_as_unreadable(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    write_record(place, SFT, None).path.write_text(f"{LINE}\nstatus: splendid\n", "utf-8")
    write_record(place, DPO, {"stage": "dpo", "lineage": taken(SFT)})
    said = aletheia(place, "exp", "lineage", DPO)
    assert tree(said) == [(0, "tiny"), (1, SFT), (2, DPO)]
    assert "unreadable" in said.out


def test_what_was_built_on_two_is_told_once_and_named_twice(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    write_record(place, SFT, {"lineage": taken()})
    write_record(place, OTHER, {"lineage": taken()})
    write_record(place, MERGE, {"stage": "merge", "lineage": taken(SFT, OTHER)})
    write_record(place, SERVE, {"stage": "serve", "lineage": taken(MERGE)})
    said = aletheia(place, "exp", "lineage", MERGE)
    assert tree(said) == [(0, "tiny"), (1, SFT), (2, MERGE), (3, SERVE), (1, OTHER), (2, MERGE)]
    assert said.out.count("as above") == 1


@pytest.mark.parametrize(
    "lineages",
    [
        {SFT: taken(SFT)},
        {SFT: taken(DPO), DPO: taken(SFT)},
        {SFT: taken(DPO), DPO: taken(MERGE), MERGE: taken(SFT, DPO)},
        {SFT: taken(SFT, SFT) | {"parent": SFT, "children": [SFT, DPO]}},
        {SFT: {"parent": DPO, "children": [DPO]}, DPO: {"parent": SFT, "children": [SFT]}},
    ],
)
def test_a_circle_ends(aletheia: Run, place: Workspace, write_record: Write, lineages: dict[str, Any]) -> None:
    for name, lineage in lineages.items():
        write_record(place, name, {"lineage": lineage})
    said = aletheia(place, "exp", "lineage", SFT)
    assert {name for _, name in tree(said)} >= set(lineages)
    assert len(said.out.splitlines()) < 12
    assert aletheia(place, "exp", "lineage", SFT, "--json").code == 0


@pytest.mark.parametrize("base", [{"name": None}, {"name": [1], "sha256": 5}, {"name": "\x1b[2J", "sha256": "x"}, {}])
def test_an_odd_base_is_shown_without_a_traceback(
    aletheia: Run, place: Workspace, write_record: Write, base: dict[str, Any]
) -> None:
    write_record(place, SFT, {"lineage": {"base": base, "parent": "\x1b[2J"}, "results": {"eval_loss": 3}})
    said = aletheia(place, "exp", "lineage", SFT)
    assert said.code == 0, said.err
    assert SFT in said.out
    assert not any(ord(letter) < 32 and letter != "\n" for letter in said.out)


def test_a_plan_has_no_lineage_yet(aletheia: Run, place: Workspace, write_record: Write) -> None:
    write_record(place, SFT, None, "hypothesis: x\n")
    said = aletheia(place, "exp", "lineage", SFT)
    assert (said.code, said.out) == (2, "")
    assert said.err == f"error: experiments/{SFT}.yaml: is a plan: nothing has run; try make run EXP={SFT}\n"
