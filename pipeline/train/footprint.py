"""What a training holds in memory and computes, from the model's shape and how it is trained. No weights, no data.

For a block like Llama's, of hidden size h, FFN f, query heads × head size q, key-value heads × head size k, with b bytes
an element (2 in bf16 and fp16, 4 in fp32), autograd keeps for the backward pass, a token a layer:

    8h              the inputs of the two norms, which compute in float32
    (2q + 2k)·b     rotated queries and keys, values, attention's output; and 4 bytes a head: its log-sum-exp
    q·b             packed: the documents' outputs once more, end to end; of pairs k and v again, for the rejected answer
    3f·b            gate, silu(gate), up
    (2h + f)·b      what the adapters read: both norms' outputs and the FFN's product. A frozen layer keeps no input
    r·b             of each adapted layer: what stands between A and B, of rank r
    2·out·b         DoRA alone, of each adapted layer: the frozen output and the adapter's, for the magnitude's gradient
    2·in·b          dropout alone, of each adapted layer: its own dropped input, and the mask

About 180 kB for the 7B model in bf16. With checkpointing a layer keeps its input alone, h·b, and one layer at a time has
the rest. Then come gradients under way, which no sum over saved tensors shows: the larger of 18h and 7f bytes a token,
measured on a CPU by resident memory. They and the logits do not stand at once. The rest is checked against autograd's
own saved tensors in the tests.

FLOP a token, of N weights in linear layers: 2N forward and 2N for the gradient of the input. A frozen weight has none
itself. With checkpointing 2N more. Causal attention over a row of n tokens: 2qn² a layer forward, twice that backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipeline.config import LoraConfig

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; a byte a block of 64; its own scale a block of 256: double quantisation
CHUNK = 1024  # positions whose logits stand at once, as in `pipeline.train.head`
LIBRARIES = 0.6e9  # bytes: the resident set of Python with torch, transformers and peft; on a GPU it is not on the card


@dataclass(frozen=True)
class Linear:
    """One linear layer inside the blocks."""

    name: str  # model.layers.0.self_attn.q_proj
    inputs: int
    outputs: int

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Shape:
    """What of a causal language model decides memory and time."""

    parameters: int
    linears: tuple[Linear, ...]  # all but the head
    layers: int
    hidden: int
    ffn: int
    heads: int
    queries: int  # heads × head size
    keys: int  # key-value heads × head size
    vocabulary: int
    stored: str  # bf16 | fp16 | fp32

    @classmethod
    def of(cls, config: Any, trust_remote_code: bool = False) -> Self:
        """From a `transformers` configuration, by the model without its weights: every layer is counted, none guessed."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        text, head = config.get_text_config(), model.get_output_embeddings()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        linears = tuple(
            Linear(name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        )
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),  # tied ones count once
            linears=linears,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            ffn=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            heads=text.num_attention_heads,
            queries=text.num_attention_heads * size,
            keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * size,
            vocabulary=text.vocab_size,
            stored=names.get(getattr(config, "dtype", None), "fp32"),
        )

    @property
    def in_linears(self) -> int:
        """Weights in linear layers, without the head."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    def adapted(self, lora: LoraConfig) -> list[Linear]:
        wanted = lora.target_modules
        if wanted == "all-linear":
            return list(self.linears)
        return [x for x in self.linears if any(x.name == name or x.name.endswith(f".{name}") for name in wanted)]

    def trainable(self, lora: LoraConfig) -> int:
        """The adapter's parameters."""
        magnitudes = lora.adapter == "dora"
        return sum(lora.lora_rank * (x.inputs + x.outputs) + magnitudes * x.outputs for x in self.adapted(lora))


@dataclass(frozen=True)
class Setup:
    """How it is trained, as far as memory and time depend on it."""

    device: str  # cuda | cpu
    precision: str  # bf16 | fp16 | fp32
    quantization: str  # none | nf4 | int8
    checkpointing: bool
    pass_tokens: int  # padding included
    packed: bool = True
    pairs: bool = False  # prompt + chosen + rejected

    @property
    def bytes(self) -> int:
        """An element of what is computed. A CPU computes a 4-bit base in float32."""
        return 4 if self.device == "cpu" and self.quantization == "nf4" else BYTES[self.precision]


