"""What tests on rows share: an empty workspace, and rows read from a file in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation
from pipeline.workspace import Workspace

Read = Callable[..., list[Any]]


@pytest.fixture
def home(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def read(home: Workspace) -> Read:
    """`read(line, line, kind=Conversation)`: the rows of `rows.jsonl` with these lines."""

    def rows(*lines: str | bytes, kind: type[Any] = Conversation) -> list[Any]:
        home.path("rows.jsonl").write_bytes(b"\n".join(v.encode() if isinstance(v, str) else v for v in lines))
        return read_rows(home, "rows.jsonl", kind)

    return rows
