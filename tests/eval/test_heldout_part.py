"""The held-out part: what it measures of a model, and what stands in the record."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eval.contestants import Contestant
from eval.heldout import HeldOut, Measured
from eval.names import BASE, MODEL
from pipeline.chat import Chat
from pipeline.config import EvalConfig
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.train.heldout import Ends

if TYPE_CHECKING:
    from tests.conftest import Trained

N = 4


@pytest.fixture(scope="module")
def part(trained: "Trained") -> HeldOut:
    rows = (
        read_rows(trained.workspace, f"data/{kind}", of)
        for kind, of in (("sft", Conversation), ("dpo", PreferencePair))
    )
    conversations, pairs = (sorted(found, key=lambda row: len(str(row)))[:N] for found in rows)
    return HeldOut(EvalConfig(batch_size=2), conversations, pairs)


def test_a_model_is_measured_row_by_row(
    part: HeldOut, model: Any, chat: Chat, answer_losses: Callable[[Any, Any], list[float]]
) -> None:
    found = part.measure(Contestant(MODEL, "merged", chat, lambda: model), model)
    assert len(found.ends) == len(found.margins) == N
    for row, ends, tokens in zip(part.conversations, found.ends, found.tokens, strict=True):
        losses = answer_losses(model, chat.conversation(row.messages))
        assert ends.loss == pytest.approx(sum(losses) / len(losses), abs=1e-3) and tokens == len(losses)
        assert len(ends.at_ends) == sum(m.role == "assistant" for m in row.messages)
        assert 0 <= ends.inside <= tokens and all(0 <= p <= 1 for p in ends.at_ends)


def test_the_record_takes_the_rows_apart(part: HeldOut, tmp_path: Path) -> None:
    theirs = Measured([Ends(3.0 + i / 10, [0.2 + i / 50], 0.3, 2.0) for i in range(N)], [40, 10, 10, 10], [0.0] * N)
    ours = Measured(
        [Ends(2.0 + i / 7, [0.6 + i / 20], 0.2, 1.0) for i in range(N)], [40, 10, 10, 10], [1.0, 2.0, -1.0, 0.5]
    )
    found = part.compare({BASE: theirs, MODEL: ours, "sft": ours}, tmp_path)
    results = found.results
    change = results["eval_loss"]["delta"]["value"]
    assert change == pytest.approx(-1 + 1.5 * (1 / 7 - 1 / 10), abs=1e-5)
    assert results["eval_loss_by_token"]["delta"]["value"] < change, "the long row gained most"
    assert results["perplexity"]["ratio"]["value"] == pytest.approx(2.718281828**change, abs=1e-4)
    assert sum(f["delta"]["n"] for f in results["by_domain"]["eval_loss"].values()) == N
    assert sum(f["n"] for f in results["by_fault"].values()) == N
    assert results["preference_accuracy"]["value"] == 0.75
    assert results["end_of_turn"]["at_end"]["delta"]["value"] == pytest.approx(0.445)
    assert results["others"]["sft"]["eval_loss"]["delta"] == {"value": 0.0, "n": N}
    assert found.items["eval_loss"][part.conversations[0].id] == (3.0, 2.0)
