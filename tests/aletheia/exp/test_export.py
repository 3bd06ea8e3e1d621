"""`aletheia exp export`: what is asked for, and what cannot be exported."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.workspace import Workspace

EXP = "EXP-2026-01-01-001"
ELSEWHERE = ("mlflow", "wandb", "model-card")


def test_an_unknown_target_is_refused_with_the_choices(
    place: Workspace, write_record: Callable[..., RecordFile], aletheia: Callable[..., Any]
) -> None:
    write_record(place, EXP)
    said = aletheia(place, "exp", "export", EXP, "--to", "mlfow")
    assert (said.code, said.out) == (2, "")
    assert said.err == "error: --to: there is no export to `mlfow`; try mlflow, wandb, markdown or model-card\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--to", "markdown", "--uri", "sqlite:///x.db"), "--uri: is for mlflow, not for markdown"),
        (("--to", "mlflow", "--output", "there"), "--output: is not for mlflow"),
        (("--to", "mlflow", "--uri", "./mlruns"), "MLflow keeps no runs in folders any more"),
        (("--to", "mlflow", "--uri", "file:///tmp/mlruns"), "MLflow keeps no runs in folders any more"),
        (("--to", "mlflow", "--uri", "sqlite://"), "names no file"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    aletheia: Callable[..., Any],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    write_record(place, EXP)
    said = aletheia(place, "exp", "export", EXP, *arguments)
    assert said.code == 2
    assert named in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_plan_goes_nowhere_but_on_a_page(
    place: Workspace, write_record: Callable[..., RecordFile], target: str
) -> None:
    from aletheia.exp.export import export

    write_record(place, EXP, facts=None, person="stages: [sft]\nhypothesis: more data helps\n")
    write_record(place, "EXP-2026-01-01-002", facts={"status": "planned"})  # a plan that has its line already
    for name in (EXP, "EXP-2026-01-01-002"):
        with pytest.raises(UserError, match=f"is a plan: nothing has run; try make run EXP={name}"):
            export(place, name, target, None, None, False)
    page = place.root / export(place, EXP, "markdown", None, None, False)
    assert "more data helps" in page.read_text("utf-8")


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_running_record_goes_nowhere_but_on_a_page_that_says_so(
    place: Workspace, write_record: Callable[..., RecordFile], target: str
) -> None:
    from aletheia.exp.export import export

    own = psutil.Process()
    started = {"status": "running", "at": "2026-01-01T10:00:00Z", "pid": own.pid, "started": own.create_time()}
    file = write_record(place, EXP, facts={"status": "running", "history": [started | {"host": socket.gethostname()}]})
    before = file.path.read_bytes()
    with pytest.raises(UserError, match="is running"):
        export(place, EXP, target, None, None, False)
    assert file.path.read_bytes() == before
    page = place.root / export(place, EXP, "markdown", None, None, False)
    assert "**Partial: the run has not ended.**" in page.read_text("utf-8")


@pytest.mark.parametrize("target", ["markdown", "model-card"])
def test_a_page_that_is_there_is_replaced_only_by_force(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    aletheia: Callable[..., Any],
    target: str,
) -> None:
    write_record(place, EXP)
    said = aletheia(place, "exp", "export", EXP, "--to", target)
    page = place.root / said.out.strip()
    assert (said.code, page.is_file()) == (0, True)
    page.write_text("mine")
    again = aletheia(place, "exp", "export", EXP, "--to", target)
    assert again.code == 2
    assert "is there already; try --force" in again.err
    assert page.read_text() == "mine"
    assert aletheia(place, "exp", "export", EXP, "--to", target, "--force").code == 0
    assert page.read_text("utf-8") != "mine"


def test_output_names_a_file_or_a_folder(
    place: Workspace, write_record: Callable[..., RecordFile], tmp_path: Path
) -> None:
    from aletheia.exp.export import export

    write_record(place, EXP)
    for target, output, written in (
        ("markdown", "wiki", f"wiki/{EXP}.md"),
        ("markdown", "wiki/page.md", "wiki/page.md"),
        ("model-card", "hub", "hub/README.md"),  # the name that the hub reads
    ):
        assert export(place, EXP, target, None, tmp_path / output, False) == str(tmp_path / written)
        assert (tmp_path / written).is_file()


@pytest.mark.parametrize("target", ["markdown", "model-card"])
def test_no_page_is_written_over_a_record_or_over_what_a_record_vouches_for(
    place: Workspace, write_record: Callable[..., RecordFile], target: str
) -> None:
    from aletheia.exp.export import export

    readme = place.checkpoints / EXP / "adapter" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text("hashed")
    artifact = {"path": str(readme.relative_to(place.root)), "sha256": "0" * 64, "bytes": 6}
    file = write_record(place, EXP, facts={"artifacts": [artifact]})
    before = file.path.read_bytes()
    with pytest.raises(UserError, match="is an artifact of the record"):
        export(place, EXP, target, None, readme, True)
    with pytest.raises(UserError, match="is a record's place"):
        export(place, EXP, target, None, file.path, True)
    assert (readme.read_text(), file.path.read_bytes()) == ("hashed", before)


def test_a_folder_that_cannot_be_made_is_one_line(
    place: Workspace, write_record: Callable[..., RecordFile], aletheia: Callable[..., Any], tmp_path: Path
) -> None:
    write_record(place, EXP)
    (tmp_path / "file").write_text("in the way")
    for target in ("markdown", "model-card", "wandb"):
        said = aletheia(place, "exp", "export", EXP, "--to", target, "--output", str(tmp_path / "file" / "in"))
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert "Not a directory" in said.err


def test_help_shows_an_example(aletheia: Callable[..., Any], place: Workspace) -> None:
    said = aletheia(place, "exp", "export", "--help")
    assert said.code == 0
    assert "aletheia exp export EXP-2026-11-21-003 --to model-card" in said.out
