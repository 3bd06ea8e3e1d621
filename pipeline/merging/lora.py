"""A trained adapter: which tensors of its base it changes, and each change (`pipeline.merging.update`).

LoRA, rsLoRA and DoRA on linear layers and embeddings, modules and biases that were trained whole, single tokens' rows.
Which of them an adapter has, and each one's scale (rank and alpha patterns included), is asked of peft: it lays the
adapter's configuration over the base without weights. So a tensor that the file lacks, or a key too many, is seen.
Anything else is refused, and so is an option of peft's that is not known (`pipeline.merging.adapter_config`).
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import AletheiaError, UserError
from pipeline.merging import adapter_config
from pipeline.merging.adapter_config import OTHERWISE
from pipeline.merging.safetensors_header import AGAIN
from pipeline.merging.shards import FLOATS, Memory, Stored, stored, tensors
from pipeline.merging.update import Adapter, Change, Factor, LowRank, Replacement, Rows, Update, Updates
from pipeline.quiet import no_weight_bars

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def read(folder: Path, base: Path, trust_remote_code: bool = False) -> Adapter:
    """The adapter in `folder`, for the model in `base`. What is returned can be sent to another process.

    Raises `UserError` for an adapter that cannot be merged, and for a key that is missing or left over.
    """
    where = str(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise UserError(f"holds no {missing[0]}", where=where, remedy="a folder that peft saved as safetensors")
    config = adapter_config.read(folder / CONFIG)
    reader = _Reader(where, stored(folder / WEIGHTS), tensors(base))
    adapted = _without_weights(folder, base, reader.base, trust_remote_code)
    for module, layer in layers(adapted, where, embeddings=True):
        reader.low_rank(module, layer)
    for group, keys in _trained_whole(adapted, where):
        reader.replaced(group, keys)
    for group, tokens in _trained_tokens(adapted, where):
        reader.tokens(group, tokens)
    for key in _trained_biases(adapted, config.get("bias", "none")):
        reader.replaced([key.replace(".base_layer.", ".")], [key])
    reader.refuse_left_over()
    kinds = [kind for kind, on in (("rsLoRA", config.get("use_rslora")), ("DoRA", config.get("use_dora"))) if on]
    return Adapter(" and ".join(kinds) or "LoRA", Updates(reader.changes))


class _Reader:
    """Takes an adapter's tensors one after the other, and knows what is left over."""

    def __init__(self, where: str, given: dict[str, Stored], base: dict[str, Stored]) -> None:
        self.where, self.given, self.base = where, given, base
        self.changes: dict[str, Change] = {}
        self.memory = Memory()

    def low_rank(self, module: str, layer: Any) -> None:
        scale, rank, dora = layer.scaling["default"], layer.r["default"], layer.use_dora["default"]
        out, into = self._shape(f"{module}.weight")
        embedding = not hasattr(layer.get_base_layer(), "out_features")
        if embedding:  # its weight is the other way round: tokens by width
            a = self._take(f"{module}.lora_embedding_A", (rank, out))
            b = self._take(f"{module}.lora_embedding_B", (into, rank))
        else:
            a = self._take(f"{module}.lora_A.weight", (rank, into))
            b = self._take(f"{module}.lora_B.weight", (out, rank))
        magnitude = self._take(f"{module}.lora_magnitude_vector", (into if embedding else out,)) if dora else None
        load = partial(_low_rank, a, b, scale, magnitude, embedding)
        self._change([f"{module}.weight"], Change(load, adds_up=True))

    def replaced(self, group: list[str], keys: list[str]) -> None:
        """`group`: names of one tensor that is tied; `keys`: the adapter's of it."""
        taken = [self._take(key, self._shape(self._name(group))) for key in keys]
        first = taken[0]
        if any(_differ(first, other) for other in taken[1:]):
            raise UserError(f"its {keys[0]} and {keys[1]} are tied and differ", where=self.where, remedy=OTHERWISE)
        self._change(group, Change(partial(_replacement, first)))

    def tokens(self, group: list[str], tokens: list[int]) -> None:
        vocabulary, width = self._shape(self._name(group))
        if len(set(tokens)) < len(tokens) or not all(0 <= token < vocabulary for token in tokens):
            what = "its trainable_token_indices name a token twice, or one that the base has not"
            raise UserError(what, where=self.where)
        module = group[0].removesuffix(".weight")
        values = self._take(f"{module}.token_adapter.trainable_tokens_delta", (len(tokens), width))
        self._change(group, Change(partial(_rows, tokens, values)))

    def refuse_left_over(self) -> None:
        """A key that nothing asked for; but peft puts the base's own weight beside the adapter of an embedding."""
        for key, tensor in self.given.items():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            copy = ".base_layer." in key and name in self.changes
            if not copy or tensor.shape != self.base[name].shape or _differ(self.base[name], tensor):
                raise UserError(f"the adapter's key {key} is left over", where=self.where)

    def _name(self, group: list[str]) -> str:
        """The one of these names that the base has stored."""
        known = [name for name in group if name in self.base]
        if len(known) != 1:
            how = f"the base stores twice, as {' and as '.join(known)}" if known else "is no weight of the base"
            raise UserError(f"the adapter changes {group[0]}, which {how}", where=self.where, remedy=OTHERWISE)
        return known[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.base:
            raise UserError(f"the adapter's {name} is no weight of the base", where=self.where)
        return self.base[name].shape

    def _take(self, name: str, shape: tuple[int, ...]) -> Stored:
        tensor = self.given.pop(key := f"{PREFIX}{name}", None)
        if tensor is None:
            raise UserError(f"the adapter lacks {key}, which its configuration asks for", where=self.where)
        if tensor.shape != shape:
            raise UserError(f"the adapter's {key} is {tensor.shape}, not {shape}", where=self.where)
        if tensor.dtype not in FLOATS:
            raise UserError(f"the adapter's {key} is stored as {tensor.dtype}", where=self.where)
        if not tensor.read(self.memory).isfinite().all():
            raise UserError(
                f"the adapter's {key} holds numbers that are not finite", where=self.where, remedy="training it again"
            )
        return tensor

    def _change(self, group: list[str], change: Change) -> None:
        name = self._name(group)
        if name in self.changes:
            raise UserError(f"the adapter changes {name} in two ways", where=self.where, remedy=OTHERWISE)
        if self.base[name].dtype not in FLOATS:
            raise UserError(f"the base's {name} is stored as {self.base[name].dtype}", where=self.where)
        self.changes[name] = change


def _low_rank(a: Stored, b: Stored, scale: float, magnitude: Stored | None, embedding: bool) -> Update:
    one, other = a.read().float(), b.read().float()
    factor = Factor(other.T, one.T, scale) if embedding else Factor(one, other, scale)
    return LowRank((factor,), magnitude.read().float() if magnitude else None, embedding)


def _replacement(tensor: Stored) -> Update:
    return Replacement(tensor.read())


def _rows(tokens: list[int], values: Stored) -> Update:
    import torch

    return Rows(torch.tensor(tokens), values.read())


def layers(adapted: Any, where: str, embeddings: bool = False) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of every module that a `PeftModel` has put a LoRA on.

    Raises `UserError` for one that is no linear layer (nor, where `embeddings` are taken too, one of these), or whose
    weight another module shares: it could not be merged.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    uses = _uses(adapted)
    for name, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, inner = name.removeprefix(PREFIX), layer.get_base_layer()
        if not isinstance(inner, (torch.nn.Linear, torch.nn.Embedding) if embeddings else torch.nn.Linear):
            raise UserError(f"the adapter is on {name}, which is no linear layer", where=where, remedy=OTHERWISE)
        if uses[id(inner.weight)] > 1:
            raise _tied(name, where)
        yield name, layer


def _trained_whole(adapted: Any, where: str) -> Iterator[tuple[list[str], list[str]]]:
    """Of every tensor of a module to save: its names (several where it is tied), and its keys in the adapter."""
    from peft.utils.other import ModulesToSaveWrapper

    uses, groups = _uses(adapted), dict[int, list[tuple[str, Any]]]()
    for name, wrapper in adapted.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            if ".token_adapter." in name:
                name = name.removeprefix(PREFIX).partition(".token_adapter.")[0]
                raise UserError(f"the adapter trains all of {name} and tokens of it too", where=where, remedy=OTHERWISE)
            trained = wrapper.modules_to_save["default"]
            for key, value in trained.state_dict(keep_vars=True).items():
                before = wrapper.original_module.state_dict(keep_vars=True).get(key)
                groups.setdefault(id(before), []).append((f"{name.removeprefix(PREFIX)}.{key}", value))
    for before, found in groups.items():
        names = [name for name, _ in found]
        if uses[before] > len(names) or len({id(value) for _, value in found}) > 1:
            raise _tied(names[0].rpartition(".")[0], where)
        yield names, names


def _trained_tokens(adapted: Any, where: str) -> Iterator[tuple[list[str], list[int]]]:
    """Names of every weight (several where it is tied) of which single rows were trained, and which."""
    from peft.utils.other import TrainableTokensWrapper

    uses, groups = _uses(adapted), dict[int, list[tuple[str, Any]]]()
    for name, wrapper in adapted.named_modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            weight = wrapper.token_adapter.get_base_layer().weight
            groups.setdefault(id(weight), []).append((name.removeprefix(PREFIX), wrapper.token_adapter))
    for before, found in groups.items():
        own = [(name, adapter) for name, adapter in found if not adapter.tied_adapter]
        if uses[before] > len(found) or len(own) != 1:
            raise _tied(found[0][0], where)
        name, adapter = own[0]
        others = [f"{other}.weight" for other, _ in found if other != name]
        yield [f"{name}.weight", *others], list(adapter.token_indices["default"])


def _trained_biases(adapted: Any, bias: str) -> Iterator[str]:
    """The adapter's keys of the biases that peft trained: all, or those of the layers with a LoRA."""
    for name, _ in adapted.named_parameters():
        if bias != "none" and name.endswith(".bias") and (bias == "all" or name.endswith(".base_layer.bias")):
            yield name.removeprefix(PREFIX)


def _uses(adapted: Any) -> Counter[int]:
    """In how many places each parameter stands."""
    return Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))


