"""Requests of the OpenAI API, as far as this server supports it.

They are strict: a number in quotes is an error. Unsupported features are declared with their neutral value only, so
that the error names the field; undeclared fields (`user`, `metadata`, `store`, ...) are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import Discriminator, Field, Tag, ValidationError

from gradmap_hub.serving.forms import GrammarText, Pattern, ResponseFormat, StructuredOutputs, Texts, form_of
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.settings import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_PROMPT_IDS,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOL_CALLS,
    MAX_TOP_LOGPROBS,
)
from gradmap_hub.serving.tools import Strict, ToolChoice, Tools, check_choice, must_call

_TAG = "~"  # prefix of union branch names in pydantic's error locations; not part of the parameter name
_MAX_TOKENS = 2**31 - 1
# The closing quote may be missing: a search that fails would begin again at every later quote.
_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)


def _is_list(value: Any) -> str:
    return "~list" if isinstance(value, list) else "~text"


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "~text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "~id lists"
    return "~texts" if isinstance(first, str) else "~ids"


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("~list")],
    Discriminator(_is_list),
]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[_Stop, Tag("~text")] | Annotated[list[_Stop], Field(max_length=MAX_STOPS), Tag("~list")],
    Discriminator(_is_list),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_IDS)]
Prompt = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("~texts")]
    | Annotated[TokenIds, Tag("~ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("~id lists")],
    Discriminator(_kind_of_prompt),
]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None
Top = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)] | None
# JSON keys are always strings.
BiasedToken = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
Biases = Annotated[dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
MaxTokens = Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    """A call that the assistant has made. `arguments` is JSON in a string, as in the OpenAI API."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message. Only the assistant's may lack content; tool_call_id and name belong to the role `tool`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def size(self) -> int:
        """Number of characters of the text and the tool calls."""
        calls = self.tool_calls or ()
        return len(self.text) + sum(len(call.function.name) + len(call.function.arguments) for call in calls)


# Only the first error is reported; collecting those of 60,000 parts takes a second.
Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class StreamOptions(Strict):
    include_usage: bool | None = None


class _Generation(Strict):
    """Fields of both chat and text completions."""

    model: str
    max_tokens: MaxTokens = Field(None, description="Maximum tokens to generate; also limited by the context.")
    max_completion_tokens: MaxTokens = Field(None, description="Overrides max_tokens.")
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] | None = Field(
        None, description="Extension. Before this many tokens, neither an end token nor a stop string ends the output."
    )
    ignore_eos: bool | None = Field(None, description="Extension. End tokens do not end the output.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="Default 1; 0 is greedy.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Default 1 (off).")
    top_k: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] | None = Field(None, description="Extension. Default 0 (off).")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension. Default 0 (off).")
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = Field(
        None, description="Extension. Default 1 (off)."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="Extension, as in vLLM.")
    guided_json: dict[str, Any] | None = Field(None, description="Extension. The answer follows this JSON schema.")
    guided_regex: Pattern | None = Field(None, description="Extension. The answer matches this pattern.")
    guided_choice: Texts | None = Field(None, description="Extension. The answer is one of these strings.")
    guided_grammar: GrammarText | None = Field(None, description="Extension. llguidance's Lark, or llama.cpp's GBNF.")
    presence_penalty: Penalty = Field(None, description="Subtracted once from the logit of each token in the output.")
    frequency_penalty: Penalty = Field(None, description="Subtracted once per occurrence in the output.")
    logit_bias: Biases = Field(None, description="Token id to a number that is added to its logit.")
    n: Choices = Field(None, description="Choices per prompt, default 1. With a seed, each uses the next one.")

    @property
    def limit(self) -> int | None:
        """The maximum number of output tokens that the request sets; None: it sets none."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: Messages
    add_generation_prompt: bool | None = Field(None, description="Extension. Default true: begin a new answer.")
    continue_final_message: bool | None = Field(None, description="Extension. Continue the last message.")
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: Top = Field(None, description="How many of the most probable tokens to list; needs logprobs.")
    tools: Tools = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(None, description="Default auto if there are tools.")
    parallel_tool_calls: bool | None = Field(None, description="Default true: there may be several calls.")
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] | None = Field(
        None, description="Maximum tokens to generate; also limited by the context. 0 needs echo."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    add_generation_prompt: None = None
    continue_final_message: None = None
    logprobs: Top = Field(None, description="Return the log-probabilities of each token and the N most probable ones.")
    suffix: Literal[""] | None = None
    best_of: Choices = Field(None, description="Must equal n: every choice is returned.")


class TokenizeRequest(Strict):
    """POST /tokenize: the tokens of a prompt or of the messages of a chat, as in vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools = Field(None, description="With messages only. Functions that the model may call.")
    add_special_tokens: bool | None = Field(None, description="With prompt only. Default true: as in a completion.")
    add_generation_prompt: bool | None = Field(None, description="With messages only. Default true: begin an answer.")
    continue_final_message: bool | None = Field(None, description="With messages only. Continue the last message.")
    return_token_strs: Literal[False] | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize: the text of tokens, as in vLLM."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_PROMPT_IDS)]


