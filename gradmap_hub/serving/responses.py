"""Responses of the OpenAI API, as far as this server supports it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class PromptDetails(BaseModel):
    """`cached_tokens`: number of prompt tokens that needed no prefill."""

    cached_tokens: int


class Usage(BaseModel):
    """Number of tokens of a request and its response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


Reason = Literal["stop", "length", "tool_calls"]


class CalledFunction(BaseModel):
    """`arguments`: JSON, as a string."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(ToolCall):
    """A whole call; `index`: its position among the calls of the message."""

    index: int


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token with its natural log-probability; `bytes` are its UTF-8 bytes, which may be a part of a character."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(BaseModel):
    """The response to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] = []


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(BaseModel):
    """One event of a streamed chat response."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """For each token: text, natural log-probability, those of the most probable tokens, offset in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None


class TextCompletion(BaseModel):
    """The response to a completion request, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to build prompts itself; also the special tokens by name, such as eos_token."""

    model_config = ConfigDict(extra="allow")

    chat_template: str | None
    model_max_length: int


class Response(BaseModel):
    """The response to a request of the Responses API: its main fields."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: list[dict[str, Any]]


class ModelInfo(BaseModel):
    """The served model; the last three fields are extensions."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    artifact: str
    provider: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelInfo]


class Health(BaseModel):
    status: Literal["ok", "failed"]


class Ready(BaseModel):
    status: Literal["ready", "stopping", "failed"]
    model: str
    active: int
    waiting: int


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ProblemAnswer(BaseModel):
    """The body of every error response."""

    error: Problem
