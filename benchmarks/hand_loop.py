"""The floor for SFT: a training loop written by hand in plain torch, for this model and nothing else.

    .venv/bin/python benchmarks/hand_loop.py MODEL ROWS [--four-rows] [--audit FILE]

The arithmetic is ours: LoRA of rank 16 on every linear layer of a bf16 Llama, float32 adapter weights cast to bf16 where they
are used, rows end to end and each attending to itself alone, the LM head on supervised positions only, the loss a mean over
the step's supervised tokens, clipping, AdamW. There is no record, no check, no guard, no log but a line a step.

A pass is filled to batch × max_length tokens and a step is two full passes, as an epoch of a packed loop is commonly cut;
`--four-rows`: a step is four rows, as ours is, in as few passes as hold them.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

RANK, ALPHA, RATE, CLIP, SEED = 16, 32, 2e-4, 1.0, 42
PASS_TOKENS, PASSES_A_STEP, ROWS_A_STEP = 1024, 2, 4
TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"
PROMPT = "<|begin_of_text|>" + TURN.format("user") + "{}<|eot_id|>" + TURN.format("assistant")
Row = tuple[list[int], int]  # token ids, and how many of them are the prompt


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a = nn.Parameter(torch.empty(RANK, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], RANK))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.a.to(x.dtype))
        return F.linear(x, self.weight) + F.linear(low, self.b.to(x.dtype)) * (ALPHA / RANK)


class Layer(nn.Module):
    def __init__(self, weights: dict[str, Tensor], prefix: str, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        for name in ("q", "k", "v", "o"):
            setattr(self, name, Linear(weights[f"{prefix}.self_attn.{name}_proj.weight"]))
        for name in ("gate", "up", "down"):
            setattr(self, name, Linear(weights[f"{prefix}.mlp.{name}_proj.weight"]))
        self.before, self.between = (
            nn.Parameter(weights[f"{prefix}.{name}_layernorm.weight"], requires_grad=False)
            for name in ("input", "post_attention")
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        """`x`: (tokens, hidden), documents of `lengths` end to end."""
        normed = F.rms_norm(x, x.shape[-1:], self.before, self.eps)
        q, k, v = (f(normed).view(len(x), self.heads, -1).transpose(0, 1) for f in (self.q, self.k, self.v))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        seen = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            for q, k, v in zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)
        ]
        x = x + self.o(torch.cat(seen, 1).transpose(0, 1).reshape(x.shape))
        normed = F.rms_norm(x, x.shape[-1:], self.between, self.eps)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        heads, self.eps = config["num_attention_heads"], config["rms_norm_eps"]
        self.layers = nn.ModuleList(
            Layer(weights, f"model.layers.{i}", heads, self.eps) for i in range(config["num_hidden_layers"])
        )
        self.embedding, self.norm, self.head = (
            nn.Parameter(weights[f"{name}.weight"], requires_grad=False)
            for name in ("model.embed_tokens", "model.norm", "lm_head")
        )
        size = config["hidden_size"] // heads
        self.inverse = config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, size, 2) / size)

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """The summed loss over the rows' supervised tokens."""
        lengths = [len(ids) for ids, _ in rows]
        angles = torch.cat([torch.arange(n) for n in lengths])[:, None] * self.inverse
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(self.head.dtype), angles.sin().to(self.head.dtype)
        x = F.embedding(torch.tensor([token for ids, _ in rows for token in ids]), self.embedding)
        for layer in self.layers:
            x = layer(x, cos, sin, lengths)
        starts = [sum(lengths[:i]) for i in range(len(rows))]
        told = [s + i for s, (ids, prompt) in zip(starts, rows, strict=True) for i in range(prompt - 1, len(ids) - 1)]
        wanted = torch.tensor([token for ids, prompt in rows for token in ids[prompt:]])
        logits = F.linear(F.rms_norm(x[told], x.shape[-1:], self.norm, self.eps), self.head)
        return F.cross_entropy(logits.float(), wanted, reduction="sum")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def read(tokenizer: Tokenizer, folder: Path) -> list[Row]:
    rows = []
    for line in (folder / "train.jsonl").read_text("utf-8").splitlines():
        asked, answer = (message["content"] for message in json.loads(line)["messages"])
        prompt = tokenizer.encode(PROMPT.format(asked), add_special_tokens=False).ids
        rows.append((prompt + tokenizer.encode(answer + "<|eot_id|>", add_special_tokens=False).ids, len(prompt)))
    return rows


def packed(rows: Sequence[Row]) -> list[list[Row]]:
    """Best fit, the longest first: bins of at most `PASS_TOKENS` tokens."""
    bins: list[tuple[int, list[Row]]] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        room = [(PASS_TOKENS - size, i) for i, (size, _) in enumerate(bins) if size + len(row[0]) <= PASS_TOKENS]
        if room:
            i = min(room)[1]
            bins[i] = (bins[i][0] + len(row[0]), [*bins[i][1], row])
        else:
            bins.append((len(row[0]), [row]))
    return [rows for _, rows in bins]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--four-rows", action="store_true")
    parser.add_argument("--audit", type=Path, help="file for what was trained, as audit.py writes it")
    given = parser.parse_args()
    torch.manual_seed(SEED)
    draw = random.Random(SEED)
    rows = read(Tokenizer.from_file(str(given.model / "tokenizer.json")), given.rows)
    if given.four_rows:
        draw.shuffle(rows)
        steps = [packed(rows[i : i + ROWS_A_STEP]) for i in range(0, len(rows), ROWS_A_STEP)]
    else:
        passes = packed(rows)
        draw.shuffle(passes)
        steps = [passes[i : i + PASSES_A_STEP] for i in range(0, len(passes), PASSES_A_STEP)]
    model = Model(given.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    sequences: list[Any] = []
    for number, passes in enumerate(steps, 1):
        of_step = [row for rows_of_pass in passes for row in rows_of_pass]
        supervised = sum(len(ids) - prompt for ids, prompt in of_step)
        total = 0.0
        for rows_of_pass in passes:
            loss = model(rows_of_pass) / supervised
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {number} loss {total:.4f} tokens {sum(len(ids) for ids, _ in of_step)}", flush=True)
        sequences += [(ids, [i >= prompt for i in range(len(ids))]) for ids, prompt in of_step]
    Path("output").mkdir(exist_ok=True)
    save_file({name: p.detach() for name, p in trained.items()}, "output/adapter_model.safetensors")
    if given.audit:
        given.audit.write_text(json.dumps({"sequences": sequences, "steps": len(steps)}))


if __name__ == "__main__":
    main()
