"""The GPU benchmark at a tiny shape on a CPU: it runs, both sides do the same work, and its arithmetic holds."""

import argparse
import io
import json
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_training
from benchmarks.gpu import Bench, Goal, Line
from benchmarks.gpu_rows import SHAPES, Shape, columns, flops, make_rows
from benchmarks.gpu_training import Run, Training
from pipeline.encoded import Encoded
from pipeline.train.passes import prompt_length, size, supervised
from pipeline.workspace import CHECKOUT

TINY = ["--shape", "tiny", "--device", "cpu", "--pairs", "1", "--steps", "1"]
CPU = torch.device("cpu")


PROJECT = ("aletheia", "benchmarks", "eval", "pipeline", "serving")
OURS = ("aletheia", "pipeline.chat", "pipeline.config", "pipeline.data", "pipeline.errors")


def of_project() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] in PROJECT}


def start(path: Path, *options: str, without: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Table and JSON of `python benchmarks/gpu.py` where the rest of the project, and these libraries, cannot be imported."""
    printed, known = io.StringIO(), of_project()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        for name in known:
            patch.delitem(sys.modules, name)  # so that what it needs of the project is imported anew
        for name in (*OURS, *without):
            patch.setitem(sys.modules, name, None)
        patch.setattr("sys.argv", ["benchmarks/gpu.py", *TINY, "--json", str(path), *options])
        runpy.run_path(str(CHECKOUT / "benchmarks" / "gpu.py"), run_name="__main__")
        for name in of_project() - known:
            del sys.modules[name]
    return printed.getvalue(), json.loads(path.read_text())


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return start(tmp_path_factory.mktemp("gpu") / "gpu.json")


def bench() -> Bench:
    """SFT on bf16, to be measured in this process."""
    options = {"shape": "tiny", "bases": ["bf16"], "tasks": ["sft"], "pairs": 1, "steps": 1, "pass_tokens": None}
    return Bench(argparse.Namespace(without=[], **options), Training(SHAPES["tiny"], CPU), 1e12)


# ── A whole run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_task_runs_on_both_bases_against_trl(printed: tuple[str, dict[str, Any]]) -> None:
    _, found = printed
    ran = [(line["task"], line["base"], line["who"]) for line in found["lines"]]
    assert ran == [(t, b, w) for b in ("bf16", "nf4") for t in ("sft", "dpo") for w in ("ours", "trl")]
    assert all(line["tokens_per_second"] > 0 and line["share_of_matmul"] > 0 for line in found["lines"])
    assert all(line["times_as_fast"] > 0 for line in found["lines"] if line["who"] == "ours")
    assert found["notes"] == []


def test_both_sides_begin_at_the_same_loss(printed: tuple[str, dict[str, Any]]) -> None:
    _, found = printed
    losses = [line["runs"][0]["first_loss"] for line in found["lines"]]
    for ours, theirs in zip(losses[::2], losses[1::2], strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)
    assert losses[2] == pytest.approx(0.6931, abs=1e-3)  # DPO: ln 2


def test_figures_on_a_cpu_are_marked_and_no_goal_is_judged(printed: tuple[str, dict[str, Any]]) -> None:
    text, found = printed
    assert "NOT A MEASUREMENT OF THE GOALS" in text and "reached" not in text and "missed" not in text
    assert found["measures_the_goals"] is False
    assert {goal["verdict"] for goal in found["goals"]} == {"not measured"} and len(found["goals"]) == 5
    assert found["memory_gb"] == {"bf16": None, "nf4": None}


def test_json_names_machine_and_versions(printed: tuple[str, dict[str, Any]]) -> None:
    _, found = printed
    assert found["versions"]["torch"] and found["versions"]["peft"] and found["machine"]["name"].endswith("CPU")
    assert found["matmul_flops"] > 0 and found["shape"]["hidden"] == 64


def test_table_is_aligned(printed: tuple[str, dict[str, Any]]) -> None:
    lines = printed[0].splitlines()
    head = next(line for line in lines if line.startswith("task"))
    at = lines.index(head)
    for line in lines[at + 1 : at + 9]:
        assert line[head.index("tokens/s") - 1] == " " != line[head.index("tokens/s")]


# ── What is missing, and what differs ────────────────────────────────────────────────────────────────────────────────


def test_missing_libraries_leave_rows_out_by_name(tmp_path: Path) -> None:
    """And pydantic, which trl brings with it, is not asked for."""
    text, found = start(
        tmp_path / "gpu.json", "--without", "trl", "bitsandbytes", without=["pydantic", "trl", "bitsandbytes"]
    )
    ran = [(line["task"], line["base"], line["who"]) for line in found["lines"]]
    assert ran == [("sft", "bf16", "ours"), ("sft", "bf16", "trainer"), ("dpo", "bf16", "ours")]
    notes = [
        "left out: trl at sft on bf16 (not installed); transformers.Trainer is in its place",
        "left out: a peer at dpo on bf16 (trl is not installed)",
        "left out: everything on NF4 (bitsandbytes is not installed)",
    ]
    assert found["notes"] == notes and all(f"note: {note}" in text for note in notes)
    ours, trainer = (line["runs"][0]["first_loss"] for line in found["lines"][:2])
    assert ours == pytest.approx(trainer, rel=5e-3)


def test_contestant_that_did_other_work_is_no_comparison() -> None:
    one = bench()
    runs = [Run([1.0], loss, "float32", None, None) for loss in (6.20, 6.35)]
    ours, peer = (
        Line("sft", "bf16", who, 1, (1, 1), 1, None, {}, [run]) for who, run in zip(("ours", "trl"), runs, strict=True)
    )
    one.relate(ours, peer)
    assert one.notes == ["no comparison: sft on bf16 begins at 6.2000, trl at 6.3500"]
    assert ours.times_as_fast == 1.0


def test_run_that_is_out_of_memory_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    monkeypatch.setattr(one.training, "trl", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    one.measure()
    assert [line.who for line in one.lines] == ["ours"] and one.lines[0].times_as_fast is None
    assert one.notes == ["left out: a run of trl at sft on bf16 (out of memory)"]


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("speed", "≥", 2.0, 2.0, True), "reached"),
        (Goal("speed", "≥", 2.0, 1.99, True), "missed"),
        (Goal("memory", "<", 24.0, 23.9, True), "reached"),
        (Goal("memory", "<", 24.0, 24.0, True), "missed"),
        (Goal("memory", "<", 24.0, None, True), "not measured"),
        (Goal("memory", "<", 24.0, 1.0, False), "not measured"),
    ],
)
def test_goal_is_judged_where_it_was_measured(goal: Goal, verdict: str) -> None:
    assert goal.verdict == verdict


def test_machine_without_a_gpu_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA GPU; --shape tiny --device cpu" in capsys.readouterr().err


# ── The arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_base_is_left_as_it_was_built() -> None:
    training = Training(SHAPES["tiny"], CPU)
    base = training.base(quantised=False)
    names = [name for name, _ in base.named_modules()]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    steps = make_rows(SHAPES["tiny"], "sft", 2)
    for run in (lambda: training.ours(base, steps, 128, True), lambda: training.trl(base, steps)):
        run()
        assert [name for name, _ in base.named_modules()] != names
        training.restore(base)
        assert [name for name, _ in base.named_modules()] == names
        assert all(value.equal(before[name]) for name, value in base.state_dict().items())
        assert not any(module._forward_hooks for module in base.modules()) and not base.is_gradient_checkpointing
        assert not any(p.requires_grad for p in base.parameters())


def test_quantised_base_holds_4_bit_weights_but_in_embedding_and_head() -> None:
    base = Training(SHAPES["tiny"], CPU).base(quantised=True)
    layers = [p for name, p in base.named_parameters() if "proj" in name]
    assert len(layers) == 14 and all(p.dtype == torch.uint8 for p in layers)
    assert base.lm_head.weight.dtype == base.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_rows_are_of_the_shape_and_the_same_each_time(task: str) -> None:
    shape = SHAPES["7b"]
    steps = make_rows(shape, task, 4)
    assert steps == make_rows(shape, task, 4)
    rows = [row for step in steps for row in step]
    assert len(rows) == 4 * shape.rows
    sides = [side for row in rows for side in ([row] if isinstance(row, Encoded) else row)]
    lengths = [len(side.ids) for side in sides]
    assert max(lengths) <= shape.length and min(lengths) >= shape.length // 8 // 2 and max(lengths) > 1.5 * min(lengths)
    for row in rows:
        if isinstance(row, tuple):
            assert prompt_length(row) == len(row[0].ids) // 3
    names = [set(columns(row)) for row in rows]
    assert all(
        n == ({"input_ids", "labels"} if task == "sft" else {"prompt_ids", "chosen_ids", "rejected_ids"}) for n in names
    )


def test_flop_are_those_that_a_step_executes() -> None:
    """Products of matrices alone, as torch counts them; LoRA's own, which are left out, are added here."""
    shape = Shape(hidden=128, layers=12, heads=4, ffn=256, vocabulary=512, length=96, rows=4, matmul=64)
    training = Training(shape, CPU)
    rows = make_rows(shape, "sft", 1)[0]
    base = training.base(quantised=False)
    with FlopCounterMode(display=False) as counted:
        training.ours(base, [rows], 192, checkpointing=False)
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "attention" not in str(op))
    tokens, widths = sum(map(size, rows)), 4 * 2 * shape.hidden + 3 * (shape.hidden + shape.ffn)
    seen = sum(len(row.ids) ** 2 for row in rows if isinstance(row, Encoded)) / 2
    expected = flops(shape, rows) - 12 * shape.layers * shape.hidden * seen + 6 * 16 * shape.layers * widths * tokens
    assert products == pytest.approx(expected, rel=0.03)  # the first layer's input needs no gradient


def test_flop_of_a_pair_count_the_shared_prompt_once_and_the_reference() -> None:
    shape = SHAPES["tiny"]
    prompt, answer = [5] * 10, [6] * 20
    side = Encoded(prompt + answer, [False] * 10 + [True] * 20)
    alone = Encoded(prompt + answer + answer, [False] * 10 + [True] * 40)
    width, pair, one = shape.layers * shape.hidden, flops(shape, [(side, side)]), flops(shape, [alone])
    seen = 30**2 / 2 + 20 * 10 + 20**2 / 2  # by chosen after its prompt; by rejected of the prompt, and of itself
    assert pair == pytest.approx(1.5 * (one - 12 * width * 50**2 / 2) + 16 * width * seen)
    assert supervised((side, side)) == supervised(alone)


def test_warm_up_is_not_counted() -> None:
    training = Training(SHAPES["tiny"], CPU)
    base = training.base(quantised=False)
    steps = make_rows(SHAPES["tiny"], "sft", gpu_training.WARM_UP + 2)
    assert len(training.ours(base, steps, 128, False).seconds) == 2
    training.restore(base)
    assert len(training.trl(base, steps).seconds) == 2
