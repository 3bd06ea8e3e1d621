"""Who is compared, each the command that a user would run: ours, TRL's as it comes and tuned, and a loop written by hand.

All get the same model, rows, rank, learning rate and rows an optimiser step, and no dropout; what else differs is the
contestant's own. `hand_loop.py` is the floor: the same arithmetic with nothing around it.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.bed import CHECKOUT, LONGEST, Bed
from benchmarks.observe import OUTPUT, Run, Told, observe

BIN = Path(sys.executable).parent
BATCH, ACCUMULATION, RATES = 2, 2, {"sft": 2e-4, "dpo": 1e-5}
SHARED = {  # by all TRL commands, in the place of its own defaults: what ours has too
    "use_cpu": True,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "seed": 42,
    "logging_steps": 1,  # else nobody outside could tell a step
    "report_to": "none",
    "output_dir": "output",
}
TUNED = {"dtype": "bfloat16", "gradient_checkpointing": False}  # the model as it is stored, nothing computed twice
PACKED = {**TUNED, "packing": True, "max_length": LONGEST}
TRL: dict[str, dict[str, dict[str, object]]] = {  # by contestant: what is added to those
    "sft": {
        "trl": {},
        "trl-tuned": PACKED,
        "trl-in-process": PACKED,
        # the quickest that was found, in passes of half as many tokens: trl's mask is dense over all of a pass
        "trl-fastest": {
            **PACKED,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": BATCH * ACCUMULATION,
        },
    },
    "dpo": {
        "trl": {},
        "trl-tuned": TUNED,
        "trl-precomputed": {"precompute_ref_log_probs": True},
    },
}
NAMES = {
    "ours": "ours",
    "trl": "TRL, defaults",
    "trl-tuned": "TRL, tuned",
    "trl-fastest": "TRL, tuned, one row a pass",
    "trl-in-process": "TRL, tuned, in process",
    "trl-precomputed": "TRL, defaults, precomputed reference",
    "hand": "hand-written, two full passes a step",
    "hand-four-rows": "hand-written, four rows a step",
}
CONTESTANTS = {task: ("ours", *peers) for task, peers in TRL.items()}
CONTESTANTS["sft"] = (*CONTESTANTS["sft"], "hand", "hand-four-rows")


@dataclass(frozen=True)
class Contestant:
    """One command on one part of the bed, in an empty folder of its own."""

    name: str
    task: str  # sft | dpo
    part: str
    bed: Bed
    folder: Path
    model: Path

    def run(self) -> Run:
        return observe(self.command(), self.environment(), self.prepared(), self.told)

    def prepared(self) -> Path:
        self.folder.mkdir(parents=True)
        (self.folder / "profile.yaml").write_text(yaml.safe_dump(self.profile()), "utf-8")
        return self.folder

    def command(self) -> list[str]:
        """What `audit.py` runs in process is the same without the first words: its `argv`."""
        if self.name == "ours":
            return [str(BIN / "aletheia"), *self.argv()[1:]]
        if self.name.startswith("hand"):
            return [sys.executable, *self.argv()]
        if self.name == "trl-in-process":  # what `trl sft` starts in a second process, by way of accelerate
            return [sys.executable, "-m", *self.argv()]
        return [str(BIN / "trl"), self.task, *self.argv()[1:]]

    def argv(self) -> list[str]:
        """The script or module, and its arguments."""
        if self.name == "ours":
            from_base = ["--from", "base"] if self.task == "dpo" else []  # as trl does: a new adapter on the base
            return ["aletheia.cli", self.task, "--profile", "profile.yaml", *from_base]
        if self.name.startswith("hand"):
            four = ["--four-rows"] if self.name == "hand-four-rows" else []
            return [
                str(CHECKOUT / "benchmarks/hand_loop.py"),
                str(self.model),
                str(self.bed.rows("sft", self.part)),
                *four,
            ]
        rows = self.bed.rows("sft-trl" if self.task == "sft" else "dpo", self.part)
        options = SHARED | TRL[self.task][self.name]
        given = {"model_name_or_path": self.model, "dataset_name": rows, "learning_rate": RATES[self.task], **options}
        return [
            f"trl.scripts.{self.task}",
            *(word for key, value in given.items() for word in (f"--{key}", str(value))),
        ]

    def environment(self) -> dict[str, str]:
        """One compute thread; no hub; nothing kept from an earlier run."""
        return os.environ | {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "ALETHEIA_ROOT": str(self.folder),
            "ALETHEIA_CACHE": str(self.folder / "cache"),
            "PYTHONUNBUFFERED": "1",  # else lines would come late
            "PYTHONPATH": str(CHECKOUT),
        }

    def profile(self) -> dict[str, object]:
        """For ours. The gate runs as for any rows; what of it would reject one only warns."""
        training = {
            "batch_size": BATCH,
            "gradient_accumulation": ACCUMULATION,
            "epochs": 1.0,
            "max_length": LONGEST,
            "schedule": "constant_with_warmup",
            "warmup_ratio": 0.0,
            "save_steps": 500,  # trl's too
        }
        return {
            "name": "bed",
            "base_model": str(self.model),
            "device": "cpu",
            "precision": "bf16",
            "training_data": {
                "sft": str(self.bed.rows("sft", self.part)),
                "dpo": str(self.bed.rows("dpo", self.part)),
                "eval": str(CHECKOUT / "data/eval"),
                "validation": {"fraction": 0.0},
                "check": {"warnings": ["D2", "D4", "D504", "D505"]},
            },
            "sft_config": {"lora_rank": 16, "lora_alpha": 32, "learning_rate": RATES["sft"], **training},
            "dpo_config": {"learning_rate": RATES["dpo"], **training},
        }

    def told(self) -> Sequence[Told]:
        return TELLS.get(self.name.partition("-")[0], _trl)(self.folder)

    @property
    def adapter(self) -> Path:
        """The weights that a finished run has left."""
        found = list(self.folder.glob("checkpoints/EXP-*/adapter" if self.name == "ours" else "output"))
        return found[0] / "adapter_model.safetensors"


def _ours(folder: Path) -> list[Told]:
    """Its log counts supervised tokens; how many there are in all follows from its two rates."""
    logs = list(folder.glob("experiments/EXP-*/log.jsonl"))
    lines = [line for log in logs for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    steps = [step for step in map(json.loads, lines) if "loss" in step]
    rates = [step["all_tokens_per_second"] / step["tokens_per_second"] for step in steps]
    return [Told(step["loss"], round(step["tokens"] * rate)) for step, rate in zip(steps, rates, strict=True)]


def _trl(folder: Path) -> list[Told]:
    """`{'loss': '9.012', …, 'num_tokens': '879', …}`; not the summary, which says `train_loss`."""
    lines = re.findall(r"\{'loss': .*\}", (folder / OUTPUT).read_text("utf-8", "replace"))
    said = [dict(re.findall(r"'(\w+)': '?([-+.\w]+)", line)) for line in lines]
    return [Told(float(step["loss"]), round(float(step["num_tokens"]))) for step in said]


def _hand(folder: Path) -> list[Told]:
    lines = re.findall(r"^step \d+ loss (\S+) tokens (\d+)\n", (folder / OUTPUT).read_text(), re.MULTILINE)
    return [Told(float(loss), int(tokens)) for loss, tokens in lines]


TELLS: dict[str, Callable[[Path], Sequence[Told]]] = {"ours": _ours, "hand": _hand}
