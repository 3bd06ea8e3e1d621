"""A record as a W&B offline run: really written by wandb, and read back from its `.wandb` file.

The library has no public reader of that file. It is a LevelDB log of its own protobuf records, `wandb.proto`, which is
private API: when a new wandb changes either, it is this file that has to follow, not the exporter.
"""

import json
import math
import os
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aletheia.exp.export import export
from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.workspace import Workspace

EXP = "EXP-2026-01-01-001"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
FACTS: dict[str, Any] = {
    "history": [
        {"status": "running", "at": "2026-01-01T10:00:00Z", "host": "here"},
        {"status": "complete", "at": "2026-01-01T11:00:00Z"},
    ],
    "configuration": {"name": "small", "sft_config": {"learning_rate": 2e-4}},
    "data": {"train": {"rows": 35}},
    "results": {"eval_loss": {"value": 5.4, "ci_low": 5.3, "ci_high": 5.5, "n": 25}},
    "resources": {"wall_seconds": 3600.0},
    "code": {"commit": "c" * 40, "dirty": False},
}


def records(run: Path) -> Iterator[Any]:
    """wandb's records in the order they were written: blocks of 32 KiB, each chunk with CRC, length and kind."""
    from wandb.proto import wandb_internal_pb2

    data = next(run.glob("run-*.wandb")).read_bytes()
    assert data[:4] == b":W&B"
    at, part = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def read(run: Path) -> dict[str, Any]:
    """Config, summary, history by step, and the run's own facts."""
    found: dict[str, Any] = {"config": {}, "summary": {}, "history": {}}
    for record in records(run):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "summary":
            found["summary"] |= {_key(u): json.loads(u.value_json) for u in record.summary.update}
        elif kind == "history":
            items = {_key(i): json.loads(i.value_json) for i in record.history.item}
            found["history"][record.history.step.num] = {k: v for k, v in items.items() if not k.startswith("_")}
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def exported(place: Workspace, name: str = EXP, **options: Any) -> list[Path]:
    lines = export(place, name, "wandb", None, options.get("output"), options.get("force", False))
    return [place.path(line) for line in lines.splitlines()]


