"""`aletheia check parity`: servers of its own and others', and every mistake in one line."""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from pipeline.config import ServeConfig
from pipeline.errors import UserError
from pipeline.records.find import records
from serving.endpoint import Endpoint
from serving.front.app import Usage, build_app
from serving.parity.check import check_parity, names
from serving.parity.compared import REMEDIES
from serving.serve import load_source, servable
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.in_process import serving

if TYPE_CHECKING:
    from tests.conftest import Said, Trained


@pytest.fixture(scope="module")
def address(trained: "Trained") -> Iterator[str]:
    """A server that leaves the adapter out."""
    _, base, chat = servable(trained.job())
    app = build_app(TransformersEngine(base.load(), chat, 2048, 4), "ours", ServeConfig(), Usage())
    with serving(app) as address:
        yield address


def test_the_command_starts_a_server_of_its_own_and_tells_what_it_left_out(
    aletheia: "Callable[..., Said]", copied: "Trained"
) -> None:
    said = aletheia(copied.workspace, "check", "parity", "--profile", "small", "--backend", "transformers", "--json")
    assert said.code == 0, said.err
    plain, ours = json.loads(said.out)["compared"]
    assert (plain["backend"], ours["backend"]) == ("transformers, plain", "transformers")
    assert plain["verdict"] == ours["verdict"] == "equal"
    assert ours["log_prob_difference"]["mean"] <= ours["log_prob_bound"]["mean"]
    _, facts = next(records(copied.workspace))
    assert facts.stage == "serve" and facts.status == "complete", "it was stopped in order"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{facts.results['address']}/models")


def test_a_mismatch_is_a_table_and_one_line_that_says_what_to_do(
    aletheia: "Callable[..., Said]", trained: "Trained", address: str
) -> None:
    said = aletheia(trained.workspace, "check", "parity", "--profile", "small", "--endpoint", address)
    assert said.code == 1
    header, plain, ours = said.out.splitlines()
    assert header.split()[:2] == ["backend", "token"]
    assert plain.endswith("equal") and ours.endswith("DIFFERS")
    last = said.err.splitlines()[-1]
    assert last.startswith(f"error: {address.removesuffix('/v1')}: log-probs differ by ")
    assert last.endswith(f"; try {REMEDIES['log-probs']}")


def test_a_running_server_is_judged_by_the_precision_that_it_says(
    trained: "Trained", capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    source, base, chat = servable(trained.job())
    model = load_source(source, base).to(torch.bfloat16)
    app = build_app(TransformersEngine(model, chat, 2048, 4), "small-merged", ServeConfig(), Usage())
    with serving(app) as address:
        (_, found), _ = check_parity(trained.job(), endpoint=address)
        assert f"{address.removesuffix('/v1')} says that it computes in bfloat16" in capsys.readouterr().err
    assert found.verdict == "equal" and found.bound and found.moved
    assert found.bound.mean < found.moved.mean / 2, "a server of the base would be seen"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--backend", "none"), "error: --backend: there is no backend `none`; try vllm or transformers or llamacpp"),
        (("--dtype", "int4"), "error: --dtype: there is no precision `int4`; try float32, bfloat16, float16"),
        (("--endpoint", "http://127.0.0.1:9"), "error: http://127.0.0.1:9: cannot be reached (ConnectError); try aletheia serve"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    aletheia: "Callable[..., Said]", trained: "Trained", words: tuple[str, ...], line: str
) -> None:
    said = aletheia(trained.workspace, "check", "parity", "--profile", "small", *words)
    assert (said.code, said.out, said.err.splitlines()[-1]) == (2, "", line)


def test_the_model_that_is_meant_is_found_among_several(trained: "Trained") -> None:
    source, _, _ = servable(trained.job())
    assert names(trained.job(), source) == ("small-merged", trained.merge)


def test_an_endpoint_without_models_is_one_line() -> None:
    from fastapi import FastAPI

    with serving(FastAPI()) as address, pytest.raises(UserError, match="shows no models at /v1/models"):
        Endpoint(address)