_REFUSED = {
    "return_token_strs": "return_token_strs is not supported.",
    "previous_response_id": "previous_response_id is not supported: send the whole conversation as input.",
    "conversation": "conversation is not supported: send the whole conversation as input.",
    "background": "background is not supported: the response is not stored.",
    "suffix": "suffix is not supported: the model only continues a text.",
    "functions": "Function calling is not supported.",
    "function_call": "Function calling is not supported.",
    "modalities": 'modalities must be ["text"].',
    "audio": "Audio is not supported.",
    "prediction": "prediction is not supported.",
    "web_search_options": "Web search is not supported.",
}

Asked = TypeVar("Asked", bound=Strict)


def parse(kind: type[Asked], body: bytes, *, most: int) -> Asked:
    """Parse and validate a request body. `most`: limit of JSON values in it, because this runs on the event loop.

    Raises:
        ApiError: 400; names the invalid parameter.
    """
    # Every value but the first of a list or object follows a comma. Commas within strings do not count.
    if body.count(b",") > most and _TEXTS.sub(b"", body).count(b",") > most:
        raise ApiError(400, f"The body has more than {most} JSON values.", code="invalid_value")
    try:
        # Before validation, since ignored fields must be valid JSON too: no NaN, no lone surrogates, no excessive
        # nesting.
        pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _problem(error) from None
    if isinstance(asked, _Generation):
        _check_generation(asked)
    elif isinstance(asked, TokenizeRequest):
        _check_tokenize(asked)
    return asked


def _check_tokenize(asked: TokenizeRequest) -> None:
    """Check the fields that depend on each other.

    Raises:
        ApiError: 400; names the invalid parameter.
    """
    if (asked.prompt is None) == (asked.messages is None):
        code = "missing_required_parameter" if asked.prompt is None else "invalid_value"
        raise ApiError(400, "Send either prompt or messages.", param="prompt", code=code)
    of_messages = {"add_generation_prompt": asked.add_generation_prompt}
    of_messages |= {"continue_final_message": asked.continue_final_message, "tools": asked.tools or None}
    others, given = (of_messages, "a prompt") if asked.messages is None else (
        {"add_special_tokens": asked.add_special_tokens or None}, "messages"
    )  # fmt: skip
    for name, value in others.items():
        if value is not None:
            raise ApiError(400, f"{name} cannot be combined with {given}.", param=name, code="unsupported_parameter")
    if asked.messages is not None:
        _check_ends(asked)
        _check_turns(asked.messages)


def _check_ends(asked: ChatRequest | TokenizeRequest) -> None:
    if asked.continue_final_message and asked.add_generation_prompt:
        said = "continue_final_message and add_generation_prompt exclude each other."
        raise ApiError(400, said, param="continue_final_message", code="invalid_value")


