"""The server: what it tells before the review is opened, and whom it refuses."""

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from eval.review import session, store
from eval.review.server import MAX_BODY, build_app, listen
from eval.review.session import Review
from pipeline.errors import UserError
from tests.eval.review.reviewing import make_review, vote_on

NAMES = re.compile(r"\b(?:model|zebra|tiny|ours|theirs|score)\b", re.IGNORECASE)


@pytest.fixture
def review(tmp_path: Path) -> Review:
    return make_review(tmp_path)


@pytest.fixture
def client(review: Review) -> TestClient:
    return client_of(review)


def client_of(review: Review, **options: Any) -> TestClient:
    return TestClient(build_app(review, **options), base_url="http://127.0.0.1:8010")


def ask(client: TestClient, what: str, status: int = 200, reviewer: str = "anna", **body: Any) -> Any:
    answer = client.post(f"/api/{what}", json={"reviewer": reviewer, **body})
    assert answer.status_code == status, answer.text
    return answer.json()


def vote(client: TestClient, state: dict[str, Any], choice: str = "left", status: int = 200, **more: Any) -> Any:
    return ask(client, "vote", status, seq=state["seq"], item=state["item"]["id"], choice=choice, **more)


# ── a review over HTTP ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_vote_is_answered_with_what_comes_next_and_a_name_goes_on_where_it_stopped(
    client: TestClient, review: Review
) -> None:
    first = ask(client, "next")
    assert (first["seq"], first["done"], first["total"], first["complete"]) == (0, 0, 13, False)
    ratings = {"left": {"accuracy": 5}, "right": {"style": 1}}
    second = vote(client, first, "tie", ratings=ratings, comment=" both say so ")
    assert second["item"]["id"] != first["item"]["id"] and second["done"] == 1
    assert ask(client, "next", reviewer=" ANNA ") == second, "one person"
    assert ask(client, "next", reviewer="bob")["done"] == 0
    (line,) = review.store.read().lines
    assert (line.choice, line.ratings, line.comment, line.reviewer) == ("tie", ratings, "both say so", "anna")
    assert vote(client, first, "tie", ratings=ratings, comment="both say so")["done"] == 1, "sent again"
    assert "another tab" in vote(client, first, "bad", status=409)["error"]["message"]
    undone = ask(client, "undo", seq=1)
    assert undone["item"] == first["item"] and undone["undone"]["ratings"] == ratings
    assert ask(client, "undo", 409, seq=2)["error"]
    assert len(review.store.read().lines) == 2


def test_the_time_left_is_told_from_the_pace_so_far(review: Review) -> None:
    state = review.state("anna")
    for number, second in enumerate((0, 10, 20, 5000, 5030)):  # between them a long break
        assert state["seconds_left"] == {3: 10.0 * 10, 4: 10.0 * 9}.get(number)
        at = f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.000+00:00"
        review.vote(replace(session.line("anna", number, state["item"]["id"], "tie", {}, ""), at=at))
        state = review.state("anna")
    assert state["seconds_left"] == 10.0 * 8, "the median of 10, 10 and 30 s"


