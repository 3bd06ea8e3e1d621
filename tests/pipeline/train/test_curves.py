"""The pictures beside a training's record, from logs written by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.train import curves
from pipeline.workspace import CHECKOUT

Log = list[dict[str, Any]]


def sft_log(steps: int = 45) -> Log:
    log: Log = []
    for step in range(1, steps + 1):
        log.append(
            {
                "step": step,
                "epoch": step / 15,
                "loss": 2 + math.exp(-step / 10) + 0.1 * math.sin(step),
                "learning_rate": 2e-4 * (1 - step / steps),
                "grad_norm": 0.4 + 0.1 * math.cos(step),
                "tokens": 900 * step,
                "tokens_per_second": 4000.0,
                "memory_gb": 17.0,
                "gpu_utilisation": 95.0,
                "gpu_power_w": 600.0,
                "update_norm": 1e-3,
                "update_norm_by_layer": {"layers.0": 1e-3, "layers.1": 2e-3 / step},
                "grad_norm_by_layer": {"layers.0": 0.3, "layers.1": 0.2 + 0.01 * step, "other": 0.01},
            }
        )
        if step % 15 == 0:
            ends = {"eval_loss": 2.2, "eval_loss_ci_low": 2.1, "eval_loss_ci_high": 2.3}
            log.append({"step": step, "epoch": step / 15, **ends, "eval_n": 25})
    return log


def dpo_log() -> Log:
    log: Log = []
    for step, line in enumerate((line for line in sft_log() if "loss" in line), 1):
        log.append(line | {"rewards/accuracies": 0.8, "rewards/margins": 0.1 * (step - 1)})
    accuracy = {"eval_preference_accuracy": 0.8, "eval_preference_accuracy_ci_low": 0.6}
    return [*log, {"step": 45, "epoch": 3.0, "eval_loss": 0.6, **accuracy, "eval_n": 30}]


def without(log: Log, *keys: str) -> Log:
    return [{key: value for key, value in line.items() if key not in keys} for line in log]


def drawn(folder: Path, log: Log) -> dict[str, bytes]:
    """Every picture by name, that it is one, and that no other lies there."""
    folder.mkdir(exist_ok=True)
    named = curves.draw(folder, log)
    assert sorted(path.name for path in folder.iterdir()) == sorted(name for name, _ in named)
    assert all(len(purpose) > 20 for _, purpose in named)
    pictures = {name: (folder / name).read_bytes() for name, _ in named}
    for picture in pictures.values():
        assert picture.startswith(b"\x89PNG")
        width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        assert width >= 800 and height >= 400
    return pictures


def drawn_bare(folder: Path, log: Log) -> dict[str, bytes]:
    """The same lines, but without ticks, and nothing is measured to find its place: a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine", lambda **_: None)
        patch.setattr("matplotlib.axis.Axis._update_ticks", lambda axis: [])
        return drawn(folder, log)


LOGS = {"sft": sft_log(), "dpo": dpo_log()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    return {stage: drawn_bare(tmp_path_factory.mktemp(stage), log) for stage, log in LOGS.items()}


@pytest.mark.parametrize("stage", LOGS)
def test_a_training_leaves_four_pictures(tmp_path: Path, stage: str) -> None:
    assert list(drawn(tmp_path, LOGS[stage])) == ["loss.png", "optimiser.png", "layers.png", "speed.png"]


@pytest.mark.parametrize(
    ("key", "picture"),
    [
        ("eval_loss_ci_low", "loss.png"),
        ("update_norm", "optimiser.png"),
        ("update_norm_by_layer", "layers.png"),
        ("memory_gb", "speed.png"),
        ("gpu_utilisation", "speed.png"),
        ("gpu_power_w", "speed.png"),
        ("eval_preference_accuracy", "loss.png"),
    ],
)
def test_every_figure_is_seen_in_its_picture_and_in_no_other(
    tmp_path: Path, bare: dict[str, dict[str, bytes]], key: str, picture: str
) -> None:
    stage = "dpo" if "accurac" in key else "sft"
    whole, less = bare[stage], drawn_bare(tmp_path, without(LOGS[stage], key))
    assert [name for name in whole if whole[name] != less[name]] == [picture]


KNOWN = {"step", "epoch", "loss", "learning_rate", "grad_norm"}
OLDER = without(sft_log(), *{key for line in sft_log() for key in line} - KNOWN)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return drawn(tmp_path_factory.mktemp("older"), OLDER)


def test_what_an_older_log_does_not_know_is_left_out(older: dict[str, bytes]) -> None:
    assert list(older) == ["loss.png", "optimiser.png"]


def test_two_steps_are_enough(tmp_path: Path) -> None:
    assert "loss.png" in drawn_bare(tmp_path, sft_log(2))


def test_a_log_with_figures_that_are_no_numbers_is_still_drawn(tmp_path: Path) -> None:
    """The last line of a run that failed on its loss, and lines that someone edited."""
    broken = {"step": 46, "epoch": 3.1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-4}
    layers: Log = [{"step": 47, "loss": 2.0, "grad_norm_by_layer": {"layers.0": math.nan, "layers.1": "?"}}]
    odd: Log = [{"step": "48", "loss": 2.0}, {"step": 49, "loss": None}, {"step": 50, "loss": True}, {"loss": 1.0}]
    odd += [{"step": 51, "epoch": 0, "eval_loss": 2.0, "eval_loss_ci_low": None, "eval_loss_ci_high": "2"}]
    assert len(drawn(tmp_path, [*sft_log(), broken, *layers, *odd])) == 4


def test_the_person_s_own_settings_neither_show_nor_are_lost(tmp_path: Path, older: dict[str, bytes]) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 23, "axes.grid": False}):
        assert drawn(tmp_path, OLDER) == older
        assert matplotlib.rcParams["font.size"] == 23


def test_drawing_says_nothing_and_needs_no_pyplot(tmp_path: Path) -> None:
    """In a fresh process that finds no font cache and no place for one."""
    script = (
        "import json, sys; from pathlib import Path; from pipeline.train import curves\n"
        "curves.draw(Path(sys.argv[1]), json.load(sys.stdin))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input=json.dumps(sft_log()),
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env=os.environ | {"MPLCONFIGDIR": str(nowhere / "config"), "HOME": str(nowhere)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "loss.png").exists()