def _tied(name: str, where: str) -> UserError:
    return UserError(
        f"the adapter is on {name}, whose weight is tied to another module's", where=where, remedy=OTHERWISE
    )


def _differ(one: Stored, other: Stored) -> bool:
    import torch

    expected = other.read()
    return not torch.equal(one.read().to(expected.dtype), expected)


def _without_weights(folder: Path, base: Path, weights: dict[str, Stored], trust_remote_code: bool) -> Any:
    """The base with the adapter's configuration laid over it by peft, on the meta device.

    Raises `UserError` where `weights`, which the base has stored, are not what its configuration asks for.
    """
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # what it warns of is refused
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
        _check_base(model, shape, weights, str(base))
        try:
            config = PeftConfig.from_pretrained(folder)
            config.init_lora_weights = True
            return get_peft_model(model, config)
        except AletheiaError:  # someone asked to stop
            raise
        except Exception as error:  # no module of that name, for one; peft raises what comes
            what = f"peft cannot lay it over the base: {' '.join(str(error).split())}"
            raise UserError(what, where=str(folder / CONFIG)) from None


def _check_base(model: Any, shape: Any, weights: dict[str, Stored], where: str) -> None:
    """Raises `UserError` for a weight that transformers would make up, the base having none or one of another shape.

    It is asked itself, with tensors that hold nothing: which names it ties, renames or does without is its own to know.
    """
    import torch

    no_weight_bars()
    empty = {
        name: torch.empty(one.shape, dtype=getattr(torch, FLOATS.get(one.dtype, "float32")), device="meta")
        for name, one in weights.items()
    }
    options = {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        _, found = type(model).from_pretrained(None, config=shape, state_dict=empty, **options)
    except RuntimeError as error:  # a part of what it puts together when it loads
        what = f"its weights are not those that its configuration asks for: {' '.join(str(error).split())}"
        raise UserError(what, where=where, remedy=AGAIN) from None
    made_up = found["missing_keys"].intersection(name for name, _ in model.named_parameters(remove_duplicate=False))
    for name in sorted(made_up):
        raise UserError(f"lacks {name}, which its configuration asks for", where=where, remedy=AGAIN)
    for name, there, asked in sorted(found["mismatched_keys"]):
        what = f"its {name} is {tuple(there)}, and its configuration asks for {tuple(asked)}"
        raise UserError(what, where=where, remedy=AGAIN)
