"""Judges as a profile names them: none of them judges itself, and several stand beside one another."""

from collections.abc import Callable
from typing import Any

import pytest

from eval.contestants import Contestant
from eval.judges.panel import agreement, find_judges, majority, refuse_contestants
from pipeline.errors import UserError
from pipeline.records.schema import Input
from pipeline.stage import Job
from tests.eval.judges.judging_server import Server


class Served:
    """What a contestant's endpoint says of itself."""

    def __init__(self, address: str, model: str) -> None:
        self.root, self.model = address.removesuffix("/v1"), model


def contestant(label: str, endpoint: Any = None, record: str = "") -> Contestant:
    taken = Input.model_construct(id=record) if record else None
    return Contestant("model", label, chat=None, load=lambda: None, endpoint=endpoint, input=taken)  # type: ignore[arg-type]


def judges(job: Callable[..., Job], *settings: str) -> list[Any]:
    return find_judges(job(f"eval_config.judges=[{', '.join(settings)}]"))


def test_the_default_is_the_weak_one_that_needs_nothing(job: Callable[..., Job]) -> None:
    assert [judge.name for judge in find_judges(job())] == ["key-point words"]


def test_judges_come_in_the_profiles_order(job: Callable[..., Job], start: Callable[..., Server]) -> None:
    server = start()
    found = judges(job, f"{{endpoint: '{server.address}', model: reader}}", "key_points")
    place = server.address.removeprefix("http://").removesuffix("/v1")
    assert [judge.name for judge in found] == [f"reader at {place}", "key-point words"]
    assert all(judge.limits for judge in found)


def test_a_judge_is_named_once(job: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match=r"eval_config\.judges: key-point words judges twice"):
        judges(job, "key_points", "key_points")


def test_two_spellings_of_one_address_are_one_judge(job: Callable[..., Job], start: Callable[..., Server]) -> None:
    server = start(cards=[{"id": "a", "root": "/m"}, {"id": "b", "root": "/m"}, {"id": "c", "root": "/o"}])
    other = server.address.replace("127.0.0.1", "localhost")
    for second in (f"{{endpoint: '{other}', model: a}}", f"{{endpoint: '{other}/', model: b}}"):
        with pytest.raises(UserError, match=r"eval_config\.judges: . at localhost:\d+ judges twice; try each once"):
            judges(job, f"{{endpoint: '{server.address}', model: a}}", second)
    assert len(judges(job, f"{{endpoint: '{server.address}', model: a}}", f"{{endpoint: '{other}', model: c}}")) == 2


def test_a_reward_model_is_looked_for_below_the_root(job: Callable[..., Job]) -> None:
    with pytest.raises(UserError, match=r"^models/reward: there is no such folder"):
        judges(job, "{reward_model: models/reward}")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("[]", "is a list of one judge or more"),
        ("key_points", "is a list of one judge or more"),
        ("[length]", "judge 1 is neither key_points"),
        ("[key_points, {model: gpt}]", "judge 2 is neither key_points"),
        ("[{endpoint: 'http://a/v1', modle: gpt}]", "judge 1 has no key `modle`; try model"),
        ("[{endpoint: 'http://a/v1', price_in: cheap}]", "judge 1, price_in: Input should be a valid number"),
        ("[{endpoint: 'http://me:secret@a/v1'}]", "judge 1, endpoint: holds a password"),
        ("[{reward_model: a, price_in: 1.0}]", "judge 1 has no key `price_in`"),
    ],
    ids=range(8),
)
def test_what_is_no_judge_is_told_in_one_line(job: Callable[..., Job], settings: str, what: str) -> None:
    with pytest.raises(UserError, match=f"^--set: eval_config.judges: {what}") as caught:
        job(f"eval_config.judges={settings}")
    assert "\n" not in str(caught.value)


