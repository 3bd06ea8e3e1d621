"""The whole pipeline as one experiment, on so few and short rows that it takes seconds."""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.records.find import records
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

THINGS = ("an index", "a lock", "a queue", "a cache", "a shard", "a pod", "a trace", "a commit")
SMALL = ["sft_config.epochs=1.0", "eval_config.limit=2", "eval_config.max_tokens=8", "serve_config.max_tokens=8"]


def few_rows(workspace: Workspace) -> None:
    """Eight conversations, eight pairs, and two of each kind to evaluate on."""
    ask = [[{"role": "user", "content": f"What is {thing}?"}] for thing in THINGS]
    say = [{"role": "assistant", "content": f"It is {thing}, and no more."} for thing in THINGS]
    deny = [{"role": "assistant", "content": f"Nobody knows {thing}."} for thing in THINGS]
    rows = {
        "sft": [{"messages": [*a, b]} for a, b in zip(ask, say, strict=True)],
        "dpo": [{"prompt": a, "chosen": [b], "rejected": [c]} for a, b, c in zip(ask, say, deny, strict=True)],
    }
    for kind, values in rows.items():
        for path in (workspace.root / "data" / kind).glob("*.jsonl"):
            path.unlink()
        (workspace.root / "data" / kind / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    for kind in ("questions", "choices"):
        first, *others = sorted((workspace.root / "data" / "eval" / kind).glob("*.jsonl"))
        first.write_text("\n".join(first.read_text("utf-8").splitlines()[:2]), "utf-8")
        for path in others:
            path.unlink()


def test_every_stage_leaves_one_complete_record_under_one_experiment(
    aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    few_rows(workspace)
    said = aletheia(workspace, "demo", "--profile", "small", *(word for text in SMALL for word in ("--set", text)))
    assert said.code == 0, said.err
    assert re.fullmatch(r"experiments/EXP-\S+\.yaml\n", said.out)
    found = {file.id: facts for file, facts in records(workspace)}
    pipeline = found.pop(said.out.strip().removeprefix("experiments/").removesuffix(".yaml"))
    assert {facts.status for facts in [pipeline, *found.values()]} == {"complete"}
    assert pipeline.stage == "pipeline"
    assert pipeline.lineage.children == sorted(found)
    assert all(facts.lineage.parent and facts.failure is None for facts in found.values())
    assert [found[i].stage for i in sorted(found)] == ["data", "sft", "sft", "dpo", "merge", "serve", "eval"]

    by_stage = {found[i].stage: i for i in sorted(found, reverse=True)}  # of the two sft records the first
    control = next(i for i, facts in found.items() if facts.configuration["sft_config"]["shuffle_answers"])
    assert control != by_stage["sft"]
    assert pipeline.results["control"]["record"] == control
    assert [found[by_stage[stage]].lineage.inputs[0].id for stage in ("dpo", "merge", "serve", "eval")] == [
        by_stage["sft"], by_stage["dpo"], by_stage["merge"], by_stage["merge"],
    ]  # fmt: skip

    served = pipeline.results["served"]
    assert served["streamed_equals_whole"] is True
    assert "no-such-model" in served["unknown_model"]
    assert found[by_stage["serve"]].results["requests"] == 2
    assert all(facts.configuration["sft_config"]["epochs"] == 1.0 for facts in found.values())
    assert said.err.count("Traceback") == 0
    assert "control  " in said.err
