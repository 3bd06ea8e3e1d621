"""The merged model of the shared pipeline, loaded once a file."""

from typing import TYPE_CHECKING, Any

import pytest

from pipeline.chat import Chat

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def model(trained: "Trained") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(trained.output("merge")).eval()


@pytest.fixture(scope="module")
def chat(trained: "Trained") -> Chat:
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(trained.output("merge")), "merged")
