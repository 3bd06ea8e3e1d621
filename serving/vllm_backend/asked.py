"""What a request may ask of vLLM: what this project's own server takes, by the same types, and more ways to draw an answer.

No parameter that changes how a chat is rendered is among them (`chat_template_kwargs`, `documents`, `tools`, …): a chat is
rendered as it was trained. pydantic and the standard library alone, since vLLM's environment loads it.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from serving.front.protocol import SEEDS, Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


def _never_negative(seed: int) -> int:
    """vLLM takes -1 for no seed, and of `n` answers gives the second the seed after the first's: -2 comes to -1 too."""
    return seed % SEEDS


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class Drawing(Body):
    """vLLM's own. Their ranges it checks itself, but for those where it would fail, or take another value in silence."""

    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS), AfterValidator(_never_negative)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: Annotated[int, Field(lt=2**31)] | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class Chat(Drawing, ChatRequest):
    pass


class Completion(Drawing, CompletionRequest):
    pass


Asked = Chat | Completion | TokenizeRequest | DetokenizeRequest
GENERATING: dict[str, type[Asked]] = {"/v1/chat/completions": Chat, "/v1/completions": Completion}
TAKEN: dict[str, type[Asked]] = {**GENERATING, "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}
