"""Which GGUF file is served: the newest export of this very model, or a line that says how to have one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import StageFailed, UserError
from pipeline.records import find
from pipeline.records.lifecycle import open_record
from pipeline.stage import Source, persons_half
from pipeline.to_gguf.llamacpp import cpu_features
from pipeline.workspace import INSTALLED
from serving.llamacpp_backend.engine import find_gguf

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llamacpp"
    folder.mkdir()
    (folder / INSTALLED).write_text(json.dumps({"version": "0", "cpu": cpu_features()}))
    monkeypatch.setenv("ALETHEIA_LLAMACPP", str(folder))
    return folder


def merged(trained: "Trained", stage: str = "merge") -> Source:
    record = trained.record(stage)
    facts = record.facts()
    assert facts
    output, taken = find.checked_output(trained.workspace, record, facts, trained.output(stage).name)
    return Source(record, facts, output, taken)


def export(trained: "Trained", kinds: Sequence[str], source: Source, *, fails: bool = False) -> Path:
    """A record of an export as the stage leaves it, of files that hold their own names."""
    job = trained.job()
    with open_record(
        trained.workspace,
        stage="export",
        profile=job.profile.id,
        person=persons_half(job, ["export"]),
        overrides={},
        configuration={},
        cost=job.config.cost,
        inputs=[source.input],
    ) as record:
        folder = record.output / "gguf"
        folder.mkdir()
        for kind in kinds:
            (folder / f"{kind}.gguf").write_text(f"{record.id} {kind}")
        record.facts.artifacts = find.artifacts(trained.workspace, folder)
        if fails:
            raise StageFailed("halfway")
    return folder


def test_the_newest_complete_export_of_this_very_model_is_served(environment: Path, copied: "Trained") -> None:
    source = merged(copied)
    other = Source(source.file, source.facts, source.output, source.input.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(UserError, match=rf"{copied.merge} has no complete export .*try `aletheia export gguf"):
        find_gguf(copied.job(), source)
    export(copied, ["f16", "q8_0"], source)
    newest = export(copied, ["f16", "q4_k_m"], source)
    export(copied, ["f16"], other)
    with pytest.raises(StageFailed):
        export(copied, ["f16"], source, fails=True)
    assert find_gguf(copied.job(), source) == newest / "f16.gguf"
    assert find_gguf(copied.job("export_config.formats=[q4_k_m]"), source) == newest / "q4_k_m.gguf"
    assert find_gguf(copied.job("export_config.formats=[q8_0]"), source).name == "q8_0.gguf"  # of the one before
    (newest / "f16.gguf").write_text("another")
    with pytest.raises(UserError, match=r"f16\.gguf is gone or was changed"):
        find_gguf(copied.job(), source)


def test_an_adapter_and_a_missing_environment_are_told_with_their_remedy(
    environment: Path, trained: "Trained", monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"is an adapter, .*try make merge PROFILE=small, then `aletheia export gguf"):
        find_gguf(trained.job(), merged(trained, "dpo"))
    monkeypatch.setenv("ALETHEIA_LLAMACPP", str(environment / "nowhere"))
    with pytest.raises(UserError, match="not installed; try `make setup-llamacpp`, then `aletheia export gguf"):
        find_gguf(trained.job(), merged(trained))
