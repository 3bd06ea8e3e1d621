"""The project's log in Markdown."""

from typing import TYPE_CHECKING

from aletheia.report import write_report
from pipeline.workspace import Workspace
from tests.aletheia.report.conftest import Put, change

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Said

HOSTILE = "a | b\nc\n# no heading\n<script>alert(1)</script> [x](javascript:alert(2)) \\| `"


def cells(line: str) -> list[str]:
    """Of a table's row, as GitHub's Markdown splits it: at every pipe that is not escaped."""
    return [cell.strip() for cell in line.strip().strip("|").replace("\\\\", "").replace("\\|", "¦").split("|")]


def table(text: str, title: str) -> list[list[str]]:
    """Rows below a heading, header and rule left out."""
    lines = text.partition(f"\n## {title}\n\n")[2].partition("\n\n")[0].splitlines()
    assert set(cells(lines[1])) == {"---"}
    assert all(len(cells(line)) == len(cells(lines[0])) for line in lines), lines
    return [cells(line) for line in lines[2:]]


def test_the_log_has_its_tables_and_lists(put: Put, place: Workspace) -> None:
    file = put(
        "EXP-2026-01-01-001",
        {
            "results": {"eval_loss": change(2, 1)},
            "verdict": {"frozen_at": "x", "finding": "supported"},
            "visualizations": [
                {"path": "EXP-2026-01-01-001/loss.png", "purpose": "loss"},
                {"path": "gone.png", "purpose": "?"},
            ],
        },
        {
            "description": "SFT on more rows",
            "learnings": {"training": ["warm-up matters"]},
            "journal": [{"date": "2026-01-01", "learned": "less is more"}],
            "next_steps": ["try rank 64", {"step": "was done", "done": True}],
            "issues": ["a loader's warning"],
            "conclusion": "it holds",
        },
    )
    (file.folder / "loss.png").write_bytes(b"x")
    put("EXP-2026-01-01-002").path.write_text("a: [\n")
    put("EXP-2026-01-01-003", None, {"stages": ["sft"], "profile": "small"})
    path = place.root / write_report(place, None, markdown=True)
    text = path.read_text()
    assert path.name == "log.md"
    planned, _, run = table(text, "Experiments")
    link = "[EXP-2026-01-01-001](EXP-2026-01-01-001.yaml)"
    figures = "held-out loss 2.00 → 1.00, change -1.00 [-1.10, -0.90] n=25"
    assert run == [link, "2026-01-01", "sft", "small", "complete", "SFT on more rows", figures, "supported"]
    assert planned[2:5] == ["sft", "small", "planned"]
    assert table(text, "Visualizations") == [
        ["[EXP-2026-01-01-001/loss.png](EXP-2026-01-01-001/loss.png)", "loss", link],
        ["gone.png", "?", link],
    ]
    assert f"### Training\n\n- warm-up matters ({link})" in text
    assert f"### From the journal\n\n- less is more ({link})" in text
    assert f"## Open next steps\n\n- [ ] try rank 64 ({link}, step 1)\n" in text and "was done" not in text
    assert f"## Issues\n\n- a loader's warning ({link})" in text and f"- it holds ({link})" in text
    assert "experiments/EXP-2026-01-01-002.yaml:2:1" in text.partition("## Needs a look")[2]


def test_a_cell_stays_a_cell(put: Put, place: Workspace) -> None:
    person = {"description": HOSTILE, "conclusion": HOSTILE, "next_steps": [HOSTILE], "learnings": {HOSTILE: HOSTILE}}
    visualizations = [{"path": HOSTILE, "purpose": HOSTILE}]
    put("EXP-2026-01-01-001", {"profile": HOSTILE, "visualizations": visualizations}, person)
    text = (place.root / write_report(place, None, markdown=True)).read_text()
    assert len(table(text, "Experiments")) == len(table(text, "Visualizations")) == 1
    assert "<script" not in text and "](javascript" not in text and "\n# no heading" not in text
    assert "no heading &lt;script>" in text


def test_an_empty_project_has_a_log(place: Workspace) -> None:
    text = (place.root / write_report(place, None, markdown=True)).read_text()
    assert "0 records." in text and "None yet." in text


def test_the_command_writes_where_it_is_told(aletheia: "Callable[..., Said]", put: Put, place: Workspace) -> None:
    put("EXP-2026-01-01-001")
    out = place.root / "docs" / "LOG.md"
    said = aletheia(place, "report", "--markdown", "--output", str(out))
    assert (said.code, said.out) == (0, "docs/LOG.md\n")
    assert "](../experiments/EXP-2026-01-01-001.yaml)" in out.read_text()  # links lead from where the log stands
