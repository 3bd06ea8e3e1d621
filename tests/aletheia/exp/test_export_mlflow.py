"""A record in MLflow: written into a real local store, and read back through MLflow's own client."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aletheia.exp.export import export
from pipeline.config import Telemetry
from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record, StopRequest
from pipeline.train.telemetry import Telemetry as ShownLive
from pipeline.workspace import Workspace

EXP = "EXP-2026-01-01-001"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
START, END = 1767261600000, 1767265200000  # 2026-01-01 10:00 and 11:00 UTC
HISTORY = [
    {"status": "running", "at": "2026-01-01T10:00:00Z", "host": "here"},
    {"status": "complete", "at": "2026-01-01T11:00:00Z"},
]
LOSS = {
    "before": {"value": 6.0, "ci_low": 5.9, "ci_high": 6.1, "n": 25},
    "after": {"value": 5.4, "ci_low": 5.3, "ci_high": 5.5, "n": 25},
    "delta": {"value": -0.6, "ci_low": -0.7, "ci_high": -0.5, "n": 25},
}
FACTS: dict[str, Any] = {
    "history": HISTORY,
    "configuration": {"name": "small", "sft_config": {"learning_rate": 2e-4, "target_modules": ["q", "v"]}, "seed": 42},
    "data": {"train": {"rows": 35, "sha256": "ab" * 32}},
    "results": {"eval_loss": LOSS, "training": {"steps": 3}},
    "resources": {"wall_seconds": 3600.0},
    "code": {"commit": "c" * 40, "dirty": True, "command": "aletheia sft"},
    "overrides": {"seed": 42},
}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and nothing in them: making them takes seconds."""
    from pipeline.train.trackers import mlflow_client

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(place: Workspace, empty_store: Path) -> Workspace:
    shutil.copy(empty_store, place.experiments / "mlflow.db")
    return place