# ── No judge in its own cause ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("card", "who"),
    [
        ({"id": "small-merged"}, contestant("small-merged")),
        ({"id": "Small-Merged"}, contestant("small-merged")),
        ({"id": "small-sft"}, contestant("small-sft (EXP-2026-11-20-001)")),
        ({"id": "EXP-2026-11-20-001"}, contestant("small-sft", record="EXP-2026-11-20-001")),
        ({"id": "coder-7b"}, contestant("deepseek-ai/coder-7b")),
        ({"id": "deepseek-ai/coder-7b"}, contestant("coder-7b")),
        ({"id": "judge", "root": "/models/small-merged/"}, contestant("small-merged")),
        ({"id": "judge", "root": "deepseek-ai/coder-7b"}, contestant("deepseek-ai/coder-7b")),
        ({"id": "judge", "root": "/loras/x", "parent": "deepseek-ai/coder-7b"}, contestant("deepseek-ai/coder-7b")),
        ({"id": "reader"}, contestant("who knows", Served("http://elsewhere:8000", "reader"))),
    ],
    ids=["name", "case", "label", "record", "owner", "no owner", "folder", "root", "parent", "endpoint"],
)
def test_a_judge_that_is_a_contestant_is_refused(
    job: Callable[..., Job], start: Callable[..., Server], card: dict[str, str], who: Contestant
) -> None:
    server = start(cards=[card])
    found = judges(job, f"{{endpoint: '{server.address}'}}", "key_points")
    with pytest.raises(UserError, match=rf"the judge {card['id']} at .* is .*, which is judged; try another model"):
        refuse_contestants(found, [contestant("another"), who])


@pytest.mark.parametrize("here", ["localhost", "127.0.0.2", "127.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"])
def test_a_second_name_for_the_same_weights_does_not_hide_them(
    job: Callable[..., Job], start: Callable[..., Server], here: str
) -> None:
    server = start(cards=[{"id": "model", "root": "/m"}, {"id": "judge", "root": "/m"}, {"id": "other", "root": "/o"}])
    model = contestant("the model", Served(server.address.replace("127.0.0.1", here), "model"))
    with pytest.raises(UserError, match="is judged"):
        refuse_contestants(judges(job, f"{{endpoint: '{server.address}', model: judge}}"), [model])
    refuse_contestants(judges(job, f"{{endpoint: '{server.address}', model: other}}"), [model])


def test_a_judge_that_is_none_of_them_may_judge(job: Callable[..., Job], start: Callable[..., Server]) -> None:
    server = start(cards=[{"id": "org/reader-70b", "root": None, "parent": None}])
    who = [contestant("small-merged", record="EXP-2026-11-20-001"), contestant("org/reader-7b"), contestant("tiny")]
    refuse_contestants(judges(job, f"{{endpoint: '{server.address}'}}"), who)


# ── Several ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_majority_counts_those_that_scored_a_prompt() -> None:
    scores = {
        "a": [1.0, 1.0, 1.0, 0.75, None, None, 0.5],
        "b": [1.0, 0.0, 0.0, 0.0, 0.25, None, 0.5],
        "c": [0.0, None, 0.0, 1.0, None, None, 0.75],
    }
    assert majority(scores) == [1.0, 0.5, 0.0, 1.0, 0.0, None, 1.0]


def test_agreement_is_of_all_and_of_each_two() -> None:
    a = [1.0, 1.0, 0.0, 0.0, 0.5, 1.0, 0.0, 1.0]
    same = agreement({"a": a, "b": [0.75 if s == 1 else s for s in a], "c": [None, *a[1:]]})
    assert same.alpha is not None and same.alpha.value == 1.0
    assert [(f.value, f.n) for f in same.pairs.values() if f] == [(1.0, 7), (1.0, 6), (1.0, 6)]
    opposed = agreement({"a": a, "b": [1 - s for s in a]})
    assert opposed.alpha is not None and opposed.alpha.value < 0
    assert opposed.pairs["a", "b"] is not None and opposed.pairs["a", "b"].value == 0.0
