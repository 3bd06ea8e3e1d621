"""The win-rate as a part: judges over a socket, and all that stands in the record and beside it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval.contestants import Contestant
from eval.judges.panel import find_judges
from eval.part import Compared
from eval.winrate.part import Answered, WinRate
from pipeline import statistics
from pipeline.chat import Chat
from pipeline.data.rows import Question
from pipeline.errors import UserError
from pipeline.stage import Job
from serving.engine import Answer
from tests.eval.judges.judging_server import MERIT, Server

if TYPE_CHECKING:
    from tests.conftest import Trained

N = 12
QUESTIONS = [
    Question(id=f"q{i}", prompt=f"{i}?", key_points=["retry with jitter"], domain="ab"[i % 2], difficulty="expert")
    for i in range(N)
]
TEXTS = {
    "base": ["It may be retried with care."] * N,
    "model": [f"It is {MERIT}: retry."] * 11 + ["No."],
    "sft": [f"It is {MERIT}."] * 6 + ["No."] * 6,
}


@pytest.fixture
def part(job: Callable[..., Job]) -> Callable[..., WinRate]:
    def make(*judges: str, **settings: Any) -> WinRate:
        asked = job(f"eval_config.judges=[{', '.join(judges)}]")
        return WinRate(asked.config.eval_config, QUESTIONS, find_judges(asked))

    return make


def compared(part: WinRate, folder: Path, *names: str) -> Compared:
    def answered(texts: Sequence[str]) -> Answered:
        return Answered([Answer(list(range(len(text))), "stop") for text in texts], list(texts))

    return part.compare({name: answered(TEXTS[name]) for name in names}, folder)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_first_judges_rate_is_the_win_rate(
    part: Callable[..., WinRate],
    start: Callable[..., Server],
    tmp_path: Path,
) -> None:
    server = start()
    priced = f"{{endpoint: '{server.address}', price_in: 1.0, price_out: 10.0}}"
    results = compared(part(priced, "key_points"), tmp_path, "base", "model").results
    rate = results["win_rate"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["unscored"], rate["n"]) == (11, 1, 0, 0, N)
    assert rate["judge"].startswith("reader at ") and rate["weakness"] and rate["verdict"].startswith("more wins")
    assert rate["positions"]["consistent"]["value"] == 1.0
    assert rate["base_against_itself"] == {"value": 0.5, "n": N}
    assert set(rate["by_domain"]) == {"a", "b"} and rate["by_domain"]["b"]["n"] == 6
    other = results["judges"]["key-point-words"]
    assert other["n"] == N and other["judge"] == "key-point words" and "positions" not in other
    assert results["judges"]["majority"]["n"] == N
    assert results["judges"]["agreement"]["alpha"]["n"] == N
    paid = next(iter(results["judging"].values()))
    assert paid["calls"] == len(server.bodies) == 3 * N, "both orders, and the base beside itself"
    assert paid["tokens_in"] == 100 * paid["calls"] and paid["cost"] == pytest.approx(paid["calls"] * 200 / 1e6)


def test_answers_and_verdicts_are_written_question_by_question(
    part: Callable[..., WinRate],
    start: Callable[..., Server],
    tmp_path: Path,
) -> None:
    results = compared(part(f"{{endpoint: '{start().address}'}}"), tmp_path, "base", "model", "sft").results
    answers, verdicts = rows(tmp_path / "answers.jsonl"), rows(tmp_path / "verdicts.jsonl")
    assert [row["score"] for row in answers] == [1.0] * 11 + [0.5]
    assert [row["model"] for row in answers] == TEXTS["model"] and [row["sft"] for row in answers] == TEXTS["sft"]
    assert len(verdicts) == 3 * N + N
    found = {(row["model"], row["against"]): row for row in verdicts if row["id"] == "q7"}
    assert found["model", "sft"]["score"] == 1.0 and found["base", "sft"]["score"] == 0.5
    assert results["others"]["sft"]["win_rate"]["wins"] == 5
    assert list(results["ranking"]["strengths"]) == ["model", "sft", "base"]
    assert results["ranking"]["wins"]["model_over_base"]["value"] > 0.9


def test_what_most_judges_say_of_one_question_asked_in_many_ways_is_known_once(
    job: Callable[..., Job], start: Callable[..., Server], tmp_path: Path
) -> None:
    asked = job(f"eval_config.judges=[{{endpoint: '{start().address}'}}, key_points]")
    alike = [Question.model_validate(q.model_dump() | {"family": f"f{i // 4}"}) for i, q in enumerate(QUESTIONS)]
    results = compared(WinRate(asked.config.eval_config, alike, find_judges(asked)), tmp_path, "base", "model").results
    figure = statistics.rate([1.0] * 11 + [0.5], [f"f{i // 4}" for i in range(N)])
    most = results["judges"]["majority"]
    assert (most["ci_low"], most["ci_high"], most["n"]) == (figure.ci_low, figure.ci_high, N)


def test_half_a_character_in_a_reason_ends_no_run(
    part: Callable[..., WinRate], start: Callable[..., Server], tmp_path: Path
) -> None:
    server = start(aside=lambda mark, answers: "half of \ud83d")
    compared(part(f"{{endpoint: '{server.address}'}}"), tmp_path, "base", "model")
    assert rows(tmp_path / "verdicts.jsonl")[0]["why"][0] == "half of \ud83d"


def test_a_judge_that_fails_leaves_the_answers_and_no_rate(
    part: Callable[..., WinRate],
    start: Callable[..., Server],
    tmp_path: Path,
) -> None:
    server = start(always=(200, "I would rather not say."))
    results = compared(part(f"{{endpoint: '{server.address}'}}"), tmp_path, "base", "model").results
    assert "win_rate" not in results
    unknown = results["win_rate_unknown"]
    assert (unknown["unscored"], unknown["verdict"]) == (N, "no verdict could be read: nothing shown")
    assert (unknown["if_unscored_lost"]["value"], unknown["if_unscored_won"]["value"]) == (0.0, 1.0)
    answers = rows(tmp_path / "answers.jsonl")
    assert [row["score"] for row in answers] == [None] * N and answers[0]["model"] == TEXTS["model"][0]
    assert rows(tmp_path / "verdicts.jsonl")[0]["why"][0].startswith("no verdict in its answer")


def test_the_record_holds_plain_values_and_others_have_the_same_names(
    part: Callable[..., WinRate], tmp_path: Path
) -> None:
    results = compared(part("key_points"), tmp_path, "base", "model", "sft").results
    assert json.loads(json.dumps(results)) == results
    assert set(results["others"]["sft"]["win_rate"]) >= {"value", "n", "wins", "judge", "weakness", "verdict"}
    assert "judging" not in results, "it costs nothing"


def test_a_contestant_is_refused_as_judge_before_anything_is_asked(
    job: Callable[..., Job], start: Callable[..., Server]
) -> None:
    server = start(cards=[{"id": "small-merged"}, {"id": "reader"}])
    who = [Contestant(name, f"small-{name}", chat=None, load=lambda: None) for name in ("base", "merged")]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the judge small-merged at .* is small-merged, which is judged"):
        WinRate.prepare(job(f"eval_config.judges=[{{endpoint: '{server.address}', model: small-merged}}]"), who)
    part = WinRate.prepare(job(f"eval_config.judges=[{{endpoint: '{server.address}', model: reader}}]"), who)
    assert dict(part.plan())["judges"].startswith("reader at ") and not server.bodies


def test_what_judging_takes_is_said_before_the_run(
    job: Callable[..., Job], start: Callable[..., Server], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = job(f"eval_config.judges=[{{endpoint: '{start().address}'}}]", "eval_config.questions=null")
    who = [Contestant(name, name, chat=None, load=lambda: None) for name in ("base", "model", "sft")]  # type: ignore[arg-type]
    n = len(WinRate.prepare(asked, who).questions)
    said = capfd.readouterr().err
    assert f"{n} questions can show a win-rate that differs from 0.5 by" in said
    assert f": up to {3 * 2 * n + len(range(0, n, -(-n // 20)))} calls, about " in said


def test_our_own_server_with_a_model_that_cannot_judge_gives_no_verdict_and_no_error(
    job: Callable[..., Job], trained: "Trained", tmp_path: Path
) -> None:
    """It has no schemas, so it is asked in text; what so small a model says is no verdict, and is none of three."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.config import ServeConfig
    from serving.front.app import build_app
    from serving.front.metrics import Usage
    from serving.transformers_backend.engine import TransformersEngine
    from tests.serving.in_process import serving

    folder = trained.output("merge")
    model, chat = AutoModelForCausalLM.from_pretrained(folder), Chat(AutoTokenizer.from_pretrained(folder), "merged")
    engine = TransformersEngine(model.eval(), chat, 2048, 8)
    with serving(build_app(engine, "another", ServeConfig(), Usage())) as address:
        asked = job(f"eval_config.judges=[{{endpoint: '{address}', max_tokens: 12}}]")
        judged = WinRate(asked.config.eval_config, QUESTIONS[:2], find_judges(asked))
        texts = {name: [Answer([1], "stop")] * 2 for name in ("base", "model")}
        measured = {name: Answered(answers, TEXTS[name][:2]) for name, answers in texts.items()}
        results = judged.compare(measured, tmp_path).results
    rate = results.get("win_rate_unknown") or results["win_rate"]
    assert rate["unscored"] + rate["wins"] + rate["ties"] + rate["losses"] == 2
    for row in rows(tmp_path / "verdicts.jsonl"):
        assert row["shown_first"] in (None, 0.0, 0.5, 1.0) and row["why"]
    assert next(iter(results["judging"].values()))["tokens_out"] > 0
