"""vLLM's server as a child: its command and variables, its life and its death, with a real child in vLLM's place."""

import itertools
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.stage import Job, run_stage
from pipeline.workspace import CHECKOUT, Workspace
from serving import child
from serving.serve import Serve
from serving.vllm_server import VllmServer, check_args
from tests.serving.fake_vllm import install
from tests.serving.processes import runs, until

if TYPE_CHECKING:
    from tests.conftest import Trained

VLLM = ("serve_config.backend=vllm", "serve_config.port=0", "serve_config.drain_timeout=5.0")
KEY = secrets.token_hex()  # not a literal: a record keeps the patch of the working tree


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole environment of vLLM's, and nothing of this machine's own settings."""
    monkeypatch.setenv("ALETHEIA_VLLM", str(install(tmp_path / "vllm-environment")))
    for name in ("ALETHEIA_API_KEY", "VLLM_API_KEY", "FAKE_VLLM", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(child, "POLL", 0.02)


@pytest.fixture
def prepared(request: pytest.FixtureRequest) -> Callable[[Job], VllmServer]:
    def prepare(job: Job) -> VllmServer:
        stage = Serve.prepare(job)
        request.addfinalizer(stage.listener.close)
        assert stage.vllm is not None
        return stage.vllm

    return prepare


def options(server: VllmServer) -> dict[str, str]:
    """The words of its command that have a value."""
    command = server.command("127.0.0.1", 8000, Path("/record/vllm"))
    assert command[1:4] in (
        ["-m", "vllm.entrypoints.openai.api_server", "--model"],
        ["-m", "vllm.entrypoints.cli.main", "serve"],
    )
    return {word: value for word, value in itertools.pairwise(command) if word.startswith("--")}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_serves_the_merged_model_by_its_name_and_contract(
    trained: "Trained", prepared: Callable[[Job], VllmServer], tmp_path: Path
) -> None:
    server = prepared(trained.job(*VLLM, "serve_config.max_concurrent=3"))
    words = options(server)
    assert (
        words.items()
        >= {
            "--model": str(trained.output("merge")),
            "--served-model-name": "small-merged",
            "--host": "127.0.0.1",
            "--port": "8000",
            "--dtype": "float32",  # as stored; vLLM's own choice would have 16 bits
            "--max-model-len": "2048",
            "--max-num-seqs": "3",
            "--chat-template": "/record/vllm/chat_template.jinja",
            "--chat-template-content-format": "string",
            "--generation-config": "/record/vllm",
            "--allowed-origins": "[]",
            "--shutdown-timeout": "5",
        }.items()
    )
    assert not words.keys() & {"--enable-lora", "--trust-remote-code", "--api-key", "--distributed-executor-backend"}
    server.write_files(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == (
        trained.output("merge") / "chat_template.jinja"
    ).read_text()
    roles = json.loads((tmp_path / "generation_config.json").read_text())
    assert roles["eos_token_id"] == server.chat.end_of_turn_id
    assert roles.keys() == {"eos_token_id", "bos_token_id", "pad_token_id"}  # no temperature, no penalty of the base's


def test_an_adapter_is_served_unmerged_over_its_base_with_others_beside_it(
    trained: "Trained", prepared: Callable[[Job], VllmServer]
) -> None:
    job = trained.job(*VLLM, f"serve_config.adapters=[{trained.sft}]", source=trained.dpo)
    server = prepared(job)
    words = options(server)
    assert (words["--model"], words["--served-model-name"]) == (str(server.base.folder), "tiny")
    assert (words["--max-loras"], words["--max-lora-rank"]) == ("2", "16")
    command = server.command("::1", 1, Path("x"))
    at = command.index("--lora-modules")
    assert [json.loads(word) for word in command[at + 1 : at + 3]] == [
        {"name": "small-dpo", "path": str(trained.output("dpo"))},
        {"name": trained.sft, "path": str(trained.output("sft"))},
    ]
    assert command[at + 3] == "--middleware" and "--enable-lora" in command
    assert [taken.id for taken in Serve.prepare(job).inputs] == [trained.dpo, trained.sft]


def test_keys_and_switches_travel_by_environment(
    trained: "Trained", prepared: Callable[[Job], VllmServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, files = prepared(trained.job(*VLLM, "serve_config.threads=3")), Path("/record/vllm")
    variables = server.variables(files, Path("/record/feedback.jsonl"), "small-merged")
    assert variables.items() >= {
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "3", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "ALETHEIA_MODEL": "small-merged",
        "ALETHEIA_CONTRACT": server.chat.contract.sha256, "ALETHEIA_FEEDBACK": "/record/feedback.jsonl",
    }.items()  # fmt: skip
    assert "VLLM_API_KEY" not in variables and variables["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("ALETHEIA_API_KEY", KEY)
    assert server.variables(files, Path("f"), "m")["VLLM_API_KEY"] == KEY
    assert not any(KEY in word for word in server.command("127.0.0.1", 1, files))


def test_on_a_cpu_the_kv_cache_is_what_the_requests_need_and_no_more_than_the_memory_allows(
    trained: "Trained", prepared: Callable[[Job], VllmServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kv_bytes(*settings: str) -> int:
        return int(options(prepared(trained.job(*VLLM, *settings)))["--kv-cache-memory-bytes"])

    config = json.loads((trained.output("merge") / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    a_token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head  # float32
    assert kv_bytes("serve_config.max_concurrent=1", "serve_config.context=512") == a_token * (512 + 128)
    assert kv_bytes("serve_config.max_concurrent=5", "serve_config.context=512") == 5 * a_token * (512 + 128)
    assert kv_bytes("serve_config.kv_cache_gb=0.25") == 250_000_000
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 12 * a_token * 640})())
    assert kv_bytes("serve_config.max_concurrent=5", "serve_config.context=512") == 3 * a_token * 640
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 0})())
    assert kv_bytes("serve_config.context=512") == a_token * 640  # one request fits, or vLLM does not start


def test_on_gpus_vllm_sizes_its_cache_and_more_gpus_than_here_are_reached_through_ray(
    trained: "Trained", prepared: Callable[[Job], VllmServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    folder = install(tmp_path / "cuda", "cuda")
    monkeypatch.setenv("ALETHEIA_VLLM", str(folder))
    gpus = (*VLLM, "device=auto", "serve_config.tensor_parallel=2")
    words = options(prepared(trained.job(*gpus)))
    assert words["--tensor-parallel-size"] == "2" and words["--dtype"] == "bfloat16"
    assert not words.keys() & {"--kv-cache-memory-bytes", "--pipeline-parallel-size", "--distributed-executor-backend"}

    nodes = (*gpus, "serve_config.pipeline_parallel=2")
    with pytest.raises(
        UserError, match=r"serve_config.pipeline_parallel: .*Ray, which vLLM's environment lacks; try .*pip"
    ):
        prepared(trained.job(*nodes))
    own = prepared(trained.job(*nodes, "serve_config.vllm_args=[--distributed-executor-backend=mp]"))
    assert [w for w in own.command("::", 1, Path("x")) if "executor" in w] == ["--distributed-executor-backend=mp"]
    (folder / "lib/python3.11/site-packages/ray").mkdir(parents=True)
    (folder / "lib/python3.11/site-packages/ray/__init__.py").touch()
    words = options(prepared(trained.job(*nodes)))
    assert (words["--pipeline-parallel-size"], words["--distributed-executor-backend"]) == ("2", "ray")


@pytest.mark.parametrize(
    "word",
    [
        "--chat-template=x", "--chat_template", "--chat-temp", "--served-model-name", "--trust-remote-code",
        "--no-trust-remote-code", "--host", "--port=1", "--api-key=x", "--api_k", "--config", "--uds", "--tokenizer-mode",
        "--generation-config", "--override-generation-config.top_k=3", "--lora-modules", "--trust-request-chat-template",
        "--allowed-origins", "--ssl-keyfile", "--model", "--",
    ],
)  # fmt: skip
def test_words_that_would_undo_a_promise_are_refused(job: Callable[..., Job], word: str) -> None:
    given = json.dumps(["--seed", "1", word])
    with pytest.raises(UserError, match=r"serve_config.vllm_args: `--.*` would undo what this server promises; try "):
        check_args(job(f"serve_config.vllm_args={given}"))


def test_other_words_are_passed_on(trained: "Trained", prepared: Callable[[Job], VllmServer]) -> None:
    given = [
        "--max-num-batched-tokens",
        "512",
        "--model-impl=auto",
        "-O3",
        "--enable-prefix-caching",
        "--port-range",
        "a b",
    ]
    job = trained.job(*VLLM, f"serve_config.vllm_args={json.dumps(given)}")
    assert prepared(job).command("127.0.0.1", 1, Path("x"))[-len(given) :] == given


# ── its life ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def post(address: str, path: str = "chat/completions", tokens: int = 2, **headers: str) -> httpx.Response:
    return httpx.post(f"{address}/{path}", json={"max_tokens": tokens, "messages": []}, headers=headers, timeout=20)


def test_a_server_answers_drains_on_sigterm_and_its_record_counts(
    served: Callable[..., tuple[Client, Facts]], copied: "Trained", capfd: pytest.CaptureFixture[str]
) -> None:
    running: list[httpx.Response] = []

    def ask(address: str) -> list[int]:
        late = threading.Thread(target=lambda: running.append(post(address, tokens=30)))
        statuses = [post(address).status_code, post(address, tokens=0).status_code]
        statuses += [
            httpx.get(address.removesuffix("/v1") + path).status_code for path in ("/ready", "/", "/v1/models")
        ]
        late.start()
        time.sleep(0.2)  # it runs while SIGTERM comes
        return statuses

    client, facts = served(ask)
    assert client.found == [200, 400, 200, 200, 200]
    assert running[0].text.count("word") == 30 and "[DONE]" in running[0].text
    assert (facts.status, facts.results.pop("address")[:17]) == ("complete", "http://127.0.0.1:")
    assert facts.results == {
        "model": "small-merged", "backend": "vllm", "version": "0.32.0", "reason": "asked for, its CPU build",
        "requests": 2, "refused": 1, "errors": 0, "completion_tokens": 32,
    }  # fmt: skip
    said = capfd.readouterr().err
    assert (
        "vllm 0.32.0: asked for, its CPU build" in said and "served 2 requests, 32 tokens; 1 refused, 0 failed" in said
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
            httpx.post(f"{address}/feedback", json=rating, headers=known).status_code,
        ]

    client, facts = served(ask, how=signal.SIGINT)
    assert client.found == [401, 401, 200, 200, 201] and facts.status == "complete"
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
            post(address, tokens=0)

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
