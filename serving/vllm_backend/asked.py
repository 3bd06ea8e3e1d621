"""What a request may ask of vLLM: what this project's own server takes, by the same types, and more ways to draw an answer.

No parameter that changes how a chat is rendered is among them (`chat_template_kwargs`, `documents`, `tools`, …): a chat is
rendered as it was trained. pydantic and the standard library alone, since vLLM's environment loads it.
"""

from typing import Annotated, Any

from pydantic import Field

from serving.front.protocol import Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


class Drawing(Body):
    """vLLM's own. Their ranges it checks itself, but for those where it would fail."""

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
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
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
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
