"""A training's log as pictures beside its record, for someone who opens the folder a year later.

    draw(record.folder, items.read(record.folder / "log.jsonl"))

Readable at 800 pixels, in colours that the colour-blind tell apart (Okabe and Ito 2008). What a log does not know, an
older one's memory for instance, is left out. The report's charts, which one can hover over, are `aletheia/report/curves.py`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Log = Sequence[dict[str, Any]]
Points = tuple[list[float], list[float]]  # steps and values

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8f98"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "axes.labelcolor": "#4a4f57",
    "lines.linewidth": 2,
    "axes.formatter.limits": (-3, 4),
    "legend.frameon": False,
}
WIDTH, PANEL, DPI = 8.0, 2.6, 144  # inches, inches, dots an inch


def draw(record_folder: Path, log: Log) -> list[tuple[str, str]]:
    """Writes the pictures that the log has figures for. Returns file name and purpose of each."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a font cache that is built, a folder not to be written
    import matplotlib

    dpo = any("rewards/margins" in line for line in log)
    pictures: list[tuple[str, str, dict[str, Callable[[Any, Log], None]]]] = [
        (
            "loss.png",
            "loss in training and on held-out rows: does it learn, and does it begin to overfit",
            {"loss": _dpo_loss, "rewards/accuracies": _preferred} if dpo else {"loss": _sft_loss},
        ),
        (
            "optimiser.png",
            "learning rate, gradient norm and size of the updates: is the training steady",
            {"learning_rate": _learning_rate, "grad_norm": _gradient, "update_norm": _update},
        ),
        (
            "layers.png",
            "gradient norm and size of the updates of each layer: where the model learns, and where it breaks",
            {"grad_norm_by_layer": _gradient_by_layer, "update_norm_by_layer": _update_by_layer},
        ),
        (
            "speed.png",
            "tokens a second, peak memory, a GPU's load and power: what the training takes",
            {"tokens_per_second": _speed, "memory_gb": _memory, "gpu_utilisation": _load, "gpu_power_w": _power},
        ),
    ]
    drawn = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the person has set for their own pictures
        matplotlib.rcParams.update(STYLE)
        for name, purpose, panels in pictures:
            known = [panel for key, panel in panels.items() if any(key in line for line in log)]
            if known:
                _picture(record_folder / name, known, log)
                drawn.append((name, purpose))
    return drawn


