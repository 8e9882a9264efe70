"""The two ports of the hub: what is served at which."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Addresses that the second port serves, and the first one does not.
CDN_PREFIX = "/cdn/"
# Clients take their token along to another port of the same host (huggingface_hub 1.33), and the Hub's CDN is another.
_OTHER_NAMES = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}


def cdn_host(host: str) -> str:
    """The name of the second port's host, for a hub that is reached as `host`: this machine's other name, if it has
    one."""
    return _OTHER_NAMES.get(host, host)


class PortGate:
    """Keeps downloads of LFS files on the second port, as on the Hub's CDN, and everything else off it."""

    def __init__(self, app: ASGIApp, cdn_port: int | None) -> None:
        self.app = app
        self.cdn_port = cdn_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            at_cdn = self.cdn_port is not None and scope["server"][1] == self.cdn_port
            if at_cdn != scope["path"].startswith(CDN_PREFIX):
                message = "This address is not served at this port"
                refused = JSONResponse({"error": message}, status_code=404, headers={"X-Error-Message": message})
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)
