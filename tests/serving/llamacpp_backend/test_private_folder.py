"""The folder of llama-server's socket: what a killed process left is removed, what a living one uses is not."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.workspace import CHECKOUT
from serving.llamacpp_backend.folder import PrivateFolder

KILLED = (
    "import os; from serving.llamacpp_backend.folder import PrivateFolder; PrivateFolder(); os.kill(os.getpid(), 9)"
)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    used = PrivateFolder()
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=CHECKOUT, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert killed.returncode == -9
    [left] = set(tmp_path.iterdir()) - {used.path}
    (tmp_path / "aletheia-llama-file").write_text("no folder")
    (tmp_path / "aletheia-llama-link").symlink_to(used.path)
    (tmp_path / "aletheia-bed").mkdir()  # a benchmark's
    young = PrivateFolder()
    assert left.exists(), "another may be about to take its lock"
    for path in (left, used.path, young.path, tmp_path / "aletheia-bed"):
        (path / "llama.sock").touch()
        os.utime(path, (0, 0))
    last = PrivateFolder()
    assert {p.name for p in tmp_path.iterdir()} == {
        "aletheia-bed", "aletheia-llama-file", "aletheia-llama-link", *(folder.path.name for folder in (used, young, last)),
    }  # fmt: skip
    for folder in (used, young, last):
        folder.remove()
        assert not folder.path.exists()
