"""Benchmarks through lm-eval-harness, item by item, so that two models can be compared pair by pair.

    scores = run(in_process(model, chat, 8), ready, chosen, "base")      the model in memory
    scores = run(served(endpoint, chat), ready, chosen, "base")    a server, by `local-completions`

Both are sent the same token ids: the chat template is applied here, in both, and what is sent is checked
(`eval/benchmarks/prompts.py`). A server is so asked for log-likelihoods and for text; its /v1/completions must take token
ids and, for multiple choice, `echo` with `logprobs`. No answer is kept between models, and none is taken from before.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.benchmarks.code import SandboxedCodeEval
from eval.benchmarks.preflight import Ready
from eval.benchmarks.prompts import check_start, renderer, sha256, template_hash
from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import AletheiaError, StageFailed, UserError
from pipeline.records.metrics import benchmark_is_lower_better
from serving.client import api_key
from serving.endpoint import REQUEST_TIMEOUT, TOGETHER, Endpoint, Lacks

BETTER_KNOWN_AS = {"pass_at_1": "pass@1"}  # MBPP's own name for it
PREFERRED = ("acc_norm", "acc")  # HellaSwag has both; the first is what is told of it
ANY_LENGTH = 2**30  # tokens
Chosen = Mapping[str, Sequence[int]]  # the items asked of a task, by its name


@dataclass(frozen=True)
class Scores:
    """A name's metric for each item. Items are numbered as in the data: `17`, and of a group's task `mmlu_virology/17`."""

    metric: str
    version: str
    lower_is_better: bool | None
    items: dict[str, float]
    asked: dict[str, str]  # by item: the SHA-256 of what was asked, and of the item itself
    prompt: dict[str, Any]  # how it was asked, for the record
    written: dict[str, str] = field(default_factory=dict)  # by item, what was generated
    problems: dict[str, str | None] = field(default_factory=dict)  # by item of code that ran: why it does not pass


def choose(ready: Sequence[Ready], limit: int | None, seed: int, share: float = 1.0) -> dict[str, list[int]]:
    """At most `limit` items of each task, and `share` of these: drawn, as files are often sorted. The same for all models."""
    chosen = {}
    for leaf, task in ((leaf, task) for each in ready for leaf, task in each.leaves.items()):
        items = list(range(len(task.eval_docs)))
        random.Random(seed).shuffle(items)  # a smaller share is a part of a larger one
        most = len(items) if limit is None else min(limit, len(items))
        chosen[leaf] = sorted(items[: max(1, int(most * share))])
    return chosen


def in_process(model: Any, chat: Chat, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class InProcess(HFLM):
        """What goes into the model is looked at."""

        apply_chat_template = staticmethod(renderer(chat))
        eot_token_id = chat.end_of_turn_id

        windows = False  # of a long text, which is no prompt

        def loglikelihood_rolling(self, *asked: Any, **options: Any) -> Any:
            self.windows = True
            try:
                return super().loglikelihood_rolling(*asked, **options)
            finally:
                self.windows = False

        def _model_call(self, inps: Any, *rest: Any, **options: Any) -> Any:
            for row in () if self.windows else inps:  # padded on the right
                check_start(row.tolist(), chat)
            return super()._model_call(inps, *rest, **options)

        def _model_generate(self, context: Any, *rest: Any, **options: Any) -> Any:
            mask = options.get("attention_mask")
            for number, row in enumerate(context):  # padded on the left
                check_start((row if mask is None else row[mask[number].bool()]).tolist(), chat)
            return super()._model_generate(context, *rest, **options)

    return InProcess(pretrained=model, tokenizer=chat.tokenizer, batch_size=batch_size, add_bos_token=False)


def served(endpoint: Endpoint, chat: Chat) -> Any:
    """Nothing is cut: a prompt that is too long the server refuses. Raises `UserError` where it takes no token ids."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ids = chat.prompt([Message(role="user", content="a")])
    try:
        endpoint.post("/v1/completions", prompt=ids, max_tokens=1, temperature=0)
    except Lacks as why:
        raise UserError(
            f"takes no token ids at /v1/completions ({why})", where=endpoint.root, remedy="benchmarks in process"
        ) from None

    class Served(LocalCompletionsAPI):
        """The model here is asked there; the tokens are ours."""

        apply_chat_template = staticmethod(renderer(chat))
        eot_token_id = chat.end_of_turn_id
        eos_string = chat.end_of_turn

        def _create_payload(self, messages: Any, *rest: Any, **options: Any) -> Any:
            for ids in messages:
                check_start(ids, chat)
            return super()._create_payload(messages, *rest, **options)

    lm = Served(
        model=endpoint.model,
        base_url=f"{endpoint.root}/v1/completions",
        tokenizer_backend=None,
        num_concurrent=TOGETHER,
        max_retries=3,
        max_length=ANY_LENGTH,
        timeout=int(REQUEST_TIMEOUT),
        header={"Authorization": f"Bearer {api_key() or 'none'}"},
    )
    lm.tokenizer, lm.tokenizer_backend, lm.tokenized_requests = chat.tokenizer, "huggingface", True
    return lm


