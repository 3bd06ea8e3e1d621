"""Adapters that vLLM serves unmerged: checked against the weights below them, and refused where vLLM would get them wrong."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.chat import Chat, Contract
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.records import find
from pipeline.records.schema import Input
from pipeline.stage import Job

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for
KEY = "serve_config.adapters"


@dataclass(frozen=True)
class Lora:
    """An adapter and the name it is served by."""

    name: str
    folder: Path
    rank: int


def room(loras: Sequence[Lora]) -> int:
    """The least of vLLM's ranks that holds them all."""
    return next(rank for rank in RANKS if rank >= max(lora.rank for lora in loras))


def lora(job: Job, name: str, folder: Path) -> Lora:
    """Raises `UserError` for an adapter that vLLM refuses, or would compute otherwise than it was trained."""
    path = folder / "adapter_config.json"
    config, where = json.loads(path.read_text("utf-8")), job.workspace.shown(path)
    for option in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(
            option
        ):  # vLLM knows the first two not at all, and overlooks the patterns: one scale for all layers
            raise UserError(f"vLLM cannot serve an adapter with {option}", where=where, remedy="make merge")
    if config["r"] > RANKS[-1]:
        what = f"vLLM serves adapters of rank {RANKS[-1]} at most, not {config['r']}"
        raise UserError(what, where=where, remedy="make merge")
    return Lora(name, folder, config["r"])


def beside(job: Job, weights: Path, base: Base, chat: Chat) -> tuple[list[Lora], list[Input]]:
    """`serve_config.adapters`, each trained on these very weights and with this template, and what is taken of each."""
    loras, inputs = [], []
    wanted = job.config.serve_config.adapters
    served = replace(base, folder=weights).identity()["sha256"] if wanted else ""
    for name in wanted:
        file, facts = find.source(job.workspace, job.profile.id, ["sft", "dpo"], name)
        folder, taken = find.checked_output(job.workspace, file, facts, "adapter")
        if Contract.load(folder) != chat.contract:
            raise job.profile.error(KEY, f"{file.id} was trained with another chat template than the one served")
        if (facts.lineage.base or {}).get("sha256") != served:
            what = f"{file.id} was trained on other weights than those served"
            raise job.profile.error(KEY, what, "--from an adapter's record: it is then served unmerged over their base")
        loras.append(lora(job, file.id, folder))
        inputs.append(taken)
    return loras, inputs
