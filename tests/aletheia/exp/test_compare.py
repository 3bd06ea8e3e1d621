"""Records side by side: only what differs, rows by their content, and no difference called better inside the noise."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pipeline import statistics
from pipeline.records import items
from pipeline.records.file import RecordFile
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

Run = Callable[..., "Said"]
Write = Callable[..., RecordFile]
A, B, C = (f"EXP-2026-01-01-00{number}" for number in (1, 2, 3))
BEFORE = [6.0, 5.0, 5.5, 6.5]


def loss(ends: list[float]) -> dict[str, Any]:
    """The results of an SFT whose rows had the loss BEFORE, and now have these."""
    change = statistics.paired(BEFORE[: len(ends)], ends)
    return {"eval_loss": change.model_dump(exclude_none=True)}


def held_out(ends: list[float]) -> list[dict[str, Any]]:
    return [{"id": f"row-{i}", "before": b, "after": a} for i, (b, a) in enumerate(zip(BEFORE, ends, strict=False))]


def rows(**parts: dict[str, str]) -> dict[str, Any]:
    """What a record says of its rows, whose hashes are given by id."""
    return {name: {"rows": len(found), "sha256": items.digest(found.values())} for name, found in parts.items()}


def compared(said: "Said") -> dict[str, Any]:
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    return found


def test_only_the_settings_that_differ_are_shown_one_column_a_record(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    write_record(place, A, {"configuration": {"seed": 42, "sft_config": {"epochs": 2.0, "rank": 16, "old": 1}}})
    write_record(place, B, {"configuration": {"seed": 42, "sft_config": {"epochs": 3.0, "rank": 16}}})
    write_record(place, C, {"configuration": {"seed": 42, "sft_config": {"epochs": 2.0, "rank": 32}}})
    found = compared(aletheia(place, "exp", "compare", A, B, C, "--json"))
    assert found["configuration"] == {
        "sft_config.epochs": {A: 2.0, B: 3.0, C: 2.0},
        "sft_config.rank": {A: 16, B: 16, C: 32},
        "sft_config.old": {A: 1},
    }
    said = aletheia(place, "exp", "compare", A, B, C).out
    header = next(line for line in said.splitlines() if line.startswith("configuration"))
    assert header.split() == ["configuration", A, B, C]
    assert next(line for line in said.splitlines() if "sft_config.old" in line).split()[1:] == ["1", "absent", "absent"]
    assert "seed" not in said


def test_environment_code_and_what_they_were_built_on_are_compared(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    environment = {"python": "3.11.7", "libraries": {"torch": "2.13", "peft": "0.21"}, "lock": {"sha256": "a" * 64}}
    newer = environment | {"libraries": {"torch": "2.14", "peft": "0.21"}, "gpus": ["H200"]}
    base = {"name": "tiny", "sha256": "b" * 64}
    code = {"commit": "c" * 40, "dirty": False}
    write_record(place, A, {"environment": environment, "code": code, "lineage": {"base": base}})
    write_record(place, B, {"environment": newer, "code": code | {"dirty": True}, "lineage": {"base": base}})
    found = compared(aletheia(place, "exp", "compare", A, B, "--json"))
    assert found["environment"] == {"libraries.torch": {A: "2.13", B: "2.14"}, "gpus": {B: ["H200"]}}
    assert found["code"] == {"dirty": {A: False, B: True}}
    assert found["built_on"] == {}


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_added_removed_and_changed_are_counted_and_named(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    one = {f"row-{i:02d}": f"hash-{i}" for i in range(5)}
    other = (
        {i: h for i, h in one.items() if i != "row-00"}
        | {"row-01": "edited"}
        | {f"new-{i:02d}": f"n{i}" for i in range(12)}
    )
    for name, found in ((A, one), (B, other)):
        file = write_record(place, name, {"data": rows(train=found, held_out={"h": "same"})})
        items.write_rows(file.folder, {"train": found, "held_out": {"h": "same"}})
    change = compared(aletheia(place, "exp", "compare", A, B, "--json"))["data"][B]
    assert change["train"]["added"] == [f"new-{i:02d}" for i in range(12)]
    assert (change["train"]["removed"], change["train"]["changed"]) == (["row-00"], ["row-01"])
    assert change["held_out"] == {"rows": [1, 1], "same": True}
    said = aletheia(place, "exp", "compare", A, B).out
    assert "train: 5 → 16 rows: 12 added, 1 removed, 1 changed" in said
    assert "added: new-00, new-01, new-02, new-03, new-04, new-05, new-06, new-07, new-08, new-09 … 12 in all\n" in said
    assert "changed: row-01\n" in said
    assert "held_out: the same 1 rows" in said


@pytest.mark.parametrize("new", ["hash-new", "hash-1"])
def test_a_row_put_in_front_of_rows_that_have_only_their_place_for_an_id_is_one_row_added(
    aletheia: Run, place: Workspace, write_record: Write, new: str
) -> None:
    one = {f"x.jsonl:{i}": f"hash-{i % 3}" for i in range(1, 5)}  # two rows are alike
    other = {"x.jsonl:1": new} | {f"x.jsonl:{i + 1}": digest for i, digest in enumerate(one.values(), 1)}
    for name, found in ((A, one), (B, other)):
        file = write_record(place, name, {"data": rows(train=found)})
        items.write_rows(file.folder, {"train": found})
    change = compared(aletheia(place, "exp", "compare", A, B, "--json"))["data"][B]["train"]
    assert (change["added"], change["removed"], change["changed"]) == (["x.jsonl:1"], [], [])


@pytest.mark.parametrize("why", ["older than rows.jsonl", "a rows.jsonl of other rows"])
def test_without_a_hash_a_row_only_the_sets_are_compared_and_it_says_so(
    aletheia: Run, place: Workspace, write_record: Write, why: str
) -> None:
    one, other = {"a": "1", "b": "2"}, {"a": "1", "c": "3"}
    for name, found in ((A, one), (B, other)):
        file = write_record(place, name, {"data": rows(train=found)})
        if why != "older than rows.jsonl":
            items.write_rows(file.folder, {"train": {"a": "1"}})
    assert compared(aletheia(place, "exp", "compare", A, B, "--json"))["data"][B]["train"] == {
        "rows": [2, 2],
        "same": False,
    }
    assert "only\n" in aletheia(place, "exp", "compare", A, B).out
    assert "the hashes of whole sets can be compared" in aletheia(place, "exp", "compare", A, B).out


def test_rows_that_one_trained_on_and_the_other_holds_out_are_named(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    for name, train, held in ((A, {"a": "1", "b": "2"}, {"c": "3"}), (B, {"a": "1"}, {"b": "2", "c": "3"})):
        file = write_record(place, name, {"data": rows(train=train, held_out=held)})
        items.write_rows(file.folder, {"train": train, "held_out": held})
    assert f"{A} trained on, {B} holds out: b\n" in aletheia(place, "exp", "compare", A, B).out


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def difference(aletheia: Run, place: Workspace, figure: str = "eval_loss") -> Any:
    entries = compared(aletheia(place, "exp", "compare", A, B, "--json"))["figures"][figure]
    assert [entry["id"] for entry in entries] == [A, B]
    return entries[1]["difference"]


def test_on_shared_items_the_difference_is_paired_and_has_its_interval(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    one, other = [5.0, 4.0, 4.6, 5.4], [4.8, 3.9, 4.4, 5.1]
    write_record(place, A, {"results": loss(one)}, **{"heldout.jsonl": held_out(one)})
    write_record(place, B, {"results": loss(other)}, **{"heldout.jsonl": held_out(other)[::-1]})  # the ids pair them
    expected = statistics.paired(one, other).delta
    found = difference(aletheia, place)
    assert (found["value"], found["ci_low"], found["ci_high"], found["n"]) == (
        expected.value, expected.ci_low, expected.ci_high, 4,
    )  # fmt: skip
    assert found["finding"] == "lower"  # and not better: other rows may have the same ids
    assert difference(aletheia, place, "eval_loss.delta")["value"] == pytest.approx(expected.value)
    said = aletheia(place, "exp", "compare", A, B).out
    assert "-0.2 [-0.3299, -0.07008] on 4 shared, matched by id alone: lower" in said


def test_inside_the_noise_nothing_is_called_better(aletheia: Run, place: Workspace, write_record: Write) -> None:
    one, other = [5.0, 4.0, 4.6, 5.4], [4.5, 4.4, 4.2, 5.5]  # a lower mean, by chance
    write_record(place, A, {"results": loss(one)}, **{"heldout.jsonl": held_out(one)})
    write_record(place, B, {"results": loss(other)}, **{"heldout.jsonl": held_out(other)})
    assert difference(aletheia, place)["value"] < 0
    assert difference(aletheia, place)["finding"] == "no difference shown"
    said = aletheia(place, "exp", "compare", A, B).out
    assert "better" not in said
    assert "worse" not in said


def test_where_nothing_is_paired_it_says_that_the_difference_has_no_interval(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    write_record(place, A, {"results": loss([5.0, 4.0, 4.6, 5.4])})
    write_record(place, B, {"results": loss([1.0, 1.0, 1.0, 1.1])})
    assert difference(aletheia, place) is None
    said = aletheia(place, "exp", "compare", A, B).out
    assert "no interval: not on shared items" in said
    assert "better" not in said


def test_only_shared_items_count_and_their_number_is_said(aletheia: Run, place: Workspace, write_record: Write) -> None:
    one, other = [5.0, 4.0, 4.6, 5.4], [4.8, 3.9, 4.5]
    write_record(place, A, {"results": loss(one)}, **{"heldout.jsonl": held_out(one)})
    write_record(place, B, {"results": loss(other)}, **{"heldout.jsonl": held_out(other)})
    assert difference(aletheia, place)["n"] == 3
    assert "on 3 shared of 4 and 3" in aletheia(place, "exp", "compare", A, B).out


def test_an_item_whose_content_was_changed_is_not_the_same_item(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    ends = [5.0, 4.0, 4.6, 5.4]
    for name, last in ((A, "hash-3"), (B, "edited")):
        found = {f"row-{i}": f"hash-{i}" for i in range(3)} | {"row-3": last}
        facts = {"results": loss(ends), "data": rows(held_out=found)}
        file = write_record(place, name, facts, **{"heldout.jsonl": held_out(ends)})
        items.write_rows(file.folder, {"held_out": found})
    found = difference(aletheia, place)
    assert (found["n"], found["changed_items"], "matched_by" in found) == (3, 1, False)


@pytest.mark.parametrize(("name", "known"), [("held_out", True), ("train", False)])
def test_ids_alone_are_believed_only_where_the_measured_set_is_the_same(
    aletheia: Run, place: Workspace, write_record: Write, name: str, known: bool
) -> None:
    ends = [5.0, 4.0, 4.6, 5.4]
    for record in (A, B):
        facts = {"results": loss(ends), "data": rows(**{name: {"any": "hash"}})}
        write_record(place, record, facts, **{"heldout.jsonl": held_out(ends)})
    assert ("matched_by" not in difference(aletheia, place)) == known


def test_preferences_and_answers_are_paired_too(aletheia: Run, place: Workspace, write_record: Write) -> None:
    margins = [{"id": "p", "before": 0.0, "after": 1.0}, {"id": "q", "before": 0.0, "after": -1.0}]
    results = {"preference_accuracy": {"value": 0.5, "n": 2}, "margin": {"value": 0.0, "n": 2}}
    for name in (A, B):
        write_record(place, name, {"stage": "dpo", "results": results}, **{"heldout.jsonl": margins})
    expected = statistics.paired([1.0, 0.0], [1.0, 0.0], shares=True).delta  # 0 or 1 a pair: the interval of shares
    found = difference(aletheia, place, "preference_accuracy")
    assert (found["n"], found["ci_low"], found["ci_high"]) == (2, expected.ci_low, expected.ci_high)
    for name, score in ((A, 0.0), (B, 1.0)):
        answers = [{"id": "q1", "score": score}, {"id": "q2", "score": 1.0}]
        facts = {"stage": "eval", "results": {"win_rate": {"value": score, "n": 2}}}
        write_record(place, name, facts, **{"answers.jsonl": answers})
    assert difference(aletheia, place, "win_rate")["value"] == 0.5


def test_a_figure_of_unknown_direction_is_higher_or_lower_never_better(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    for name, shift in ((A, 0.0), (B, 1.0)):
        file = write_record(place, name, {"stage": "eval", "results": {"answer_tokens": {"value": shift, "n": 3}}})
        items.write_changes(file.folder, {"answer_tokens": {str(i): (0.0, shift + i * shift / 10) for i in range(3)}})
    assert difference(aletheia, place, "answer_tokens")["finding"] == "higher"


@pytest.mark.parametrize(
    ("metric", "finding"),
    [
        *[
            (name, "worse")
            for name in ("ter", "brier_score", "perplexity", "word_perplexity", "bits_per_byte", "mse", "wer")
        ],
        *[(name, "better") for name in ("acc", "acc_norm", "exact_match", "f1", "bleu")],
        *[(name, "higher") for name in ("of_mine", None, 3, ["acc"])],
    ],
)
@pytest.mark.parametrize("task", ["choices", "mmlu.pro", "low_loss"])
def test_a_benchmark_is_better_in_the_direction_of_its_metric(
    aletheia: Run, place: Workspace, write_record: Write, metric: Any, finding: str, task: str
) -> None:
    figure = f"benchmarks.{task}"
    hashes = {str(i): f"hash-{i}" for i in range(3)}
    for name, shift in ((A, 0.0), (B, 1.0)):
        ends = {i: (0.0, shift + int(i) * shift / 10) for i in hashes}
        result = statistics.paired(*zip(*ends.values(), strict=True)).model_dump(exclude_none=True)
        facts = {"stage": "eval", "results": {"benchmarks": {task: result | {"metric": metric}}}}
        file = write_record(place, name, facts | {"data": rows(choices=hashes)})
        items.write_rows(file.folder, {"choices": hashes})
        items.write_changes(file.folder, {figure: ends})
    assert difference(aletheia, place, figure)["finding"] == finding
    assert difference(aletheia, place, f"{figure}.delta")["finding"] == finding


def test_benchmarks_of_two_metrics_are_higher_or_lower_never_better(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    hashes = {str(i): f"hash-{i}" for i in range(3)}
    for name, shift, metric in ((A, 0.0, "perplexity"), (B, 1.0, "acc")):
        entry = {"value": shift, "n": 3, "metric": metric}
        facts = {"stage": "eval", "results": {"benchmarks": {"x": entry}}, "data": rows(choices=hashes)}
        file = write_record(place, name, facts)
        items.write_rows(file.folder, {"choices": hashes})
        items.write_changes(file.folder, {"benchmarks.x": {i: (0.0, shift + int(i) * shift / 10) for i in hashes}})
    assert difference(aletheia, place, "benchmarks.x")["finding"] == "higher"


def test_a_figure_of_unknown_direction_is_neither_inside_the_noise(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    for name, shift in ((A, 0.0), (B, 1.0)):
        file = write_record(place, name, {"stage": "eval", "results": {"answer_tokens": {"value": shift, "n": 4}}})
        items.write_changes(file.folder, {"answer_tokens": {str(i): (0.0, shift * 9 * (-1) ** i) for i in range(4)}})
    assert difference(aletheia, place, "answer_tokens")["finding"] == "no difference shown"


def test_the_first_of_several_is_the_reference_of_all(aletheia: Run, place: Workspace, write_record: Write) -> None:
    for name, shift in ((A, 0.0), (B, -0.1), (C, 0.2)):
        ends = [5.0 + shift, 4.0 + shift, 4.5 + shift * 1.1]
        facts = {"results": loss(ends), "data": rows(held_out={"any": "hash"})}
        write_record(place, name, facts, **{"heldout.jsonl": held_out(ends)})
    entries = compared(aletheia(place, "exp", "compare", A, B, C, "--json"))["figures"]["eval_loss"]
    assert "difference" not in entries[0]
    assert [entry["difference"]["finding"] for entry in entries[1:]] == ["better", "worse"]


def test_different_stages_are_compared_and_it_is_said(aletheia: Run, place: Workspace, write_record: Write) -> None:
    write_record(place, A)
    write_record(place, B, {"stage": "eval"})
    assert "their stages differ" in aletheia(place, "exp", "compare", A, B).out
    write_record(place, C)
    assert "their stages differ" not in aletheia(place, "exp", "compare", A, C).out


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ([A, A], f"error: {A} is named twice"),
        ([A, f"experiments/{A}.yaml"], f"error: {A} is named twice"),
        ([A], "error: one record alone"),
        ([A, B], f"error: experiments/{B}.yaml: is a plan: nothing has run"),
        ([A, C], f"error: experiments: there is no record `{C}`"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    aletheia: Run, place: Workspace, write_record: Write, names: list[str], error: str
) -> None:
    write_record(place, A)
    write_record(place, B, None)
    said = aletheia(place, "exp", "compare", *names)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(error)
    assert len(said.err.splitlines()) == 1


def test_odd_contents_are_compared_without_a_traceback(aletheia: Run, place: Workspace, write_record: Write) -> None:
    odd = [
        "{torn", "[1]", {"id": 3, "after": 1}, {"id": "a"}, {"id": "\ud800", "before": 1, "after": 2, "part": "train"},
        {"id": "x", "before": 1e308, "after": -1e308, "figure": []}, {"part": "train", "id": "x", "sha256": 5},
        {"id": "y", "before": 1e308, "after": 1e308},
    ]  # fmt: skip
    files = dict.fromkeys(("rows.jsonl", "heldout.jsonl", "answers.jsonl", "items.jsonl"), odd)
    facts: dict[str, Any] = {
        "configuration": {"a": float("nan"), "b": {}, "c": [1, [2]]},
        "data": {"train": {"rows": [], "sha256": 3}, "x": 5, "held_out": {"rows": None}},
        "environment": {"libraries": "none"},
        "code": {"patch": "x", "commit": []},
        "results": {
            "eval_loss": {"before": 3, "after": {"value": 5, "n": "many"}},
            "margin": {"value": 1, "ci_low": "x"},
        },
    }
    write_record(place, A, facts, **files)
    write_record(place, B, facts | {"configuration": {"a": {"b": 1}}, "stage": "\x1b[2J"}, **files)
    said = aletheia(place, "exp", "compare", A, B)
    assert said.code == 0, said.err
    assert not any(ord(letter) < 32 and letter != "\n" for letter in said.out)
    assert "heldout.jsonl: 2 lines, the first 1, are torn or no JSON object, and passed over" in said.err
    compared(aletheia(place, "exp", "compare", A, B, "--json"))
