"""Which model is served, what is refused, and how a server begins and ends."""

import json
import secrets
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.testclient import TestClient

from pipeline.chat import CONTRACT_FILE, Chat, Contract
from pipeline.config import ServeConfig
from pipeline.data.rows import Message
from pipeline.errors import UserError
from pipeline.merge import Merge
from pipeline.model import Base, load_model
from pipeline.records.find import artifacts
from pipeline.stage import Job, run_stage
from serving.front.app import build_app
from serving.front.metrics import Usage
from serving.serve import Serve, load_source, model_name, servable
from serving.transformers_backend.engine import TransformersEngine

if TYPE_CHECKING:
    from tests.conftest import Said, Trained
    from tests.serving.conftest import Server

ANY_PORT = "serve_config.port=0"
KEY = secrets.token_hex()  # not a literal: a record keeps the patch of the working tree


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the backends that may be installed here."""
    monkeypatch.setenv("ALETHEIA_VLLM", str(tmp_path / "none"))
    monkeypatch.setenv("ALETHEIA_LLAMACPP", str(tmp_path / "none"))
    monkeypatch.delenv("ALETHEIA_API_KEY", raising=False)


@pytest.fixture
def prepare(request: pytest.FixtureRequest) -> Callable[[Job], Serve]:
    """`Serve.prepare`, its socket closed when the test ends."""

    def run(job: Job) -> Serve:
        prepared = Serve.prepare(job)
        request.addfinalizer(prepared.listener.close)
        return prepared

    return run


# ── from start to end ────────────────────────────────────────────────────────────────────────────────────────────────


def test_sigterm_lets_the_answer_finish_and_closes_a_complete_record(
    serve: "Callable[..., Server]", copied: "Trained"
) -> None:
    server = serve(copied.workspace, "--backend", "transformers")
    assert server.address.startswith("http://127.0.0.1:")
    client = server.client
    request: Any = {"model": server.model, "prompt": "def", "max_tokens": 60, "temperature": 0}
    whole = client.completions.create(**request)
    with pytest.raises(Exception, match="does not exist"):
        client.completions.create(**request | {"model": "gpt-4"})
    chunks = client.completions.create(**request, stream=True)
    streamed = next(chunks).choices[0].text
    server.process.terminate()
    streamed += "".join(chunk.choices[0].text for chunk in chunks)
    code, out, facts = server.ended()

    assert streamed == whole.choices[0].text
    assert code == 0
    assert out.startswith("experiments/EXP-") and out.count("\n") == 1
    assert (facts.status, facts.stage, facts.failure) == ("complete", "serve", None)
    assert [change.status for change in facts.history] == ["running", "complete"]
    assert facts.lineage.inputs[0].id == copied.merge
    assert facts.results == {
        "address": server.address, "model": "small-merged", "backend": "transformers", "reason": "asked for",
        "version": version("transformers"), "requests": 2, "refused": 1, "errors": 0, "cut_off": 0, "timed_out": 0,
        "prompt_tokens": 2 * whole.usage.prompt_tokens, "completion_tokens": 120,
    }  # fmt: skip


def test_a_key_is_asked_for_heads_are_limited_and_what_people_think_is_kept_beside_the_record(
    serve: "Callable[..., Server]", copied: "Trained", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", KEY)
    server = serve(copied.workspace, "--set", "serve_config.context=64")
    root, known = server.address.removesuffix("/v1"), {"Authorization": f"Bearer {KEY}"}
    rating = {"answer": "a", "rating": "up", "messages": [{"role": "user", "content": "q"}]}
    assert httpx.get(f"{root}/").headers["content-type"].startswith("text/html")
    assert httpx.get(f"{server.address}/models").status_code == 401
    assert httpx.get(f"{server.address}/models", headers=known).json()["data"][0]["max_model_len"] == 64
    with suppress(httpx.TransportError):  # it hangs up on what it does not read
        assert httpx.get(f"{root}/health", headers={"X": "x" * 200_000}).status_code == 400
    assert server.post("feedback", json=rating, headers=known).status_code == 201
    server.process.send_signal(signal.SIGHUP)  # a closed terminal
    code, out, facts = server.ended()
    assert (code, facts.status) == (0, "complete")
    folder = (copied.workspace.root / out.strip()).with_suffix("")
    assert json.loads((folder / "feedback.jsonl").read_text())["model"] == "small-merged"
    files = [path for path in [folder.with_suffix(".yaml"), *folder.rglob("*")] if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("taken", ["by a server", "by another that does not answer yet"])
def test_a_port_in_use_is_one_line(
    copied: "Trained", prepare: Callable[[Job], Serve], aletheia: "Callable[..., Said]", taken: str
) -> None:
    answering = taken == "by a server"
    other = socket.create_server(("127.0.0.1", 0)) if answering else prepare(copied.job(ANY_PORT)).listener
    port = other.getsockname()[1]
    before = sorted(copied.workspace.experiments.iterdir())
    said = aletheia(copied.workspace, "serve", "--profile", "small", "--port", str(port), "--dry-run")
    other.close()
    assert said.code == 2
    assert said.out == ""
    takes, error = said.err.splitlines()
    assert takes.startswith("takes merge")
    assert error == f"error: cannot listen on 127.0.0.1:{port}: Address already in use; try --port {port + 1}"
    assert sorted(copied.workspace.experiments.iterdir()) == before


def test_it_listens_on_this_machine_alone_unless_told_otherwise(
    trained: "Trained", prepare: Callable[[Job], Serve]
) -> None:
    assert prepare(trained.job(ANY_PORT)).listener.getsockname()[0] == "127.0.0.1"
    assert prepare(trained.job(ANY_PORT, "serve_config.host=0.0.0.0")).listener.getsockname()[0] == "0.0.0.0"


def test_every_token_is_sent_at_once(trained: "Trained", prepare: Callable[[Job], Serve]) -> None:
    """asyncio sets TCP_NODELAY only on sockets that name their protocol; without it each token waits for an ACK."""
    assert prepare(trained.job(ANY_PORT)).listener.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "203.0.113.7"])
def test_an_address_that_is_not_this_machines_is_one_line(trained: "Trained", host: str) -> None:
    with pytest.raises(UserError, match=f"cannot listen on {host}"):
        Serve.prepare(trained.job(ANY_PORT, f"serve_config.host={host}"))


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("vllm", "serve_config.backend: vLLM's environment is not installed here; try make setup-vllm"),
        ("llamacpp", "serve_config.backend: llama.cpp is not installed; try `make setup-llamacpp`"),
        ("ollama", "serve_config.backend: must be 'auto', 'vllm', 'transformers' or 'llamacpp', not 'ollama'"),
    ],
)
def test_a_backend_that_cannot_be_had_is_one_line(
    trained: "Trained", aletheia: "Callable[..., Said]", backend: str, told: str
) -> None:
    said = aletheia(trained.workspace, "serve", "--profile", "small", "--port", "0", "--backend", backend, "--dry-run")
    last = said.err.splitlines()[-1]
    assert said.code == 2 and last.startswith("error: ") and told in last


def test_the_dry_run_says_which_backend_and_why(trained: "Trained", aletheia: "Callable[..., Said]") -> None:
    said = aletheia(trained.workspace, "serve", "--profile", "small", "--port", "0", "--dry-run")
    assert said.code == 0 and f"backend  transformers {version('transformers')}: no GPU is used" in said.err


def test_more_context_than_the_model_holds_is_refused(trained: "Trained", prepare: Callable[[Job], Serve]) -> None:
    with pytest.raises(UserError, match=r"serve_config.context: the model holds 2048 tokens, not 4096; try 2048$"):
        Serve.prepare(trained.job(ANY_PORT, "serve_config.context=4096"))
    assert prepare(trained.job(ANY_PORT, "serve_config.context=512")).context == 512
    assert prepare(trained.job(ANY_PORT)).context == 2048


@pytest.mark.parametrize(
    ("host", "key", "told"),
    [("0.0.0.0", "", True), ("0.0.0.0", KEY, False), ("127.0.0.2", "", False)],
    ids=["open", "open, with a key", "loopback"],
)
def test_an_open_address_without_a_key_is_told(
    copied: "Trained",
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    host: str,
    key: str,
    told: bool,
) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", key)
    monkeypatch.setattr(Serve, "_engine", lambda _: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception):
        run_stage(Serve, copied.job(ANY_PORT, f"serve_config.host={host}"))
    assert (f"note: {host} is open to the network without an API key" in capfd.readouterr().err) == told


def test_a_key_that_can_never_work_is_refused_before_it_starts(
    trained: "Trained", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", "secret ")
    with pytest.raises(UserError, match="ALETHEIA_API_KEY: holds a space at an end"):
        Serve.prepare(trained.job(ANY_PORT))


# ── which model ──────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_of(job: Job, question: str) -> tuple[str, str]:
    """The name and the greedy answer of the model that the job would serve."""
    source, base, chat = servable(job)
    app = build_app(
        TransformersEngine(load_source(source, base), chat, 2048, 2), model_name(job, source), ServeConfig(), Usage()
    )
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
    with TestClient(app) as client:
        answer = client.post("/v1/chat/completions", json=body | {"model": model_name(job, source)}).json()
    return answer["model"], answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_adapter_served_unmerged_is_its_merged_model(
    copied: "Trained", base: Base, greedy: Callable[..., list[int]], tuned_chat: Chat, question: str, stage: str
) -> None:
    import torch

    job = copied.job(source=getattr(copied, stage))
    merged = run_stage(Merge, job).output / "model"
    prompt = tuned_chat.prompt([Message(role="user", content=question)])
    text = tuned_chat.tokenizer.decode(greedy(merged, prompt, 24), skip_special_tokens=True)
    assert answer_of(job, question) == (f"small-{stage}", text)

    source, _, _ = servable(job)
    with torch.inference_mode():
        served, whole, bare = (
            model(input_ids=torch.tensor([prompt])).logits
            for model in (load_source(source, base), load_model(merged, base), base.load())
        )
    assert (served - whole).abs().max() < 1e-3 < (served - bare).abs().max()


def test_the_merged_model_is_preferred_then_dpo_then_sft(copied: "Trained") -> None:
    names = []
    for _ in range(3):
        source, _, _ = servable(copied.job())
        names.append((source.file.id, model_name(copied.job(), source)))
        (copied.workspace.experiments / f"{source.file.id}.yaml").unlink()
    assert names == [(copied.merge, "small-merged"), (copied.dpo, "small-dpo"), (copied.sft, "small-sft")]
    with pytest.raises(UserError, match="no complete merge or dpo or sft record"):
        servable(copied.job())


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def rehash(copied: "Trained", stage: str) -> None:
    """The record takes the changed output for its own, so that only the contract can tell."""
    file = copied.record(stage)
    facts = file.facts()
    assert facts is not None
    facts.artifacts = artifacts(copied.workspace, copied.output(stage))
    file.write(facts)


@pytest.mark.parametrize("stage", ["merge", "dpo"])
def test_a_chat_template_that_is_not_the_trained_one_is_refused(copied: "Trained", stage: str) -> None:
    template = copied.output(stage) / "chat_template.jinja"
    template.write_text(template.read_text().replace("### Instruction", "### Question"))
    rehash(copied, stage)
    with pytest.raises(UserError, match="its chat template is not the one it was trained with"):
        servable(copied.job(source=getattr(copied, stage)))


def test_a_contract_that_is_gone_or_torn_is_refused(copied: "Trained") -> None:
    contract = copied.output("merge") / CONTRACT_FILE
    assert Contract.load(contract.parent)
    for break_it in (lambda: contract.write_text(contract.read_text()[:40]), contract.unlink):
        break_it()
        rehash(copied, "merge")
        with pytest.raises(UserError, match="no readable chat_contract"):
            servable(copied.job())


def test_a_model_that_was_changed_since_is_refused(copied: "Trained") -> None:
    weights = copied.output("merge") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="was changed since"):
        servable(copied.job())


def test_only_a_complete_record_of_a_servable_stage_is_served(copied: "Trained") -> None:
    facts = copied.record("dpo").facts()
    assert facts is not None
    facts.status = "failed"
    copied.record("dpo").write(facts)
    with pytest.raises(UserError, match="is failed, not complete"):
        servable(copied.job(source=copied.dpo))
    with pytest.raises(UserError, match="there is no record"):
        servable(copied.job(source="EXP-2000-01-01-001"))
