"""A trained adapter, and what it makes of a base weight: LoRA, rsLoRA and DoRA on linear layers.

    LoRA    W' = W + s·B·A, s = alpha / r             arXiv 2106.09685
    rsLoRA  the same, s = alpha / sqrt(r)             arXiv 2312.03732
    DoRA    W' = m · V / ‖V‖, V = W + s·B·A           arXiv 2402.09353; m and the norm: a value for each row of V

Which modules an adapter has, and each one's scale (rank and alpha patterns included), is asked of peft: it lays the
adapter's configuration over the base without weights. So a module that the file lacks, or a key too many, is seen.
Anything else than these three is refused, and so is an option of peft's that is not known here.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.shards import read_tensor, tensor_names

# keys of adapter_config.json that are handled, or mean nothing to a merge; any other must be off
HANDLED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
FRESH = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # other ways to begin (PiSSA, OLoRA, LoftQ) change the base's weights too
OTHERWISE = "training without it, or serving the adapter unmerged"
PREFIX = "base_model.model."
BLOCK = 1 << 17  # elements worked on at once: about what a core's cache holds, four times as fast as a whole matrix
UNIT = 2**-24  # unit roundoff of float32


@dataclass(frozen=True)
class Update:
    """One linear layer's adapter, float32: A `(rank, in)`, B `(out, rank)`, and for DoRA the magnitude `(out,)`."""

    a: Any
    b: Any
    scale: float
    magnitude: Any = None

    def merged(self, weight: Any) -> Any:
        """`weight` `(out, in)` with the adapter in it: summed in float32, rounded once to the weight's dtype."""
        import torch

        merged = torch.empty_like(weight)
        for rows in blocks(weight):
            total = weight[rows].to(torch.float32, copy=True).addmm_(self.b[rows], self.a, alpha=self.scale)
            if self.magnitude is not None:
                norm = torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)
                total.mul_((self.magnitude[rows] / norm).float()[:, None])
            merged[rows] = total
        return merged

    def exact(self, weight: Any) -> Iterator[tuple[slice, Any, Any]]:
        """Rows, their merged weight in float64, and how far `merged` may be from it before its last rounding.

        The bound is that of a sum of rank + 1 products in float32 (Higham 2002, section 3.1), with |B|·|A| ≤ ‖B‖‖A‖.
        """
        import torch

        a, b = self.a.double(), self.b.double()
        a_norm, b_norm, share = a.norm(dim=0), b.norm(dim=1), (len(a) + 4) * UNIT
        for rows in blocks(weight):
            old = weight[rows].to(torch.float64, copy=True)
            total = old.addmm(b[rows], a, alpha=self.scale)
            error = old.abs_().addr_(b_norm[rows], a_norm, beta=share, alpha=share * abs(self.scale))
            if self.magnitude is not None:
                norm = total.norm(dim=1, keepdim=True)
                factor = self.magnitude[rows].double()[:, None] / norm
                error.addcmul_(total.abs(), error.norm(dim=1, keepdim=True) / norm + 4 * UNIT).mul_(factor.abs())
                total.mul_(factor)
            yield rows, total, error


@dataclass(frozen=True)
class Adapter:
    """The updates of a whole model, by the name of the base weight each belongs to."""

    kind: str  # LoRA | rsLoRA | DoRA | rsLoRA and DoRA
    updates: dict[str, Update]

    def merged(self, name: str, weight: Any) -> Any:
        """The weight itself where no update belongs to it."""
        return self.updates[name].merged(weight) if name in self.updates else weight


def blocks(weight: Any) -> Iterator[slice]:
    """Slices of a matrix's rows, so that a block's temporaries stay in the cache."""
    step = max(1, BLOCK // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def read(folder: Path, base: Path, trust_remote_code: bool = False) -> Adapter:
    """The adapter in `folder`, for the model in `base`.

    Raises `UserError` for an adapter that cannot be merged, and for a key that is missing or left over.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    _refuse_options(config, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    stored = set(tensor_names(base))
    updates = {}
    for module, layer in layers(_without_weights(folder, base, trust_remote_code), str(folder)):
        name, scale, rank = f"{module}.weight", layer.scaling["default"], layer.r["default"]
        if name not in stored:
            raise UserError(f"the adapter's {name} is no weight of the base", where=str(folder))
        out, into = layer.out_features, layer.in_features
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, into), "lora_B.weight": (out, rank)}
        if layer.use_dora["default"]:
            shapes["lora_magnitude_vector"] = (out,)
        parts: list[Any] = []
        for part, shape in shapes.items():
            tensor = tensors.pop(key := f"{PREFIX}{module}.{part}", None)
            if tensor is None:
                raise UserError(f"the adapter lacks {key}, which its configuration asks for", where=str(folder))
            if tuple(tensor.shape) != shape:
                raise UserError(f"the adapter's {key} is {tuple(tensor.shape)}, not {shape}", where=str(folder))
            parts.append(tensor.float())
        updates[name] = Update(parts[0], parts[1], scale, parts[2] if len(parts) > 2 else None)
    for key, tensor in tensors.items():
        if not _copy_of_base(key, tensor, base, updates):
            raise UserError(f"the adapter's key {key} is left over", where=str(folder))
    kinds = [kind for kind, on in (("rsLoRA", config.get("use_rslora")), ("DoRA", config.get("use_dora"))) if on]
    return Adapter(" and ".join(kinds) or "LoRA", updates)


def _refuse_options(config: dict[str, Any], folder: Path) -> None:
    """Raises `UserError`, naming every option that a merge would get wrong."""
    wrong = sorted(key for key, value in config.items() if key not in HANDLED and value and value != "none")
    if config.get("peft_type") != "LORA":
        wrong = [str(config.get("peft_type"))]
    elif config.get("init_lora_weights", True) not in FRESH:
        wrong.append(f"init_lora_weights: {config['init_lora_weights']}")
    if wrong:
        raise UserError(
            f"merge handles LoRA, rsLoRA and DoRA, not {', '.join(wrong)}",
            where=str(folder / "adapter_config.json"),
            remedy=OTHERWISE,
        )


def layers(adapted: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of every module that a `PeftModel` has put an adapter on.

    Raises `UserError` for one that is no linear layer, or whose weight another module shares: it could not be merged.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    uses = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
    for name, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, inner = name.removeprefix(PREFIX), layer.get_base_layer()
        if not isinstance(inner, torch.nn.Linear):
            raise UserError(f"the adapter is on {name}, which is no linear layer", where=where, remedy=OTHERWISE)
        if uses[id(inner.weight)] > 1:
            what = f"the adapter is on {name}, whose weight is tied to another module's"
            raise UserError(what, where=where, remedy=OTHERWISE)
        yield name, layer


def _without_weights(folder: Path, base: Path, trust_remote_code: bool) -> Any:
    """The base with the adapter's configuration laid over it by peft, on the meta device."""
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    config = PeftConfig.from_pretrained(folder)
    config.init_lora_weights = True
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # what it warns of is refused
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # no module of that name, for one
            raise UserError(str(error), where=str(folder / "adapter_config.json")) from None


def _copy_of_base(key: str, tensor: Any, base: Path, updates: dict[str, Update]) -> bool:
    """Whether it is the base's own weight, which peft puts beside the adapter of an output layer."""
    import torch

    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if ".base_layer." not in key or name not in updates:
        return False
    return torch.equal(read_tensor(base, name).to(tensor.dtype), tensor)
