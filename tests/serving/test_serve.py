"""Which model is served, what is refused, and how a server begins and ends."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from pipeline.chat import CONTRACT_FILE, Chat, Contract
from pipeline.data.rows import Message
from pipeline.errors import UserError
from pipeline.merge import Merge
from pipeline.model import Base, load_model
from pipeline.records.find import artifacts
from pipeline.stage import Job, run_stage
from serving.app import Usage, build_app
from serving.serve import Serve, load_source, model_name, servable
from serving.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    from tests.conftest import Said, Trained
    from tests.serving.conftest import Server

ANY_PORT = "serve_config.port=0"


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
    server = serve(copied.workspace)
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
        "address": server.address, "model": "small-merged", "backend": "transformers", "requests": 2, "refused": 1,
        "errors": 0, "prompt_tokens": 2 * whole.usage.prompt_tokens, "completion_tokens": 120,
    }  # fmt: skip


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


# ── which model ──────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_of(job: Job, question: str) -> tuple[str, str]:
    """The name and the greedy answer of the model that the job would serve."""
    source, base, chat = servable(job)
    app = build_app(TransformersEngine(load_source(source, base), chat, 2048, 2), model_name(job, source), 512, Usage())
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
