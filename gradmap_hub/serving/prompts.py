"""Converts a validated request to engine input: token ids, sampling parameters, stop strings, token limit."""

from __future__ import annotations

from gradmap_hub.errors import GradmapError
from gradmap_hub.runtime import Sampling, Scoring
from gradmap_hub.serving.problems import ApiError
from gradmap_hub.serving.scheduler import Engine, Work
from gradmap_hub.serving.schemas import ChatRequest, CompletionRequest
from gradmap_hub.serving.settings import CHARACTERS_PER_TOKEN, MAX_SCORES

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat is limited by the context only


def check_length(asked: ChatRequest | CompletionRequest, context_length: int) -> int:
    """Refuse a prompt that cannot fit into the context, without tokenising it. Takes microseconds.

    Returns:
        The number of characters (or token ids) of the prompt.

    Raises:
        ApiError: 400, the prompt is too long.
    """
    if isinstance(asked, ChatRequest):
        param, prompt = "messages", None
        count = sum(len(turn.text) for turn in asked.messages)
    else:
        param, prompt = "prompt", _given_prompt(asked)
        count = len(prompt)
    if isinstance(prompt, list):
        if count + _least_output(asked) > context_length:
            raise _too_long(f"{count} tokens", context_length, param)
    elif count > context_length * CHARACTERS_PER_TOKEN:
        raise _too_long(f"{count} characters", context_length, param)
    return count


def _least_output(asked: ChatRequest | CompletionRequest) -> int:
    """Return for how many tokens of output there must be room: none if only the prompt is asked for."""
    return 0 if asked.max_tokens == 0 else 1


def _too_long(size: str, context_length: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"The prompt has {size}; prompt and output share a context of {context_length} tokens. Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def work_for(engine: Engine, asked: ChatRequest | CompletionRequest) -> Work:
    """Tokenise and check the prompt. Slow for long prompts: do not call it on the event loop.

    Raises:
        ApiError: 400, the prompt is empty, too long, or rejected by the chat template; logit_bias has an unknown token.
    """
    if isinstance(asked, ChatRequest):
        param, ids = "messages", _chat_ids(engine, asked)
        wanted = asked.max_completion_tokens or asked.max_tokens
    else:
        param, ids = "prompt", _prompt_ids(engine, asked)
        wanted = _COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    if not ids:
        raise ApiError(400, "The prompt has no tokens. Send a non-empty one.", param=param, code="invalid_value")
    room = engine.context_length - len(ids)
    if room < _least_output(asked):
        raise _too_long(f"{len(ids)} tokens", engine.context_length, param)
    scoring = _scoring(asked)
    if scoring is not None and scoring.prompt and len(ids) * (1 + scoring.top) > MAX_SCORES:
        raise ApiError(
            400,
            f"The prompt has {len(ids)} tokens, and {1 + scoring.top} log-probabilities of each are asked for; the "
            f"limit is {MAX_SCORES} in all. Ask for fewer.",
            param="logprobs",
            code="invalid_value",
        )
    return Work(
        prompt=ids,
        max_tokens=room if wanted is None else min(wanted, room),
        sampling=_sampling(asked, engine.vocabulary),
        stop=_stops(asked.stop),
        scoring=scoring,
        echo=_echo(engine, asked),
    )


def _scoring(asked: ChatRequest | CompletionRequest) -> Scoring | None:
    if isinstance(asked, ChatRequest):
        return Scoring(asked.top_logprobs or 0) if asked.logprobs else None
    return None if asked.logprobs is None else Scoring(asked.logprobs, prompt=bool(asked.echo))


def _echo(engine: Engine, asked: ChatRequest | CompletionRequest) -> str:
    """Return the text that the answer begins with."""
    if isinstance(asked, ChatRequest) or not asked.echo:
        return ""
    prompt = _given_prompt(asked)
    return prompt if isinstance(prompt, str) else engine.decode(prompt)


def _chat_ids(engine: Engine, asked: ChatRequest) -> list[int]:
    # OpenAI's developer role is the system role in the chat templates of open models.
    turns = [
        {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text} for turn in asked.messages
    ]
    try:
        return engine.encode_chat(turns)
    except GradmapError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error


def _given_prompt(asked: CompletionRequest) -> str | list[int]:
    """The prompt as text or token ids."""
    prompt = asked.prompt
    if isinstance(prompt, str):
        return prompt
    first = prompt[0]
    if isinstance(first, int):
        return [token for token in prompt if isinstance(token, int)]
    return first


def _prompt_ids(engine: Engine, asked: CompletionRequest) -> list[int]:
    prompt = _given_prompt(asked)
    if isinstance(prompt, list):
        return prompt
    try:
        return engine.encode(prompt)
    except GradmapError as error:
        raise ApiError(400, error.message, param="prompt", code="invalid_value") from error


def _sampling(asked: ChatRequest | CompletionRequest, vocabulary: int) -> Sampling:
    biases = {int(token): bias for token, bias in (asked.logit_bias or {}).items()}
    strange = max(biases, default=0)
    if strange >= vocabulary:
        raise ApiError(
            400,
            f"logit_bias: {strange} is not a token id of this model; valid ids are 0 to {vocabulary - 1}.",
            param="logit_bias",
            code="invalid_value",
        )
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
