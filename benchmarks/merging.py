"""Our merge against plain peft: the same base, adapter and machine, in turn, each a process of its own.

    .venv/bin/python benchmarks/merging.py              # six rounds, three of a deeper model; 14 GB of disk while it runs
    .venv/bin/python benchmarks/merging.py --quick      # one round of a small model: does it all work?
    .venv/bin/python benchmarks/merging.py --show       # run nothing: the tables of what is there

The base is a Llama of 1.1B random bf16 weights, untied, with a rank-16 LoRA on all linear layers. peft's is what its
documentation says, with the same tokenizer saved: it checks and hashes nothing.

Ours runs twice. Once the merge alone, as peft's: from the base and the adapter to the merged folder on the disk, in a
process that has imported the same libraries (it hashes what it writes). The goal is of that, without the imports, which
both share. Both end with the disk synced; how long that took is told. And once whole, as `aletheia merge`: imports, its
record, the hash of the base (that it is the one trained on), and the receipt's comparison of every tensor on the disk
with base + adapter. That is beside peft's whole process: what the proof costs. The comparison of logits, which loads
models whole as peft does, is run apart. What all wrote is compared, tensor by tensor.

Memory is the most that all processes had at once, what they share counted once (`observe.py`). Of a model with three
times the layers ours must take no more.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks.bed import make_bed  # noqa: E402
from benchmarks.compare import aligned, spread  # noqa: E402
from benchmarks.observe import OUTPUT, observe  # noqa: E402
from benchmarks.training import machine, say  # noqa: E402

FULL = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 8192}  # fmt: skip
DEEPER, ROUNDS, DEEPER_ROUNDS, RANK = 3, 6, 3, 16
SOURCE = "EXP-2026-01-01-001"
PEFT = """
import os
import sys
import time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, out = sys.argv[1:]
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
saved = time.perf_counter()
os.sync()
print("merging", time.perf_counter() - start, time.perf_counter() - saved)
"""
ALONE = """
import os
import sys
import time
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from pipeline.merging import lora
from pipeline.merging.shards import rewrite

base, adapter, out = map(Path, sys.argv[1:])
start = time.perf_counter()
updates = lora.read(adapter, base).updates
out.mkdir()
for _ in rewrite(base, out, {name: lambda weight, into, name=name: updates[name].merged(weight, out=into) for name in updates}):
    pass
