"""vLLM's server as a child: its life and its death, with a real child in vLLM's place."""

import json
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pipeline.errors import Interrupted, StageFailed
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.stage import run_stage
from pipeline.workspace import Workspace
from serving import child
from serving.serve import Serve
from tests.serving.processes import runs, until
from tests.serving.vllm_backend.fake_vllm import ONE_TOO_MANY, VLLM

if TYPE_CHECKING:
    from tests.conftest import Trained

pytestmark = pytest.mark.usefixtures("environment")
KEY = secrets.token_hex()  # not a literal: a record keeps the patch of the working tree


class Client(threading.Thread):
    """Does `what` with the address as soon as the server's record tells it, then asks this process to stop."""

    def __init__(self, workspace: Workspace, what: Callable[[str], Any], how: signal.Signals) -> None:
        super().__init__(daemon=True)
        self.workspace, self.what, self.how, self.found = workspace, what, how, None
        self.before = set(workspace.experiments.glob("EXP-*.yaml"))

    def facts(self) -> Facts | None:
        new = set(self.workspace.experiments.glob("EXP-*.yaml")) - self.before
        return RecordFile(new.pop()).facts() if new else None

    def run(self) -> None:
        try:
            until(lambda: bool((facts := self.facts()) and facts.results.get("address")))
            facts = self.facts()
            assert facts
            self.found = self.what(facts.results["address"])
        finally:
            os.kill(os.getpid(), self.how)


@pytest.fixture
def served(copied: "Trained") -> Iterator[Callable[..., tuple[Client, Facts]]]:
    """`served(what)`: a server in this thread, `what(address)` in another, then SIGTERM."""

    def serve(
        what: Callable[[str], Any], *settings: str, how: signal.Signals = signal.SIGTERM, **options: Any
    ) -> tuple[Client, Facts]:
        client = Client(copied.workspace, what, how)
        client.start()
        run_stage(Serve, copied.job(*VLLM, *settings, **options))
        client.join(20)
        facts = client.facts()
        assert facts
        return client, facts

    yield serve


def engine_of(folder: Path) -> int:
    return int((folder / "engine.pid").read_text())


def body(tokens: int = 2) -> dict[str, Any]:
    return {"model": "small-merged", "max_tokens": tokens, "messages": [{"role": "user", "content": "q"}]}


def post(address: str, path: str = "chat/completions", tokens: int = 2, **headers: str) -> httpx.Response:
    return httpx.post(f"{address}/{path}", json=body(tokens), headers=headers, timeout=20)


def test_a_server_answers_drains_on_sigterm_and_its_record_counts(
    served: Callable[..., tuple[Client, Facts]], copied: "Trained", capfd: pytest.CaptureFixture[str]
) -> None:
    streamed: list[str] = []
    told: list[int] = []
    begun = threading.Event()
    late: list[threading.Thread] = []

    def listen(address: str) -> None:
        ready = address.removesuffix("/v1") + "/ready"
        with httpx.stream("POST", f"{address}/chat/completions", json=body(100), timeout=20) as answer:
            for line in answer.iter_lines():
                streamed.append(line)
                begun.set()
                if not told and httpx.get(ready, timeout=20).status_code == 503:
                    told.append(post(address).status_code)

    def ask(address: str) -> list[int]:
        statuses = [post(address).status_code, post(address, tokens=ONE_TOO_MANY).status_code]
        statuses += [
            httpx.get(address.removesuffix("/v1") + path).status_code for path in ("/ready", "/", "/v1/models")
        ]
        late.append(threading.Thread(target=listen, args=[address]))
        late[0].start()
        assert begun.wait(20)  # it runs while SIGTERM comes
        return statuses

    client, facts = served(ask)
    assert client.found == [200, 400, 200, 200, 200]
    late[0].join(20)
    assert streamed.count("data: word") == 100 and "data: [DONE]" in streamed
    assert told == [503], "vLLM would still take it"
    assert (facts.status, facts.results.pop("address")[:17]) == ("complete", "http://127.0.0.1:")
    assert facts.results == {
        "model": "small-merged", "backend": "vllm", "version": "0.32.0", "reason": "asked for, its CPU build",
        "requests": 2, "refused": 2, "errors": 0, "completion_tokens": 102,
    }  # fmt: skip
    said = capfd.readouterr().err
    assert (
        "vllm 0.32.0: asked for, its CPU build" in said and "served 2 requests, 102 tokens; 2 refused, 0 failed" in said
    )
    folder = next(path for path in copied.workspace.experiments.glob("EXP-*") if (path / "engine.pid").exists())
    assert "Application shutdown complete" in (folder / "vllm.log").read_text()
    until(lambda: not runs(engine_of(folder)))


