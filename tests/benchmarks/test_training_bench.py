"""The benchmark's own promises: its rows, its eye for work that is not the same, its watch and its ratios."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import audit
from benchmarks.bed import LONGEST, PARTS, Bed, make_bed
from benchmarks.compare import Goal, Result, differences, goals_table
from benchmarks.contestants import CONTESTANTS, NAMES, Contestant
from benchmarks.observe import Told, observe
from benchmarks.training import compete, machine, parameters, taken_up


@pytest.fixture(scope="module")
def bed() -> Bed:
    return make_bed()


GIVEN = [((1, 2, 3, 4), (False, False, True, True)), ((5, 6, 7), (False, True, True))]


def test_the_bed_is_what_the_goals_were_set_on(bed: Bed) -> None:
    facts = bed.facts
    assert (facts["sft_rows"], facts["pairs"], facts["longest"] <= LONGEST) == (400, 200, True)
    assert facts["useful_when_padded_in_twos"] == pytest.approx(0.75, abs=0.01)
    assert facts["model_parameters"] == pytest.approx(34.1e6, rel=0.01)
    parts = [bed.sequences("sft", str(part)) for part in range(PARTS["sft"])]
    assert len({ids for part in parts for ids, _ in part}) == 400, "a row stands in the bed once"
    assert max(sum(len(ids) for ids, _ in p) for p in parts) < 1.05 * min(sum(len(ids) for ids, _ in p) for p in parts)
    for _, mask in [*parts[0], *bed.sequences("dpo", "0")]:
        assert mask[-1] and not mask[0] and list(mask) == sorted(mask), "an answer, whole, after its prompt"


def test_all_contestants_are_named_and_ours_is_among_them() -> None:
    assert all(names[0] == "ours" and set(names) <= set(NAMES) for names in CONTESTANTS.values())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (GIVEN, []),
        ([GIVEN[1], GIVEN[0]], []),
        (GIVEN[:1], ["1 of 2 sequences are not trained"]),
        ([*GIVEN, GIVEN[0]], ["1 of 2 sequences are trained more than once"]),
        (
            [((1, 2, 3), (False, False, True)), GIVEN[1]],
            ["1 of 2 sequences are cut", "1 of 2 sequences are not trained"],
        ),
        ([*GIVEN, ((9, 9), (False, True))], ["1 of 2 sequences are not the bed's"]),
        ([GIVEN[0], ((5, 6, 7), (True, True, True))], ["1 of 2 sequences have other supervised tokens"]),
        ([GIVEN[0], ((5, 6, 7), (False, True, False))], ["1 of 2 sequences have other supervised tokens"]),
    ],
)
def test_work_that_is_not_the_same_is_found(found: list[audit.Found], said: list[str]) -> None:
    assert audit.faults(GIVEN, found) == said


def test_of_a_pair_only_the_first_token_of_an_answer_is_let_pass() -> None:
    cancelled = [((1, 2, 3, 4), (False, False, False, True)), GIVEN[1]]
    assert audit.faults(GIVEN, cancelled, pairs=True) == []
    assert audit.faults(GIVEN, cancelled) != []
    assert audit.faults(GIVEN, [((1, 2, 3, 4), (False, False, True, False)), GIVEN[1]], pairs=True) != []


def test_a_row_is_taken_apart_where_its_positions_turn_back() -> None:
    packed = audit.sequences([1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 0, 1, 2], [0, 1, 1, 0, 1, 1, 0])  # type: ignore[list-item]
    assert packed == GIVEN
    # prompt 1 2, chosen 3 4, rejected 5: the second token's gradient is of both answers
    forked = audit.sequences([1, 2, 3, 4, 5], [0, 1, 2, 3, 2], [False, True, True, False, False])
    assert forked == [GIVEN[0], ((1, 2, 5), (False, False, True))]


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_recorder_sees_what_a_model_is_trained_on(
    bed: Bed, packed: bool, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaModel

    monkeypatch.setattr(LlamaModel, "forward", LlamaModel.forward)  # put back what listen() replaces
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "register_optimizer_step_post_hook", lambda hook: None)
    recorder = audit.Recorder()
    recorder.listen()
    model = AutoModelForCausalLM.from_pretrained(bed.narrow)
    given = bed.sequences("sft", "quick")[:2]
    labels = [[t if m else -100 for t, m in zip(ids, mask, strict=True)] for ids, mask in given]
    if planted:
        labels[1][-1] = -100  # its end-of-turn is not trained
    lengths = [len(ids) for ids, _ in given]
    batch: dict[str, Any] = {}
    if packed:
        batch["input_ids"] = torch.tensor([[t for ids, _ in given for t in ids]])
        batch["position_ids"] = torch.tensor([[i for n in lengths for i in range(n)]])
        batch["labels"] = torch.tensor([[-100, *labels[0][1:], -100, *labels[1][1:]]])
    else:
        width = max(lengths)
        for name, rows in (("input_ids", [list(ids) for ids, _ in given]), ("labels", labels)):
            filler = -100 if name == "labels" else 2
            batch[name] = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
        batch["attention_mask"] = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    with torch.no_grad():
        model(**batch)
    assert recorder.found == [], "a pass without a gradient trains nothing"
    model(**batch).loss.backward()
    assert recorder.passes == 1
    assert audit.faults(given, recorder.found) == (["1 of 2 sequences have other supervised tokens"] if planted else [])


def test_the_hand_written_loop_computes_what_transformers_does(bed: Bed) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from benchmarks.hand_loop import Model, read

    rows = read(Tokenizer.from_file(str(bed.narrow / "tokenizer.json")), bed.rows("sft", "quick"))
    given = bed.sequences("sft", "quick")
    assert [(tuple(ids), prompt) for ids, prompt in rows] == [(ids, mask.index(True)) for ids, mask in given]
    loss = Model(bed.narrow)(rows[:3]).item()
    model = AutoModelForCausalLM.from_pretrained(bed.narrow)
    expected = 0.0
    for ids, prompt in rows[:3]:
        logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].float()
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
    assert loss == pytest.approx(expected, rel=1e-3)


def _result(name: str, number: int, **values: Any) -> Result:
    return replace(
        Result("sft", name, number, "0", 10.0, 9.0, 5.0, 4.0, 1.0, 1.0, 7, 7, losses=(9.0, 8.0), adapter={"F32": 7}),
        **values,
    )


def test_ratios_are_taken_within_a_round() -> None:
    speeds = {"ours": [800.0, 400.0, 900.0], "trl": [400.0, 100.0]}
    results = [_result(name, i, speed=speed) for name, all_ in speeds.items() for i, speed in enumerate(all_)]
    goal = Goal("sft", "", "speed", "trl", at_least=2.5)
    assert goal.ratios(results) == [2.0, 4.0]
    assert goal.reached(median(goal.ratios(results))) and not goal.reached(2.4)
    assert Goal("sft", "", "wall", "trl", at_most=0.6).reached(0.6)
    assert not Goal("sft", "", "wall", "trl", at_most=0.6).reached(0.61)
    assert Goal("sft", "", "wall", "trl", faster=True).ratios([_result("ours", 0), _result("trl", 0, wall=24.0)]) == [
        2.4
    ]
    assert "3.00 (2.00–4.00)" in goals_table(results, NAMES) and "reached" in goals_table(results, NAMES)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({}, ""),
        ({"losses": (9.1, 8.1)}, ""),
        ({"losses": (9.0, 8.0, 1.0)}, ""),  # more steps: only those that both took
        ({"losses": (9.4, 8.4)}, "mean loss of the first 2 steps 8.9000, ours 8.5000"),
        ({"losses": (float("nan"), 8.0)}, "mean loss"),
        ({"adapter": {"BF16": 7}}, "trains {'BF16': 7}, ours {'F32': 7}"),
        ({"adapter": {"F32": 6}}, "trains {'F32': 6}"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(planted: dict[str, Any], said: str) -> None:
    found = differences([_result("trl", 0, **planted), _result("ours", 0)])
    assert [said in line for line in found] == ([True] if said else [])


PROGRAM = """
import subprocess, sys, time
waste = bytearray(150_000_000)
child = subprocess.run([sys.executable, "-c", '''
import time
waste = bytearray(60_000_000)
for step in range(1, 4):
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
    print("step", step, flush=True)
'''])
"""


def test_a_command_is_watched_from_outside_with_all_its_processes(tmp_path: Path) -> None:
    def told() -> list[Told]:
        return [Told(9.0, 1)] * (tmp_path / "output.txt").read_text().count("step")

    run = observe([sys.executable, "-c", PROGRAM], {}, tmp_path, told)
    assert len(run.steps) == 3
    between = [later.cpu - step.cpu for step, later in pairwise(run.steps)]
    assert all(0.1 < seconds < 0.4 for seconds in between), "the child's CPU time, though it has not ended"
    assert [s.wall for s in run.steps] == sorted(s.wall for s in run.steps) and run.steps[-1].wall <= run.wall
    assert run.cpu >= 0.6
    assert 150e6 < run.largest < 200e6 and run.largest + 50e6 < run.whole < 300e6


def test_a_command_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no such model\n.*exit 3"):
        observe([sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], {}, tmp_path, list)


def test_a_benchmark_goes_on_with_what_is_missing_and_only_on_the_same_machine_and_commit(
    bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, kept = machine(), tmp_path / "training.json"
    runs = [{"task": "dpo", "name": name, "round": number} for name in CONTESTANTS["dpo"] for number in range(2)]
    found = {"machine": now, "bed": bed.facts, "same_work": {"dpo": {}}, "runs": runs}
    kept.write_text(json.dumps(found))
    assert compete(["dpo"], 2, False, kept, taken_up(kept, now)) == found
    assert not any(capsys.readouterr()), "nothing ran again"
    with pytest.raises(SystemExit, match=r"its commit was .*: begin anew"):
        taken_up(kept, now | {"commit": "another"})


def test_what_an_adapter_holds_is_read_from_its_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "adapter.safetensors")
    assert parameters(tmp_path / "adapter.safetensors") == {"F32": 15, "BF16": 4}


def test_peers_get_the_settings_of_ours(bed: Bed, tmp_path: Path) -> None:
    for task, names in CONTESTANTS.items():
        for name in names:
            contestant = Contestant(name, task, "0", bed, tmp_path / f"{task}-{name}", bed.model)
            words = contestant.command()
            if name.startswith("trl"):
                given = dict(pairwise(words))
                profile: Any = contestant.profile()[f"{task}_config"]
                assert float(given["--learning_rate"]) == profile["learning_rate"]
                rows = int(given["--per_device_train_batch_size"]) * int(given["--gradient_accumulation_steps"])
                assert rows == profile["batch_size"] * profile["gradient_accumulation"]
