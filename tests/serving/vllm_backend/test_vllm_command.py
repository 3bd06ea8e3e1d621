"""vLLM's command and variables: what it is told, and what is refused before it starts."""

import itertools
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import UserError
from pipeline.stage import Job
from pipeline.workspace import CHECKOUT
from serving.serve import Serve
from serving.vllm_backend.server import VllmServer, check_args
from tests.serving.vllm_backend.fake_vllm import VLLM, install

if TYPE_CHECKING:
    from tests.conftest import Trained

pytestmark = pytest.mark.usefixtures("environment")
KEY = secrets.token_hex()  # not a literal: a record keeps the patch of the working tree


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
    listed = server.variables(Path("x"), Path("f"), "small-dpo")["ALETHEIA_MODELS"]
    assert json.loads(listed) == ["small-dpo", trained.sft, "tiny"], "clients take the first, and the base is the last"
    assert [taken.id for taken in Serve.prepare(job).inputs] == [trained.dpo, trained.sft]


def test_keys_and_switches_travel_by_environment(
    trained: "Trained", prepared: Callable[[Job], VllmServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, files = prepared(trained.job(*VLLM, "serve_config.threads=3")), Path("/record/vllm")
    variables = server.variables(files, Path("/record/feedback.jsonl"), "small-merged")
    assert variables.items() >= {
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "3", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "ALETHEIA_MODEL": "small-merged",
        "ALETHEIA_MODELS": '["small-merged"]', "ALETHEIA_CONTEXT": "2048", "VLLM_MAX_STOP_STRINGS": "16",
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
