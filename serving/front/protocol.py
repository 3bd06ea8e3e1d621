"""OpenAI's request and error shapes, as far as the server keeps them, and vLLM's of /tokenize.

What the server cannot do it refuses by name.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from pipeline.data.rows import Message

MAX_STOPS = 16  # OpenAI takes 4; lm-eval sends a task's and the end of sequence
MAX_STOP = 1000  # characters
MAX_CHOICES = 128  # OpenAI's limit of n
MAX_TOP = 20  # OpenAI's limit of log-probs beside each token
SEEDS = 2**63
SHUTTING_DOWN = "shutting_down"

# what clients send though it asks for nothing; any other value of these is refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},),
    "top_k": (0, -1), "min_p": (0,), "min_tokens": (0,), "ignore_eos": (False,), "suffix": ("",), "best_of": (1,),
    "tools": ([],), "tool_choice": ("none",), "response_format": ({"type": "text"},), "store": (False,),
    "service_tier": ("auto",),
}  # fmt: skip

M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """Unknown parameters are errors: a parameter that is ignored is a lie."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        """OpenAI's schema lets optional parameters be null, and some clients send all of them so."""
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None and not (key not in cls.model_fields and value in NEUTRAL.get(key, ()))
        }


def _text(content: Any) -> Any:
    """OpenAI's list of parts, where all are text; joined as vLLM does."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        raise ValueError("a string, or parts of the type `text`: this server reads nothing else")
    return "\n".join(part["text"] for part in content)


def _role(role: Any) -> Any:
    return "system" if role == "developer" else role  # OpenAI's newer name


class ChatMessage(Message, Body):
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[str, Field(min_length=1, pattern=r"\S"), BeforeValidator(_text)]


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError(f"a string, or up to {MAX_STOPS} of them")
    if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops):
        raise ValueError(f"each a string of 1 to {MAX_STOP} characters, none of them empty")
    return stops


def _prompts(value: Any) -> list[Any]:
    """Several prompts, also where one was given."""
    prompts = value if isinstance(value, list) and value and not _ids(value) else [value]
    if not (all(isinstance(p, str) and p for p in prompts) or all(_ids(p) for p in prompts)):
        raise ValueError("the prompt must be text, token ids, or a list of either, and none of them empty")
    return prompts


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in each part


class Request(Body):
    """What both completions share."""

    model: str
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Request":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is of use with stream alone")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens to tell beside each one; None: no log-probs."""
        return None


class ChatRequest(Request):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is of use with logprobs alone")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 for the log-probs of the prompt alone
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool = False

    @property
    def top(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Body):
    """vLLM's: text, or messages as they are rendered for the model."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None  # default: with a prompt; the chat template brings its own
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens with messages: the chat template brings the special tokens")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


class ApiError(Exception):
    """One error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        self.counted = False  # in the usage
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parsed(model: type[M], body: bytes) -> M:
    """Raises `ApiError` that names the parameter."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is no JSON: {what.removeprefix('Invalid JSON: ')}")
        case "extra_forbidden":
            message = f"this server does not know or support `{where}`"
            return ApiError(400, message, param=where, code="unsupported_parameter")
        case "missing":
            return ApiError(400, f"`{where}` is missing", param=where)
        case "model_type" if not where:
            return ApiError(400, "the body is no JSON object")
        case "string_pattern_mismatch" | "string_too_short":  # `Message.content`
            what = "is blank"
    return ApiError(400, f"{where}: {what}" if where else what, param=where or None)
