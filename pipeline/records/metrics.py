"""The figures of a record by name: what criteria, lists, comparisons and the report all look up.

eval_loss               of a change (before, after, delta): the value after
eval_loss.delta         the change, with its interval
eval_loss.delta.ci_low  one end of it
aletheia_choices        a benchmark, wherever it stands below `benchmarks`
eval.eval_loss          in a pipeline experiment: of its stage `eval`
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SHORTHANDS = ("benchmarks", "training", "metrics")  # blocks whose names may be left out of a path
FORECASTS = ("predicted", "predicted_and_actual")  # what was expected: found when asked for, never listed

LOWER_BENCHMARKS = {  # metrics in lm-eval's words
    "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "loss", "brier_score", "mse", "rmse", "mae",
    "ter", "wer", "cer",
}  # fmt: skip
HIGHER_BENCHMARKS = {
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "accuracy", "balanced_accuracy", "exact_match", "em", "f1", "mcc",
    "precision", "recall", "pass@1", "bleu", "chrf", "chrf++", "rouge1", "rouge2", "rougeL", "rougeLsum", "likelihood",
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A figure, its 95 % interval and the number of rows behind it, where the record has them."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    n: int | None = None

    def text(self, digits: int = 4) -> str:
        number = f"{self.value:.{digits}g}"
        interval = (
            ""
            if self.ci_low is None or self.ci_high is None
            else f" [{self.ci_low:.{digits}g}, {self.ci_high:.{digits}g}]"
        )
        return f"{number}{interval}{'' if self.n is None else f' n={self.n}'}"


def benchmark_is_lower_better(metric: str) -> bool | None:
    """None where the direction is not known: then no change of it is better or worse."""
    return True if metric in LOWER_BENCHMARKS else False if metric in HIGHER_BENCHMARKS else None


def resolve(results: dict[str, Any], path: str) -> Metric | None:
    """The figure at a dotted path; None where there is none."""
    found = _at(results, path.split("."))
    return None if found is None else as_metric(found)


def metrics(results: dict[str, Any]) -> dict[str, Metric]:
    """Every figure by its full dotted path, ends of intervals left out; of a change also `before` and `delta`."""
    return dict(_walk(results, ""))


def as_metric(value: Any) -> Metric | None:
    """A number, a figure (`value`, `ci_low`, …) or a change (its `after`)."""
    if isinstance(value, dict):
        if "after" in value and "before" in value:
            return as_metric(value["after"])
        number = _number(value.get("value"))
        if number is None:
            return None
        n = value.get("n")
        low, high = _number(value.get("ci_low")), _number(value.get("ci_high"))
        return Metric(number, low, high, n if isinstance(n, int) else None)
    number = _number(value)
    return None if number is None else Metric(number)


def _at(values: Any, keys: list[str]) -> Any:
    """Keys may themselves hold dots: the longest that fits is tried first."""
    if not keys:
        return values
    if not isinstance(values, dict):
        return None
    for length in range(len(keys), 0, -1):
        key = ".".join(keys[:length])
        if key in values:
            found = _at(values[key], keys[length:])
            if found is not None:
                return found
    if keys[0] in ("value", "ci_low", "ci_high", "n", "delta") and "after" in values:
        return _at(values["after"], keys)
    for block in SHORTHANDS:
        if block in values:
            found = _at({k: v for k, v in values[block].items()} if isinstance(values[block], dict) else None, keys)
            if found is not None:
                return found
    return None


def _walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Metric]]:
    for key, value in values.items():
        if key in FORECASTS:
            continue
        path = f"{prefix}{key}"
        metric = as_metric(value)
        if metric is not None:
            yield path, metric
        if not isinstance(value, dict):
            continue
        if "before" in value and "after" in value:
            for end in ("before", "delta"):
                figure = as_metric(value.get(end))
                if figure is not None:
                    yield f"{path}.{end}", figure
        elif "value" not in value:
            yield from _walk(value, f"{path}.")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None
