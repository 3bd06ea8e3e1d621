"""The report of a project: all of its records as one page, or as a log in Markdown.

    aletheia report
    aletheia report --markdown --output LOG.md

Reads experiments/, writes one file. The page needs no network: styles, scripts and data stand in it.
"""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.records.file import write_atomically
from pipeline.workspace import Workspace

MARK = "<!-- Written by `aletheia report`: the next one replaces it. -->"


def write_report(workspace: Workspace, output: Path | None, markdown: bool) -> str:
    """Returns the path written. Raises `UserError` rather than replace a file that is no report."""
    from aletheia.report.markdown import log
    from aletheia.report.page import page
    from aletheia.report.project import read_project

    path = output or workspace.experiments / ("log.md" if markdown else "report.html")
    _check_replaceable(path, workspace)
    render = log if markdown else page
    text = render(read_project(workspace), path.resolve().parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8", "replace"))
    return workspace.shown(path.resolve())


def _check_replaceable(path: Path, workspace: Workspace) -> None:
    if not path.exists():
        return
    where = workspace.shown(path.resolve())
    if not path.is_file():
        raise UserError("is no file", where=where, remedy="--output with a file's name")
    with path.open("rb") as file:
        if MARK.encode() not in file.read(1024):
            raise UserError("was not written by this command, and stays", where=where, remedy="another --output")
