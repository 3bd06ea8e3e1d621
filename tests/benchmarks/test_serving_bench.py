"""The serving benchmark's own promises: answers of full length, counted as they are told, and ratios taken within a round."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.bed import make_bed
from benchmarks.serving import LOW, NAMES, NARROW, STREAMS, Run, load, make_model, over_http, table
from pipeline.config import ServeConfig
from serving.front.app import Usage, build_app
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.in_process import serving


@pytest.mark.parametrize("temperature", [0.0, LOW])
def test_every_answer_is_counted_and_has_its_full_length(tmp_path: Path, temperature: float) -> None:
    bed = make_bed()
    make_model(bed, tmp_path, NARROW)
    model, chat, _ = load(tmp_path)
    app = build_app(TransformersEngine(model, chat, 256, STREAMS), "bench", ServeConfig(), Usage())
    prompts = [ids[:20] for ids, _ in bed.sequences("sft", "quick")][:3]
    with serving(app) as address:
        said = asyncio.run(over_http(address, prompts, 40, temperature))
    assert said["tokens"] == 3 * 40
    assert len({*said["texts"]}) == 3 and said["seconds"] > 0


def test_a_ratio_is_within_a_round_and_a_goal_is_reached_or_missed() -> None:
    def runs(number: int, pace: float, many: float) -> list[Run]:
        """A round on a machine of this pace; `many`: how much faster our server is with all streams than with one."""
        return [
            Run(name, number, streams, 100, 10 / pace / (many if streams > 1 else 1) * (0.5 if name == "engine" else 1))
            for name in NAMES
            for streams in (1, STREAMS)
        ]

    said = table([*runs(0, 1, 6), *runs(1, 50, 6), *runs(2, 7, 4)])
    lines = {line[:35].strip(): line[35:].split() for line in said.splitlines()}
    assert lines["8 streams over one stream"] == ["6.00", "4.00–6.00", "≥", "5", "reached"]
    assert lines["8 streams over the engine alone"] == ["0.50", "0.50–0.50", "≥", "0.9", "MISSED"]
