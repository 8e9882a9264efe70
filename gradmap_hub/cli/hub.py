"""`gradmap-hub hub`: the embedded Hub as a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gradmap_hub.cli.options import Host, Port
from gradmap_hub.cli.output import stderr
from gradmap_hub.errors import GradmapError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: gradmap-hub hub --root ./my-hub --port 8900")(hub)


def hub(
    root: Annotated[Path, typer.Option("--root", help="Folder that holds the repositories.")] = Path(
        "gradmap-hub-data"
    ),
    host: Host = "127.0.0.1",
    port: Port = 0,
    cdn_port: Annotated[
        int,
        typer.Option(
            "--cdn-port", help="Port of LFS downloads, by signed URL; 0 takes any free one.", min=0, max=65535
        ),
    ] = 0,
    user: Annotated[str, typer.Option("--user", help="User to create if missing; its token is printed.")] = "local",
) -> None:
    """Run the embedded Hub as a server, for rehearsal and air-gapped use. It stops on Ctrl-C."""
    from gradmap_hub.local_hub import LocalHub

    try:
        server = LocalHub(root, host=host, port=port, cdn_port=cdn_port)
        token = server.add_user(user)
        server.start()
    except (OSError, RuntimeError, ValueError) as error:
        raise GradmapError(f"The embedded Hub cannot be started: {error}") from error
    print(server.url, flush=True)
    settings = f"HF_ENDPOINT={server.url} HF_TOKEN={token} HF_HUB_DISABLE_XET=1"
    stderr.print(f"Use it with: export {escape(settings)}", highlight=False)
    server.serve_forever()
