"""An environment of vLLM's, and no model in it."""

from pathlib import Path

import pytest

from serving import child
from tests.serving.vllm_backend.fake_vllm import install


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole environment of vLLM's, and nothing of this machine's own settings."""
    monkeypatch.setenv("ALETHEIA_VLLM", str(install(tmp_path / "vllm-environment")))
    for name in ("ALETHEIA_API_KEY", "VLLM_API_KEY", "FAKE_VLLM", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(child, "POLL", 0.02)
