"""Converts a validated request to engine input: token ids, sampling parameters, stop strings, token limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradmap_hub.errors import GradmapError, MissingExtra
from gradmap_hub.runtime import Sampling, Scoring
from gradmap_hub.runtime.constraints import Constraint
from gradmap_hub.serving.engine import Engine
from gradmap_hub.serving.forms import form_of
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.responses import Detokenized, Tokenized
from gradmap_hub.serving.scheduler import Work
from gradmap_hub.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from gradmap_hub.serving.settings import CHARACTERS_PER_TOKEN, MAX_SCORES
from gradmap_hub.serving.tools import Tool, ToolUse
from gradmap_hub.serving.turns import turns_for

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat is limited by the context only


def check_length(asked: ChatRequest | CompletionRequest, context_length: int) -> int:
    """Refuse a prompt that cannot fit into the context, without tokenising it. Takes microseconds.

    Returns:
        The number of characters (or token ids) of all prompts.

    Raises:
        ApiError: 400, a prompt is too long.
    """
    if isinstance(asked, ChatRequest):
        count = sum(turn.size for turn in asked.messages)
        if asked.tool_choice != "none":
            count += sum(len(tool.model_dump_json()) for tool in asked.tools or ())
        _check_characters(count, context_length, "messages")
        return count
    prompts = _given_prompts(asked)
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_characters(len(prompt), context_length, "prompt")
        elif len(prompt) + _least_output(asked) > context_length:
            raise _too_long(f"{len(prompt)} tokens", context_length, "prompt")
    return sum(map(len, prompts))


def _check_characters(count: int, context_length: int, param: str) -> None:
    if count > context_length * CHARACTERS_PER_TOKEN:
        raise _too_long(f"{count} characters", context_length, param)


def check_choices(asked: ChatRequest | CompletionRequest, most: int) -> int:
    """Return how many generations a request needs.

    Raises:
        ApiError: 400, more than slots and queue hold.
    """
    each = asked.n or 1
    count = each if isinstance(asked, ChatRequest) else each * len(_given_prompts(asked))
    if count > most:
        raise ApiError(
            400,
            f"The request asks for {count} choices; this server takes at most {most} at a time. Ask for fewer.",
            param="n" if each > 1 else "prompt",
            code="invalid_value",
        )
    return count


def _least_output(asked: ChatRequest | CompletionRequest) -> int:
    """Return for how many output tokens the context must have room: 0 if only the prompt is requested, else 1."""
    return 0 if asked.limit == 0 else 1


def _too_long(size: str, context_length: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"The prompt has {size}; prompt and output share a context of {context_length} tokens. Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def works_for(engine: Engine, asked: ChatRequest | CompletionRequest) -> list[Work]:
    """Tokenise and check the prompts; return the input of every choice, those of the first prompt first.

    Slow for long prompts: do not call it on the event loop.

    Raises:
        ApiError: 400, a prompt is empty, too long, or rejected by the chat template; a token id is unknown.
    """
    prompts: list[tuple[list[int], str]]
    use = None
    if isinstance(asked, ChatRequest):
        use = ToolUse.of(engine.tool_format, asked.tools or (), asked.tool_choice, asked.parallel_tool_calls)
        tools = () if use is None else use.tools
        param, prompts = "messages", [(_chat_ids(engine, asked, asked.messages, tools), "")]
        wanted = asked.limit
    else:
        param, prompts = "prompt", [_completion_prompt(engine, asked, prompt) for prompt in _given_prompts(asked)]
        wanted = _COMPLETION_TOKENS if asked.limit is None else asked.limit
    scoring = _scoring(asked)
    sampling, stop = _sampling(asked, engine.vocabulary), _stops(asked.stop)
    by, constraint = _constraint(engine, asked, use)
    works = []
    for ids, echo in prompts:
        _check_ids(ids, engine.vocabulary, param)
        room = engine.context_length - len(ids)
        if room < _least_output(asked):
            raise _too_long(f"{len(ids)} tokens", engine.context_length, param)
        limit = room if wanted is None else min(wanted, room)
        for choice in range(asked.n or 1):
            own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + choice)
            works.append(
                Work(
                    ids,
                    limit,
                    own,
                    stop,
                    scoring,
                    echo,
                    ignore_end=bool(asked.ignore_eos),
                    min_tokens=min(asked.min_tokens or 0, limit),
                    constraint=None if constraint is None else constraint.copy(),
                    constrained_by=by,
                    tools=use,
                    shown=None if use is None else engine.call_tokens,
                )
            )
    if scoring is not None:
        _check_scores(works, scoring, "top_logprobs" if isinstance(asked, ChatRequest) else "logprobs")
    return works


def _constraint(
    engine: Engine, asked: ChatRequest | CompletionRequest, use: ToolUse | None
) -> tuple[str, Constraint | None]:
    """Return the name of the parameter that constrains the answer, and the constraint; None: there is none."""
    param, wanted = form_of(asked)
    calls = None if use is None else use.calls(wanted if isinstance(wanted, Mapping) else None)
    if calls is not None:
        param, wanted = "tools", calls
    if wanted is None:
        return param, None
    try:
        return param, engine.constrain(wanted)
    except MissingExtra as error:
        said = f"This server cannot constrain answers. On its machine: {error.hint}"
        raise ApiError(400, said, param=param, code="unsupported_parameter") from error
    except GradmapError as error:
        raise ApiError(400, error.message, param=param, code="invalid_value") from error


def _check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """Check the tokens of a prompt once, not for each of its generations in the engine.

    Raises:
        ApiError: 400, the prompt has no tokens, or an unknown token id.
    """
    if not ids:
        raise ApiError(400, "The prompt has no tokens. Send a non-empty one.", param=param, code="invalid_value")
    if max(ids) >= vocabulary:
        raise _unknown_token(max(ids), vocabulary, param)


def _unknown_token(token: int, vocabulary: int, param: str) -> ApiError:
    said = f"{param}: {token} is not a token id of this model; valid ids are 0 to {vocabulary - 1}."
    return ApiError(400, said, param=param, code="invalid_value")


def _check_scores(works: Sequence[Work], scoring: Scoring, param: str) -> None:
    """Bound the memory of a response.

    Raises:
        ApiError: 400, the response may have more than MAX_SCORES log-probabilities.
    """
    tokens = sum(work.max_tokens + (len(work.prompt) if scoring.prompt else 0) for work in works)
    if tokens * (1 + scoring.top) > MAX_SCORES:
        said = (
            f"The response may have {tokens} tokens with {1 + scoring.top} log-probabilities each; the limit is "
            f"{MAX_SCORES} in all. Ask for fewer, or set max_tokens."
        )
        raise ApiError(400, said, param=param, code="invalid_value")


def _scoring(asked: ChatRequest | CompletionRequest) -> Scoring | None:
    if isinstance(asked, ChatRequest):
        return Scoring(asked.top_logprobs or 0) if asked.logprobs else None
    return None if asked.logprobs is None else Scoring(asked.logprobs, prompt=bool(asked.echo))


def tokenized(engine: Engine, asked: TokenizeRequest) -> Tokenized:
    """Return the tokens of a prompt or a chat, which may be longer than the context.

    Raises:
        ApiError: 400, the tokenizer or the chat template rejects it.
    """
    if asked.messages is not None:
        use = ToolUse.of(engine.tool_format, asked.tools or (), None, None)
        ids = _chat_ids(engine, asked, asked.messages, () if use is None else use.tools)
    elif asked.prompt:
        ids = _text_ids(engine, asked.prompt, special=asked.add_special_tokens is not False)
    else:
        ids = []
    return Tokenized(tokens=ids, count=len(ids), max_model_len=engine.context_length, token_strs=None)


def detokenized(engine: Engine, asked: DetokenizeRequest) -> Detokenized:
    """Return the text of tokens.

    Raises:
        ApiError: 400, a token id is unknown.
    """
    if asked.tokens:
        _check_ids(asked.tokens, engine.vocabulary, "tokens")
    return Detokenized(prompt=engine.decode(asked.tokens))


def _chat_ids(
    engine: Engine, asked: ChatRequest | TokenizeRequest, messages: Sequence[Message], tools: Sequence[Tool]
) -> list[int]:
    try:
        return engine.encode_chat(
            turns_for(engine.chat_template or "", messages),
            add_generation_prompt=asked.add_generation_prompt is not False,
            continue_final_message=bool(asked.continue_final_message),
            tools=[tool.shown for tool in tools],
        )
    except GradmapError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error


def _given_prompts(asked: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, each as text or token ids."""
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [token for token in prompt if isinstance(token, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


def _completion_prompt(engine: Engine, asked: CompletionRequest, prompt: str | list[int]) -> tuple[list[int], str]:
    """Return the token ids of a prompt, and the text that its answers begin with (the prompt if echo is set)."""
    if isinstance(prompt, list):
        return prompt, engine.decode(prompt) if asked.echo else ""
    return _text_ids(engine, prompt), prompt if asked.echo else ""


def _text_ids(engine: Engine, text: str, *, special: bool = True) -> list[int]:
    try:
        return engine.encode(text, special=special)
    except GradmapError as error:
        raise ApiError(400, error.message, param="prompt", code="invalid_value") from error


def _sampling(asked: ChatRequest | CompletionRequest, vocabulary: int) -> Sampling:
    biases = {int(token): bias for token, bias in (asked.logit_bias or {}).items()}
    strange = max(biases, default=0)
    if strange >= vocabulary:
        raise _unknown_token(strange, vocabulary, "logit_bias")
    temperature = 1.0 if asked.temperature is None else asked.temperature
    top_p = 1.0 if asked.top_p is None else asked.top_p
    if top_p == 0:  # greedy
        temperature, top_p = 0.0, 1.0
    return Sampling(
        temperature=temperature,
        top_k=asked.top_k or 0,
        top_p=top_p,
        min_p=asked.min_p or 0.0,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        seed=None if asked.seed is None else asked.seed % 2**63,  # NumPy's generator takes no negative seeds
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=biases,
    )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
