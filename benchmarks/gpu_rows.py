"""Shapes, rows and what they cost: the arithmetic of `benchmarks/gpu.py`."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.encoded import Encoded
from pipeline.train.passes import Row, supervised


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    length: int  # tokens of the longest row
    rows: int  # a step
    matmul: int  # size of the product whose rate is measured


SHAPES = {
    "7b": Shape(4096, 30, 32, 11008, 102_400, 2048, 16, 8192),  # deepseek-coder-7b-instruct-v1.5
    "tiny": Shape(64, 2, 4, 128, 512, 64, 4, 256),
}


def make_rows(shape: Shape, task: str, steps: int) -> list[list[Row]]:
    """Random tokens, 1/8 to all of `length` a sequence, a quarter of them prompt; of a pair's a third, which it shares."""
    draw = random.Random(0)

    def ids(number: int) -> list[int]:
        return draw.choices(range(2, shape.vocabulary), k=number)

    def row() -> Row:
        length = draw.randint(shape.length // 8, shape.length)
        if task == "sft":
            prompt = length // 4
            return Encoded(ids(length), [n >= prompt for n in range(length)])
        asked = ids(length // 3)
        answers = ids(length - len(asked)), ids(max(1, round((length - len(asked)) * draw.uniform(0.5, 1))))
        chosen, rejected = (Encoded(asked + a, [False] * len(asked) + [True] * len(a)) for a in answers)
        return chosen, rejected

    return [[row() for _ in range(shape.rows)] for _ in range(steps)]


def flops(shape: Shape, rows: Sequence[Row]) -> float:
    """What a step over these rows cannot do without."""
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.ffn)
    total = 0.0
    for row in rows:
        sides = (row,) if isinstance(row, Encoded) else row
        times = 1 if len(sides) == 1 else 1.5  # the reference: a forward pass, half of forward and backward
        first = len(sides[0].ids)
        prompt = 0 if len(sides) == 1 else sides[0].mask.index(True)
        others = sum(len(side.ids) - prompt for side in sides[1:])
        seen = first**2 / 2 + others * prompt + others**2 / 2  # pairs of positions
        total += times * 4 * weights * (first + others)
        total += (12 if len(sides) == 1 else 16) * shape.layers * shape.hidden * seen
        total += times * 4 * shape.vocabulary * shape.hidden * supervised(row)
    return total


def matmul_rate(size: int, device: torch.device) -> float:
    """FLOP/s of a bf16 product of square matrices, random ones: the median of ten after three."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(times[3:])[5]


def columns(row: Row) -> dict[str, list[int]]:
    """A row as the peers take it."""
    if isinstance(row, Encoded):
        return {"input_ids": row.ids, "labels": row.labels}
    chosen, rejected = row
    prompt = chosen.mask.index(True)
    return {"prompt_ids": chosen.ids[:prompt], "chosen_ids": chosen.ids[prompt:], "rejected_ids": rejected.ids[prompt:]}


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """(rows, longest): ids, labels and attention mask, for `transformers.Trainer`."""
    filled = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    every = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in every], True, value)
        for key, value in filled.items()
    }
