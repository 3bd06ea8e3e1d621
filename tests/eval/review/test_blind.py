"""The sealed key: it alone draws prompts, order, sides and repeats, the same ones at any time."""

import hashlib
import json
from pathlib import Path

import pytest

from eval.review import blind
from pipeline import statistics
from pipeline.errors import UserError
from tests.eval.review.reviewing import make_review

KEY = bytes(range(32))
PROMPTS = [f"q-{i}" for i in range(60)]


def test_a_key_draws_the_same_again_and_another_key_draws_otherwise() -> None:
    assert blind.queue(KEY, "anna", PROMPTS) == blind.queue(KEY, "anna", list(reversed(PROMPTS)))
    assert blind.sample(KEY, PROMPTS, 20) == blind.sample(KEY, PROMPTS, 20)
    other = bytes(32)
    assert blind.sample(KEY, PROMPTS, 20) != blind.sample(other, PROMPTS, 20)
    assert blind.queue(KEY, "anna", PROMPTS) != blind.queue(other, "anna", PROMPTS)
    assert len({blind.new_key() for _ in range(20)}) == 20


def test_every_prompt_is_asked_once_and_a_tenth_again_later_with_the_sides_swapped() -> None:
    for n, repeats in ((2, 0), (3, 1), (12, 1), (60, 6), (300, 30)):
        prompts = [f"q-{i}" for i in range(n)]
        items = blind.queue(KEY, "anna", prompts)
        first = {item.prompt: place for place, item in enumerate(items) if not item.repeat}
        again = {item.prompt: place for place, item in enumerate(items) if item.repeat}
        assert sorted(first) == sorted(prompts) and len(again) == repeats and len(items) == n + repeats
        assert all(place - first[prompt] > min(5, n // 2) - 1 for prompt, place in again.items())
        assert all(items[place].model_left != items[first[prompt]].model_left for prompt, place in again.items())
        assert len({item.id for item in items}) == len(items)


def test_orders_sides_and_samples_are_as_good_as_thrown() -> None:
    """Of 60 reviewers' 3,600 items: each side half the time, at any place of the order, for any prompt."""
    queues = [[i for i in blind.queue(KEY, f"r{n}", PROMPTS) if not i.repeat] for n in range(60)]
    items = [item for queue in queues for item in queue]
    left = statistics.proportion(sum(item.model_left for item in items), len(items))
    assert abs(left.value - 0.5) < 0.035, "four standard errors"
    for part in (queues[:30], [queue[:10] for queue in queues], [queue[50:] for queue in queues]):
        sides = [item.model_left for queue in part for item in queue]
        assert abs(sum(sides) / len(sides) - 0.5) < 2 / len(sides) ** 0.5
    places = [queue.index(next(i for i in queue if i.prompt == "q-0")) for queue in queues]
    assert abs(sum(places) / 60 - 29.5) < 4 * 17.3 / 60**0.5
    ids = {prompt: [next(i for i in queue if i.prompt == prompt).model_left for queue in queues] for prompt in PROMPTS}
    assert max(sum(sides) for sides in ids.values()) < 50 and min(sum(sides) for sides in ids.values()) > 10
    keys = [bytes([n]) * 32 for n in range(200)]
    chosen = [sum(prompt in blind.sample(key, PROMPTS, 20) for key in keys) for prompt in PROMPTS[::10]]
    assert all(abs(count - 200 / 3) < 4 * (200 * 2 / 9) ** 0.5 for count in chosen)


def test_the_key_is_written_once_for_its_owner_alone_and_its_hash_before_the_first_vote(tmp_path: Path) -> None:
    review = make_review(tmp_path)
    file = tmp_path / "review" / "key"
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_bytes() == review.key
    plan = json.loads((tmp_path / "review" / "votes.jsonl").read_text().splitlines()[0])
    assert plan["commitment"] == hashlib.sha256(file.read_bytes()).hexdigest()
    again = make_review(tmp_path)
    assert again.key == review.key and again.plan == review.plan and again.prompts == review.prompts


def test_another_key_or_none_or_other_answers_or_another_plan_are_refused(tmp_path: Path) -> None:
    review = make_review(tmp_path, n=6)
    for option, wanted in (("--n", {"n": 7}), ("--votes-each", {"each": 2})):
        with pytest.raises(UserError, match=f"{option}: is . since this review began"):
            make_review(tmp_path, **wanted)
    make_review(tmp_path, n=6, each=1)
    file = tmp_path / "review" / "key"
    file.write_bytes(bytes(32))
    with pytest.raises(UserError, match="is not the key that this review was sealed with"):
        make_review(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="is gone"):
        make_review(tmp_path)
    assert not file.exists()
    file.write_bytes(review.key)
    with (tmp_path / "answers.jsonl").open("a") as out:
        out.write('{"id": "late", "prompt": "?", "model": "a", "base": "b"}\n')
    with pytest.raises(UserError, match="not those that this review began with"):
        make_review(tmp_path)


def test_what_a_crash_left_before_the_plan_was_whole_is_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "review"
    folder.mkdir()
    (folder / "votes.jsonl").write_text('{"review": 1, "at": "20')
    (folder / "key").write_bytes(b"half")
    review = make_review(tmp_path)
    assert len(review.key) == 32 and make_review(tmp_path).key == review.key
    with pytest.raises(UserError, match="there are 12 prompts, not 13"):
        make_review(tmp_path / "more", n=13)