@pytest.fixture
def client(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(place.root)  # where a store without a folder of its own keeps artifacts
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{place.experiments}/mlflow.db")


def exported(place: Workspace, client: Any, name: str = EXP, force: bool = False) -> Any:
    """The run, read back."""
    uri, run = export(place, name, "mlflow", None, None, force).split(" ")
    assert uri == f"sqlite:///{place.experiments}/mlflow.db"
    return client.get_run(run)


def test_an_export_takes_the_place_of_the_run_that_the_training_wrote_while_it_ran(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_record(place, EXP, FACTS, log=[{"step": 1, "loss": 2.0}])
    facts = file.facts()
    assert facts
    settings = Telemetry(tensorboard=False, mlflow="sqlite:///experiments/mlflow.db")
    with ShownLive(settings, Record(file, facts, place, StopRequest())) as live:
        live.write({"step": 1, "loss": 2.0})
    (shown,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    run = exported(place, client)
    assert (run.info.run_name, set(run.data.metrics) & set(shown.data.metrics)) == (EXP, {"log/loss"})
    assert "live" not in run.data.tags
    assert [r.info.run_id for r in client.search_runs([run.info.experiment_id])] == [run.info.run_id]
    assert capsys.readouterr().err == f"the live run {shown.info.run_id} of {EXP} is marked deleted\n"
    with pytest.raises(UserError, match="is there already"):
        exported(place, client)


def test_a_new_store_is_made_and_migrated_where_none_is(
    place: Workspace, write_record: Callable[..., RecordFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    write_record(place, EXP, FACTS)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    uri, run = export(place, EXP, "mlflow", "sqlite:///new/runs.db", None, False).split(" ")
    assert uri == f"sqlite:///{tmp_path}/cwd/new/runs.db"  # found again from any folder
    assert MlflowClient(tracking_uri=uri).get_run(run).info.run_name == EXP
    assert [path.name for path in (tmp_path / "cwd").iterdir()] == ["new"]
    assert (tmp_path / "cwd/new/runs-artifacts" / run / "artifacts" / f"{EXP}.yaml").is_file()


def test_figures_come_with_the_ends_of_their_intervals(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    write_record(place, EXP, FACTS)
    metrics = exported(place, client).data.metrics
    assert metrics == {
        "eval_loss": 5.4,
        "eval_loss.ci_low": 5.3,
        "eval_loss.ci_high": 5.5,
        "eval_loss.n": 25.0,
        "eval_loss.before": 6.0,
        "eval_loss.before.ci_low": 5.9,
        "eval_loss.before.ci_high": 6.1,
        "eval_loss.before.n": 25.0,
        "eval_loss.delta": -0.6,
        "eval_loss.delta.ci_low": -0.7,
        "eval_loss.delta.ci_high": -0.5,
        "eval_loss.delta.n": 25.0,
        "training.steps": 3.0,
        "resources.wall_seconds": 3600.0,
    }


def test_numbers_inside_a_figure_are_not_lost(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    results = {"win_rate": {"value": 0.8, "n": 30, "wins": 21, "longest_wins": {"value": 0.9, "n": 30}}}
    write_record(place, EXP, {"results": results})
    metrics = exported(place, client).data.metrics
    assert metrics["win_rate.wins"] == 21
    assert metrics["win_rate.longest_wins.value"] == 0.9


def test_the_resolved_configuration_and_the_data_are_parameters(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    write_record(place, EXP, FACTS)
    assert exported(place, client).data.params == {
        "name": "small",
        "sft_config.learning_rate": "0.0002",
        "sft_config.target_modules": '["q", "v"]',
        "seed": "42",
        "data.train.rows": "35",
        "data.train.sha256": "ab" * 32,
    }


def test_a_long_value_is_named_and_kept_whole_in_the_artifact_never_cut(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long, just = "x" * 6001, "y" * 6000
    write_record(place, EXP, {"configuration": {"long": long, "just": just}}, person=f"hypothesis: {'h' * 8001}\n")
    run = exported(place, client)
    assert run.data.params["just"] == just
    assert run.data.params["long"] == f"6001 characters, more than MLflow keeps: see the artifact {EXP}.yaml"
    assert run.data.tags["hypothesis"].startswith("8001 characters")
    artifact = Path(client.download_artifacts(run.info.run_id, f"{EXP}.yaml")).read_text("utf-8")
    assert long in artifact
    said = capsys.readouterr().err
    assert "long is longer than MLflow's 6000 characters" in said
    assert "hypothesis is longer than MLflow's 8000 characters" in said


def test_curves_are_there_step_by_step(place: Workspace, write_record: Callable[..., RecordFile], client: Any) -> None:
    log = [
        {"step": 1, "loss": 6.0, "epoch": 0.5, "grad_norm_by_layer": {"layers.0": 0.1}},
        {"step": 2, "loss": 5.5, "epoch": 1.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 5.6, "eval_loss_ci_low": 5.5},
    ]
    write_record(place, EXP, FACTS, log=log)
    run = exported(place, client)

    def points(name: str) -> list[tuple[int, float, int]]:
        return [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, name)]

    assert points("log/loss") == [(1, 6.0, END), (2, 5.5, END)]
    assert points("log/eval_loss") == [(2, 5.6, END)]
    assert points("log/eval_loss_ci_low") == [(2, 5.5, END)]
    assert points("log/grad_norm_by_layer.layers.0") == [(1, 0.1, END)]
    assert points("eval_loss") == [(0, 5.4, END)]  # the record's figure is no point of the curve


def test_more_points_than_a_request_takes_all_arrive(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    write_record(place, EXP, log=[{"step": step, "loss": 1 / (step + 1), "grad_norm": 0.5} for step in range(1300)])
    run = exported(place, client).info.run_id
    losses = {m.step: m.value for m in client.get_metric_history(run, "log/loss")}
    assert losses == {step: 1 / (step + 1) for step in range(1300)}
    assert len(client.get_metric_history(run, "log/grad_norm")) == 1300


def test_nan_stays_nan_and_infinity_is_said_instead_of_stored_as_a_number(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = [
        {"step": 1, "loss": 6.0},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": math.inf, "grad_norm": -math.inf},
    ]
    write_record(place, EXP, {"results": {"odd": {"value": math.nan, "n": 3}}}, log=log)
    run = exported(place, client)
    losses = [m.value for m in client.get_metric_history(run.info.run_id, "log/loss")]
    assert losses[0] == 6.0
    assert math.isnan(losses[1])
    assert len(losses) == 2
    assert "log/grad_norm" not in run.data.metrics
    assert "odd.value" not in run.data.metrics
    assert "2 infinite values (log/grad_norm, log/loss) are in the artifact log.jsonl only" in capsys.readouterr().err
    kept = Path(client.download_artifacts(run.info.run_id, "log.jsonl")).read_text()
    assert "Infinity" in kept


def test_a_torn_or_foreign_log_is_exported_as_far_as_it_goes(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = [
        {"step": 1, "loss": 6.0},
        '{"step": 2, "lo',
        {"loss": 5.0},
        {"step": -1, "loss": 1.0},
        {"step": 2.5, "loss": 1.0},
        {"step": 10**400, "loss": 1.0},
        {"step": 3, "loss": "nan", "note": [1]},
        {"step": 4, "loss": 4.0},
        {"step": 4, "loss": 3.0},
    ]
    write_record(place, EXP, log=[line if isinstance(line, str) else json.dumps(line) for line in log])
    run = exported(place, client).info.run_id
    assert {m.step: m.value for m in client.get_metric_history(run, "log/loss")} == {1: 6.0, 4: 3.0}
    said = capsys.readouterr().err
    assert "torn or no JSON object" in said
    assert "6 entries of" in said
    assert "1 values stand twice for one step" in said


def test_the_record_its_log_and_its_pictures_are_artifacts(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    pictures = [f"{EXP}/loss.png", f"{EXP}/gone.png", "../../secret.png", f"{EXP}/log.jsonl"]
    facts = FACTS | {"visualizations": [{"path": path, "purpose": "to see"} for path in pictures]}
    file = write_record(place, EXP, facts, log=[{"step": 1, "loss": 6.0}])
    (file.folder / "loss.png").write_bytes(PNG)
    before = file.path.read_bytes()
    run = exported(place, client).info.run_id
    assert [a.path for a in client.list_artifacts(run)] == [f"{EXP}.yaml", "log.jsonl", "plots"]
    assert [a.path for a in client.list_artifacts(run, "plots")] == ["plots/loss.png"]
    assert Path(client.download_artifacts(run, f"{EXP}.yaml")).read_bytes() == before
    assert Path(client.download_artifacts(run, "plots/loss.png")).read_bytes() == PNG
    said = capsys.readouterr().err
    assert f"names the picture {EXP}/gone.png, which is not there" in said
    assert "names the picture ../../secret.png" in said  # nothing outside experiments/ goes out


def test_the_run_carries_the_records_name_times_and_tags(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    judged = {"criterion": "eval_loss < 5.5", "finding": "supported", "observed": "5.4", "why": "all of it is below"}
    facts = FACTS | {
        "verdict": {"frozen_at": "2026-01-01T10:00:00Z", "finding": "supported", "judged": [judged]},
        "lineage": {
            "parent": "EXP-2026-01-01-009",
            "inputs": [{"id": "EXP-2026-01-01-008", "stage": "data", "path": "x", "sha256": "0" * 64}],
        },
    }
    person = "hypothesis: more data lowers the loss\ndescription: on all rows\ntags: [night, big]\n"
    write_record(place, EXP, facts, person=person)
    run = exported(place, client)
    assert client.get_experiment(run.info.experiment_id).name == "small"
    assert (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time) == (EXP, "FINISHED", START, END)
    assert run.data.tags | {"mlflow.runName": EXP} == {
        "id": EXP,
        "started": "2026-01-01T10:00:00Z here",
        "status": "complete",
        "stage": "sft",
        "profile": "small",
        "commit": "c" * 40,
        "dirty": "true",
        "parents": "EXP-2026-01-01-009, EXP-2026-01-01-008",
        "hypothesis": "more data lowers the loss",
        "tags": "night, big",
        "overrides": '{"seed": 42}',
        "verdict": "supported",
        "criteria": "eval_loss < 5.5: supported (5.4)",
        "mlflow.runName": EXP,
        "mlflow.source.name": "aletheia sft",
        "mlflow.source.git.commit": "c" * 40,
        "mlflow.note.content": "on all rows",
    }


@pytest.mark.parametrize(
    ("status", "shown"), [("complete", "FINISHED"), ("failed", "FAILED"), ("cancelled", "KILLED"), ("dead", "KILLED")]
)
def test_a_records_true_status_is_mapped_to_mlflows(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any, status: str, shown: str
) -> None:
    import socket

    begun = {
        "status": "running",
        "at": "2026-01-01T10:00:00Z",
        "host": socket.gethostname(),
        "pid": 2**22,
        "started": 1.0,
    }
    ended = [] if status == "dead" else [{"status": status, "at": "2026-01-01T11:00:00Z"}]
    facts = {"status": "running" if status == "dead" else status, "history": [begun, *ended]}
    write_record(place, EXP, facts)
    run = exported(place, client)
    assert (run.info.status, run.data.tags["status"]) == (shown, status)
    assert run.info.end_time == (None if status == "dead" else END)  # nobody saw a dead run's end


def test_a_pipelines_stages_are_nested_runs(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    children = ["EXP-2026-01-01-002", "EXP-2026-01-01-003", "EXP-2026-01-01-004"]
    write_record(place, EXP, FACTS | {"stage": "pipeline", "lineage": {"children": [EXP, *children]}})
    for child in children[:2]:
        write_record(place, child, FACTS | {"lineage": {"parent": EXP}})
    top = exported(place, client)
    runs = client.search_runs([top.info.experiment_id])
    assert len(runs) == 3
    nested = {r.info.run_name: r.data.tags.get("mlflow.parentRunId") for r in runs}
    assert nested == {EXP: None, children[0]: top.info.run_id, children[1]: top.info.run_id}
    assert f"there is no record `{children[2]}`" in capsys.readouterr().err
    for child in children[:2]:
        facts = RecordFile(place.experiments / f"{child}.yaml").facts()
        assert facts
        assert client.get_run(facts.external["mlflow"]["run_id"]).info.run_name == child

    # a stage that is exported again stands below its pipeline again
    again = exported(place, client, children[0], force=True)
    assert again.data.tags["mlflow.parentRunId"] == top.info.run_id


def test_an_export_is_not_made_twice_unless_forced_and_then_the_earlier_is_marked_deleted(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any, aletheia: Callable[..., Any]
) -> None:
    write_record(place, EXP, FACTS)
    first = exported(place, client).info.run_id
    said = aletheia(place, "exp", "export", EXP, "--to", "mlflow")
    assert (said.code, said.out) == (2, "")
    assert said.err == f"error: sqlite:///{place.experiments}/mlflow.db: {EXP} is there already; try --force\n"
    said = aletheia(place, "exp", "export", EXP, "--to", "mlflow", "--force")
    second = said.out.split()[-1]
    assert (said.code, said.err) == (0, f"the earlier run {first} of {EXP} is marked deleted\n")
    assert client.get_run(first).info.lifecycle_stage == "deleted"
    assert client.get_run(second).info.lifecycle_stage == "active"


def test_another_checkouts_record_of_the_same_id_is_left_alone(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    write_record(place, EXP, FACTS)
    theirs = exported(place, client).info.run_id
    write_record(place, EXP, FACTS | {"history": [HISTORY[0] | {"host": "elsewhere"}, HISTORY[1]]})
    exported(place, client, force=True)
    assert client.get_run(theirs).info.lifecycle_stage == "active"


def test_the_record_says_where_it_went_and_its_person_half_stays_byte_for_byte(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    person = "\ufeff# mine \r\nhypothesis:   'more | data' # odd\r\ntags:   [a,  b]\r\n\r\n"
    file = write_record(place, EXP, FACTS, person=person)
    run = exported(place, client).info.run_id
    assert file.path.read_bytes().startswith(person.encode())
    facts = file.facts()
    assert facts
    noted = facts.external["mlflow"]
    assert (noted["uri"], noted["run_id"]) == (f"sqlite:///{place.experiments}/mlflow.db", run)
    assert noted["at"].endswith("Z")
    assert facts.results == FACTS["results"]  # and nothing else changed


def test_no_password_reaches_the_screen_or_the_record(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    aletheia: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    file = write_record(place, EXP, FACTS)
    uri = "http://me:hunter2hunter2@127.0.0.1:9"
    said = aletheia(place, "exp", "export", EXP, "--to", "mlflow", "--uri", uri)  # a port where nothing listens
    assert said.code == 2
    assert said.err.startswith("error: http://[redacted]@127.0.0.1:9: ")
    assert said.err.count("\n") == 1
    monkeypatch.setattr(
        "aletheia.exp.exporters.mlflow_run.mlflow_client", lambda uri: client
    )  # as if a server had answered
    said_by_server = aletheia(place, "exp", "export", EXP, "--to", "mlflow", "--uri", uri)
    assert said_by_server.out.startswith("http://[redacted]@127.0.0.1:9 ")
    facts = file.facts()
    assert facts
    assert facts.external["mlflow"]["uri"] == "http://[redacted]@127.0.0.1:9"
    for text in (said.err, said_by_server.out, said_by_server.err, file.path.read_text("utf-8")):
        assert "hunter2" not in text


def test_an_export_that_breaks_off_leaves_no_run_and_no_claim(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any
) -> None:
    file = write_record(place, EXP, FACTS)
    (place.experiments / "mlflow-artifacts").write_text("in the way")
    with pytest.raises(UserError, match=r"mlflow\.db: "):
        exported(place, client)
    assert client.search_runs([client.get_experiment_by_name("small").experiment_id]) == []
    facts = file.facts()
    assert facts
    assert facts.external == {}
    (place.experiments / "mlflow-artifacts").unlink()
    assert exported(place, client).info.status == "FINISHED"


def test_a_deleted_experiment_and_a_file_that_is_no_database_are_one_line(
    place: Workspace, write_record: Callable[..., RecordFile], client: Any, aletheia: Callable[..., Any], tmp_path: Path
) -> None:
    write_record(place, EXP, FACTS)
    client.delete_experiment(client.create_experiment("small"))
    said = aletheia(place, "exp", "export", EXP, "--to", "mlflow")
    assert said.code == 2
    assert "MLflow's experiment `small` is deleted; try mlflow experiments restore" in said.err
    (tmp_path / "notes.db").write_text("this is no database, and stays what it is " * 100)
    said = aletheia(place, "exp", "export", EXP, "--to", "mlflow", "--uri", f"sqlite:///{tmp_path}/notes.db")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "file is not a database" in said.err


def test_names_that_mlflow_does_not_take_are_changed_aloud_and_stay_apart(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = {"pass@1": 0.5, "pass#1": 0.25, "../up": 1.0, "a//b": 2.0, "é": 3.0, "n" * 300: 4.0}
    write_record(place, EXP, {"results": results, "configuration": {"k=v": 1, "": 2}})
    run = exported(place, client)
    assert run.data.metrics == {"pass_1": 0.5, "pass_1_2": 0.25, "_.._up": 1.0, "_a__b": 2.0, "é": 3.0, "n" * 250: 4.0}
    assert set(run.data.params.values()) == {"1", "2"}
    assert "MLflow does not take these names: pass@1 → pass_1, pass#1 → pass_1_2" in capsys.readouterr().err


def test_a_half_written_upper_half_does_not_hold_the_facts_back(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_record(place, EXP, FACTS)
    text = file.path.read_text("utf-8")
    file.path.write_text(text.replace("# mine", "hypothesis: [unclosed"), "utf-8")
    edited = file.path.read_bytes()
    run = exported(place, client)
    assert run.data.metrics["eval_loss"] == 5.4
    assert f"{EXP}.yaml:" in capsys.readouterr().err
    assert file.path.read_bytes() == edited