def test_ctrl_c_is_as_good_and_a_key_is_asked_for_everywhere_and_stands_nowhere(
    served: Callable[..., tuple[Client, Facts]], copied: "Trained", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", KEY)

    def ask(address: str) -> list[int]:
        root = address.removesuffix("/v1")
        rating = {"answer": "a", "rating": "up", "messages": [{"role": "user", "content": "q"}]}
        known = {"Authorization": f"Bearer {KEY}"}
        return [
            post(address).status_code,
            post(root, "invocations").status_code,
            httpx.get(f"{root}/health").status_code,
            post(address, **known).status_code,
            post(root, "invocations", **known).status_code,
            httpx.post(f"{address}/feedback", json=rating, headers=known).status_code,
        ]

    client, facts = served(ask, how=signal.SIGINT)
    assert client.found == [401, 401, 200, 200, 404, 201] and facts.status == "complete"
    folder = next(path for path in copied.workspace.experiments.glob("EXP-*") if (path / "engine.pid").exists())
    kept = json.loads((folder / "feedback.jsonl").read_text())
    assert (kept["model"], kept["contract"]) == ("small-merged", facts.data["contract"])
    files = [path for path in [folder.with_suffix(".yaml"), *folder.rglob("*")] if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            "dies",
            "vLLM ended with exit code 1 before it was ready: ValueError: To serve at least one request, 9 GiB KV cache",
        ),
        ("crashes", "vLLM was killed by SIGSEGV while it served"),
    ],
)
def test_its_death_fails_the_stage_with_the_line_of_its_log_that_says_why(
    copied: "Trained", monkeypatch: pytest.MonkeyPatch, how: str, told: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", how)

    def ask(address: str) -> None:
        post(address)
        with pytest.raises(httpx.TransportError):
            post(address, tokens=ONE_TOO_MANY)

    client = Client(copied.workspace, ask, signal.SIGTERM)
    monkeypatch.setattr(client, "how", 0)  # nobody asks it to stop
    if how == "crashes":
        client.start()
    with pytest.raises(StageFailed) as failure:
        run_stage(Serve, copied.job(*VLLM))
    assert str(failure.value).startswith(told) and "vllm.log" in str(failure.value)
    facts = client.facts()
    assert facts and facts.failure and facts.status == "failed" and told in facts.failure.message
    assert facts.results.get("requests") == (1 if how == "crashes" else None)


def test_stopped_while_it_loads_the_record_is_cancelled_and_nothing_runs_on(
    copied: "Trained", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "never ready")
    experiments, found = copied.workspace.experiments, []

    def interrupt() -> None:
        until(lambda: any((path / "engine.pid").exists() for path in experiments.glob("EXP-*")))
        folder = next(path for path in experiments.glob("EXP-*") if (path / "engine.pid").exists())
        until(lambda: (folder / "engine.pid").read_text() != "")
        found.append(engine_of(folder))
        os.kill(os.getpid(), signal.SIGTERM)

    client = Client(copied.workspace, lambda _: None, signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        run_stage(Serve, copied.job(*VLLM))
    facts = client.facts()
    assert facts and facts.status == "cancelled"
    until(lambda: not runs(found[0]))


def test_a_server_that_heeds_no_sigterm_is_killed_and_the_record_is_complete(
    served: Callable[..., tuple[Client, Facts]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    monkeypatch.setattr(child, "MARGIN", 0.3)
    _, facts = served(lambda address: post(address).status_code, "serve_config.drain_timeout=0.2")
    assert facts.status == "complete" and facts.results["requests"] == 1
    assert "vLLM did not end within 0.5 s of SIGTERM and was killed" in capfd.readouterr().err


def test_the_dry_run_tells_the_choice_and_starts_nothing(copied: "Trained", capfd: pytest.CaptureFixture[str]) -> None:
    from pipeline.stage import dry_run

    before = sorted(copied.workspace.experiments.iterdir())
    dry_run(Serve, copied.job(*VLLM, source=copied.dpo))
    said = capfd.readouterr().err
    assert "backend   vllm 0.32.0: asked for, its CPU build" in said and "adapters  small-dpo, rank 16" in said
    assert sorted(copied.workspace.experiments.iterdir()) == before
