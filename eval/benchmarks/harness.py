"""Benchmarks through lm-eval-harness, in process, item by item, so that two models can be compared pair by pair.

The profile's own tasks are the YAML files in `<training_data.eval>/tasks`; any other name is one of lm-eval's, whose
data comes from a hub. The chat template is applied, and no answer is cached between models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.chat import Chat
from pipeline.config import EvalConfig
from pipeline.errors import StageFailed
from pipeline.progress import say
from pipeline.tasks import task_name


@dataclass(frozen=True)
class Scores:
    """A task's metric for each item, keyed by lm-eval's `doc_id`, and the task's version."""

    metric: str
    version: str
    items: dict[int, float]


def run(
    model: Any, chat: Chat, tasks: Sequence[dict[str, Any] | str], config: EvalConfig, label: str
) -> dict[str, Scores]:
    """Raises `StageFailed` when a task's data cannot be had, with the harness's own reason."""
    import logging

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    say(f"{label}: benchmarks {', '.join(task_name(task) for task in tasks)}")
    standard = any(isinstance(task, str) for task in tasks)
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=config.batch_size),
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=standard),  # indexing the stock tasks takes 15 s
            limit=config.limit,
            apply_chat_template=True,
            bootstrap_iters=0,  # our intervals are paired, from the items
            verbosity="ERROR",
        )
    except (ConnectionError, OSError, KeyError, ValueError) as error:
        raise StageFailed(f"lm-eval: {error}", remedy="eval_config.tasks with tasks whose data is at hand") from None
    return {name: _scores(name, results) for name in results["samples"]}


def _scores(name: str, results: Any) -> Scores:
    """The task's first metric: acc for multiple choice, exact_match or chrf and the like for generation."""
    samples = results["samples"][name]
    metric = next((m for m in samples[0]["metrics"] if _value(m, samples[0].get(m)) is not None), None)
    if metric is None:
        what = ", ".join(samples[0]["metrics"])
        raise StageFailed(
            f"{name}: {what} gives no figure for an item", remedy="a metric such as acc, exact_match or chrf"
        )
    items = {int(sample["doc_id"]): float(_value(metric, sample[metric])) for sample in samples}  # type: ignore[arg-type]
    return Scores(metric, str(results["versions"].get(name)), items)


def _value(metric: str, found: Any) -> float | None:
    """An item's figure. lm-eval keeps [reference, answer] where it scores the corpus as a whole; sacrebleu scores one."""
    if isinstance(found, int | float):
        return float(found)
    if isinstance(found, list | tuple) and len(found) == 2 and metric in ("bleu", "chrf", "ter"):
        import sacrebleu

        reference, answer = (part if isinstance(part, str) else part[0] for part in found)
        return float(getattr(sacrebleu, f"sentence_{metric}")(answer, [reference]).score)
    return None
