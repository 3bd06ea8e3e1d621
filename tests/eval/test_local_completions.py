"""lm-eval's `local-completions` and the openai client, as they are, against our server: the scores of the model in process."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import openai
import pytest

from pipeline.chat import Chat
from pipeline.config import ServeConfig
from pipeline.tasks import find_tasks
from serving.front.app import Usage, build_app
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.in_process import serving

if TYPE_CHECKING:
    from tests.conftest import Trained

TASK, ITEMS = "aletheia_choices", 6


@pytest.fixture(scope="module")
def address(model: Any, chat: Chat) -> Iterator[str]:
    with serving(build_app(TransformersEngine(model, chat, 2048, 4), "small", ServeConfig(), Usage())) as address:
        yield address


def samples(trained: "Trained", lm: Any, **options: Any) -> list[dict[str, Any]]:
    """Each item: the log-likelihood of every choice and whether it is greedy, and the score."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=find_tasks(trained.workspace.path("data/eval"), [TASK]),
        task_manager=TaskManager(include_defaults=False),
        limit=ITEMS,
        apply_chat_template=True,
        bootstrap_iters=0,
        verbosity="ERROR",
        **options,
    )
    return list(results["samples"][TASK])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.skipif(find_spec("tenacity") is None, reason="lm-eval[api] needs tenacity, which is not installed")
def test_multiple_choice_over_http_scores_as_in_process(
    trained: "Trained", model: Any, chat: Chat, address: str, batch_size: int
) -> None:
    from lm_eval.models.huggingface import HFLM

    arguments = {
        "model": "small",
        "base_url": f"{address}/completions",
        "tokenizer": str(trained.output("merge")),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_retries": 1,
    }
    over_http = samples(trained, "local-completions", model_args=arguments, batch_size=batch_size)
    in_process = samples(trained, HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=1))
    assert len(over_http) == len(in_process) == ITEMS
    for there, here in zip(over_http, in_process, strict=True):
        for (said, greedy), (expected, is_greedy) in zip(there["filtered_resps"], here["filtered_resps"], strict=True):
            assert said == pytest.approx(expected, abs=1e-3)
            assert greedy == is_greedy
        assert (there["doc_id"], there["acc"]) == (here["doc_id"], here["acc"])
    likelihoods = [said for there in over_http for said, _ in there["filtered_resps"]]
    assert len({round(said, 3) for said in likelihoods}) > ITEMS, "they tell the choices apart"


def test_the_openai_client_gets_a_prompts_log_probs(model: Any, chat: Chat, address: str) -> None:
    import torch

    tokens = chat.tokenizer("A lock is held by one.")["input_ids"]
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
    answer: Any = client.completions.create(
        model="small", prompt=tokens, echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    told = answer.choices[0].logprobs
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    assert told.token_logprobs[0] is None and len(told.token_logprobs) == len(tokens) + 1
    by_hand = [expected[i, token].item() for i, token in enumerate(tokens[1:])] + [expected[-1].max().item()]
    assert told.token_logprobs[1:] == pytest.approx(by_hand, abs=1e-3)
    assert all(len(top) >= 2 for top in told.top_logprobs[1:])
    assert answer.choices[0].text.startswith(chat.tokenizer.decode(tokens, skip_special_tokens=True)[:10])
