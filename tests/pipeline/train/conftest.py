"""Where the tests of training have a workspace with rows of few words, its base is the shallow one."""

from pathlib import Path

import pytest

from pipeline.workspace import Workspace
from tests.pipeline.shallow import make_shallow_talk, on_shallow


@pytest.fixture
def small_talk(workspace: Workspace, shallow: Path) -> Workspace:
    """This test's workspace, with rows of few words and the shallow base."""
    return on_shallow(workspace, shallow)


@pytest.fixture(scope="module")
def module_talk(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Such a workspace for a whole file, whose tests read what is in it."""
    return make_shallow_talk(tmp_path_factory.mktemp("talk") / "root", shallow)