def memory(shape: Shape, lora: LoraConfig, setup: Setup) -> dict[str, int]:
    """Bytes by part at the peak: in the backward pass of the last layer."""
    trainable, casts = shape.trainable(lora), 2 if setup.bytes == 2 else 0  # autocast's copies of the adapter
    hidden, tokens = shape.hidden, setup.pass_tokens
    layer = kept_by_layer(shape, lora, setup)
    kept = hidden * setup.bytes * shape.layers + layer if setup.checkpointing else layer * shape.layers
    ends = (4 + 2 * setup.bytes) * hidden  # embeddings, the last norm's input, and what it gives
    logits = _logits(shape, setup)
    under_way = max(0.0, tokens * max(18 * hidden, 7 * shape.ffn) - logits)
    parts = {
        "weights": _weights(shape, setup),
        "adapter": trainable * (4 + casts),
        "gradients": trainable * 4,
        "optimiser": trainable * 8,  # AdamW's two moments
        "activations": tokens * (kept + ends) + under_way + _dora(shape, lora),
        "logits": logits,
        "reference": 0,  # its log-probs are computed before the first step, by the policy itself
        "others": LIBRARIES if setup.device == "cpu" else 0,
    }
    return {name: round(size) for name, size in parts.items()}


def kept_by_layer(shape: Shape, lora: LoraConfig, setup: Setup) -> float:
    """Bytes a token that autograd keeps of one layer, without checkpointing. Derived above."""
    adapted, b = shape.adapted(lora), setup.bytes
    read = {(x.parent, x.inputs) for x in adapted}  # q, k and v read the same
    by_adapters = sum(inputs for _, inputs in read) + lora.lora_rank * len(adapted)
    if lora.adapter == "dora":
        by_adapters += sum(2 * x.outputs for x in adapted)
    if lora.lora_dropout:
        by_adapters += sum(2 * x.inputs for x in adapted) - sum(inputs for _, inputs in read)
    again = setup.packed * (shape.queries + setup.pairs * 2 * shape.keys)
    attention = 2 * shape.queries + 2 * shape.keys + again
    return 8 * shape.hidden + 4 * shape.heads + b * (attention + 3 * shape.ffn + by_adapters / shape.layers)


def training_flops(shape: Shape, lora: LoraConfig, setup: Setup, lengths: Sequence[int], supervised: int) -> float:
    """Of one pass over rows of these lengths, forward and backward."""
    tokens, again = sum(lengths), setup.checkpointing
    linear = (4 + 2 * again) * shape.in_linears + 6 * shape.trainable(lora)
    head = 4 * shape.vocabulary * shape.hidden * supervised
    return tokens * linear + head + (3 + again) * _attention(shape, lengths)


def forward_flops(shape: Shape, lengths: Sequence[int], supervised: int) -> float:
    """Of measuring rows of these lengths."""
    head = 2 * shape.vocabulary * shape.hidden * supervised
    return 2 * shape.in_linears * sum(lengths) + head + _attention(shape, lengths)


def _attention(shape: Shape, lengths: Sequence[int]) -> float:
    return 2.0 * shape.queries * shape.layers * sum(length * length for length in lengths)


def _weights(shape: Shape, setup: Setup) -> float:
    """A quantised base keeps embeddings, norms and head as they are, and one layer at a time is unpacked."""
    whole = BYTES[setup.precision]
    if setup.quantization == "none":
        return shape.parameters * whole
    each = NF4 if setup.quantization == "nf4" else 1.0
    largest = max(linear.inputs * linear.outputs for linear in shape.linears)
    return shape.in_linears * each + (shape.parameters - shape.in_linears) * whole + largest * setup.bytes


def _logits(shape: Shape, setup: Setup) -> float:
    """Logits of a chunk of positions and their exponentials, float32; hidden states at them and their gradient."""
    if setup.packed:
        return min(CHUNK, setup.pass_tokens) * shape.vocabulary * 8 + setup.pass_tokens * shape.hidden * 2 * setup.bytes
    return setup.pass_tokens * shape.vocabulary * (2 * setup.bytes + 8)  # all; float32 where trained, as if all were


def _dora(shape: Shape, lora: LoraConfig) -> float:
    """peft multiplies B·A out, by way of an identity matrix, and adds the weight: one layer at a time."""
    if lora.adapter != "dora":
        return 0.0
    return max((6 * x.inputs**2 + 8 * x.inputs * x.outputs for x in shape.adapted(lora)), default=0.0)
