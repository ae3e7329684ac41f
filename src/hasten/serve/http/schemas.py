"""Bodies of requests and responses; the OpenAPI document is made from these.

Field names are OpenAI's; those below the line "beyond OpenAI" are vLLM's. Unknown fields are ignored, as other
servers do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

__all__ = [
    "ChatRequest",
    "ChatResponse",
    "CompletionRequest",
    "CompletionResponse",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "ErrorResponse",
    "ModelList",
    "TokenizeRequest",
    "TokenizeResponse",
]

TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class Body(BaseModel):
    """What all requests share."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: StrictBool = Field(default=False, description="send a last chunk with the token counts")
    continuous_usage_stats: StrictBool = Field(default=False, description="send the token counts with every chunk")


class JsonSchema(Body):
    """A named JSON schema."""

    name: StrictStr = Field(default="answer", max_length=256)
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None
    description: StrictStr | None = None


class ResponseFormat(Body):
    """What the answer must conform to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """How tokens are chosen, for both kinds of completion."""

    model: StrictStr | None = Field(default=None, description="name of the served model; may be left out")
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, strict=True)]] | None = Field(
        default=None, description="token id -> what is added to its logit"
    )
    n: StrictInt | None = Field(default=None, ge=1, le=128)
    seed: StrictInt | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = Field(default=None, ge=0, le=100)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    user: StrictStr | None = None
    response_format: ResponseFormat | None = None
    # beyond OpenAI
    top_k: StrictInt | None = Field(default=None, ge=-1, le=2**31 - 1)
    min_p: Number | None = Field(default=None, ge=0, le=1)
    repetition_penalty: Number | None = Field(default=None, ge=0.01, le=100)
    ignore_eos: StrictBool = False
    min_tokens: StrictInt = Field(default=0, ge=0, le=2**31 - 1)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    prompt_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    guided_json: StrictStr | dict[str, Any] | None = None
    guided_regex: StrictStr | None = None
    guided_grammar: StrictStr | None = None
    guided_choice: Annotated[list[StrictStr], Field(min_length=1, max_length=256)] | None = None
    priority: StrictInt = Field(default=0, ge=-(2**31), le=2**31 - 1, description="lower is served first")
    slo: StrictStr | None = Field(
        default=None, description='objective of this request, such as "ttft<200ms, tpot<50ms"'
    )


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    best_of: StrictInt | None = Field(default=None, ge=1, le=128)
    echo: StrictBool | None = None
    logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    max_tokens: StrictInt | None = Field(default=16, ge=0, le=2**31 - 1)
    suffix: StrictStr | None = Field(default=None, description="text after the gap that is to be filled")
    # beyond OpenAI
    add_special_tokens: StrictBool = True


class ChatMessage(Body):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[dict[str, Any]] | None = None
    name: StrictStr | None = None


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: StrictInt | None = Field(default=None, ge=0, le=2**31 - 1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=0, le=2**31 - 1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(default=None, description="not supported; refused")
    tool_choice: Any = None
    # beyond OpenAI
    echo: StrictBool = False
    add_generation_prompt: StrictBool = True
    chat_template: StrictStr | None = Field(default=None, description="not accepted from requests; refused")
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """Body of POST /tokenize: a prompt or messages."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    return_token_strs: StrictBool | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Any] | None = None


class CompletionResponse(BaseModel):
    """Response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: dict[str, float | int | None]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatResponse(BaseModel):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: dict[str, float | int | None]


class TokenizeResponse(BaseModel):
    """Response of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Response of POST /detokenize."""

    prompt: str


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """Response of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Response with any status of 400 and more."""

    error: ErrorObject
