"""A training's log as pictures beside its record, for someone who opens the folder a year later.

    draw(record.folder, items.read(record.folder / "log.jsonl"))

Readable at 800 pixels, in colours that the colour-blind tell apart (Okabe and Ito 2008). What a log does not know, an
older one's memory for instance, is left out. The report's charts, which one can hover over, are `aletheia/report/curves.py`.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
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
    "legend.frameon": False,
}
WIDTH, PANEL, DPI = 8.0, 2.6, 144  # inches, inches, dots an inch


def draw(record_folder: Path, log: Log) -> list[tuple[str, str]]:
    """Writes the pictures that the log has figures for. Returns file name and purpose of each."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a font cache that is built, a folder not to be written
    import matplotlib

    dpo = any("rewards/margins" in line for line in log)
    pictures: list[tuple[str, str, list[Callable[[Any, Log], bool]]]] = [
        (
            "loss.png",
            "loss in training and on held-out rows: does it learn, and does it begin to overfit",
            [_dpo_loss, _preferred] if dpo else [_sft_loss],
        ),
        (
            "optimiser.png",
            "learning rate, gradient norm and size of the updates: is the training steady",
            [_learning_rate, _gradient, _update],
        ),
        ("layers.png", "gradient norm of each layer: where the model learns, and where it breaks", [_layers]),
        ("speed.png", "tokens a second and peak memory: what the training takes", [_speed, _memory]),
    ]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the person has set for their own pictures
        matplotlib.rcParams.update(STYLE)
        return [(name, purpose) for name, purpose, panels in pictures if _picture(record_folder / name, panels, log)]


def _picture(path: Path, panels: list[Callable[[Any, Log], bool]], log: Log) -> bool:
    """The panels that have something to show, one below the other; False where none has."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    scratch = Figure().subplots()
    shown = [panel for panel in panels if panel(scratch, log)]
    if not shown:
        return False
    figure = Figure(figsize=(WIDTH, max(PANEL * len(shown), 4.0)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for panel, ax in zip(shown, axes, strict=True):
        panel(ax, log)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel(_step_label(log))
    figure.align_ylabels(axes)
    figure.savefig(path)
    return True


def _sft_loss(ax: Any, log: Log) -> bool:
    return _loss(ax, log, "nats a token")


def _dpo_loss(ax: Any, log: Log) -> bool:
    return _loss(ax, log, "nats a pair")


def _loss(ax: Any, log: Log, unit: str) -> bool:
    ax.set(title="Loss", ylabel=unit)
    return _with_held_out(ax, _series(log, "loss"), log, "eval_loss", "training, each step")


def _preferred(ax: Any, log: Log) -> bool:
    ax.set(title="Preference accuracy: the chosen answer gained on the rejected one", ylabel="share of pairs")
    ax.set_ylim(-0.03, 1.03)
    ax.axhline(0.5, color=GREY, linewidth=1, linestyle=(0, (4, 4)))
    ax.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)
    accuracies = _series(log, "rewards/accuracies")
    return _with_held_out(ax, accuracies, log, "eval_preference_accuracy", "training, each step")


def _learning_rate(ax: Any, log: Log) -> bool:
    ax.set(title="Learning rate", ylabel="AdamW's rate")
    ax.ticklabel_format(axis="y", scilimits=(-3, 4))
    return _line(ax, _series(log, "learning_rate"))


def _gradient(ax: Any, log: Log) -> bool:
    ax.set(title="Gradient norm, before clipping", ylabel="L2 norm")
    return _thin_and_smoothed(ax, _series(log, "grad_norm"))


def _update(ax: Any, log: Log) -> bool:
    ax.set(title="Size of the updates", ylabel="‖Δθ‖ / ‖θ‖")
    ax.ticklabel_format(axis="y", scilimits=(-3, 4))
    return _thin_and_smoothed(ax, _series(log, "update_norm"))


def _speed(ax: Any, log: Log) -> bool:
    ax.set(title="Throughput", ylabel="supervised tokens / s")
    ax.set_ylim(bottom=0)
    return _thin_and_smoothed(ax, _series(log, "tokens_per_second"))


def _memory(ax: Any, log: Log) -> bool:
    ax.set(title="Peak memory so far", ylabel="GB")
    ax.set_ylim(bottom=0)
    return _line(ax, _series(log, "memory_gb"))


def _layers(ax: Any, log: Log) -> bool:
    """A row a layer, a column a step: thirty lines could not be told apart."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in log if isinstance(line.get("grad_norm_by_layer"), dict) and _number(line.get("step"))]
    names = list(dict.fromkeys(name for line in lines for name in line["grad_norm_by_layer"]))
    found = [[_positive(line["grad_norm_by_layer"].get(name)) for line in lines] for name in names]
    known = [value for row in found for value in row if value == value]
    if not known:
        return False
    steps = [line["step"] for line in lines]
    image = ax.imshow(
        found,
        aspect="auto",
        origin="lower",
        cmap="cividis",
        norm=LogNorm(min(known), max(known)) if min(known) < max(known) else None,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(names) - 0.5),
    )
    ax.set(title="Gradient norm of each layer, before clipping", ylabel="layer")
    ax.grid(False)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label="L2 norm", pad=0.02)
    return True


def _with_held_out(ax: Any, training: Points, log: Log, key: str, label: str) -> bool:
    """Each step thin, their mean thick, and the held-out rows' figure with its 95 % interval."""
    drawn = _thin_and_smoothed(ax, training, label)
    lines = [line for line in log if _number(line.get(key)) and _number(line.get("step"))]
    if lines:
        value = [line[key] for line in lines]
        ends = [[abs(line.get(f"{key}_{end}", line[key]) - line[key]) for line in lines] for end in ("ci_low", "ci_high")]
        n = lines[-1].get("eval_n")
        rows = f"held out, 95 % interval{f', n = {n}' if n else ''}"
        ax.errorbar([line["step"] for line in lines], value, ends, color=ORANGE, marker="o", capsize=4, label=rows)
    ax.legend(loc="best")
    return drawn or bool(lines)


def _thin_and_smoothed(ax: Any, points: Points, label: str = "each step") -> bool:
    steps, values = points
    window = len(values) // 20 * 2 + 1
    if window == 1:
        return _line(ax, points, label)
    ax.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.4, label=label)
    half = window // 2
    smooth = [fmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    ax.plot(steps, smooth, color=BLUE, label=f"mean of {window} steps")
    _room(ax, values)
    return True


def _line(ax: Any, points: Points, label: str = "each step") -> bool:
    ax.plot(*points, color=BLUE, label=label)
    _room(ax, points[1])
    return bool(points[0])


def _room(ax: Any, values: list[float]) -> None:
    """One spike is not to flatten all the rest."""
    if values and min(values) > 0 and max(values) > 20 * median(values):
        ax.set_yscale("log")


def _series(log: Log, key: str) -> Points:
    lines = [line for line in log if _number(line.get(key)) and _number(line.get("step"))]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _number(value: Any) -> bool:
    """A finite one: JSON written by Python may hold NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _positive(value: Any) -> float:
    return value if _number(value) and value > 0 else float("nan")


def _step_label(log: Log) -> str:
    last = next((line for line in reversed(log) if _number(line.get("epoch")) and _number(line.get("step"))), {})
    if not last.get("epoch"):
        return "step"
    return f"step  ({last['step'] / last['epoch']:g} an epoch)"
