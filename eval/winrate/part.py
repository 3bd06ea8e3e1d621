"""Win-rate: every contestant answers the same open questions, and judges compare the model's answers with the others'.

Beside it what needs no judge: how long the answers are, whether they end by themselves, and what their code is worth
(`eval/technical.py`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from eval import shape, technical
from eval.contestants import Contestant
from eval.judges.endpoint import CHARACTERS_A_TOKEN
from eval.judges.judge import Judge
from eval.judges.panel import find_judges, refuse_contestants
from eval.names import BASE, MODEL
from eval.part import Compared, against_each
from eval.sandbox import sandbox
from eval.winrate import told, win_rate
from eval.winrate.duels import Duels, ask, forecast
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

HALVES = "backslashreplace"  # half a character is no UTF-8; so written it is JSON's own escape


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
    judges: Sequence[Judge] = ()

    @classmethod
    def prepare(cls, job: Job, contestants: Sequence[Contestant]) -> Self:
        """Raises `UserError` where a judge cannot judge, or is one of the contestants."""
        config, questions = job.config.eval_config, open_questions(job)
        asked = sample(questions, config.questions)
        if len(asked) < len(questions):
            say(f"win-rate: {len(asked)} of {len(questions)} open questions (eval_config.questions)")
        say(f"win-rate: {win_rate.planned_precision(asked)}")
        if config.run_code:
            _check_tests(asked)
        judges = find_judges(job)
        refuse_contestants(judges, contestants)
        names = list(dict.fromkeys(who.name for who in contestants))
        longest = "x" * (config.max_tokens * CHARACTERS_A_TOKEN)
        for judge in judges:
            if takes := forecast(judge, asked, names, longest):
                say(f"{judge.name}: {takes}")
        return cls(config, asked, judges)

    def rows(self) -> dict[str, Sequence[Row]]:
        return {"questions": self.questions}

    def plan(self) -> list[tuple[str, str]]:
        return [
            ("open questions", str(len(self.questions))),
            ("judges", ", ".join(judge.name for judge in self.judges)),
        ]

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
        texts = {name: answered.texts for name, answered in measured.items()}
        self._write_answers(folder, texts, [None] * len(self.questions))  # kept, whatever becomes of the judges
        said = [ask(judge, self.questions, texts) for judge in self.judges]
        self._write_answers(folder, texts, said[0].judged(MODEL, BASE).scores)
        with (folder / "verdicts.jsonl").open("w", encoding="utf-8", errors=HALVES) as out:
            for row in (row for duels in said for row in duels.rows()):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        found = against_each(measured, lambda theirs, ours, whose: Compared(self._figures(said, theirs, ours, whose)))
        found.results["technical"] = self._code(measured, folder)
        if ranked := said[0].ranking():
            found.results["ranking"] = told.ranking(ranked)
            told.tell_ranking(ranked)
        if paid := {told.key(judge.name): took for judge in self.judges if (took := told.spent(judge))}:
            found.results["judging"] = paid
        return found

    def _figures(self, said: Sequence[Duels], theirs: Answered, ours: Answered, whose: str) -> dict[str, Any]:
        rates = [
            win_rate.win_rate(self.questions, ours.texts, theirs.texts, duels.judged(MODEL, whose)) for duels in said
        ]
        name = "win_rate" if rates[0].rate else "win_rate_unknown"  # no figure stands where none is known
        found: dict[str, Any] = {name: told.figures(rates[0], said[0].judge)}
        told.tell(rates[0], said[0].judge, whose)
        if len(said) > 1:
            found["judges"] = told.several(said, rates, MODEL, whose)
            told.tell_several(found["judges"])
        before, after = ([float(a.finish_reason == "stop") for a in m.answers] for m in (theirs, ours))
        stops = statistics.paired(before, after, shares=True)
        their_tokens, our_tokens = ([len(a.tokens) for a in m.answers] for m in (theirs, ours))
        lengths = statistics.paired(their_tokens, our_tokens)
        tokens = f"{lengths.before.value:.0f} → {lengths.after.value:.0f} tokens long"
        ending = f"{stops.before.value:.0%} → {stops.after.value:.0%} end by themselves"
        say(f"answers: {tokens}, {ending} within {self.config.max_tokens}")
        found |= statistics.as_record({"stops_by_itself": stops, "answer_tokens": lengths})
        return found | shape.compare(theirs.texts, ours.texts, their_tokens, our_tokens)

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

    def _write_answers(self, folder: Path, texts: dict[str, list[str]], scores: Sequence[float | None]) -> None:
        self._write(
            folder / "answers.jsonl",
            lambda i: (
                {"prompt": self.questions[i].prompt}
                | {name: answers[i] for name, answers in texts.items()}
                | {"score": scores[i]}
            ),
        )

    def _write(self, path: Path, row: Callable[[int], dict[str, Any]]) -> None:
        """One line a question, `row` of its number."""
        with path.open("w", encoding="utf-8", errors=HALVES) as out:
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
