"""Eval as a stage: what it compares, on which rows, and how sure it is."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval.evaluate import Evaluate
from pipeline.chat import Chat
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, Question, Row
from pipeline.data.split import split
from pipeline.errors import StageFailed, UserError
from pipeline.records.file import RecordFile
from pipeline.records.find import artifacts
from pipeline.records.lifecycle import Record
from pipeline.stage import Job, run_stage

if TYPE_CHECKING:
    from tests.conftest import Trained

LIMIT, QUESTIONS = 3, 4
T_4 = 2.776445  # Student's t, 97.5 %, 4 degrees of freedom


@pytest.fixture(scope="module")
def own(trained: "Trained", tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """A finished pipeline with few open questions."""
    copied = trained.copy_to(tmp_path_factory.mktemp("eval") / "root")
    folder = copied.workspace.path("data/eval/questions")
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    for path in folder.glob("*.jsonl"):
        path.unlink()
    (folder / "few.jsonl").write_text("\n".join(lines[:QUESTIONS]), "utf-8")
    return copied


@pytest.fixture(scope="module")
def record(own: "Trained") -> Record:
    """One whole evaluation."""
    return run_stage(Evaluate, own.job(f"eval_config.limit={LIMIT}"))


@pytest.fixture(scope="module")
def models(trained: "Trained") -> tuple[Any, Any]:
    """The base and the merged model, as plain transformers reads them."""
    from transformers import AutoModelForCausalLM

    from pipeline.model import find_base

    folders = (find_base(trained.workspace, trained.job().profile).folder, trained.output("merge"))
    base, tuned = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
    return base, tuned


@pytest.fixture(scope="module")
def chat(trained: "Trained") -> Chat:
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(trained.output("merge")), "merged")


def rows_of(job: Job) -> dict[str, Sequence[Any]]:
    (part,) = Evaluate.prepare(job).parts
    return part.rows()


def held_out(own: "Trained", path: str, kind: type[Row]) -> list[Any]:
    rows = read_rows(own.workspace, path, kind)
    return split(rows, own.job().config.training_data.validation)[1]


def interval(values: Sequence[float], t: float = T_4) -> list[float]:
    """Mean and Student's t interval, from the textbook."""
    mean = sum(values) / len(values)
    half = t * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return [mean, mean - half, mean + half]


def ends(figure: dict[str, Any]) -> list[float]:
    return [figure["value"], figure["ci_low"], figure["ci_high"]]


def test_the_record_is_complete_and_says_what_was_compared(own: "Trained", record: Record) -> None:
    facts = record.facts
    assert (facts.status, facts.stage) == ("complete", "eval")
    assert (facts.results["model"], facts.results["against"]) == ("small-merged", "tiny")
    assert [taken.id for taken in facts.lineage.inputs] == [own.merge]
    assert facts.lineage.base is not None and len(facts.lineage.base["sha256"]) == 64
    assert facts.data["conversations"]["rows"] == facts.data["pairs"]["rows"] == 5
    assert facts.data["questions"]["rows"] == QUESTIONS


def test_loss_is_paired_row_by_row_on_what_training_held_out(
    own: "Trained", record: Record, models: Any, chat: Chat, answer_losses: Callable[..., list[float]]
) -> None:
    rows = []
    for row in held_out(own, "data/sft", Conversation):
        losses = [answer_losses(model, chat.conversation(row.messages)) for model in models]
        rows.append([sum(loss) / len(loss) for loss in losses])
    before, after = zip(*rows, strict=True)
    measured = record.facts.results["eval_loss"]
    assert ends(measured["before"]) == pytest.approx(interval(before), abs=1e-3)
    assert ends(measured["after"]) == pytest.approx(interval(after), abs=1e-3)
    assert ends(measured["delta"]) == pytest.approx(
        interval([a - b for b, a in zip(before, after, strict=True)]), abs=1e-3
    )
    apart = [b - a for a, b in (ends(measured[end])[1:] for end in ("before", "after"))]
    assert ends(measured["delta"])[2] - ends(measured["delta"])[1] < min(apart)  # what pairing is for
    assert measured["delta"]["n"] == 5
    assert record.facts.results["perplexity"]["after"]["value"] == pytest.approx(
        math.exp(measured["after"]["value"]), abs=0.01
    )