def _check_tools(asked: ChatRequest) -> None:
    check_choice(asked.tools or [], asked.tool_choice)
    if must_call(asked.tool_choice):
        for name, value in (("min_tokens", asked.min_tokens), ("ignore_eos", asked.ignore_eos)):
            if value:
                said = f"{name} cannot be combined with a tool_choice that demands a call: it ends the answer."
                raise ApiError(400, said, param=name, code="unsupported_parameter")


def _check_form(asked: _Generation) -> None:
    param, wanted = form_of(asked)
    if wanted is None:
        return
    for name, value in (("min_tokens", asked.min_tokens), ("ignore_eos", asked.ignore_eos)):
        if value:
            said = f"{name} cannot be combined with {param}, which determines where the answer ends."
            raise ApiError(400, said, param=name, code="unsupported_parameter")
    if isinstance(asked, ChatRequest) and asked.tools and asked.tool_choice != "none" and not isinstance(wanted, dict):
        said = f"{param} cannot be combined with tools: an answer without calls can only follow a JSON schema."
        raise ApiError(400, said, param=param, code="unsupported_parameter")


def _check_generation(asked: _Generation) -> None:
    """Check the fields that depend on each other.

    Raises:
        ApiError: 400; names the invalid parameter.
    """
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream: true.", param="stream_options", code="invalid_value")
    if isinstance(asked, ChatRequest) and asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
    _check_form(asked)
    if asked.limit is not None and (asked.min_tokens or 0) > asked.limit:
        field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        said = f"min_tokens ({asked.min_tokens}) must not exceed {field} ({asked.limit})."
        raise ApiError(400, said, param="min_tokens", code="invalid_value")
    if isinstance(asked, CompletionRequest) and asked.limit == 0 and not asked.echo:
        raise ApiError(400, "max_tokens must be at least 1, or 0 with echo.", param="max_tokens", code="invalid_value")
    if isinstance(asked, ChatRequest):
        _check_tools(asked)
        _check_ends(asked)
        _check_turns(asked.messages)
    if isinstance(asked, CompletionRequest) and asked.best_of not in (None, asked.n or 1):
        said = "best_of must equal n: this server returns every choice that it generates."
        raise ApiError(400, said, param="best_of", code="unsupported_value")


def _check_turns(turns: Sequence[Message]) -> None:
    """Check the fields of messages that depend on the role.

    Raises:
        ApiError: 400, a message that is not an assistant's lacks content, or has tool calls.
    """
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            continue
        if turn.content is None:
            param = f"messages[{place}].content"
            said = f"Missing required parameter: {param}. Only an assistant message may lack it."
            raise ApiError(400, said, param=param, code="missing_required_parameter")
        if turn.tool_calls:
            param = f"messages[{place}].tool_calls"
            said = f"{param}: only an assistant message may have tool calls."
            raise ApiError(400, said, param=param, code="invalid_value")


def _problem(error: ValidationError) -> ApiError:
    """Convert the first validation error to an API error with a message of one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [place for place in first["loc"] if not (isinstance(place, str) and place.startswith(_TAG))]
    if places[:1] == ["logit_bias"]:  # its keys are the client's own text
        said = f"logit_bias must be an object of at most {MAX_BIASES} token ids with numbers from -100 to 100."
        return ApiError(400, said, param="logit_bias", code="invalid_value")
    param = ""
    for place in places:
        param += f"[{place}]" if isinstance(place, int) else f".{place}" if param else place
    for place in places:
        if place in _REFUSED:
            return ApiError(400, _REFUSED[str(place)], param=param, code="unsupported_parameter")
    if first["type"] == "none_required":  # of CompletionRequest
        said = f"{param} is for chats: a completion has no chat template."
        return ApiError(400, said, param=param, code="unsupported_parameter")
    if not places:
        return ApiError(400, "The body must be a JSON object.", code="invalid_type")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {param}.", param=param, code="missing_required_parameter")
    if places[-1] == "type" and "content" in places:
        return ApiError(400, f"{param}: content parts must be text.", param=param, code="unsupported_value")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    said = first["msg"].replace(" after validation", "")
    return ApiError(400, f"{param}: {said[:1].lower()}{said[1:]}.", param=param, code=code)
