"""A training asks for the tokens of a row three times; they are made once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.chat import PROBES, Chat
from pipeline.dpo import Dpo
from pipeline.model import Base
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.workspace import Workspace


@pytest.mark.parametrize(("stage", "encode", "rows"), [(Sft, "_conversation", 10), (Dpo, "_pair", 6)])
def test_a_training_encodes_each_row_once(
    small_talk: Workspace,
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    stage: Any,
    encode: str,
    rows: int,
) -> None:
    honest, seen = getattr(Chat, encode), Counter[str]()

    def counted(chat: Chat, row: Any) -> Any:
        seen.update([str(row)] if chat._known is not None else [])  # else it is looking the template over
        return honest(chat, row)

    monkeypatch.setattr(Chat, encode, counted)
    run_stage(stage, job("sft_config.epochs=0.2", "sft_config.warmup_ratio=0.0", source="base"))
    assert len(seen) == rows and set(seen.values()) == {1}


def test_what_is_remembered_is_what_would_be_made_again(base: Base) -> None:
    plain, remembering = base.chat(), base.chat().remember()
    for _ in range(2):
        for probe in PROBES:
            assert remembering.conversation(probe) == plain.conversation(probe)
    assert remembering.conversation(PROBES[0]) is remembering.conversation(list(PROBES[0]))
    altered = [PROBES[0][0], PROBES[0][1].model_copy(update={"content": "Another."})]
    assert remembering.conversation(altered) == plain.conversation(altered) != plain.conversation(PROBES[0])
