"""Who else is compared: of the lineage, of another record, behind a server."""

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from eval.evaluate import Evaluate
from pipeline.chat import Chat
from pipeline.errors import UserError
from pipeline.records.lifecycle import Record
from pipeline.stage import run_stage

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def record(trained: "Trained", tmp_path_factory: pytest.TempPathFactory, model: Any, chat: Chat) -> Any:
    """The merged model against its base, what DPO began from, and a server that is the merged model itself."""
    from pipeline.config import ServeConfig
    from serving.front.app import Usage, build_app
    from serving.transformers_backend.engine import TransformersEngine
    from tests.serving.in_process import serving

    copied = trained.copy_to(tmp_path_factory.mktemp("contestants") / "root")
    app = build_app(TransformersEngine(model, chat, 2048, 8), "org/twin.1", ServeConfig(), Usage())
    with ExitStack() as stack:
        also = f"[sft, '{stack.enter_context(serving(app))}#org/twin.1']"
        options = (f"eval_config.also={also}", "eval_config.questions=4", "eval_config.max_tokens=16")
        return run_stage(Evaluate, copied.job(*options, parts=("heldout", "winrate")))


def test_what_dpo_began_from_stands_beside_the_base_with_figures_of_its_own(record: Record) -> None:
    results = record.facts.results
    sft = results["others"]["sft"]
    assert sft["eval_loss"]["after"] == results["eval_loss"]["after"]
    assert sft["eval_loss"]["before"] != results["eval_loss"]["before"]
    assert len(record.facts.lineage.inputs) == 2
    figures = {json.loads(line)["figure"] for line in (record.folder / "items.jsonl").read_text().splitlines()}
    assert {"eval_loss", "others.sft.eval_loss", "others.sft.margin"} <= figures


def test_a_server_is_asked_the_questions_and_answers_as_its_model_does(record: Record) -> None:
    rows = [json.loads(line) for line in (record.folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["org-twin-1"] for row in rows] == [row["model"] for row in rows]
    twin = record.facts.results["others"]["org-twin-1"]
    assert twin["win_rate"]["ties"] == 4
    assert "eval_loss" not in twin


def test_the_judged_model_itself_is_left_out_aloud(trained: "Trained", capsys: pytest.CaptureFixture[str]) -> None:
    who = Evaluate.prepare(trained.job(f"eval_config.also=[{trained.merge}]", parts=("heldout",))).contestants
    assert [c.name for c in who] == ["base", "model"]
    assert "is the judged model itself, and is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ("sft, sft", "sft is taken as a name"),
        ("sft, {sft}", "is EXP-.*, named before; try each once"),
        ("EXP-2020-01-01-001", "EXP-2020-01-01-001"),
        ("best", "also"),
    ],
)
def test_who_is_not_there_is_said(trained: "Trained", also: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Evaluate.prepare(trained.job(f"eval_config.also=[{also.format(sft=trained.sft)}]", parts=("heldout",)))


def test_a_lineage_without_the_stage_is_said(copied: "Trained") -> None:
    for gone in (copied.merge, copied.dpo):
        (copied.workspace.experiments / f"{gone}.yaml").unlink()
    with pytest.raises(UserError, match="lineage has no dpo"):
        Evaluate.prepare(copied.job("eval_config.also=[dpo]", parts=("heldout",)))
