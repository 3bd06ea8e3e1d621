"""`aletheia eval --show` and `aletheia eval prefetch`: neither runs an evaluation."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.workspace import Workspace
from tests.eval.page.facts import EVAL, SFT, lineage

if TYPE_CHECKING:
    from tests.conftest import Said


def test_a_result_is_shown_again_and_its_page_written_anew(
    aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    record = lineage(workspace.root)
    before = record.path.read_bytes()
    said = aletheia(workspace, "eval", "--show", EVAL)
    assert said.code == 0
    assert "Better" in said.out and "Not known" in said.out
    assert said.err.strip() == f"page: experiments/{EVAL}/result.html"
    assert "<h2" in (record.folder / "result.html").read_text("utf-8")
    assert record.path.read_bytes() == before


def test_a_record_of_another_stage_has_no_result(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    lineage(workspace.root)
    said = aletheia(workspace, "eval", "--show", SFT)
    assert said.code == 2 and "a record of sft, not of an evaluation" in said.err


def test_own_tasks_need_no_network_and_are_listed(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    said = aletheia(workspace, "eval", "prefetch", "--profile", "small")
    assert (said.code, said.err) == (0, "")
    header, row = said.out.splitlines()
    assert header.split()[:3] == ["task", "from", "items"]
    assert row.split()[:2] == ["aletheia_choices", "own"]
