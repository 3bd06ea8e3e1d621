"""The reference's log-probs: computed once, by the policy as it starts, kept, and never another's."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Pair, little_model, pair, plain_log_probs, trainable

from pipeline import attention, reference
from pipeline.errors import UserError
from pipeline.head import bare
from pipeline.passes import Pass
from pipeline.trainer import Execution
from pipeline.workspace import Workspace

SOURCE = random.Random(0)
PAIRS = [pair(SOURCE, 3, SOURCE.randint(1, 9), SOURCE.randint(1, 9)) for _ in range(6)]
HASHES = [f"row-{n}" for n in range(6)]
KEY = reference.key(base="b", adapter="a", contract="c")


class Untouchable:
    """A model that nobody may ask anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the model was asked for {name}")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    """In training, where half of the adapter's inputs are dropped."""
    made = little_model(adapter={"lora_dropout": 0.5})
    attention.install(bare(made))
    return made.train()


def of(workspace: Workspace, model: Any, rows: Sequence[int], known_as: str = KEY, packed: bool = True) -> Any:
    pairs, hashes = [PAIRS[i] for i in rows], [HASHES[i] for i in rows]
    return reference.log_probs(workspace, known_as, model, pairs, hashes, Execution(30, packed))


def plainly(model: Any, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    with torch.no_grad():
        sums = [each.sum().item() for each in plain_log_probs(model.eval(), [side for both in pairs for side in both])]
    attention.install(bare(model.train()))
    return list(zip(sums[::2], sums[1::2], strict=True))


def kept(workspace: Workspace) -> Path:
    (path,) = (workspace.checkpoints / ".reference").iterdir()  # and no half-written one
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_each_pair_gets_its_own_log_probs_without_dropout_or_gradients(
    packed: bool, workspace: Workspace, model: Any
) -> None:
    found = of(workspace, model, [4, 0, 5, 1], packed=packed)
    expected = plainly(model, [PAIRS[i] for i in (4, 0, 5, 1)])
    assert [list(each) for each in found] == [pytest.approx(each, abs=1e-9) for each in expected]
    assert model.training and all(p.grad is None and not p.is_inference() for p in trainable(model))


def test_what_the_file_has_is_not_computed_again(workspace: Workspace, model: Any) -> None:
    found = of(workspace, model, [0, 1, 2])
    assert of(workspace, Untouchable(), [0, 1, 2]) == found
    assert of(workspace, Untouchable(), [2, 0]) == [found[2], found[0]]  # by row, not by place
    with pytest.raises(AssertionError, match="the model was asked"):
        of(workspace, Untouchable(), [0, 3])


def test_only_rows_that_the_file_lacks_are_computed(
    workspace: Workspace, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of(workspace, model, [0, 1, 2])
    seen: list[Pass] = []
    honest = reference.token_log_probs
    monkeypatch.setattr(reference, "token_log_probs", lambda m, batch: (seen.append(batch), honest(m, batch))[1])
    found = of(workspace, model, [3, 1, 5])
    assert sum(len(batch.rows) for batch in seen) == 2
    tokens = {token for batch in seen for token in batch.targets.tolist()}
    assert tokens == {
        t for i in (3, 5) for side in PAIRS[i] for t, wanted in zip(side.ids, side.mask, strict=True) if wanted
    }
    assert found[1] == first[1]
    assert of(workspace, Untouchable(), [0, 1, 2, 3, 5]) == [*first, found[0], found[2]]  # none was forgotten


def test_the_key_changes_with_everything_it_is_told() -> None:
    parts = {"base": "b", "adapter": "a", "contract": "c", "packed": True}
    keys = {reference.key(**parts), *(reference.key(**parts | {name: "other"}) for name in parts)}
    keys.add(reference.key(**parts | {"adapter": None}))
    assert len(keys) == 6
    assert reference.key(**dict(reversed(parts.items()))) == reference.key(**parts)


def test_another_key_does_not_find_the_file(workspace: Workspace, model: Any) -> None:
    of(workspace, model, [0])
    with pytest.raises(AssertionError, match="the model was asked"):
        of(workspace, Untouchable(), [0], known_as=reference.key(base="b", adapter="another", contract="c"))


def another_key(text: str) -> str:
    return json.dumps(json.loads(text) | {"key": KEY[:16] + "0" * 48})


@pytest.mark.parametrize(
    "damage",
    [
        another_key,
        lambda text: text[:-9],  # torn
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"rows": json.loads(text)["rows"]}),
        lambda text: json.dumps({"key": KEY, "rows": {"row-0": [1.0]}}),
        lambda text: json.dumps({"key": KEY, "rows": {"row-0": ["a", "b"]}}),
    ],
    ids=["another key", "torn", "empty", "list", "no key", "one side", "no numbers"],
)
def test_a_file_of_another_key_or_a_broken_one_is_refused_in_a_line(
    damage: Any, workspace: Workspace, model: Any
) -> None:
    of(workspace, model, [0])
    path = kept(workspace)
    path.write_text(damage(path.read_text()))
    damaged = path.read_bytes()
    with pytest.raises(UserError) as refused:
        of(workspace, Untouchable(), [0])
    said = str(refused.value)
    assert said.startswith(f"checkpoints/.reference/{path.name}: ") and "\n" not in said and "deleting the file" in said
    assert path.read_bytes() == damaged


def test_a_measurement_that_fails_leaves_the_model_in_training_and_keeps_nothing(
    workspace: Workspace, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, batch: Pass) -> Any:
        assert not model.training
        raise RuntimeError("planted")

    monkeypatch.setattr(reference, "token_log_probs", fail)
    with pytest.raises(RuntimeError, match="planted"):
        of(workspace, model, [0])
    assert model.training and not (workspace.checkpoints / ".reference").exists()
