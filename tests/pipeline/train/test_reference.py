"""The reference's log-probs: computed once, by the policy as it starts, kept, and never another's."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Pair, little_model, pair, plain_log_probs, trainable

from pipeline.errors import UserError
from pipeline.train import attention, head, reference
from pipeline.train.head import bare
from pipeline.train.passes import Pass
from pipeline.train.trainer import Execution
from pipeline.workspace import Workspace

SOURCE = random.Random(0)
PAIRS = [pair(SOURCE, 3, SOURCE.randint(1, 9), SOURCE.randint(1, 9)) for _ in range(6)]
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
    return reference.log_probs(workspace, known_as, model, Execution(30, packed), [PAIRS[i] for i in rows])


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
    honest = head.token_log_probs
    monkeypatch.setattr(head, "token_log_probs", lambda m, batch: (seen.append(batch), honest(m, batch))[1])
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


def test_a_row_is_known_by_its_tokens_and_by_which_of_them_are_trained(workspace: Workspace, model: Any) -> None:
    (chosen, rejected), how = PAIRS[0], Execution(30, packed=True)
    found = reference.log_probs(workspace, KEY, model, how, [PAIRS[0]])
    untrained = replace(rejected, mask=[*rejected.mask[:-1], False])
    for other in ((rejected, chosen), (chosen, chosen), (chosen, untrained)):
        assert reference.log_probs(workspace, KEY, model, how, [other]) != found
    assert len(json.loads(kept(workspace).read_text())["rows"]) == 4
    assert reference.log_probs(workspace, KEY, Untouchable(), how, [PAIRS[0]]) == found


def of_another_key(text: str) -> str:
    """As `log_probs` would write it."""
    other, kept = KEY[:16] + "0" * 48, json.loads(text)
    return json.dumps(kept | {"key": other, "sha256": reference._sha256([other, kept["rows"]])})


def a_value_off(text: str) -> str:
    """In one digit, of a pair that promise 3's check would not look at."""
    kept = json.loads(text)
    row = list(kept["rows"])[-1]
    kept["rows"][row][1] += 0.25
    return json.dumps(kept)


def of_other_rows(text: str) -> str:
    kept = json.loads(text)
    rows = list(kept["rows"])
    return json.dumps(kept | {"rows": dict(zip(rows, [kept["rows"][row] for row in rows[1:] + rows[:1]], strict=True))})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (of_another_key, "are reference log-probs of another model, adapter or template"),
        (a_value_off, "are reference log-probs that were changed since they were written"),
        (of_other_rows, "are reference log-probs that were changed since they were written"),
        (lambda text: text.replace(KEY, KEY[:-1] + "x"), "are reference log-probs that were changed since"),
    ],
    ids=["another key", "a value off", "of other rows", "the key off"],
)
def test_a_file_of_another_key_or_a_changed_one_is_refused_in_a_line(
    damage: Any, said: str, workspace: Workspace, model: Any
) -> None:
    of(workspace, model, [0, 1])
    path = kept(workspace)
    path.write_text(damage(path.read_text()))
    damaged = path.read_bytes()
    with pytest.raises(UserError) as refused:
        of(workspace, Untouchable(), [0, 1])
    line = str(refused.value)
    assert line.startswith(f"checkpoints/.reference/{path.name}: {said}")
    assert "\n" not in line and line.endswith("try deleting the file: they are computed anew")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "",
        lambda text: "\0" * len(text),
        lambda text: "[]",
        lambda text: json.dumps({"key": KEY, "rows": {}}),
        lambda text: json.dumps({"key": KEY, "sha256": "", "rows": {"row-0": [1.0]}}),
        lambda text: json.dumps({"key": KEY, "sha256": "", "rows": {"row-0": ["a", "b"]}}),
    ],
    ids=["torn", "empty", "zeros", "list", "unsealed", "one side", "no numbers"],
)
def test_what_a_torn_file_had_is_computed_anew_aloud(
    damage: Any, workspace: Workspace, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = of(workspace, model, [0, 1])
    path = kept(workspace)
    whole = path.read_bytes()
    path.write_text(damage(path.read_text()))
    assert of(workspace, model, [0, 1]) == found and path.read_bytes() == whole
    assert f"note: checkpoints/.reference/{path.name} is torn" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_said_to_be_that(workspace: Workspace, model: Any) -> None:
    of(workspace, model, [0])
    path = kept(workspace)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"\.json: cannot be read: Is a directory; try deleting the file"):
        of(workspace, Untouchable(), [0])


def test_a_measurement_that_fails_leaves_the_model_in_training_and_keeps_nothing(
    workspace: Workspace, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, batch: Pass) -> Any:
        assert not model.training
        raise RuntimeError("planted")

    monkeypatch.setattr(head, "token_log_probs", fail)
    with pytest.raises(RuntimeError, match="planted"):
        of(workspace, model, [0])
    assert model.training and not (workspace.checkpoints / ".reference").exists()
