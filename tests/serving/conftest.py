"""A server in a process of its own, and the greedy text that plain transformers gives."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from pipeline.chat import Chat
from pipeline.data.read import read_rows
from pipeline.data.rows import Message, Question
from pipeline.model import Base
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace
from tests.forked import Forked

if TYPE_CHECKING:
    from tests.conftest import Trained


@dataclass
class Server:
    """`aletheia serve`, ready."""

    process: Forked
    workspace: Workspace
    model: str
    address: str  # http://127.0.0.1:8000/v1

    def post(self, path: str, **request: object) -> httpx.Response:
        return httpx.post(f"{self.address}/{path}", timeout=60, **request)  # type: ignore[arg-type]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=60)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=60)

    def ended(self) -> tuple[int, str, Facts]:
        """Waits for its end: exit code, stdout and the record."""
        out, _ = self.process.communicate(timeout=60)
        facts = RecordFile(self.workspace.root / out.strip()).facts()
        assert facts is not None
        return self.process.returncode, out, facts


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`serve(workspace, "--from", "EXP-…")` starts a server on a free port and waits until it answers."""
    started: list[Forked] = []

    def start(workspace: Workspace, *options: str) -> Server:
        process = Forked(
            tmp_path_factory.mktemp("serve") / "said",
            *("serve", "--profile", "small", "--port", "0", *options),
            environment=os.environ | {"ALETHEIA_ROOT": str(workspace.root)},
        )
        started.append(process)
        said = []
        for line in process.errors():
            said.append(line)
            if found := re.match(r"serving (\S+) at (\S+)", line):
                httpx.get(found[2].removesuffix("/v1") + "/health", timeout=60).raise_for_status()
                return Server(process, workspace, found[1], found[2])
        raise AssertionError(f"the server ended: {''.join(said)}")

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def greedy() -> Callable[..., list[int]]:
    """`greedy(folder, prompt, 40)`: the token ids that plain `generate()` adds, the end-of-turn included."""
    import torch
    from transformers import AutoModelForCausalLM

    models: dict[Path, object] = {}

    def generate(folder: Path, prompt: Sequence[int], max_tokens: int) -> list[int]:
        if folder not in models:
            models[folder] = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            output = models[folder].generate(  # type: ignore[attr-defined]
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                do_sample=False,
                max_new_tokens=max_tokens,
            )
        return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


@pytest.fixture(scope="session")
def tuned_chat(trained: "Trained") -> Chat:
    """The chat template that the merged model carries."""
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(trained.output("merge")), "merged")


@pytest.fixture(scope="session")
def question(trained: "Trained", base: Base, tuned_chat: Chat, greedy: Callable[..., list[int]]) -> str:
    """One that the base and the merged model answer differently: the answer tells which of them gave it."""
    for row in read_rows(trained.workspace, "data/eval/questions", Question):
        prompt = tuned_chat.prompt([Message(role="user", content=row.prompt)])
        if greedy(base.folder, prompt, 24) != greedy(trained.output("merge"), prompt, 24):
            return row.prompt
    raise AssertionError("the base and the merged model answer every question alike")