def _picture(path: Path, panels: list[Callable[[Any, Log], None]], log: Log) -> None:
    """The panels one below the other."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(WIDTH, max(PANEL * len(panels), 4.0)), dpi=DPI, layout=layout)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, log)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel(_step_label(log))
    figure.align_ylabels(axes)
    figure.savefig(path)


def _sft_loss(ax: Any, log: Log) -> None:
    _loss(ax, log, "nats a token")


def _dpo_loss(ax: Any, log: Log) -> None:
    _loss(ax, log, "loss a pair")  # of some kinds no nats


def _loss(ax: Any, log: Log, unit: str) -> None:
    ax.set(title="Loss", ylabel=unit)
    _trips(ax, log)
    _with_held_out(ax, _series(log, "loss"), log, "eval_loss")


def _preferred(ax: Any, log: Log) -> None:
    ax.set(title="Preference accuracy", ylabel="share of pairs whose\nmargin has risen")
    moved = [line for line in log if line.get("rewards/margins") != 0]  # else policy and reference are still the same
    _with_held_out(ax, _series(moved, "rewards/accuracies"), log, "eval_preference_accuracy")
    ax.set_ylim(-0.03, 1.03)
    ax.axhline(0.5, color=GREY, linewidth=1, linestyle=(0, (4, 4)))
    ax.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)


def _learning_rate(ax: Any, log: Log) -> None:
    ax.set(title="Learning rate", ylabel="rate of AdamW")
    _line(ax, _series(log, "learning_rate"))


def _gradient(ax: Any, log: Log) -> None:
    ax.set(title="Gradient norm, before clipping", ylabel="L2 norm")
    _thin_and_smoothed(ax, _series(log, "grad_norm"))


def _update(ax: Any, log: Log) -> None:
    ax.set(title="Size of the updates to the adapter", ylabel="‖Δθ‖ / ‖θ‖")
    _thin_and_smoothed(ax, _series(log, "update_norm"))


def _speed(ax: Any, log: Log) -> None:
    ax.set(title="Throughput", ylabel="supervised tokens / s")
    _thin_and_smoothed(ax, _series(log, "tokens_per_second"), from_zero=True)


def _memory(ax: Any, log: Log) -> None:
    ax.set(title="Peak memory so far", ylabel="GB")
    _line(ax, _series(log, "memory_gb"), from_zero=True)


def _load(ax: Any, log: Log) -> None:
    ax.set(title="GPU at work", ylabel="% of the time")
    _thin_and_smoothed(ax, _series(log, "gpu_utilisation"))
    ax.set_ylim(0, 103)


def _power(ax: Any, log: Log) -> None:
    ax.set(title="Power of the GPU", ylabel="W")
    _thin_and_smoothed(ax, _series(log, "gpu_power_w"), from_zero=True)


def _gradient_by_layer(ax: Any, log: Log) -> None:
    _by_layer(ax, log, "grad_norm_by_layer", "Gradient norm of each layer, before clipping", "L2 norm")


def _update_by_layer(ax: Any, log: Log) -> None:
    _by_layer(ax, log, "update_norm_by_layer", "Size of the updates of each layer", "‖Δθ‖ / ‖θ‖")


def _by_layer(ax: Any, log: Log, key: str, title: str, unit: str) -> None:
    """A row a layer, a column a step: thirty lines could not be told apart."""
    from matplotlib.colors import LogNorm

    lines = [line for line in log if isinstance(line.get(key), dict) and _number(line.get("step"))]
    names = list(dict.fromkeys(name for line in lines for name in line[key]))
    found = [[_positive(line[key].get(name)) for line in lines] for name in names]
    known = [value for row in found for value in row if value == value]
    steps, low, high = [line["step"] for line in lines], min(known, default=1), max(known, default=1)
    image = ax.imshow(
        found,
        aspect="auto",
        origin="lower",
        cmap="cividis",
        norm=LogNorm(low, high) if low < high else None,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(names) - 0.5),
    )
    ax.set(title=title, ylabel="layer")
    ax.grid(False)
    shown = range(0, len(names), len(names) // 16 + 1)
    ax.set_yticks(shown, [names[i].removeprefix("layers.") for i in shown])
    ticks = [low * (high / low) ** (i / 4) for i in range(5)] if low < high else [low]
    bar = ax.figure.colorbar(image, ax=ax, label=unit, pad=0.02)
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()


def _with_held_out(ax: Any, training: Points, log: Log, key: str) -> None:
    """Each step thin, their running median thick, and the held-out rows' figure with its 95 % interval."""
    _thin_and_smoothed(ax, training)
    lines = [line for line in log if _number(line.get(key)) and _number(line.get("step"))]
    if lines:
        value = [line[key] for line in lines]
        ends = [
            [abs(_or(line.get(f"{key}_{end}"), line[key]) - line[key]) for line in lines]
            for end in ("ci_low", "ci_high")
        ]
        n = lines[-1].get("eval_n")
        label = f"held-out rows, 95 % interval{f', n = {n}' if n else ''}"
        ax.errorbar([line["step"] for line in lines], value, ends, color=ORANGE, marker="o", capsize=4, label=label)
        lowest = min(lines, key=lambda line: line[key])
        best = f", {lowest[key]:.3g} at step {lowest['step']}" if key == "eval_loss" and lowest is not lines[-1] else ""
        last = f"{value[-1]:.3g} on held-out rows at step {lines[-1]['step']}"
        ax.set_title(f"{ax.get_title(loc='left')}: {last}{best}")
    ax.legend(loc="best")


def _thin_and_smoothed(ax: Any, points: Points, from_zero: bool = False) -> None:
    steps, values = points
    window = min(len(values) // 20 * 2 + 1, 101)
    if window == 1:
        _line(ax, points, from_zero)
        return
    ax.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.4, label="training, each step")
    half = window // 2
    smooth = [median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    ax.plot(steps, smooth, color=BLUE, label=f"training, median of {window} steps")
    _scale(ax, values, from_zero)


def _trips(ax: Any, log: Log) -> None:
    """Where a guard left a step out."""
    for n, line in enumerate(line for line in log if "trip" in line and _number(line.get("step"))):
        ax.axvline(
            line["step"], color=ORANGE, linewidth=1, linestyle=(0, (1, 2)), label="" if n else "left out by a guard"
        )


def _line(ax: Any, points: Points, from_zero: bool = False) -> None:
    ax.plot(*points, color=BLUE, label="training, each step")
    _scale(ax, points[1], from_zero)


def _scale(ax: Any, values: list[float], from_zero: bool) -> None:
    if from_zero:
        ax.set_ylim(0, 1.1 * max(values, default=1) or 1)
    elif values and min(values) > 0 and max(values) > 20 * median(values):  # one spike is not to flatten all the rest
        ax.set_yscale("log")


def _series(log: Log, key: str) -> Points:
    lines = [line for line in log if _number(line.get(key)) and _number(line.get("step"))]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _number(value: Any) -> bool:
    """A finite one: JSON written by Python may hold NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _or(value: Any, otherwise: float) -> float:
    return value if _number(value) else otherwise


def _positive(value: Any) -> float:
    return value if _number(value) and value > 0 else math.nan


def _step_label(log: Log) -> str:
    last = next((line for line in reversed(log) if _number(line.get("epoch")) and _number(line.get("step"))), {})
    if not last.get("epoch"):
        return "step"
    return f"step  ({last['step'] / last['epoch']:g} an epoch)"