AutoConfig.from_pretrained(base).save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
saved = time.perf_counter()
os.sync()  # most of it was, as it was written
print("merging", time.perf_counter() - start, time.perf_counter() - saved)
"""
NAMES = {
    "peft": "peft: merge_and_unload",
    "ours-alone": "ours, the merge alone",
    "ours": "ours: aletheia merge",
    "ours-logits": "ours, logits compared too",
    "ours-deeper": f"ours, {DEEPER}× the layers",
}


@dataclass(frozen=True)
class Result:
    """One run. Seconds and bytes."""

    name: str
    round: int
    wall: float  # the whole command
    cpu: float
    peak: int
    load: float = 0.0  # processes that wanted to run, on the machine, when it ended
    merging: float | None = None  # without the imports; not of a whole command
    syncing: float = 0.0  # of these, after all was written


@dataclass(frozen=True)
class Goal:
    """A ratio to peft within a round, or of the deeper model to the other."""

    says: str
    at_least: float | None = None
    at_most: float | None = None

    def reached(self, ratio: float) -> bool:
        return ratio >= (self.at_least or 0.0) and (self.at_most is None or ratio <= self.at_most)

    @property
    def bound(self) -> str:
        return f"≥ {self.at_least:g}×" if self.at_least else f"≤ {self.at_most:g}×" if self.at_most else ""


FASTER = Goal("the merge alone: times as fast as peft's", at_least=1.8)
PROVEN = Goal("the whole command, with its proof: times as fast as peft's process")
MEMORY, DEPTH = Goal("peak memory, of peft's", at_most=0.6), Goal(f"peak memory at {DEEPER}× the layers", at_most=1.03)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="one round of a small model: for the harness, not for figures"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks/results", help="folder")
    parser.add_argument("--show", action="store_true", help="run nothing: the tables of what is there")
    given = parser.parse_args()
    kept = given.results / ("merging-quick.json" if given.quick else "merging.json")
    if given.show:
        found = json.loads(kept.read_text("utf-8"))
    else:
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = compete(SMALL if given.quick else FULL, 1 if given.quick else given.rounds, kept)
    results = [Result(**run) for run in found["runs"]]
    print(f"\n{runs_table(results)}\n\n{goals_table(results)}")
    if given.quick:
        print("note: a small model: no figures")
    if (load := median(result.load for result in results)) > (cores := found["machine"]["cores"]):
        print(f"note: {load:.0f} processes shared {cores} cores: read CPU seconds; seconds are of the others too")
    if faults := found["differences"]:
        sys.exit("\n".join(["\nnot the same work, so no comparison:", *faults]))


def compete(shape: Mapping[str, int], rounds: int, kept: Path) -> dict[str, Any]:
    """Both in every round, in turn; then the logits and the deeper model. Writes what is found after each run."""
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))  # torch's own choice, in both
    found: dict[str, Any] = {"machine": machine() | {"threads": threads}, "shape": dict(shape)}
    found |= {"runs": [], "differences": []}

    def run(root: Path, name: str, number: int) -> Path:
        out, result = measured(root, name, number)
        found["runs"].append(asdict(result))
        kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        return out

    with tempfile.TemporaryDirectory(prefix="aletheia-merging-") as work:
        root, contestants = make_root(Path(work) / "root", shape), ["peft", "ours-alone", "ours"]
        found["parameters"] = parameters(root)
        for number in range(rounds):
            turn = number % len(contestants)  # each is now the first, now the last
            outs = {name: run(root, name, number) for name in contestants[turn:] + contestants[:turn]}
            if not number:
                found["differences"] = [d for name in contestants[1:] for d in differences(outs[name], outs["peft"])]
            for out in outs.values():
                shutil.rmtree(out)
        shutil.rmtree(run(root, "ours-logits", 0))
        shutil.rmtree(root)
        deeper = dict(shape) | {"num_hidden_layers": DEEPER * shape["num_hidden_layers"]}
        root = make_root(Path(work) / "deeper", deeper)
        for number in range(min(rounds, DEEPER_ROUNDS)):
            shutil.rmtree(run(root, "ours-deeper", number))
    kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def make_root(root: Path, shape: Mapping[str, int]) -> Path:
    """A workspace with a base, and a complete record of an SFT that trained an adapter on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from pipeline.chat import Chat

    torch.manual_seed(0)
    base, adapter = root / "base", root / "checkpoints" / SOURCE / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(make_bed().model)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(dtype="bfloat16", tie_word_embeddings=False, **shape, **tokens)
    for folder in (base, adapter):
        folder.mkdir(parents=True)
        tokenizer.save_pretrained(folder)
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _write_random(base / "model.safetensors", {name: tuple(p.shape) for name, p in model.named_parameters()})

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        adapted = get_peft_model(model, lora)
    halves = {
        n.replace(".default", ""): torch.randn(p.shape) * 0.01 for n, p in adapted.named_parameters() if "lora_" in n
    }
    save_file(halves, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.peft_config["default"].save_pretrained(adapter)
    Chat(tokenizer, "base").contract.save(adapter)
    _write_record(root, base, adapter)
    return root


def _write_random(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16, a tensor at a time: norms about 1, the rest as a model is initialised."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + size]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02).add_(float("norm" in name))
            file.write(values.view(torch.uint8).flatten().numpy())


def _write_record(root: Path, base: Path, adapter: Path) -> None:
    from pipeline.model import find_base
    from pipeline.profile import load_profile
    from pipeline.records.file import RecordFile
    from pipeline.records.find import artifacts
    from pipeline.records.lifecycle import upper_half
    from pipeline.records.schema import Facts, Lineage, StatusChange
    from pipeline.workspace import Workspace

    (root / "configs").mkdir()
    (root / "configs" / "bench.yaml").write_text(f"name: bench\nbase_model: {base}\ndevice: cpu\n")
    workspace = Workspace(root)
    facts = Facts(
        status="complete",
        stage="sft",
        profile="bench",
        history=[StatusChange(status="complete", at="2026-01-01T00:00:00Z")],
        lineage=Lineage(base=find_base(workspace, load_profile(workspace, "bench")).identity()),
        artifacts=artifacts(workspace, adapter),
    )
    workspace.experiments.mkdir()
    file = RecordFile(workspace.experiments / f"{SOURCE}.yaml")
    file.path.write_bytes(upper_half(SOURCE, SOURCE[4:14], {"profile": "bench", "stages": ["sft"]}))
    file.write(facts)


def parameters(root: Path) -> int:
    from pipeline.merging.shards import tensors

    return sum(tensor.end - tensor.start for tensor in tensors(root / "base").values()) // 2


def measured(root: Path, name: str, number: int) -> tuple[Path, Result]:
    """One run, and the folder that it wrote the model into. Says what it gave."""
    from pipeline.records.file import RecordFile

    work = root / f"{name}-{number}"
    work.mkdir()
    environment = os.environ | {"ALETHEIA_ROOT": str(root), "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    compared = str(name == "ours-logits").lower()
    merge = ["-m", "aletheia.cli", "merge", "--profile", "bench", "--set", f"merge_config.check_logits={compared}"]
    folders = [str(root / "base"), str(root / "checkpoints" / SOURCE / "adapter"), str(work / "model")]
    script = {"peft": PEFT, "ours-alone": ALONE}.get(name)
    os.sync()  # what the run before left to be written is not this one's to wait for
    run = observe([sys.executable, *(["-c", script, *folders] if script else merge)], environment, work, list)
    out, merging, syncing = work / "model", None, 0.0
    if script:
        merging, syncing = map(float, (work / OUTPUT).read_text("utf-8").rpartition("merging ")[2].split())
    else:
        newest = max((root / "experiments").glob("EXP-*.yaml"))
        facts = RecordFile(newest).facts()
        assert facts is not None and facts.stage == "merge" and facts.status == "complete"
        out = root / "checkpoints" / newest.stem / "model"
    result = Result(name, number, run.wall, run.cpu, run.whole, os.getloadavg()[0], merging, syncing)
    alone = f", {merging:.1f} s without the imports" if merging else ""
    say(f"{number} {NAMES[name]}: {run.wall:.1f} s{alone} ({run.cpu:.1f} CPU s), {run.whole / 1e6:,.0f} MB")
    return out, result


def differences(ours: Path, theirs: Path) -> list[str]:
    """peft sums in float32 and rounds once too, in another order: now and then an element is a unit off."""
    import torch

    from pipeline.merging.shards import same_bytes, tensors

    mine, other = tensors(ours), tensors(theirs)
    if mine.keys() != other.keys():
        return [f"other tensors: {sorted(mine.keys() ^ other.keys())[:3]}"]
    said = []
    for name, tensor in mine.items():
        if tensor.dtype != other[name].dtype or tensor.shape != other[name].shape:
            said.append(f"{name}: another dtype or shape")
        elif not same_bytes(tensor, other[name]):
            one, two = tensor.read(), other[name].read()
            units = (one.view(torch.int16).int() - two.view(torch.int16).int()).abs()
            near_zero = one.float().abs().maximum(two.float().abs()) < 1e-6  # there a unit is less than float32's error
            if (units.gt(1) & ~near_zero).any() or units.gt(0).float().mean() > 1e-3:
                said.append(f"{name}: more than now and then a unit in the last place off")
    return said


def ratios(results: Sequence[Result]) -> dict[Goal, list[float]]:
    """Within a round; of the deeper model, to the median."""
    rounds: dict[int, dict[str, Result]] = {}
    for result in results:
        rounds.setdefault(result.round, {})[result.name] = result
    both = [(found["ours"], found["peft"]) for found in rounds.values() if {"ours", "peft"} <= found.keys()]
    usual = [one.peak for one in results if one.name == "ours"]
    merging = [{name: one.merging for name, one in found.items() if one.merging} for found in rounds.values()]
    return {
        FASTER: [one["peft"] / one["ours-alone"] for one in merging if len(one) == 2],
        PROVEN: [peft.wall / ours.wall for ours, peft in both],
        MEMORY: [ours.peak / peft.peak for ours, peft in both],
        DEPTH: [one.peak / median(usual) for one in results if one.name == "ours-deeper"],
    }


def goals_table(results: Sequence[Result]) -> str:
    rows = [("", "median (least–most)", "goal", "")]
    for goal, found in ratios(results).items():
        if found:
            verdict = ("reached" if goal.reached(median(found)) else "MISSED") if goal.bound else ""
            rows.append((goal.says, f"{spread(found)}×", goal.bound, verdict))
    return aligned(rows)


def runs_table(results: Sequence[Result]) -> str:
    """Each contestant's medians."""
    rows = [("", "runs", "merging, s", "of it a sync", "whole, s", "CPU s", "peak MB")]
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        merging = [one.merging for one in own if one.merging]
        rows.append(
            (
                NAMES[name],
                str(len(own)),
                spread(merging, ".1f") if merging else "",
                spread([one.syncing for one in own], ".1f") if any(one.syncing for one in own) else "",
                spread([one.wall for one in own], ".1f"),
                f"{median(one.cpu for one in own):.1f}",
                f"{median(one.peak for one in own) / 1e6:,.0f}",
            )
        )
    return aligned(rows)


if __name__ == "__main__":
    main()
