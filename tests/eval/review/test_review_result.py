"""Votes into verdicts and figures: by hand, and on reviews whose truth is known."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.review import blind, judges, session, tally
from eval.review.result import EARLY, OPENED, judged_at_all, result
from eval.review.store import Line, Plan
from eval.review.tally import Tally, count, majority
from eval.statistics import agreement, prediction_powered, sequential
from pipeline.errors import UserError
from tests.eval.review.reviewing import choice, make_review, vote_on, write_answers

SAID = ["model"] * 7 + ["other"] * 2 + ["tie", "bad", "skip"]  # of q-0 … q-11


def number(item: blind.Item) -> int:
    return int(item.prompt.removeprefix("q-"))


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_person_s_review_is_what_they_said(tmp_path: Path) -> None:
    review = make_review(tmp_path)
    rated = {
        0: {"model": {"accuracy": 5, "style": 1}, "other": {"accuracy": 3}},
        1: {"model": {"accuracy": 4}, "other": {"accuracy": 4}},
    }
    swap = next(item.prompt for item in review.queue("anna") if item.repeat)
    vote_on(
        review,
        "anna",
        lambda item: SAID[number(item)],
        rate=lambda item: {} if item.repeat else rated.get(number(item), {}),
    )
    counted = review.tally()
    assert counted.complete and counted.may_open
    found = result(counted, {})
    assert (found.wins, found.losses, found.ties, found.both_bad, found.skipped) == (7, 2, 1, 1, 1)
    assert found.share_of_wins == sequential.share_of_wins(7, 2) and found.share_of_wins.value == 0.777778
    assert found.e_value == pytest.approx(512 * math.factorial(7) * 2 / math.factorial(10), rel=1e-3)  # B(8, 3)·2⁹
    assert found.verdict == "no difference shown" and found.opened == OPENED[True]
    assert (found.votes, found.reviewers, found.agreement) == (11, 1, None)
    assert found.ratings.keys() == {"accuracy"}, "style was rated on one side alone"
    accuracy = found.ratings["accuracy"]
    assert (accuracy.before.value, accuracy.after.value, accuracy.delta.value, accuracy.delta.n) == (3.5, 4.5, 1.0, 2)
    lefts = [choice(SAID[number(i)], i) for i in review.queue("anna") if not i.repeat and number(i) < 9].count("left")
    assert found.left and found.left.value == pytest.approx(lefts / 9, abs=1e-6)
    skipped = swap == "q-11"
    assert (found.self_consistency is None) == skipped
    assert skipped or (found.self_consistency and found.self_consistency.value == 1.0)
    needed = found.decisive_needed
    assert needed and sequential.log_e_value(7 / 9 * needed, 2 / 9 * needed) >= sequential.ENOUGH
    assert sequential.log_e_value(7 / 9 * (needed - 1), 2 / 9 * (needed - 1)) < sequential.ENOUGH
    record = found.as_record()
    json.dumps(record)
    assert record["wins"] == 7 and record["share_of_wins"]["ci_high"] > 0.9 and "agreement" not in record
    assert not {"anna", "reviewer"} & set(json.dumps(record).replace('"', " ").split())


def test_several_people_agree_as_far_as_they_do_and_with_themselves(tmp_path: Path) -> None:
    review = make_review(tmp_path, each=2)

    def bob(item: blind.Item) -> str:  # of q-0 he thinks otherwise, and of what comes again too
        said = SAID[number(item)]
        return "tie" if item.repeat else "other" if number(item) == 0 else said

    vote_on(review, "anna", lambda item: SAID[number(item)])
    assert not review.tally().verdicts and not review.tally().may_open
    vote_on(review, "bob", bob)
    found = result(review.tally(), {})
    assert (found.wins, found.losses, found.ties, found.both_bad, found.skipped) == (6, 2, 2, 1, 1)
    score = {"model": 1.0, "other": 0.0, "tie": 0.5, "bad": 0.5}
    units = [[score[said], 0.0 if n == 0 else score[said]] for n, said in enumerate(SAID) if said != "skip"]
    expected = agreement.alpha(units, "ordinal")
    assert found.agreement and expected and found.agreement.value == expected.value
    assert found.votes == 22 and found.reviewers == 2
    twice = {name: next(i for i in review.queue(name) if i.repeat) for name in ("anna", "bob")}
    same = [SAID[number(twice["anna"])] == SAID[number(twice["anna"])], SAID[number(twice["bob"])] == "tie"]
    counted = [s for s, name in zip(same, twice, strict=True) if SAID[number(twice[name])] != "skip"]
    assert (found.self_consistency.n if found.self_consistency else 0) == len(counted)
    assert not counted or (found.self_consistency and found.self_consistency.value == sum(counted) / len(counted))


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (["win"], "win"), (["win", "loss"], "tie"), (["win", "win", "loss"], "win"), (["loss", "tie", "bad"], "loss"),
        (["tie", "bad"], "tie"), (["bad", "bad", "tie"], "bad"), (["win", "loss", "bad"], "bad"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_prompt_s_verdict_is_the_majority_s(told: list[tally.Verdict], verdict: str) -> None:
    assert majority(told) == verdict


# ── when it opens ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_opens_at_the_planned_number_of_prompts_or_when_the_evidence_is_enough(tmp_path: Path) -> None:
    review, opened = make_review(tmp_path / "one", 20), []
    for _ in range(22):
        vote_on(review, "anna", lambda item: "tie", most=1)
        opened.append(review.tally().may_open)
    distinct = [len({i.prompt for i in review.queue("anna")[: n + 1]}) for n in range(22)]
    assert opened == [n >= 20 for n in distinct], "a repeat is no further prompt"
    clear = make_review(tmp_path / "two", 40)
    while not clear.tally().may_open:
        vote_on(clear, "anna", lambda item: "model", most=1)
    assert clear.tally().verdicts.__len__() == 8, "2⁸/9 is the first beyond 20"
    found = result(clear.tally(), {"judge": {f"q-{i}": 1.0 for i in range(40)}})
    assert found.opened == OPENED[False] and found.verdict == "better"
    assert found.judges["judge"].corrected is None and "kept" in found.judges["judge"].without
    dull = make_review(tmp_path / "three", 40)
    vote_on(dull, "anna", lambda item: "model", most=3)
    assert not dull.tally().may_open and result(dull.tally(), {}).opened == EARLY


def test_a_second_person_s_votes_count_once_more_for_agreement_but_not_for_evidence(tmp_path: Path) -> None:
    review = make_review(tmp_path, 7)
    vote_on(review, "anna", lambda item: "model")
    before = review.tally().verdicts
    for name in ("bob", "carl", "dora"):
        vote_on(review, name, lambda item: "model")
    counted = review.tally()
    assert counted.verdicts == before and result(counted, {}).e_value == pytest.approx(2**7 / 8)
    assert result(counted, {}).votes == 28


def test_a_verdict_once_there_stays_whatever_is_voted_later(tmp_path: Path) -> None:
    """Else evidence that was looked at would be looked at anew, and the promise of 5 % would not hold."""
    review = make_review(tmp_path, 10, each=2)
    chance = random.Random(3)
    for _ in range(12):
        for name in ("anna", "bob", "carl"):
            vote_on(review, name, lambda item: chance.choice(["model", "other", "tie", "bad", "skip"]), most=1)
    lines = review.store.read().lines
    last = list(count(review.queue, lines, review.plan).verdicts.items())
    assert len(last) > 5
    for number in range(len(lines)):
        some = list(count(review.queue, lines[:number], review.plan).verdicts.items())
        assert some == last[: len(some)]


def test_skipped_prompts_do_not_keep_a_review_closed_for_ever(tmp_path: Path) -> None:
    review = make_review(tmp_path, 4)
    vote_on(review, "anna", lambda item: "skip")
    assert review.tally().skipped == 4 and review.tally().may_open
    found = result(review.tally(), {})
    assert found.share_of_wins is None and found.votes == 0 and found.verdict == "no difference shown"
    vote_on(review, "bob", lambda item: "model")
    assert review.tally().skipped == 0 and result(review.tally(), {}).wins == 4


# ── on planted truths ────────────────────────────────────────────────────────────────────────────────────────────────


def simulated(seed: int, prompts: int, people: int, each: int, win: Callable[[random.Random], bool]) -> Tally:
    """People who mostly see what the others see in a prompt; they take turns at random, each in an order of their own."""
    chance = random.Random(seed)
    key = seed.to_bytes(32, "big")
    names = [f"q-{i}" for i in range(prompts)]
    truth = {name: win(chance) for name in names}
    queues = {f"r{i}": blind.queue(key, f"r{i}", names) for i in range(people)}
    lines, left = [], [name for name, queue in queues.items() for _ in queue]
    chance.shuffle(left)
    at = dict.fromkeys(queues, 0)
    for who in left:
        item = queues[who][at[who]]
        model = truth[item.prompt] if chance.random() < 0.8 else win(chance)
        said = "tie" if chance.random() < 0.1 else choice("model" if model else "other", item)
        lines.append(Line("", who, at[who], item.id, said))
        at[who] += 1
    return count(queues.__getitem__, lines, Plan("", "", "base", prompts, each, ""))


def opens_at(counted: Tally) -> int | None:
    """The first number of verdicts at which the evidence was enough, however often one had looked."""
    wins = losses = 0
    for place, verdict in enumerate(counted.verdicts.values(), 1):
        wins, losses = wins + (verdict == "win"), losses + (verdict == "loss")
        if sequential.log_e_value(wins, losses) >= sequential.ENOUGH:
            return place
    return None


def test_of_reviews_of_equals_at_most_5_in_100_ever_find_a_difference() -> None:
    """Three people who influence each other's picture, two votes a prompt, looked at after every vote."""
    found = [opens_at(simulated(seed, 40, 3, 2, lambda chance: chance.random() < 0.5)) for seed in range(300)]
    assert sum(place is not None for place in found) <= 0.05 * 300 + 2 * (300 * 0.05 * 0.95) ** 0.5


