"""Every kind of tampering is planted once, in a chain of records that is otherwise true: base → sft → dpo → merge."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from aletheia.exp.verify import Check, failures, verify
from aletheia.exp.verify import checked as checks_of
from pipeline.chat import Contract
from pipeline.config import Profile
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, describe
from pipeline.data.split import split
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.records.file import LINE, RecordFile
from pipeline.records.find import artifacts, checked_output
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

SFT, DPO, MERGE, PIPELINE = (f"EXP-2026-01-01-{number:03d}" for number in (1, 2, 3, 4))
FOLDER = {SFT: "adapter", DPO: "adapter", MERGE: "model"}
Write = Callable[..., RecordFile]


@pytest.fixture
def chain(place: Workspace, write_record: Write) -> Workspace:
    """A workspace whose records are true. The weights are any bytes: only their hashes count here."""
    (place.root / "data" / "eval").mkdir(parents=True)
    base = place.root / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"base")
    turns = [[{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": f"So {i}."}] for i in range(6)]
    other = {"role": "assistant", "content": "No."}
    _write_rows(place, "sft", [{"id": f"s{i}", "messages": turn} for i, turn in enumerate(turns)])
    _write_rows(
        place,
        "dpo",
        [
            {"id": f"p{i}", "prompt": [ask], "chosen": [yes], "rejected": [other]}
            for i, (ask, yes) in enumerate(turns[:4])
        ],
    )
    taken: list[Any] = []
    for experiment_id, stage in ((SFT, "sft"), (DPO, "dpo"), (MERGE, "merge")):
        folder = place.checkpoints / experiment_id / FOLDER[experiment_id]
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(f"weights of {stage}".encode())
        (folder / "config.json").write_text("{}")
        Contract("c" * 64, "<|EOT|>", 3, 0).save(folder)
        _write_true(place, write_record, experiment_id, stage, taken)
        file = RecordFile(place.experiments / f"{experiment_id}.yaml")
        facts = file.facts()
        assert facts is not None
        taken = [checked_output(place, file, facts, FOLDER[experiment_id])[1].model_dump()]
    stages = {"stage": "pipeline", "lineage": {"children": [SFT, DPO, MERGE]}}
    write_record(place, PIPELINE, facts=stages)
    os.symlink(f"{MERGE}/model", place.checkpoints / "small-merged")
    return place


def _write_rows(place: Workspace, kind: str, rows: list[dict[str, Any]]) -> None:
    (place.root / "data" / kind).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place.root / "data" / kind / "rows.jsonl").write_text(text)


def _write_true(place: Workspace, write: Write, experiment_id: str, stage: str, inputs: list[Any], **more: Any) -> None:
    """A record of what now lies in its folder, with a patch."""
    config = Profile(name="small", base_model="base")
    folder = place.experiments / experiment_id
    folder.mkdir(exist_ok=True)
    (folder / "code.patch").write_text("a patch\n")
    patch = {"path": f"{experiment_id}/code.patch", "sha256": hashlib.sha256(b"a patch\n").hexdigest()}
    rows: dict[str, Any] = {}
    if stage in ("sft", "dpo"):
        kind: Any = Conversation if stage == "sft" else PreferencePair
        halves = split(read_rows(place, f"data/{stage}", kind), config.training_data.validation)
        rows = {name: describe(half) for name, half in zip(("train", "held_out"), halves, strict=True)}
    base = Base("base", None, place.root / "base", "cpu", None, "none", False).identity()
    facts = {
        "stage": stage,
        "lineage": {"base": base, "inputs": inputs},
        "configuration": config.model_dump(mode="json"),
        "data": rows | {"contract": "c" * 64},
        "artifacts": [
            a.model_dump() for a in artifacts(place, place.checkpoints / experiment_id / FOLDER[experiment_id])
        ],
        "code": {"commit": "0" * 40, "dirty": True, "patch": patch},
    }
    write(place, experiment_id, facts=facts | more)


def checked(place: Workspace, experiment_id: str = MERGE) -> list[Check]:
    return checks_of(place, experiment_id)


def failed(place: Workspace, experiment_id: str = MERGE) -> dict[tuple[str, str], str]:
    return {(check.record, check.what): check.why for check in failures(checked(place, experiment_id))}


def rewrite(place: Workspace, experiment_id: str, change: Callable[[Facts], Any]) -> None:
    """The record as a hostile program would write it: sealed, and with a copy beside it."""
    file = RecordFile(place.experiments / f"{experiment_id}.yaml")
    facts = file.facts()
    assert facts is not None
    change(facts)
    file.write(facts)


def weights(place: Workspace, experiment_id: str) -> Path:
    return place.checkpoints / experiment_id / FOLDER[experiment_id] / "model.safetensors"


def test_a_true_chain_passes_every_check_down_to_the_base(chain: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(chain, MERGE, as_json=False)
    out = capsys.readouterr().out
    shown = [line.split()[0] for line in out.splitlines() if line.startswith("EXP-")]
    assert shown == [MERGE, DPO, SFT, MERGE]
    assert out.splitlines()[-1] == f"{MERGE} is what its records say: 30 of 30 checks"
    found = {(check.record, check.what) for check in checked(chain)}
    for experiment_id in (SFT, DPO, MERGE):
        of_each = ["record", "chat contract", "base base", f"experiments/{experiment_id}/code.patch"]
        of_each += [chain.shown(path) for path in (weights(chain, experiment_id), weights(chain, experiment_id).parent)]
        assert {(experiment_id, what) for what in of_each} <= found
    assert {
        (MERGE, f"input {DPO}"),
        (DPO, f"input {SFT}"),
        (DPO, "rows dpo.train"),
        (SFT, "rows sft.held_out"),
    } <= found


def test_a_pipeline_is_checked_with_all_its_stages(chain: Workspace) -> None:
    assert {check.record for check in checked(chain, PIPELINE)} == {PIPELINE, SFT, DPO, MERGE}
    weights(chain, DPO).write_bytes(b"another")
    assert list(failed(chain, PIPELINE)) == [(DPO, chain.shown(weights(chain, DPO)))]


def test_verifying_writes_nothing(chain: Workspace) -> None:
    path = chain.experiments / f"{DPO}.yaml"
    path.write_bytes(path.read_bytes().replace(b"status: complete", b"status: failed"))
    before = {p: p.read_bytes() for p in chain.root.rglob("*") if p.is_file()}
    verify(chain, MERGE, as_json=True)
    assert {p: p.read_bytes() for p in chain.root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("experiment_id", [SFT, DPO, MERGE])
def test_one_changed_byte_in_an_adapter_or_a_merged_shard_fails(chain: Workspace, experiment_id: str) -> None:
    path = weights(chain, experiment_id)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert list(failed(chain)) == [(experiment_id, chain.shown(path))]
    assert "was changed since" in failed(chain)[experiment_id, chain.shown(path)]


def test_a_deleted_artifact_fails(chain: Workspace) -> None:
    weights(chain, SFT).unlink()
    assert failed(chain) == {(SFT, chain.shown(weights(chain, SFT))): "is gone"}


@pytest.mark.parametrize("name", ["extra.pkl", ".hidden", "below/extra.bin"])
def test_a_file_that_no_record_names_fails(chain: Workspace, name: str) -> None:
    path = weights(chain, MERGE).parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"anything")
    assert list(failed(chain)) == [(MERGE, chain.shown(path))]


def test_a_link_in_place_of_a_file_fails_though_its_target_has_the_right_bytes(chain: Workspace) -> None:
    path = weights(chain, MERGE)
    path.rename(chain.root / "elsewhere")
    path.symlink_to(chain.root / "elsewhere")
    assert failed(chain) == {(MERGE, chain.shown(path)): "is a symbolic link, and not followed"}


def test_a_link_in_place_of_the_output_folder_fails(chain: Workspace) -> None:
    folder = weights(chain, MERGE).parent
    folder.rename(chain.root / "elsewhere")
    folder.symlink_to(chain.root / "elsewhere")
    assert set(failed(chain)) >= {(MERGE, chain.shown(folder / "model.safetensors"))}


def test_a_pipe_in_place_of_a_file_fails_and_is_not_waited_for(chain: Workspace) -> None:
    path = weights(chain, MERGE)
    path.unlink()
    os.mkfifo(path)
    assert failed(chain) == {(MERGE, chain.shown(path)): "is no plain file"}


def test_an_edit_below_the_line_fails(chain: Workspace) -> None:
    path = chain.experiments / f"{DPO}.yaml"
    path.write_bytes(path.read_bytes().replace(b"status: complete", b"status: failed"))
    assert failed(chain) == {(DPO, "record"): "was edited below the line"}


def test_an_edit_below_the_line_fails_where_no_copy_is_at_hand(chain: Workspace) -> None:
    path = chain.experiments / f"{DPO}.yaml"
    (chain.experiments / DPO / "below.yaml").unlink()
    path.write_bytes(path.read_bytes().replace(b"bytes: 2\n", b"bytes: 3\n"))
    assert list(failed(chain)) == [(DPO, "record")]


def test_an_edit_of_the_record_and_of_its_copy_alike_fails(chain: Workspace) -> None:
    for path in (chain.experiments / f"{DPO}.yaml", chain.experiments / DPO / "below.yaml"):
        path.write_bytes(path.read_bytes().replace(b"bytes: 2\n", b"bytes: 3\n"))
    assert list(failed(chain)) == [(DPO, "record")]


def test_an_edit_above_the_line_is_no_concern(chain: Workspace) -> None:
    path = chain.experiments / f"{DPO}.yaml"
    path.write_bytes(b"hypothesis: [in mid-edit\n" + path.read_bytes())
    assert not failed(chain)


@pytest.mark.parametrize("above", [b"", b"seal: mine\n"])
@pytest.mark.parametrize("instead", [b"", b"seal: none\n"])
def test_a_record_whose_seal_was_taken_out_fails(
    chain: Workspace, capsys: pytest.CaptureFixture[str], above: bytes, instead: bytes
) -> None:
    (chain.experiments / DPO / "below.yaml").unlink()  # as in a clone without it
    path = chain.experiments / f"{DPO}.yaml"
    forged = re.sub(rb"(?m)^seal:.*\n", instead, path.read_bytes().replace(b"bytes: 2\n", b"bytes: 3\n"))
    path.write_bytes(above + forged)
    assert list(failed(chain)) == [(DPO, "record")]
    assert failed(chain)[DPO, "record"].startswith("carries no seal")
    assert not verify(chain, DPO, as_json=False)
    assert "is NOT what its records say" in capsys.readouterr().out


def test_where_nothing_could_be_judged_nothing_is_called_true(
    chain: Workspace, write_record: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_record(chain, "EXP-2026-01-01-009", facts={"status": "failed", "stage": "eval"})
    file.path.write_bytes(b"tags: [\n" + file.path.read_bytes())
    file.write(Facts(status="cancelled", stage="eval", profile="small"))  # waits beside the file in mid-edit
    assert not verify(chain, file.id, as_json=False)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{file.id} cannot be judged: no check could be made; 1 warning, 1 not checked"


def test_a_parent_trained_anew_in_place_of_the_one_taken_fails(chain: Workspace, write_record: Write) -> None:
    weights(chain, SFT).write_bytes(b"of another training")
    shutil.rmtree(chain.experiments / SFT)
    _write_true(chain, write_record, SFT, "sft", [])
    assert list(failed(chain, SFT)) == []
    assert list(failed(chain)) == [(DPO, f"input {SFT}")]
    assert "what it made is not what was taken" in failed(chain)[DPO, f"input {SFT}"]


def test_a_parent_that_is_gone_fails(chain: Workspace) -> None:
    (chain.experiments / f"{SFT}.yaml").unlink()
    assert list(failed(chain)) == [(SFT, "record")]


def test_a_parent_that_did_not_finish_fails(chain: Workspace) -> None:
    rewrite(chain, SFT, lambda facts: setattr(facts, "status", "cancelled"))
    assert failed(chain) == {(DPO, f"input {SFT}"): "is cancelled, not complete"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_base_fails(chain: Workspace, name: str) -> None:
    (chain.root / "base" / name).write_bytes(b"changed")
    assert list(failed(chain)) == [(i, "base base") for i in (MERGE, DPO, SFT)]


def test_a_base_other_than_the_parents_fails(chain: Workspace) -> None:
    rewrite(chain, SFT, lambda facts: facts.lineage.base.update(name="acme/gone", revision="0" * 40, sha256="f" * 64))
    assert failed(chain) == {(DPO, f"input {SFT}"): "stands on another base"}


def test_a_base_of_the_hub_that_is_not_in_the_cache_is_not_fetched_and_not_called_true(
    chain: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *host, **_: asked.append(host) or [])
    for experiment_id in (SFT, DPO, MERGE):
        rewrite(chain, experiment_id, lambda facts: facts.lineage.base.update(name="acme/gone", revision="0" * 40))
    assert verify(chain, MERGE, as_json=False)
    assert capsys.readouterr().out.splitlines()[-1].endswith("27 of 27 checks; 3 not checked")
    assert not asked


def test_rows_that_changed_since_are_a_warning_and_no_failure(
    chain: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    with (chain.root / "data" / "sft" / "rows.jsonl").open("a") as out:
        turns = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "More."}]
        out.write(json.dumps({"id": "new", "messages": turns}) + "\n")
    shutil.rmtree(chain.root / "data" / "dpo")
    assert verify(chain, MERGE, as_json=False)
    out = capsys.readouterr().out
    assert "are others now: 6 rows, then 5" in out
    assert "those of then are not there: data/dpo" in out
    assert out.splitlines()[-1].endswith("26 of 26 checks; 4 warnings")


def test_the_rows_are_judged_by_content_and_not_by_order(chain: Workspace) -> None:
    path = chain.root / "data" / "sft" / "rows.jsonl"
    path.write_text("".join(sorted(path.read_text().splitlines(True), reverse=True)))
    assert "warning" not in {check.finding for check in checked(chain)}


def test_a_changed_or_deleted_patch_fails(chain: Workspace) -> None:
    (chain.experiments / DPO / "code.patch").write_text("another\n")
    (chain.experiments / SFT / "code.patch").unlink()
    assert list(failed(chain)) == [(i, f"experiments/{i}/code.patch") for i in (DPO, SFT)]


def test_the_patch_of_a_run_before_its_resume_is_checked_too(chain: Workspace) -> None:
    earlier = {"commit": "1" * 40, "patch": {"path": f"{DPO}/code-1.patch", "sha256": "1" * 64}}
    rewrite(chain, DPO, lambda facts: facts.code.update(before_resume=earlier))
    assert failed(chain) == {(DPO, f"experiments/{DPO}/code-1.patch"): "is gone"}


def test_another_chat_contract_than_the_recorded_one_fails(chain: Workspace) -> None:
    for experiment_id in (SFT, DPO, MERGE):
        rewrite(chain, experiment_id, lambda facts: facts.data.update(contract="d" * 64))
    assert list(failed(chain)) == [(i, "chat contract") for i in (MERGE, DPO, SFT)]


def test_another_chat_contract_than_the_parents_fails(chain: Workspace) -> None:
    rewrite(chain, SFT, lambda facts: facts.data.update(contract="d" * 64))
    assert failed(chain)[DPO, f"input {SFT}"] == "has another chat contract"


def test_a_complete_model_that_names_no_files_fails(chain: Workspace) -> None:
    rewrite(chain, MERGE, lambda facts: setattr(facts, "artifacts", []))
    assert failed(chain) == {(MERGE, "output"): "a complete record, and it names no artifacts"}


OUTSIDE = [
    "/etc/passwd",
    "../../etc/passwd",
    f"checkpoints/{MERGE}/../../secret",
    f"checkpoints/{SFT}/adapter/config.json",
]


@pytest.mark.parametrize("hostile", [*OUTSIDE, "", "a\0b"])
def test_a_path_that_leads_elsewhere_fails_and_is_not_read(
    chain: Workspace, hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chain.root / "secret").write_text("a secret")
    rewrite(chain, MERGE, lambda facts: setattr(facts.artifacts[0], "path", hostile))
    opened: list[Path] = []
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or plain_open(self, *a, **k))
    assert (MERGE, hostile) in failed(chain)
    assert not [path for path in opened if path.name in ("passwd", "secret")]


def test_a_patch_path_that_leads_elsewhere_fails_and_is_not_read(chain: Workspace) -> None:
    digest = hashlib.sha256(b"a secret").hexdigest()
    (chain.root / "secret").write_bytes(b"a secret")
    rewrite(chain, MERGE, lambda facts: facts.code.update(patch={"path": "../secret", "sha256": digest}))
    assert "not read" in failed(chain)[MERGE, "experiments/../secret"]


def test_a_lineage_that_goes_in_a_circle_fails_and_ends(chain: Workspace) -> None:
    rewrite(chain, SFT, lambda facts: facts.lineage.inputs.append(_input(chain, MERGE)))
    assert "goes in a circle" in failed(chain)[MERGE, "lineage"]
    rewrite(chain, SFT, lambda facts: facts.lineage.inputs.append(_input(chain, SFT)))
    assert "goes in a circle" in failed(chain, SFT)[SFT, "lineage"]


def _input(place: Workspace, experiment_id: str) -> Any:
    file = RecordFile(place.experiments / f"{experiment_id}.yaml")
    facts = file.facts()
    assert facts is not None
    return checked_output(place, file, facts, FOLDER[experiment_id])[1]


@pytest.mark.parametrize(
    "hostile", ["../../etc/passwd", "../x/EXP-2026-01-01-001", "EXP-2026-01-01-001/../../x", "", "EXP-2026-01-01-009"]
)
def test_a_parent_whose_id_is_none_fails_and_is_not_looked_for(chain: Workspace, hostile: str) -> None:
    rewrite(chain, DPO, lambda facts: setattr(facts.lineage.inputs[0], "id", hostile))
    assert (hostile, "record") in failed(chain)


@pytest.mark.parametrize("below", [b"status: complete\n", b"- 1\n", b"{", b"\xff\xfe"])
def test_a_broken_lower_half_is_named_and_the_rest_is_checked(chain: Workspace, below: bytes) -> None:
    shutil.rmtree(chain.experiments / SFT)
    (chain.experiments / f"{SFT}.yaml").write_bytes(b"# mine\n" + LINE.encode() + b"\n" + below)
    found = failed(chain)
    assert list(found) == [(SFT, "record")]
    assert "input" in {check.what.split()[0] for check in checked(chain) if check.record == DPO}


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": 3, "held_out": {"sha256": []}, "contract": ["x"]}},
        {"configuration": {"training_data": "nowhere"}},
        {"configuration": {}},
        {"code": {"patch": "x", "before_resume": 4}},
        {"code": {"patch": {"path": None, "sha256": {}}}},
        {"lineage": {"base": {"name": 3, "sha256": 4}}},
        {"lineage": {"base": {"name": "../..", "revision": [], "sha256": "x"}}},
        {"lineage": {"base": {"name": "no such\nname", "sha256": "x"}}},
        {"lineage": {"base": {}}},
    ],
)
def test_blocks_of_another_shape_end_in_findings(
    chain: Workspace, write_record: Write, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(chain, "EXP-2026-01-01-009", facts={"stage": "sft", **change})
    verify(chain, "EXP-2026-01-01-009", as_json=False)
    assert "EXP-2026-01-01-009 is" in capsys.readouterr().out


def test_a_run_that_did_not_finish_has_no_output_to_judge(chain: Workspace, write_record: Write) -> None:
    write_record(chain, "EXP-2026-01-01-009", facts={"status": "failed"})
    found = {check.what: check.finding for check in checked(chain, "EXP-2026-01-01-009")}
    assert found["output"] == "not checked"


def test_a_plan_has_nothing_to_check(chain: Workspace, write_record: Write) -> None:
    write_record(chain, "EXP-2026-01-01-009", facts=None)
    with pytest.raises(UserError, match="is a plan"):
        verify(chain, "EXP-2026-01-01-009", as_json=False)


def test_hashing_much_shows_how_far_it_is(
    chain: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("chain", "verify"):  # the base, the artifacts
        monkeypatch.setattr(f"aletheia.exp.{module}.LARGE", 1)
    assert not failed(chain)
    said = capsys.readouterr().err
    assert "hashing  0/0 megabytes" in said
    assert "hashing the base base  0.0 GB" in said


def test_the_command_says_what_failed_first_and_ends_with_1(chain: Workspace, aletheia: Callable[..., Any]) -> None:
    assert aletheia(chain, "exp", "verify", MERGE).code == 0
    weights(chain, DPO).unlink()
    said = aletheia(chain, "exp", "verify", MERGE)
    assert said.code == 1
    first = f"first: {DPO} {chain.shown(weights(chain, DPO))}: is gone"
    assert said.out.splitlines()[-1] == f"{MERGE} is NOT what its records say: 1 of 30 checks failed, the {first}"


def test_json_is_the_data_alone(chain: Workspace, aletheia: Callable[..., Any]) -> None:
    said = json.loads(aletheia(chain, "exp", "verify", MERGE, "--json").out)
    assert said["true"] is True
    assert said["counts"] == {"ok": 30}
    assert said["checks"] == [asdict(check) for check in checked(chain)]
