"""llama.cpp beside this environment: where it is, its converter, its quantiser, and a GGUF file as it reads it.

`make setup-llamacpp` builds it into `.venv-llamacpp` (`serving.llamacpp_backend.setup`). `aletheia export gguf` and the
`llamacpp` backend use it, each part as a program of its own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.chat import Chat
from pipeline.errors import StageFailed, UserError
from pipeline.to_gguf.convert import UNKNOWN
from pipeline.workspace import CHECKOUT, INSTALLED

SETUP = "make setup-llamacpp"
BLOCK = 64  # rows of logits read at once
HERE = Path(__file__).parent
_FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")
_CPU_FEATURE = re.compile(r"\b(?:avx|fma|f16c|bmi|amx|sve|asimd|i8mm)\w*")


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp, whole and built for this CPU."""

    folder: Path
    version: str  # of llama-cpp-python, whose source distribution it was built from

    @classmethod
    def find(cls) -> Self | None:
        """`ALETHEIA_LLAMACPP`, else `.venv-llamacpp` in the checkout; None where it is not, or not wholly, installed."""
        folder = environment_folder()
        with suppress(OSError, ValueError, KeyError, TypeError):
            stamp = json.loads((folder / INSTALLED).read_text("utf-8"))
            if set(stamp["cpu"]) <= set(cpu_features()):  # else it would die of an illegal instruction
                return cls(folder, stamp["version"])
        return None

    @classmethod
    def required(cls) -> Self:
        found = cls.find()
        if found is None:
            what = "is of another CPU" if (environment_folder() / INSTALLED).exists() else "is not installed"
            raise UserError(f"llama.cpp {what}", remedy=f"`{SETUP}`: about ten minutes, once")
        return found

    @property
    def tools(self) -> Path:
        return self.folder / "llama.cpp"

    def tool(self, name: str) -> str:
        return str(self.tools / "bin" / name)

    def converts(self, architecture: str) -> bool:
        """Whether its converter knows a model of this class."""
        return f'"{architecture}":' in (self.tools / "conversion" / "__init__.py").read_text("utf-8")

    def convert(self, model: Path, out: Path, end_of_turn: int, pre: str = "") -> bool:
        """A `transformers` folder as a GGUF file of 16-bit floats; whether the converter knew its pre-tokenizer.

        `pre`: the pre-tokenizer it is to name. Raises `StageFailed` with the converter's last line.
        """
        arguments = [str(self.tools), pre, str(end_of_turn), str(model), "--outtype", "f16", "--outfile", str(out)]
        return UNKNOWN not in _run([sys.executable, "-P", str(HERE / "convert.py"), *arguments])

    def quantise(self, source: Path, out: Path, kind: str, threads: int) -> str | None:
        """None, or what the quantiser had to keep at a wider type. Raises `StageFailed` with its last line."""
        said = _run([self.tool("llama-quantize"), str(source), str(out), kind.upper(), str(threads)])
        found = _FALLBACK.search(said)
        return f"{found[1]} of {found[2]} tensors are of a wider type: their rows do not divide" if found else None


def environment_folder() -> Path:
    return Path(os.environ.get("ALETHEIA_LLAMACPP") or CHECKOUT / ".venv-llamacpp").expanduser().absolute()


def cpu_features() -> list[str]:
    """Those of this CPU that a build for it may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(set(_CPU_FEATURE.findall(flags)))


def compute_threads() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or 1


def clean_environment() -> dict[str, str]:
    """Without the variables that would change llama.cpp behind the back of what is asked, and without our secrets."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_", "ALETHEIA_"))}


def _run(command: Sequence[str]) -> str:
    environment = clean_environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    said = done.stdout.decode("utf-8", "replace")  # what it shows of a vocabulary is cut anywhere
    if done.returncode:
        name = Path(command[2] if command[1] == "-P" else command[0]).name
        raise StageFailed(f"{name} failed: {_last_line(said)}")
    return said


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


class ReaderFailed(StageFailed, RuntimeError):
    """llama.cpp's process ended, with its last line: a stage fails, and to a server its backend did."""


class Reader:
    """A GGUF file in a process of its own: `facts` of its metadata, token ids of texts, logits of token ids.

    `context`: tokens; None loads no weights. `pre` reads it with another pre-tokenizer than it names. One question at a
    time.
    """

    def __init__(
        self, llama: LlamaCpp, file: Path, context: int | None = None, threads: int = 1, pre: str | None = None
    ) -> None:
        self.file = file
        options = json.dumps({"context": context, "threads": threads, "pre": pre})
        python = str(llama.folder / "bin" / "python")
        self._process = subprocess.Popen(
            [python, "-P", str(HERE / "worker.py"), str(llama.tools), str(file), options],
            stdin=subprocess.PIPE,  # it ends when nobody holds the other end any more
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(),
        )
        self.facts: dict[str, Any] = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def tokenize(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Special tokens in a text are parsed; `special` puts those before and after it that the file says."""
        self._ask({"texts": list(texts), "special": special})
        found: list[list[int]] = self._answer()
        return found

    def logits(self, tokens: Sequence[int], positions: Sequence[int]) -> Iterator[Any]:
        """numpy float32 arrays `(up to BLOCK, vocabulary)`, of the ascending `positions` in turn. To be read to its end."""
        import numpy as np

        self._ask({"tokens": list(tokens), "positions": list(positions)})
        vocabulary = self.facts["vocabulary"]
        for start in range(0, len(positions), BLOCK):
            rows = len(positions[start : start + BLOCK])
            raw = self._read(rows * vocabulary * 4)
            yield np.frombuffer(bytearray(raw), np.float32).reshape(rows, vocabulary)

    def _ask(self, question: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._failed()
        return json.loads(line)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        raw = self._process.stdout.read(size)
        if len(raw) < size:
            self._failed()
        return raw

    def _failed(self) -> None:
        _, said = self._process.communicate()
        raise ReaderFailed(f"{self.file.name}: {_last_line(said.decode('utf-8', 'replace'))}")


def check_metadata(facts: dict[str, Any], chat: Chat, vocabulary: int, name: str) -> None:
    """That a file carries this model's vocabulary, chat template and end-of-turn. Raises `UserError`."""
    if facts["vocabulary"] != vocabulary:
        raise UserError(f"has {facts['vocabulary']} tokens and the model {vocabulary}", where=name)
    if facts["tokenizer.chat_template"] != chat.tokenizer.chat_template:
        raise UserError("its chat template is not the one that was trained", where=name)
    if chat.end_of_turn_id not in facts["ends"]:
        raise UserError(f"it would not stop at the end-of-turn {chat.end_of_turn}", where=name)