def test_a_planted_better_side_is_found_and_its_interval_holds() -> None:
    reviews = [simulated(seed, 60, 2, 1, lambda chance: chance.random() < 0.8) for seed in range(60)]
    results = [result(one, {}) for one in reviews]
    assert {one.verdict for one in results} <= {"better", "no difference shown"}
    assert sum(one.verdict == "better" for one in results) > 50
    assert sum(opens_at(one) is not None and opens_at(one) < 60 for one in reviews) > 45  # type: ignore[operator]
    inside = [one.share_of_wins and one.share_of_wins.ci_low <= 0.8 <= one.share_of_wins.ci_high for one in results]  # type: ignore[operator]
    assert sum(map(bool, inside)) >= 55
    assert all(one.self_consistency and 0.5 < one.self_consistency.value < 1 for one in results[:5])


# ── judges ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_judge_stands_beside_people_and_the_corrected_rate_uses_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        blind, "new_key", lambda: bytes(blind.KEY_BYTES)
    )  # of every 25 samples one is too unlike the rest
    chance = random.Random(1)
    truth = {f"q-{i}": float(chance.random() < 0.6) for i in range(80)}
    judge = {name: 1.0 if chance.random() < 0.3 else value for name, value in truth.items()}  # likes the model
    review = make_review(tmp_path, 80, n=25)
    vote_on(review, "anna", lambda item: "model" if truth[item.prompt] else "other")
    found = result(review.tally(), {"endpoint": judge})
    beside = found.judges["endpoint"]
    seen = list(review.tally().verdicts)
    people, same = [truth[name] for name in seen], sum(truth[name] == judge[name] for name in seen)
    assert len(seen) == 25 and beside.with_people.same.value == same / 25 and beside.with_people.same.n == 25
    elsewhere = [score for name, score in judge.items() if name not in seen]
    expected = prediction_powered.corrected(people, [judge[name] for name in seen], elsewhere)
    assert beside.corrected == expected and expected.rate.n == 80
    assert expected.judge_alone.value > expected.rate.value, "what the judge likes is taken out again"
    assert "corrected" in found.as_record()["judges"]["endpoint"]
    few = make_review(tmp_path / "few", 12, n=5)
    vote_on(few, "anna", lambda item: "model")
    told = result(few.tally(), {"endpoint": judge}).judges["endpoint"]
    assert told.corrected is None and told.without.startswith("needs 10 prompts")


