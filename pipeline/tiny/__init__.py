"""The embedded base model `tiny`: a small Llama that needs no model hub.

    aletheia sft --profile tiny      # builds it on first use, about a minute on two cores, and caches it

A 1.3M-parameter `LlamaForCausalLM` with a byte-level BPE tokenizer and DeepSeek-Coder's chat template and token
roles, so everything downstream runs the code it runs for the 7B model. It is pretrained on `corpus.jsonl` with fixed
seeds and kept under a hash of everything that determines it (`recipe.py`). It is big enough to learn the form of an
answer and where to stop, and too small to learn content: its figures prove the pipeline, not a model.
"""

import hashlib
import os
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from pipeline.progress import say

HERE = Path(__file__).parent
DETERMINING = ("corpus.jsonl", "chat_template.jinja", "recipe.py")


def tiny_base() -> Path:
    """The folder of the embedded base, a plain `transformers` checkpoint; built when the cache has none."""
    from filelock import FileLock

    cache = Path(os.environ.get("ALETHEIA_CACHE") or Path.home() / ".cache" / "aletheia")
    folder = cache / f"tiny-{_recipe_hash()}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build_whole(cache, folder)
    return folder


def _build_whole(cache: Path, folder: Path) -> None:
    """Built aside and renamed: a folder of that name is always whole."""
    from pipeline.tiny.recipe import build

    say("building the embedded base model `tiny`: once, about a minute on two cores")
    unfinished = Path(tempfile.mkdtemp(dir=cache, prefix="building-"))
    try:
        build(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _recipe_hash() -> str:
    """Twelve hex digits over all that determines the weights: text, recipe, libraries, processor family."""
    digest = hashlib.sha256()
    for name in DETERMINING:
        digest.update((HERE / name).read_bytes())
    digest.update(" ".join(version(p) for p in ("torch", "tokenizers", "transformers")).encode())
    digest.update(platform.machine().encode())
    return digest.hexdigest()[:12]