def run(
    lm: Any, chat: Chat, ready: Sequence[Ready], chosen: Chosen, label: str, code_eval: SandboxedCodeEval | None = None
) -> dict[str, Scores]:
    """Each name's scores. Raises `StageFailed` with the harness's own reason."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = {leaf: task for each in ready for leaf, task in each.leaves.items()}
    for task in tasks.values():  # a model must not find what the one before it left
        task._instances = None
    try:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            task_manager=TaskManager(include_defaults=False),
            samples={leaf: list(chosen[leaf]) for leaf in tasks},
            use_cache=None,
            cache_requests=False,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,  # our intervals are paired, from the items
            confirm_run_unsafe_code=any(each.runs_code for each in ready),  # in the sandbox
        )
    except AletheiaError:
        raise
    except Exception as error:  # a task's own code, the model's and the server's
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise StageFailed(
            f"{label}: lm-eval: {said}", remedy="eval_config.tasks without the one it is about"
        ) from error
    found: dict[str, Scores] = {}
    for each in ready:
        leaves = {leaf: _scores(leaf, task, results, chat, code_eval) for leaf, task in each.leaves.items()}
        for scores in leaves.values() if each.mended else ():
            scores.prompt["mended"] = each.mended
        found |= _together(each.name, leaves)
    return found


def _together(name: str, leaves: dict[str, Scores]) -> dict[str, Scores]:
    """A group is one figure over all its items, where its tasks are measured alike; else each is its own."""
    if list(leaves) == [name]:
        return leaves
    first = next(iter(leaves.values()))
    if len({scores.metric for scores in leaves.values()}) > 1:
        return leaves

    def all_of(values: str) -> dict[str, Any]:
        return {f"{leaf}/{i}": value for leaf, scores in leaves.items() for i, value in getattr(scores, values).items()}

    versions = sorted({scores.version for scores in leaves.values()})
    prompt = first.prompt | {"tasks": {leaf: len(scores.items) for leaf, scores in leaves.items()}}
    joined = Scores(first.metric, ", ".join(versions), first.lower_is_better, all_of("items"), all_of("asked"), prompt)
    return {name: joined}


def _scores(leaf: str, task: Any, results: Any, chat: Chat, code_eval: SandboxedCodeEval | None) -> Scores:
    """One metric of a task: of those that give an item's figure the preferred, else the first."""
    samples = results["samples"][leaf]
    able = [m for m in samples[0]["metrics"] if _value(m, samples[0].get(m)) is not None]
    metric = next((m for m in PREFERRED if m in able), next(iter(able), None))
    if metric is None:
        what = ", ".join(samples[0]["metrics"])
        raise StageFailed(
            f"{leaf}: {what} gives no figure for an item", remedy="a metric such as acc, exact_match or chrf"
        )
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    by_item = {str(sample["doc_id"]): sample for sample in samples}
    higher = task.higher_is_better().get(metric)
    named = BETTER_KNOWN_AS.get(metric, metric)
    generated = task.OUTPUT_TYPE == "generate_until"
    written = {i: str(s["resps"][0][0]) for i, s in by_item.items()} if generated else {}
    problems = {}
    if code_eval and getattr(task, "UNSAFE_CODE", False):
        problems = {i: _problem(sample, code_eval) for i, sample in by_item.items()}
    return Scores(
        metric=named,
        version=str(results["versions"].get(leaf)),
        lower_is_better=benchmark_is_lower_better(named) if higher is None else not higher,
        items={i: float(_value(metric, sample[metric])) for i, sample in by_item.items()},  # type: ignore[arg-type]
        asked={i: sha256(f"{s['prompt_hash']} {s['doc_hash']}") for i, s in by_item.items()},
        prompt=_prompt(task, samples[0], results["n-shot"].get(leaf, 0), chat),
        written=written,
        problems=problems,
    )


def _problem(sample: Mapping[str, Any], code_eval: SandboxedCodeEval) -> str | None:
    program = sample["filtered_resps"][0]
    return code_eval.problems.get((program if isinstance(program, str) else program[0], str(sample["target"])))


def _prompt(task: Any, sample: Mapping[str, Any], shots: int, chat: Chat) -> dict[str, Any]:
    """How the first item was asked, so that another run can be seen to have asked the same."""
    text = str(sample["arguments"][0][0])
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = next((place for place, token in enumerate(ids) if token != chat.bos_id), len(ids))
    return {
        "item": sample["doc_id"],
        "sha256": sha256(text),
        "template_sha256": template_hash(chat),
        "bos_tokens": bos,
        "examples": shots,
        "examples_as": "turns" if shots else "none",
        "output": task.OUTPUT_TYPE,
    }


def _value(metric: str, found: Any) -> float | None:
    """An item's figure. lm-eval keeps [reference, answer] where it scores the corpus as a whole; sacrebleu scores one."""
    if isinstance(found, int | float):
        return float(found)
    if isinstance(found, list | tuple) and len(found) == 2 and metric in ("bleu", "chrf", "ter"):
        import sacrebleu

        reference, answer = (part if isinstance(part, str) else part[0] for part in found)
        return float(getattr(sacrebleu, f"sentence_{metric}")(answer, [reference]).score)
    return None