def test_judges_are_read_from_the_files_whichever_side_they_saw_first(tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.jsonl", 3, score=lambda i: [1, None, 0.5][i], sft=lambda i: f"SFT {i}")
    rows = [
        {"id": "q-0", "judge": "big", "model": "model", "against": "base", "score": 0.75},
        {"id": "q-1", "judge": "big", "model": "base", "against": "model", "score": 0.25},
        {"id": "q-2", "judge": "big", "model": "model", "against": "base", "score": None},
        {"id": "q-0", "judge": "big", "model": "model", "against": "sft", "score": 0},
        {"id": "q-1", "judge": "big", "model": "sft", "against": "base", "score": 1},
        {"id": "q-2", "judge": 7, "model": "model", "against": "base", "score": 9},
    ]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "torn", "utf-8")
    assert judges.scores(tmp_path, "base", "words") == {
        "words": {"q-0": 1.0, "q-2": 0.5},
        "big": {"q-0": 0.75, "q-1": 0.75},
    }
    assert judges.scores(tmp_path, "sft", "words") == {"big": {"q-0": 0.0}}
    unseen = count(lambda who: [], [], Plan("", "", "base", 3, 1, ""))
    assert judged_at_all({"big": {"q-0": 1.0}}, unseen) == {}


def test_answers_that_cannot_be_compared_are_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"

    def read(against: str = "base", **more: Callable[[int], Any]) -> session.Rows:
        write_answers(path, 3, **more)
        return session.read_rows(path, against, "answers.jsonl")

    assert list(read().prompts) == ["q-0", "q-1", "q-2"]
    assert list(read(base=lambda i: None if i == 1 else "x").prompts) == ["q-0", "q-2"]
    assert "1 rows of answers.jsonl lack an answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no answers of `dpo` beside the model's; try base, sft"):
        read("dpo", sft=lambda i: "s")
    with pytest.raises(UserError, match="holds no answers of `model`"):
        read("model")
    with pytest.raises(UserError, match="the prompt q stands there twice"):
        read(id=lambda i: "q")
