"""Win-rate: every contestant answers the same open questions, and judges compare the model's answers with the others'.

Beside it what needs no judge: how long the answers are, whether they end by themselves, and what their code is worth
(`eval/technical.py`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from eval import technical
from eval.contestants import BASE, MODEL, Contestant
from eval.judges import key_points
from eval.part import Compared, against_each
from eval.sandbox import sandbox
from eval.winrate import win_rate
from pipeline import statistics
from pipeline.config import EvalConfig
from pipeline.data.read import read_rows
from pipeline.data.rows import Message, Question, Row
from pipeline.data.split import sample
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.stage import Job
from serving.endpoint import answer_all
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import generate_all


@dataclass
class Answered:
    """One contestant's answers, in the order of the questions."""

    answers: list[Answer]
    texts: list[str]


@dataclass
class WinRate:
    name: ClassVar[str] = "winrate"
    over_endpoint: ClassVar[bool] = True

    config: EvalConfig
    questions: Sequence[Question]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        config, questions = job.config.eval_config, open_questions(job)
        asked = sample(questions, config.questions)
        if len(asked) < len(questions):
            say(f"win-rate: {len(asked)} of {len(questions)} open questions (eval_config.questions)")
        say(f"win-rate: {win_rate.planned_precision(len(asked))}")
        if config.run_code:
            _check_tests(asked)
        return cls(config, asked)

    def rows(self) -> dict[str, Sequence[Row]]:
        return {"questions": self.questions}

    def plan(self) -> list[tuple[str, str]]:
        return [("open questions", str(len(self.questions)))]

    def measure(self, who: Contestant, model: Any) -> Answered:
        config, chat, what = self.config, who.chat, f"{who.label}: answers"
        chats = [[Message(role="user", content=question.prompt)] for question in self.questions]
        sampling = Sampling(config.max_tokens, config.temperature)
        if who.endpoint:
            answers = answer_all(who.endpoint, chat, chats, sampling, config.seed, what)
        else:
            answers = generate_all(model, chat, [chat.prompt(c) for c in chats], sampling, config.seed, what)
        return Answered(answers, [chat.tokenizer.decode(answer.tokens).strip() for answer in answers])

    def compare(self, measured: dict[str, Answered], folder: Path) -> Compared:
        ours = measured[MODEL].texts
        rates = {
            name: win_rate.win_rate(self.questions, ours, theirs.texts)
            for name, theirs in measured.items()
            if name != MODEL
        }
        self._write(
            folder / "answers.jsonl",
            lambda i: (
                {"prompt": self.questions[i].prompt}
                | {name: answered.texts[i] for name, answered in measured.items()}
                | {"score": rates[BASE].scores[i]}
            ),
        )
        found = against_each(
            measured, lambda theirs, ours, whose: Compared(self._figures(rates[whose], theirs, ours, whose))
        )
        found.results["technical"] = self._code(measured, folder)
        return found

    def _figures(self, result: win_rate.WinRate, theirs: Answered, ours: Answered, whose: str) -> dict[str, Any]:
        before, after = ([float(a.finish_reason == "stop") for a in m.answers] for m in (theirs, ours))
        stops = statistics.paired(before, after, shares=True)
        before, after = ([float(len(a.tokens)) for a in m.answers] for m in (theirs, ours))
        lengths = statistics.paired(before, after)
        say(f"win-rate against the {whose} {result.rate.text()}: {result.verdict}")
        say(f"  the judge is weak: {key_points.WEAKNESS}; if the longer simply won: {result.longest_wins.text()}")
        if result.at_equal_length:
            say(f"  were both answers equally long: {result.at_equal_length.text()}")
        tokens = f"{lengths.before.value:.0f} → {lengths.after.value:.0f} tokens long"
        ending = f"{stops.before.value:.0%} → {stops.after.value:.0%} end by themselves"
        say(f"answers: {tokens}, {ending} within {self.config.max_tokens}")
        beside = {
            "wins": result.wins, "ties": result.ties, "losses": result.losses,
            "sign_test_p": round(result.p_value, 4), "judge": key_points.NAME, "weakness": key_points.WEAKNESS,
            "students_t": result.students_t, "base_against_itself": result.against_itself,
            "longest_wins": result.longest_wins, "at_equal_length": result.at_equal_length,
            "agrees_with_longest": result.agrees_with_longest,
        }  # fmt: skip
        rate = statistics.as_record(result.rate) | statistics.as_record(beside)
        return {"win_rate": rate} | statistics.as_record({"stops_by_itself": stops, "answer_tokens": lengths})

    def _code(self, measured: dict[str, Answered], folder: Path) -> dict[str, Any]:
        """Whether the code in the answers parses, and where that is allowed passes its tests."""
        found = {
            name: [
                technical.inspect(question, answer, self.config.run_code)
                for question, answer in zip(self.questions, answered.texts, strict=True)
            ]
            for name, answered in measured.items()
        }
        self._write(folder / "technical.jsonl", lambda i: {name: codes[i].as_row() for name, codes in found.items()})
        results = technical.compare(found[MODEL], found[BASE])
        say(technical.told(results))
        return dict(statistics.as_record(results))

    def _write(self, path: Path, row: Callable[[int], dict[str, Any]]) -> None:
        """One line a question, `row` of its number."""
        with path.open("w", encoding="utf-8") as out:
            for i, question in enumerate(self.questions):
                out.write(json.dumps({"id": question.id} | row(i), ensure_ascii=False) + "\n")


def open_questions(job: Job) -> list[Question]:
    return read_rows(job.workspace, f"{job.config.training_data.eval}/questions", Question)


def _check_tests(questions: Sequence[Question]) -> None:
    """Raises `UserError` where there are tests, and nowhere to run them."""
    tested = sum(technical.tests_of(question) is not None for question in questions)
    if tested and (problem := sandbox.available()):
        raise UserError(
            f"no sandbox here: {problem}", where="eval_config.run_code", remedy="false: code is only parsed"
        )
    say(f"tests: {tested} of {len(questions)} open questions have some")