def test_config_summary_and_history_are_the_records(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    log = [
        {"step": 20, "loss": 5.5, "epoch": 1.0},
        {"step": 10, "loss": 6.0, "epoch": 0.5, "grad_norm_by_layer": {"layers.0": 0.1}},  # wandb drops what goes back
        {"step": 20, "epoch": 1.0, "eval_loss": 5.6},
    ]
    person = "hypothesis: more data helps\ndescription: on all rows\ntags: [night]\n"
    write_record(place, EXP, FACTS | {"lineage": {"parent": "EXP-2026-01-01-009"}}, person=person, log=log)
    (run,) = exported(place)
    found = read(run)
    assert run.parent == place.experiments / EXP / "wandb"
    assert found["config"]["sft_config"] == {"learning_rate": 2e-4}
    assert found["config"]["data"] == {"train": {"rows": 35}}
    about = found["config"]["record"]
    assert (about["id"], about["status"], about["commit"]) == (EXP, "complete", "c" * 40)
    assert about["hypothesis"] == "more data helps"
    assert about["started"] == "2026-01-01T10:00:00+00:00"
    assert found["history"] == {
        10: {"log/loss": 6.0, "log/epoch": 0.5, "log/grad_norm_by_layer.layers.0": 0.1},
        20: {"log/loss": 5.5, "log/epoch": 1.0, "log/eval_loss": 5.6},
    }
    figures = {key: value for key, value in found["summary"].items() if not key.startswith(("_", "log/"))}
    assert figures == {
        "eval_loss": 5.4,
        "eval_loss.ci_low": 5.3,
        "eval_loss.ci_high": 5.5,
        "eval_loss.n": 25,
        "resources.wall_seconds": 3600,
    }
    run_facts = found["run"]
    assert (run_facts.project, run_facts.display_name, run_facts.job_type) == ("small", EXP, "sft")
    assert (run_facts.run_group, run_facts.notes) == ("EXP-2026-01-01-009", "on all rows\nmore data helps")
    assert set(run_facts.tags) == {"complete", "night", "sft"}
    assert found["exit"] == 0


def test_every_step_of_a_long_curve_arrives_nan_and_infinity_included(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    log = [{"step": step, "loss": 1 / (step + 1)} for step in range(1500)]
    log += [{"step": 1500, "loss": math.nan}, {"step": 1501, "loss": math.inf}]
    write_record(place, EXP, FACTS, log=log)
    (run,) = exported(place)
    losses = {step: values["log/loss"] for step, values in read(run)["history"].items()}
    assert [losses[step] for step in range(1500)] == pytest.approx([1 / (step + 1) for step in range(1500)])
    assert math.isnan(losses[1500])
    assert losses[1501] == math.inf


def test_the_record_its_log_and_its_pictures_go_along_as_copies(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    picture = {"path": f"{EXP}/loss.png", "purpose": "to see"}
    file = write_record(place, EXP, FACTS | {"visualizations": [picture]}, log=[{"step": 1, "loss": 6.0}])
    (file.folder / "loss.png").write_bytes(PNG)
    before = file.path.read_bytes()
    (run,) = exported(place)
    kept = {str(p.relative_to(run / "files")): p for p in (run / "files").rglob("*") if p.is_file()}
    assert kept.keys() == {f"{EXP}.yaml", "log.jsonl", "plots/loss.png"}
    assert not any(path.is_symlink() for path in kept.values())
    assert kept[f"{EXP}.yaml"].read_bytes() == before
    assert kept["plots/loss.png"].read_bytes() == PNG
    named = {f.path for r in records(run) if r.WhichOneof("record_type") == "files" for f in r.files.files}
    assert kept.keys() <= named  # wandb sync uploads what the log names


def test_nothing_is_asked_printed_sent_or_left_behind(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    aletheia: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(home))
    for name, value in {  # what a shell may have set for real runs
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
        "WANDB_PROJECT": "other",
        "WANDB_RUN_ID": "other",
        "WANDB_DIR": str(cwd),
        "WANDB_NAME": "other",
        "WANDB_TAGS": "other",
        "WANDB_NOTES": "other",
    }.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # all that would leave the machine comes by here
        proxy.settimeout(0.2)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        environment, leave = dict(os.environ), sys.exit
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        write_record(place, EXP, FACTS, log=[{"step": 1, "loss": 6.0}])
        said = aletheia(place, "exp", "export", EXP, "--to", "wandb")

        with pytest.raises(TimeoutError):
            proxy.accept()
    run = place.path(said.out.strip())
    assert said.code == 0
    assert said.out == f"{place.shown(run)}\n"
    assert said.err == f"to upload: wandb sync {run}\n"
    assert (list(home.iterdir()), list(cwd.iterdir())) == ([], [])
    assert not [link for link in (place.experiments / EXP).rglob("*") if link.is_symlink() and not link.exists()]
    assert not [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert sys.exit is leave
    assert "wandb" not in sys.excepthook.__module__
    assert {k: v for k, v in os.environ.items() if "WANDB" in k} == {
        k: v for k, v in environment.items() if "WANDB" in k
    }
    found = read(run)
    assert (found["run"].project, found["run"].display_name) == ("small", EXP)
    assert "other" not in (found["run"].run_id, found["run"].notes, *found["run"].tags)
    assert b"0" * 40 not in b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_a_failed_run_is_no_success_at_wandb(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    failure = {"kind": "StageFailed", "message": "loss is nan at step 3", "step": 3}
    write_record(place, EXP, FACTS | {"status": "failed", "failure": failure})
    (run,) = exported(place)
    found = read(run)
    assert found["exit"] == 1
    assert found["config"]["record"]["failure"] == "loss is nan at step 3"
    assert "failed" in found["run"].tags


def test_a_pipeline_and_its_stages_are_one_group(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    child = "EXP-2026-01-01-002"
    write_record(place, EXP, FACTS | {"stage": "pipeline", "lineage": {"children": [child]}})
    write_record(place, child, FACTS | {"lineage": {"parent": EXP}})
    runs = [read(run)["run"] for run in exported(place)]
    assert [(run.display_name, run.run_group, run.job_type) for run in runs] == [
        (EXP, EXP, "pipeline"),
        (child, EXP, "sft"),
    ]


def test_the_record_says_where_its_run_lies_and_a_second_one_needs_force(
    place: Workspace, write_record: Callable[..., RecordFile], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_record(place, EXP, FACTS, person="# mine  \nhypothesis:  'odd' \n")
    (first,) = exported(place)
    facts = file.facts()
    assert facts
    noted = facts.external["wandb"]
    assert (noted["path"], noted["project"]) == (place.shown(first), "small")
    assert first.name.endswith(noted["run_id"])
    assert file.path.read_bytes().startswith(b"# mine  \nhypothesis:  'odd' \n")
    for output in (None, tmp_path / "elsewhere"):
        with pytest.raises(UserError, match=f"{EXP} is exported already; try --force"):
            exported(place, output=output)
    capsys.readouterr()
    (second,) = exported(place, output=tmp_path / "elsewhere", force=True)
    assert second.parent == tmp_path / "elsewhere" / "wandb"
    assert not first.exists()
    assert f"the earlier run {place.shown(first)} is removed" in capsys.readouterr().err
    shutil.rmtree(second)  # once its person has removed it, there is nothing to replace
    assert exported(place)[0].is_dir()


def test_force_removes_nothing_but_an_offline_run(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    precious = place.checkpoints / "offline-run-model"
    precious.mkdir()
    (precious / "model.safetensors").write_text("weights")
    for path in (place.shown(precious), ".", "experiments", "/"):
        write_record(place, EXP, FACTS | {"external": {"wandb": {"path": path}}})
        assert exported(place, force=True)[0].is_dir()
    assert (precious / "model.safetensors").read_text() == "weights"


def test_a_tag_too_long_for_wandb_and_a_name_it_refuses_are_said(
    place: Workspace, write_record: Callable[..., RecordFile], aletheia: Callable[..., Any]
) -> None:
    write_record(place, EXP, FACTS, person=f"tags: [{'t' * 65}, short]\n")
    said = aletheia(place, "exp", "export", EXP, "--to", "wandb")
    assert said.code == 0
    assert "is longer than W&B's 64 characters; left out" in said.err
    assert set(read(place.path(said.out.strip()))["run"].tags) == {"complete", "sft", "short"}
    write_record(place, "EXP-2026-01-01-002", FACTS | {"profile": "a/b"})
    said = aletheia(place, "exp", "export", "EXP-2026-01-01-002", "--to", "wandb")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("error: W&B: ")
