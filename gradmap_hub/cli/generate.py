"""`gradmap-hub generate`: one answer, or a conversation, in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from gradmap_hub.cli.output import Result, emit, stderr
from gradmap_hub.errors import UsageError
from gradmap_hub.units import plain

if TYPE_CHECKING:
    from gradmap_hub.runtime import Generation, Sampling, TextModel

_DEFAULT_TOKENS = 256


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub generate small 'The capital of France is' --max-tokens 32")(generate)


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, or a Hub id.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` or no prompt reads standard input.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message before the prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as given, without the chat template.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Chat turn by turn; end with Ctrl-D.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Maximum number of new tokens.")
    ] = _DEFAULT_TOKENS,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the top-1 token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample from the smallest set of tokens with this total probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Sample from tokens with at least this share of the top-1 probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: tokens that already occur become less likely.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of sampling; the same seed gives the same answer.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop where this text appears; repeatable.")] = None,
    artifact: Annotated[str, typer.Option("--artifact", help="auto, int8, fp32, int4 or a file name.")] = "auto",
    provider: Annotated[str, typer.Option("--provider", help="Execution provider: auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of ONNX Runtime; default: all processors.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Maximum number of tokens of prompt and answer.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, counts and timings.")
    ] = False,
) -> None:
    """Generate text with a model's ONNX files, on ONNX Runtime and without torch."""
    from gradmap_hub import runtime

    sampling = runtime.Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1; got {max_tokens}.")
    if chat and (prompt is not None or raw or as_json):
        raise UsageError("--chat reads its own prompts; leave out the prompt, --raw and --json.")
    if prompt is None and not chat and sys.stdin.isatty():
        raise UsageError(
            "No prompt given.", hint='Give one: gradmap-hub generate MODEL "prompt"; or --chat; or pipe it in.'
        )
    text = "" if chat else _standard_input() if prompt in (None, "-") else prompt or ""
    _check_unicode(text, "prompt")
    _check_unicode(system or "", "system message")
    if not chat and not text.strip():
        raise UsageError("The prompt is empty.")
    began = time.perf_counter()
    loaded = runtime.load(
        model, artifact=artifact, provider=provider, threads=threads, context=context, revision=revision
    )
    load_seconds = time.perf_counter() - began
    if chat:
        _converse(loaded, system, max_tokens, sampling, stop or [])
        return
    ids = _prompt_ids(loaded, text, system, raw)
    answer = loaded.start(ids, max_tokens=max_tokens, sampling=sampling, stop=stop or [])
    if as_json:
        for _ in answer:
            pass
        emit(Result(_json(loaded, answer, load_seconds)), as_json)
        return
    _stream(answer)
    stderr.print(f"[dim]{escape(_summary(loaded, answer))}[/]", highlight=False)


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise _not_unicode("prompt on standard input") from error


def _check_unicode(text: str, what: str) -> None:
    """Check that a text from the terminal is Unicode. Python keeps bytes that are invalid in the terminal's encoding as
    lone surrogates.

    Raises:
        UsageError: the text has such bytes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _not_unicode(what) from error


def _not_unicode(what: str) -> UsageError:
    return UsageError(
        f"The {what} is not valid {(sys.stdin.encoding or 'utf-8').upper()} text.",
        hint="Convert it to UTF-8, for example with iconv.",
    )


def _prompt_ids(model: TextModel, text: str, system: str | None, raw: bool) -> list[int]:
    if raw or not model.has_chat_template:
        if system is not None:
            raise UsageError("--system needs a chat template: leave it out with --raw and for models without one.")
        return model.encode(text)
    return model.encode_chat([*_messages(system), {"role": "user", "content": text}])


def _messages(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _stream(answer: Generation) -> None:
    """Print the text as it is generated; Ctrl-C ends the answer and the line. On a terminal, control characters are
    removed, because a model may write escape codes; a file or pipe gets the text unchanged."""
    shown = plain if sys.stdout.isatty() else str
    try:
        for piece in answer:
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _converse(model: TextModel, system: str | None, max_tokens: int, sampling: Sampling, stop: list[str]) -> None:
    if not model.has_chat_template:
        raise UsageError("This model has no chat template, which --chat needs. Leave out --chat.")
    stderr.print(f"[dim]{escape(model.name)}, {escape(model.artifact)}; Ctrl-D ends.[/]", highlight=False)
    messages = _messages(system)
    first = len(messages)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise _not_unicode("prompt on standard input") from error
        _check_unicode(said, "prompt")
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        ids = model.encode_chat(messages)
        # The oldest turns are dropped when the context is full; the system message stays.
        while len(ids) + max_tokens > model.context_length and len(messages) > first + 2:
            del messages[first : first + 2]
            ids = model.encode_chat(messages)
        answer = model.start(ids, max_tokens=max_tokens, sampling=sampling, stop=stop)
        _stream(answer)
        messages.append({"role": "assistant", "content": answer.text})


def _summary(model: TextModel, answer: Generation) -> str:
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    return (
        f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, first after "
        f"{answer.first_token_seconds or 0:.2f} s{speed}; {model.artifact} on {model.provider}"
    )


def _json(model: TextModel, answer: Generation, load_seconds: float) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "first_token_seconds": answer.first_token_seconds,
        "tokens_per_second": answer.tokens_per_second,
        "load_seconds": load_seconds,
        "model": model.name,
        "artifact": model.artifact,
        "provider": model.provider,
        "threads": model.threads,
    }