def test_preference_is_the_change_against_the_base_pair_by_pair(
    own: "Trained", record: Record, models: Any, chat: Chat, answer_losses: Callable[..., list[float]]
) -> None:
    changes = []
    for pair in held_out(own, "data/dpo", PreferencePair):
        margins = []
        for model in models:
            chosen, rejected = (-sum(answer_losses(model, side)) for side in chat.pair(pair))
            margins.append(chosen - rejected)
        changes.append(margins[1] - margins[0])
    results = record.facts.results
    assert ends(results["margin"]["delta"]) == pytest.approx(interval(changes), abs=1e-2)
    accuracy = results["preference_accuracy"]
    assert accuracy["value"] == sum(change > 0 for change in changes) / 5
    assert 0 <= accuracy["ci_low"] <= accuracy["value"] <= accuracy["ci_high"] <= 1  # all five may have risen, or none
    assert accuracy["ci_low"] < accuracy["ci_high"]
    assert (accuracy["n"], accuracy["chance"]) == (5, 0.5)


def test_every_figure_has_its_interval_and_its_n(record: Record) -> None:
    def figures(value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, dict):
            return []
        own = [value] if "value" in value else []
        return own + [figure for inner in value.values() for figure in figures(inner)]

    found = figures(record.facts.results)
    assert len(found) >= 15
    for figure in found:
        assert 1 <= figure["n"] <= 5
        if "ci_low" in figure:  # all rows the same give none
            assert figure["ci_low"] <= figure["value"] <= figure["ci_high"]


def test_benchmarks_are_paired_too(record: Record) -> None:
    task = record.facts.results["benchmarks"]["aletheia_choices"]
    assert (task["metric"], task["version"]) == ("acc", "2.0")
    assert task["before"]["n"] == task["after"]["n"] == task["delta"]["n"] == LIMIT
    assert 0 <= task["mcnemar_p"] <= 1


def test_answers_are_kept_question_by_question(own: "Trained", record: Record) -> None:
    rows = [json.loads(line) for line in (record.folder / "answers.jsonl").read_text("utf-8").splitlines()]
    questions = read_rows(own.workspace, "data/eval/questions", Question)
    assert [(row["id"], row["prompt"]) for row in rows] == [(q.id, q.prompt) for q in questions]
    rate = record.facts.results["win_rate"]
    assert rate["value"] == pytest.approx(sum(row["score"] for row in rows) / QUESTIONS)
    assert rate["wins"] + rate["ties"] + rate["losses"] == QUESTIONS
    assert rate["weakness"]


def test_parts_can_be_asked_for_alone(own: "Trained") -> None:
    (part,) = Evaluate.prepare(own.job(parts=("winrate",))).parts
    assert {name: len(rows) for name, rows in part.rows().items()} == {"questions": QUESTIONS}
    plan = dict(Evaluate.prepare(own.job(parts=("heldout",))).plan())
    assert plan["held out"] == "5 conversations, 5 pairs"
    assert "benchmarks" not in plan


# ── parity, and an endpoint ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_record_says_that_the_prompts_are_those_of_training(record: Record) -> None:
    parity = record.facts.results["parity"]
    assert parity["prompts"] >= 10
    assert parity["in_process"] == {
        "backend": "transformers, plain", "verdict": "equal where compared",
        "token_ids": "equal", "bos": "equal", "stop": "equal", "log_probs": "not compared",
    }  # fmt: skip


@pytest.fixture
def endpoint(own: "Trained", models: Any, chat: Chat) -> Iterator[Callable[[Any], str]]:
    """`endpoint(model)`: the address of a server of that model."""
    from pipeline.config import ServeConfig
    from serving.front.app import Usage, build_app
    from serving.transformers_backend.engine import TransformersEngine
    from tests.serving.in_process import serving

    with ExitStack() as stack:

        def start(model: Any) -> str:
            app = build_app(TransformersEngine(model, chat, 2048, 8), "small-merged", ServeConfig(), Usage())
            return stack.enter_context(serving(app))

        yield start


def test_answers_come_over_the_endpoint_after_its_parity(
    own: "Trained", record: Record, models: Any, endpoint: Callable[[Any], str]
) -> None:
    job = own.job(f"eval_config.endpoint={endpoint(models[1])}", parts=("winrate",))
    served = run_stage(Evaluate, job)
    assert served.facts.results["parity"]["endpoint"]["verdict"] == "equal"
    there, here = ((r.folder / "answers.jsonl").read_text("utf-8").splitlines() for r in (served, record))
    assert [json.loads(row)["model"] for row in there] == [json.loads(row)["model"] for row in here]
    assert served.facts.results["win_rate"]["value"] == record.facts.results["win_rate"]["value"]


def test_an_endpoint_of_another_model_is_not_judged(
    own: "Trained", models: Any, endpoint: Callable[[Any], str]
) -> None:
    address = endpoint(models[0])
    what = f"{address.removesuffix('/v1')} is not small-merged: log-probs differ"
    with pytest.raises(StageFailed, match=what):
        run_stage(Evaluate, own.job(f"eval_config.endpoint={address}", parts=("winrate",)))
    newest = max(own.workspace.experiments.glob("EXP-*.yaml"))
    facts = RecordFile(newest).facts()
    assert facts is not None and facts.status == "failed"
    assert facts.results["parity"]["endpoint"]["verdict"] == "DIFFERS"
    assert "win_rate" not in facts.results


