"""`gradmap-hub serve`: load a model, serve it, and print the address."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gradmap_hub.cli.output import LogLines, stderr
from gradmap_hub.errors import MissingExtra, UsageError

KEY_VARIABLE = "GRADMAP_API_KEY"
_EXAMPLE = "Example: gradmap-hub serve small --port 8000, then: curl http://127.0.0.1:8000/v1/models"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLE)(serve)


def serve(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder made by push or export, or a model id on the Hub.")
    ],
    host: Annotated[str, typer.Option("--host", help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes any free one.", min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option("--slots", help="Generations decoded concurrently.", min=1)] = 8,
    queue: Annotated[
        int, typer.Option("--queue", help="Requests that may wait for a slot; further ones get 429.", min=0)
    ] = 64,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Limit for one request, waiting included.")
    ] = 300.0,
    drain: Annotated[
        float,
        typer.Option(
            "--drain", metavar="SECONDS", help="Time limit of running generations at shutdown; then they are stopped."
        ),
    ] = 60.0,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of ONNX Runtime; default: by the number of cores.", min=1)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Maximum number of tokens of prompt and answer; default: the model's, at most 4096.",
            min=2,
        ),
    ] = None,
    artifact: Annotated[
        str, typer.Option("--artifact", help="File to run: int8, fp32, ...; auto: the best for the machine.")
    ] = "auto",
    provider: Annotated[
        str, typer.Option("--provider", help="Execution provider of ONNX Runtime: cpu, cuda; auto: the best available.")
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the Hub.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="MODEL_ID", help="Model id in answers; default: the model's."),
    ] = None,
    prefix_cache: Annotated[
        int | None,
        typer.Option(
            "--prefix-cache",
            metavar="BYTES",
            help="Memory for the beginnings of prompts that later ones share; 0: none; default: two contexts.",
            min=0,
        ),
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", metavar="BYTES", help="Largest request body.", min=1024)] = 1024
    * 1024,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help=f"File with the API key that clients must send; or set {KEY_VARIABLE}. No option takes the key.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="ORIGIN", help="Origin of web pages that may call the server (CORS); repeatable."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Further Host name, for a proxy on loopback; repeatable."),
    ] = None,
    strict_model: Annotated[
        bool, typer.Option("--strict-model", help="Refuse requests that name another model with 404.")
    ] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log one line per request on stderr, without texts and keys.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings on stderr.")] = False,
) -> None:
    """Serve FOLDER over HTTP with the OpenAI API: chat, completions, streaming. It stops on Ctrl-C and SIGTERM."""
    for module in ("prometheus_client", "pydantic", "starlette", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra("The server", "serve")
    from gradmap_hub.serving.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        slots=slots,
        queue=queue,
        timeout=timeout,
        drain=drain,
        max_body=max_body,
        prefix_cache=prefix_cache,
        name=name,
        api_key=_api_key(api_key_file),
        allow_origins=tuple(allow_origin or ()),
        allow_hosts=tuple(allow_host or ()),
        log_requests=log_requests,
        strict_model=strict_model,
    )
    _log_to_stderr(log_requests, quiet)
    if not settings.loopback and settings.api_key is None:
        stderr.print(
            f"[yellow]warning[/] {escape(host)} is reachable from other machines and there is no API key: anyone "
            "who connects can use the model. See --api-key-file.",
            highlight=False,
        )
    from gradmap_hub import runtime
    from gradmap_hub.serving.server import Server

    path = Path(folder)
    model = runtime.load(
        path if path.exists() else folder,
        artifact=artifact,
        provider=provider,
        threads=threads,
        context=context,
        revision=revision,
    )

    def started(url: str) -> None:
        print(url, flush=True)
        if not quiet:
            stderr.print(
                f"Serving {escape(name or model.name)} ({escape(model.artifact)}, {model.provider}, {model.threads} "
                f"threads, context {model.context_length}), {slots} slots, {queue} waiting. Ctrl-C stops it.",
                highlight=False,
            )

    Server(model, settings).serve_forever(started)


def _api_key(file: Path | None) -> str | None:
    """The key from the file, or from the environment.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UsageError(f"--api-key-file {file} cannot be read: {reason}.") from error
    if not key:
        raise UsageError(f"--api-key-file {file} is empty.")
    return key


def _log_to_stderr(requests: bool, quiet: bool) -> None:
    handler = logging.StreamHandler()  # not rich's, which wraps lines to the width of a terminal
    handler.setFormatter(LogLines("%(asctime)s %(message)s"))
    serving = logging.getLogger("gradmap_hub.serving")
    serving.addHandler(handler)
    serving.propagate = False
    serving.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("gradmap_hub.serving.access").setLevel(logging.INFO if requests else logging.WARNING)
    logging.getLogger("uvicorn.error").addHandler(handler)