def test_a_vote_is_only_answered_once_it_is_on_the_disk(
    client: TestClient, review: Review, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(client, "next")
    seen = []

    def sync(file: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{file}"))
        if len(seen) == 1:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        assert "No space left" in vote(client, first, status=507)["error"]["message"]
        assert review.store.read().lines == []
        assert vote(client, first)["done"] == 1
    assert seen == [str(review.store.path)] * 2


# ── blind ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def zebra(folder: Path, swapped: bool = False) -> Review:
    """Each side's answers can be told by their first letter alone, which says nothing of whose they are."""
    rows = []
    for i in range(40):
        sides = (f"x {'long ' * (i + 1)}", f"y short {i}")
        ours, theirs = sides[::-1] if swapped else sides
        rows.append({"id": f"q-{i}", "prompt": f"Question {i}?", "model": ours, "zebra": theirs, "score": 1})
    folder.mkdir(exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Review(folder / "review", session.read_rows(folder / "answers.jsonl", "zebra", ""), "zebra", 20)


def everything(client: TestClient) -> list[Any]:
    """Every page and endpoint, used rightly and wrongly, by two people until just before the end."""
    answers = [
        client.get(path) for path in ("/", "/api/review", "/api/result", "/api/vote", "/docs", "/openapi.json", "/x")
    ]
    answers += [client.post("/api/vote", json={}), client.post("/api/next", content=b"{"), client.post("/", json={})]
    answers += [client.get("/", headers={"host": "model.example"})]
    for who, votes in (("anna", 15), ("bob", 4)):
        answers.append(client.post("/api/next", json={"reviewer": who}))
        for number in range(votes):
            state = answers[-1].json()
            body = {
                "reviewer": who,
                "seq": state["seq"],
                "item": state["item"]["id"],
                "choice": ("tie", "bad")[number % 2],
            }
            answers += [client.post("/api/vote", json=body | {"seq": 99}), client.post("/api/vote", json=body)]
        answers += [client.post("/api/undo", json={"reviewer": who, "seq": answers[-1].json()["seq"]})]
        answers += [client.post("/api/next", json={"reviewer": who})]
    return answers


def test_nothing_the_server_says_before_the_end_names_a_contestant_or_tells_a_result(tmp_path: Path) -> None:
    review = zebra(tmp_path)
    answers = everything(client_of(review))
    assert len(answers) > 50 and not review.tally().may_open
    for answer in answers:
        found = NAMES.findall(answer.text) + NAMES.findall(str(answer.url)) + NAMES.findall(str(dict(answer.headers)))
        assert found == [], answer.text
        assert "cookie" not in str(answer.headers).lower() and "server" not in answer.headers
        if "item" in (said := answer.json() if answer.headers["content-type"] == "application/json" else {}):
            assert said.keys() == {"seq", "done", "total", "seconds_left", "complete", "item", "undone"}
            assert list(said["item"]) == ["id", "prompt", "left", "right"] and said["complete"] is False
            assert "q-" not in str(said["item"]["id"])


def test_who_votes_undoes_and_votes_again_is_not_told_which_side_would_open_it(tmp_path: Path) -> None:
    """Eight votes for one contestant are enough evidence: the answer to the eighth is the same as to one against it."""
    review = make_review(tmp_path, 12)
    first = [item.repeat for item in review.queue("anna")]
    seven = next(place for place in range(7, len(first)) if not first[place] and first[:place].count(False) == 7)
    vote_on(review, "anna", lambda item: "model", most=seven)
    client, said, opened = client_of(review), [], []
    for side in store.SIDES:
        state = ask(client, "next")
        said.append(vote(client, state, side))
        opened.append(review.tally().may_open)
        ask(client, "undo", seq=said[-1]["seq"])
    assert sorted(opened) == [False, True]
    same = [{key: value for key, value in state.items() if key not in ("seq", "seconds_left")} for state in said]
    assert same[0] == same[1] and same[0]["done"] == seven + 1


def test_the_answers_lie_the_same_whoever_wrote_which(tmp_path: Path) -> None:
    """With the contestants exchanged in the file, and the key's draw with them, every byte sent is the same."""
    one, other = zebra(tmp_path / "one"), zebra(tmp_path / "other", swapped=True)
    for file in ("key", "votes.jsonl"):
        text = (tmp_path / "one" / "review" / file).read_bytes()
        text = text.replace(one.rows.sha256.encode(), other.rows.sha256.encode())
        (tmp_path / "other" / "review" / file).write_bytes(text)
    other = zebra(tmp_path / "other", swapped=True)
    queue = [replace(item, model_left=not item.model_left) for item in one.queue("anna")]
    other._queues["anna"] = queue
    for number in range(20):
        states = [review.state("anna") | {"seconds_left": None} for review in (one, other)]
        assert json.dumps(states[0]) == json.dumps(states[1])
        for review in (one, other):
            vote_on(review, "anna", lambda item: "tie", most=1)
        assert states[0]["done"] == number
    sides = [text[0] for item in queue for text in [(one.rows.answers[item.prompt])[0 if not item.model_left else 1]]]
    assert 4 < sides.count("x") < len(sides) - 4, "the longer answer is now here, now there"


# ── who is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8010", "localhost.evil.example", "[::1]", "0.0.0.0:8010", ""]
)
def test_another_site_s_name_for_this_address_is_refused(client: TestClient, host: str) -> None:
    for answer in (
        client.get("/", headers={"host": host}),
        client.post("/api/next", json={"reviewer": "anna"}, headers={"host": host}),
    ):
        assert answer.status_code == 400 and "Question" not in answer.text
    for name in ("127.0.0.1:8010", "localhost:8010", "localhost"):
        assert client.get("/", headers={"host": name}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://127.0.0.1", "http://127.0.0.1:8011", "null", "http://localhost:8010"]
)
def test_another_site_s_request_is_refused_and_keeps_nothing(client: TestClient, review: Review, origin: str) -> None:
    state = ask(client, "next")
    body = {"reviewer": "anna", "seq": 0, "item": state["item"]["id"], "choice": "left"}
    assert client.post("/api/vote", json=body, headers={"origin": origin}).status_code == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert client.post("/api/vote", content=json.dumps(body), headers={"content-type": kind}).status_code == 415
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/api/vote", headers=preflight).headers
    assert review.store.read().lines == []
    assert client.post("/api/vote", json=body, headers={"origin": "http://127.0.0.1:8010"}).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "model"}, {"choice": "undo"}, {"item": 7}, {"seq": -1}, {"seq": "x"}, {"extra": 1}, {"reviewer": ""},
        {"reviewer": "a" * 61}, {"reviewer": "a\u202eb"}, {"reviewer": "\n"}, {"ratings": {"left": {"accuracy": 6}}},
        {"ratings": {"left": {"accuracy": 0}}}, {"ratings": {"middle": {}}}, {"ratings": {"left": {"beauty": 3}}},
        {"comment": "x" * 4001}, {"ratings": [1]}, {"comment": None},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_what_no_page_of_ours_sends_is_refused_and_keeps_nothing(
    client: TestClient, review: Review, change: dict[str, Any]
) -> None:
    body = {"reviewer": "anna", "seq": 0, "item": ask(client, "next")["item"]["id"], "choice": "left"} | change
    answer = client.post("/api/vote", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert review.store.read().lines == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[" * 60_000, b"\xff\xfe", b'{"reviewer": "\\ud800"}'], ids=range(6)
)
def test_a_body_that_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/next", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused_before_it_is_read(client: TestClient) -> None:
    json_type = {"content-type": "application/json"}
    assert client.post("/api/vote", content=b"x" * (MAX_BODY + 1), headers=json_type).status_code == 413

    def parts() -> Any:
        for _ in range(100):
            yield b"x" * 10_000

    answer = client.post("/api/vote", content=parts(), headers=json_type)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"


def test_the_page_may_run_its_own_script_and_style_and_fetch_from_here_alone(client: TestClient) -> None:
    answer = client.get("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:" and policy["trusted-types"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", answer.text)
    assert set(re.findall(r'<button[^>]* value="(\w+)"', answer.text)) == set(get_args(store.Choice))


def test_a_taken_port_is_one_line() -> None:
    with listen(0) as taken:
        host, port = taken.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"port {port}: Address already in use; try --port 0"):
            listen(port)
