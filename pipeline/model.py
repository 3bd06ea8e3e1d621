"""The base model: found, checked against the machine, loaded. Only safetensors; remote code only when asked.

`find_base` is cheap and comes before a record exists: it says in one line what is missing (a GPU, the hub, a folder).
`load` reads the weights.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Chat, Contract
from pipeline.errors import UserError
from pipeline.merging.shards import shards, tensors
from pipeline.profile import Profile
from pipeline.progress import say
from pipeline.quiet import no_weight_bars
from pipeline.records.find import sha256
from pipeline.stage import Source
from pipeline.workspace import Workspace

HUB_TIMEOUT = 5.0  # seconds; a hub that answers does so at once
TINY_REMEDY = "PROFILE=tiny, which needs no GPU and no hub"
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Base:
    """A base model on disk: a plain `transformers` folder, its identity and where it will run."""

    name: str
    revision: str | None
    folder: Path
    device: str  # cuda | cpu
    dtype: str | None  # bfloat16 | float32 | None: as stored
    quantization: str  # none | nf4 | int8; auto until a training has chosen
    trust_remote_code: bool

    def identity(self) -> dict[str, Any]:
        """For the record: one hash over the weights' files and the configuration that says how they compute."""
        files = [*shards(self.folder), self.folder / "config.json"]
        digest = hashlib.sha256("".join(f"{f.name} {sha256(f)}\n" for f in files).encode()).hexdigest()
        return {"name": self.name, "revision": self.revision, "sha256": digest}

    @property
    def stored_quantised(self) -> bool:
        """Raises `UserError` for a configuration that is no JSON."""
        path = self.folder / "config.json"
        try:
            return "quantization_config" in json.loads(path.read_text("utf-8"))
        except ValueError:
            raise UserError("is no JSON", where=str(path), remedy="fetching the model again") from None

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    def chat(self) -> Chat:
        return Chat(self.tokenizer(), self.name)

    def load(self, quantized: bool = False) -> Any:
        """The model in eval mode. Quantised only for training: merge and evaluation use the base as it is stored."""
        return load_model(self.folder, self, self.quantization if quantized else "none")

    @property
    def context(self) -> int | None:
        """Tokens the model was made for."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        return getattr(config, "max_position_embeddings", None)


def find_base(workspace: Workspace, profile: Profile, before_download: Callable[[], None] = lambda: None) -> Base:
    """`before_download` may refuse. Raises `UserError` when the machine, the hub or the folder is not there."""
    config = profile.config
    device = _device(profile)
    folder, revision = _folder(workspace, profile, before_download)
    if not any(folder.glob("*.safetensors")):
        raise profile.error("base_model", f"{folder} holds no .safetensors", "a model with safetensors weights")
    tensors(folder)  # their headers alone
    dtype = {
        "bf16": "bfloat16",
        "fp16": "float16",
        "fp32": "float32",
        "auto": "bfloat16" if device == "cuda" else None,
    }[config.precision]
    return Base(config.base_model, revision, folder, device, dtype, config.quantization, config.trust_remote_code)


def read_config(workspace: Workspace, profile: Profile) -> Any:
    """The base's `transformers` configuration, without its weights. Raises `UserError` when it cannot be had."""
    from transformers import AutoConfig

    name, trust = profile.config.base_model, profile.config.trust_remote_code
    folder = _local_folder(workspace, profile)
    if folder is not None:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=profile.config.revision)
    if isinstance(cached, str):
        return AutoConfig.from_pretrained(Path(cached).parent, trust_remote_code=trust)
    commit = _commit_on_hub(profile, name, profile.config.revision)
    return AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=trust)


def load_model(folder: Path, base: Base, quantization: str = "none") -> Any:
    """A causal language model from a plain folder, where and how `base` says."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    no_weight_bars()
    options: dict[str, Any] = {"dtype": base.dtype or "auto", "device_map": {"": base.device}}
    if quantization == "nf4":
        import torch

        compute = torch.bfloat16 if base.device == "cuda" else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    elif quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=base.trust_remote_code, **options
    )
    if quantization == "nf4" and base.device == "cpu":
        from pipeline.private import keep_4bit_layout

        keep_4bit_layout(model)
    return model.eval()


def check_trained_on(
    base: Base, chat: Chat, workspace: Workspace, source: Source, identity: Callable[[], dict[str, Any]] | None = None
) -> None:
    """Raises `UserError` when an adapter was trained with another template, or on other weights, than the base has now.

    `identity` waits for the base's, where that has been begun.
    """
    if Contract.load(source.output) != chat.contract:
        raise UserError(
            "was trained with another chat template than the base has now",
            where=workspace.shown(source.output),
            remedy="training again on this base",
        )
    if (source.facts.lineage.base or {}).get("sha256") != (identity or base.identity)()["sha256"]:
        raise UserError(
            "was trained on other weights than this base's",
            where=workspace.shown(source.file.path),
            remedy="training again on this base",
        )


def say_other_quantization(source: Source, base: Base) -> None:
    """An adapter that goes on over another quantisation of its base than it was trained over goes on from another model."""
    before = source.facts.results.get("training", {}).get("quantization", base.quantization)
    if before != base.quantization:
        say(
            f"note: the adapter of {source.file.id} was trained over quantization {before}, here it is {base.quantization}"
        )


def _device(profile: Profile) -> str:
    wanted = profile.config.device
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise profile.error("device", "needs a CUDA GPU and this machine shows none", TINY_REMEDY)
    return "cpu"


def _folder(workspace: Workspace, profile: Profile, before_download: Callable[[], None]) -> tuple[Path, str | None]:
    folder = _local_folder(workspace, profile)
    if folder is not None:
        return folder, None
    return _from_hub(profile, profile.config.base_model, profile.config.revision, before_download)


def _local_folder(workspace: Workspace, profile: Profile) -> Path | None:
    """None for a name on the hub. Raises `UserError` for what is neither that nor a folder."""
    name = profile.config.base_model
    if name == "tiny":
        from pipeline.tiny import tiny_base

        return tiny_base()
    local = workspace.path(name)
    if local.is_dir():
        return local
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise profile.error(
            "base_model",
            f"there is no folder {local}",
            "a hub name such as deepseek-ai/deepseek-coder-7b-instruct-v1.5",
        )
    return None


def _from_hub(
    profile: Profile, name: str, revision: str, before_download: Callable[[], None]
) -> tuple[Path, str | None]:
    """The snapshot in the local cache, fetched when it is not there; its commit is the revision of the record."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder, folder.name
    except LocalEntryNotFoundError:
        pass
    commit = _commit_on_hub(profile, name, revision)
    before_download()
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=MODEL_FILES)), commit
    except Exception as error:  # the network again, or the disk: huggingface_hub keeps what has come
        what = f"the download of {name} broke off ({type(error).__name__}: {error})"
        raise profile.error("base_model", what, "the same command again: it goes on where it stopped") from None


def _commit_on_hub(profile: Profile, name: str, revision: str) -> str:
    """Asks the hub once, briefly. Raises `UserError` when it has no such model or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise profile.error(
            "base_model", f"the hub has no {name} at {revision}, or wants a login", "`hf auth login`"
        ) from None
    except Exception as error:  # whatever its HTTP library of the day raises: it could not be asked
        what = f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__})"
        raise profile.error("base_model", what, f"a local folder, or {TINY_REMEDY}") from None