# ── another lineage ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_sft_alone_is_evaluated_on_its_own_rows_and_on_no_pairs(copied: "Trained") -> None:
    for gone in (copied.merge, copied.dpo):
        (copied.workspace.experiments / f"{gone}.yaml").unlink()
    results = run_stage(Evaluate, copied.job(parts=("heldout",))).facts.results
    assert results["model"] == "small-sft"
    assert results["eval_loss"]["delta"]["n"] == 5
    assert not {"preference_accuracy", "margin"} & set(results)
    sft = copied.record("sft").facts()
    assert sft is not None
    assert ends(results["eval_loss"]["after"]) == pytest.approx(ends(sft.results["eval_loss"]["after"]), abs=1e-3)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def file_of(copied: "Trained", kind: str, row: Any) -> Path:
    """The file that the row stands in."""
    path: Path = copied.workspace.root / row.where.rpartition(":")[0]
    assert path.parent.name == kind
    return path


@pytest.mark.parametrize("how", ["edited", "removed"])
@pytest.mark.parametrize(("kind", "shape"), [("sft", Conversation), ("dpo", PreferencePair)])
def test_held_out_rows_that_changed_since_are_taken_from_the_snapshot_of_the_training(
    copied: "Trained", kind: str, shape: type[Row], how: str
) -> None:
    before = held_out(copied, f"data/{kind}", shape)
    part = "conversations" if kind == "sft" else "pairs"
    _change(copied, kind, before[0], how)
    assert {r.id: r for r in rows_of(copied.job(parts=("heldout",)))[part]} == {r.id: r for r in before}


@pytest.mark.parametrize("how", ["edited", "removed"])
@pytest.mark.parametrize(("kind", "shape"), [("sft", Conversation), ("dpo", PreferencePair)])
def test_without_the_snapshot_held_out_rows_that_changed_are_refused(
    copied: "Trained", kind: str, shape: type[Row], how: str
) -> None:
    for path in (copied.workspace.checkpoints / "data").iterdir():
        path.unlink()
    for path in copied.workspace.path("data/eval").glob("*/*.jsonl"):  # each is looked for in all training rows
        path.write_text(path.read_text("utf-8").splitlines(keepends=True)[0], "utf-8")
    assert rows_of(copied.job(parts=("heldout",))), "as long as they are in their files"
    _change(copied, kind, held_out(copied, f"data/{kind}", shape)[0], how)
    what = rf"data/{kind}: 1 of the 5 held_out rows of {getattr(copied, kind)} are gone or changed since"
    with pytest.raises(UserError, match=what):
        Evaluate.prepare(copied.job(parts=("heldout",)))


def _change(copied: "Trained", kind: str, row: Row, how: str) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        at = next(i for i, r in enumerate(rows) if r["id"] == row.id)
        if how == "removed":
            del rows[at]
        else:
            rows[at]["messages" if kind == "sft" else "chosen"][-1]["content"] += "."

    rewrite(copied.workspace.root / row.where.rpartition(":")[0], change)


@pytest.mark.parametrize("key", ["seed=2", "fraction=0.5", "strategy=random"])
def test_another_split_in_the_profile_changes_nothing_of_what_was_held_out(trained: "Trained", key: str) -> None:
    rows = rows_of(trained.job(f"training_data.validation.{key}", parts=("heldout",)))
    assert {row.id for row in rows["conversations"]} == {r.id for r in held_out(trained, "data/sft", Conversation)}


def test_rows_in_another_order_are_the_same_rows(copied: "Trained") -> None:
    for path in copied.workspace.path("data").glob("[sd]*/*.jsonl"):
        rewrite(path, lambda rows: rows.reverse())
    rows = rows_of(copied.job(parts=("heldout",)))
    assert (len(rows["conversations"]), len(rows["pairs"])) == (5, 5)


def test_a_template_that_is_not_the_bases_is_refused(copied: "Trained") -> None:
    """Even where it is what the model itself was trained with: the base would be asked something else."""
    folder = copied.output("merge")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("### Instruction", "### Question"))
    from transformers import AutoTokenizer

    Chat(AutoTokenizer.from_pretrained(folder), "changed").contract.save(folder)
    facts = copied.record("merge").facts()
    assert facts is not None
    facts.artifacts = artifacts(copied.workspace, folder)
    copied.record("merge").write(facts)
    with pytest.raises(UserError, match="is not its base's"):
        Evaluate.prepare(copied.job())
