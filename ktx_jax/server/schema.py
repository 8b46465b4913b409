# SPDX-License-Identifier: Apache-2.0
"""Requests, as OpenAI's API defines them and this server takes them.

What is not named here is refused. What changes nothing here (who asks, where it is billed) is in `harmless`, and the
response names it in the header `X-Ignored-Parameters`.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, field_validator, model_validator

from ktx_jax.engine.requests import MAX_BIASES, MAX_LOGPROBS
from ktx_jax.server.settings import MAX_CHOICES, MAX_MESSAGES, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOOLS

TokenId: TypeAlias = Annotated[StrictInt, Field(ge=0, lt=2**31)]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]


class Inconsistent(ValueError):
    """Fields that do not go together; `param` is the one to change."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class Body(BaseModel):
    """A part of a request: values keep their types, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    harmless: ClassVar[frozenset[str]] = frozenset()

    def ignored(self) -> list[str]:
        """The fields given that change nothing here."""
        return sorted(name for name in self.model_fields_set & self.harmless if getattr(self, name) is not None)


class StreamOptions(Body):
    harmless = frozenset(("include_obfuscation",))
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(Body):
    """How to draw; null is the same as absent."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
            raise ValueError("keys should be token ids, as strings of digits")
        return value

    @model_validator(mode="after")
    def _stream_options_go_with_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise Inconsistent("stream_options", "stream_options goes with stream: true")
        return self

    def texts_to_stop(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Tokenize(Body):
    """`/tokenize`: a text or a conversation to token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list["Message"], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise Inconsistent("prompt", "give either prompt or messages")
        if self.messages is not None and "add_special_tokens" in self.model_fields_set:
            raise Inconsistent(
                "add_special_tokens", "add_special_tokens goes with prompt: of messages, the chat template decides"
            )
        return self


class Detokenize(Body):
    """`/detokenize`: token ids to text."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]
    skip_special_tokens: bool = False


class CompletionRequest(Sampling):
    """`/v1/completions`."""

    harmless = frozenset(("user",))
    model: str
    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise Inconsistent("best_of", "best_of other than n is not supported: ask for n and choose")
        if self.max_tokens == 0 and not self.echo:
            raise Inconsistent(
                "max_tokens", "max_tokens of 0 goes with echo: true; otherwise there is nothing to answer"
            )
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, even if there is one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole: Any = self.prompt
        return [whole] if isinstance(whole[0], int) else whole


class TextPart(Body):
    type: Literal["text"]
    text: str


def _joined(value: Any) -> Any:
    """Content in parts as one text; parts that are not text are left for the check to refuse."""
    if isinstance(value, list) and all(isinstance(part, dict) and _is_text(part) for part in value):
        return "".join(part["text"] for part in value)
    return value


def _is_text(part: dict[str, Any]) -> bool:
    return set(part) == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)


Content: TypeAlias = Annotated[str | list[TextPart], BeforeValidator(_joined)]


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    harmless = frozenset(("index",))
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class SystemMessage(Body):
    harmless = frozenset(("name",))
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    harmless = frozenset(("name",))
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """A reply of before; clients send back all that they got, so fields that were empty may be there."""

    harmless = frozenset(("name", "refusal"))
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    refusal: str | None = None
    name: str | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise Inconsistent("content", "an assistant message needs content or tool_calls")
        return self


class ToolMessage(Body):
    harmless = frozenset(("name",))
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """A schema that the reply is held to, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    harmless = frozenset(
        ("metadata", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier")
    ) | frozenset(("service_tier", "store", "user"))
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise Inconsistent("top_logprobs", "top_logprobs goes with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Inconsistent("max_completion_tokens", "max_tokens and max_completion_tokens differ: give one of them")
        if not self.tools and self.tool_choice not in (None, "none"):
            raise Inconsistent("tool_choice", "tool_choice goes with tools")
        if not self.tools and self.parallel_tool_calls is not None:
            raise Inconsistent("parallel_tool_calls", "parallel_tool_calls goes with tools")
        return self

    def ignored(self) -> list[str]:
        parts: list[Body] = [part for part in (self.stream_options, *self.messages) if part is not None]
        return [*super().ignored(), *sorted({name for part in parts for name in _names(part)})]


def _names(part: Body) -> list[str]:
    prefix = "stream_options" if isinstance(part, StreamOptions) else "messages"
    return [f"{prefix}.{name}" for name in part.ignored()]
