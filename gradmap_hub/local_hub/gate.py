"""The two ports of the hub: API and CDN."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Paths served only by the CDN port.
CDN_PREFIX = "/cdn/"
#: Below it, the sites of static Spaces: OWNER/NAME/.
STATIC_PREFIX = f"{CDN_PREFIX}static/"
# huggingface_hub 1.33 also sends its token to another port of the same host, so the CDN port needs another host name.
_OTHER_NAMES = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}


def cdn_host(host: str) -> str:
    """The host name of the CDN port: the other loopback name of ``host``, if it has one."""
    return _OTHER_NAMES.get(host, host)


class PortGate:
    """Serves LFS downloads only on the CDN port and everything else only on the main port."""

    def __init__(self, app: ASGIApp, cdn_port: int | None) -> None:
        self.app = app
        self.cdn_port = cdn_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            at_cdn = self.cdn_port is not None and scope["server"][1] == self.cdn_port
            if at_cdn != scope["path"].startswith(CDN_PREFIX):
                message = "This path is not served on this port"
                refused = JSONResponse({"error": message}, status_code=404, headers={"X-Error-Message": message})
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)
