"""What every route handler uses: the hub, the request and permission checks."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gradmap_hub.files import parse_json

from .auth import Accounts, Identity, Signer, can_open, can_see
from .errors import Forbidden, Gated, HubError, InvalidName, RepoNotFound, Unauthorized
from .faults import Faults
from .gate import cdn_host
from .gitids import Entry
from .names import RepoKey, RepoType, check_path, requested_key
from .shelf import Shelf
from .store import RepoState, Store

#: The plan of an account. free: unpaid, with a verified e-mail address and older than 30 days; young: unpaid, and not
#: yet both; pro (users) and team (organisations): paid.
Plan = Literal["young", "free", "pro", "team"]
_BODY_LIMIT = 64 * 1024 * 1024
#: Limit in characters of a message in a header: messages repeat names from requests, and clients reject long headers.
_MESSAGE_LIMIT = 1000


@dataclass(frozen=True)
class Hub:
    """The parts and settings of a running hub; :class:`LocalHub` explains the settings."""

    store: Store
    accounts: Accounts
    shelf: Shelf
    signer: Signer
    faults: Faults
    paid_plan: bool
    #: Plans of accounts that differ from ``paid_plan``.
    plans: Mapping[str, Plan]
    multipart_bytes: int
    cdn_seconds: float
    #: Whether Xet uploads are accepted.
    xet: bool = False
    #: None if LFS files are served from the main port.
    cdn_port: int | None = None
    page_size: int = 1000

    def plan_of(self, account: str) -> Plan:
        return self.plans.get(account, "pro" if self.paid_plan else "free")


@dataclass(frozen=True)
class Call:
    """One request: the caller, the repository type and the body."""

    hub: Hub
    http: HttpRequest
    identity: Identity | None
    repo_type: RepoType
    body: bytes = b""

    @property
    def base_url(self) -> str:
        """The URL under which the client reached the hub, without a trailing slash."""
        return str(self.http.base_url).rstrip("/")

    @property
    def cdn_url(self) -> str:
        """The URL of the CDN port, as seen by the client."""
        url = self.http.base_url.replace(port=self.hub.cdn_port)
        name = url.hostname or ""
        if cdn_host(name) != name:
            url = url.replace(hostname=cdn_host(name))
        return str(url).rstrip("/")

    def param(self, name: str) -> str:
        """A path parameter, fully unquoted (a revision may contain slashes)."""
        return self.http.path_params[name].replace("%2F", "/")

    def path(self) -> str:
        """The path of a file or folder in the repository.

        Raises:
            InvalidName: the path is invalid.
        """
        path = self.http.path_params["path"]
        if "%2F" in path:
            raise InvalidName(f"Invalid path {path!r}")
        return check_path(path)

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            HubError: 400, the body is not a JSON object.
        """
        try:
            value = parse_json(self.body, finite=True)
        except ValueError as error:
            raise HubError(400, f"The body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise HubError(400, "The body must be a JSON object")
        return value

    def user(self) -> Identity:
        """The authenticated user.

        Raises:
            Unauthorized: the request is anonymous.
        """
        if self.identity is None:
            raise Unauthorized
        return self.identity

    def key(self) -> RepoKey:
        """The repository in the request path.

        Raises:
            RepoNotFound: the name is invalid.
        """
        name = self.param("name").removesuffix(".git") if "/info/lfs/" in self.http.url.path else self.param("name")
        return requested_key(self.param("namespace"), name, self.repo_type)

    def visible(self, key: RepoKey) -> RepoState:
        """The state of a repository that this caller may see.

        Raises:
            RepoNotFound: the repository does not exist or is not visible to this caller.
        """
        state = self.hub.store.state(key)
        if not can_see(self.identity, key, state):
            raise RepoNotFound
        return state

    def readable(self, key: RepoKey, path: str = "", entry: Entry | None = None) -> RepoState:
        """Like :meth:`visible`, but for the content of one file, or (by default) of every file.

        Raises:
            Gated: the repository is gated and this caller has no access.
        """
        state = self.visible(key)
        if not can_open(self.identity, key, state, path, is_lfs=entry is not None and entry.sha256 is not None):
            raise Gated(key.type, key.id, self.identity is not None)
        return state

    def writable(self, key: RepoKey) -> Identity:
        """The user, if they may write to this repository.

        Raises:
            RepoNotFound, Unauthorized, Forbidden
        """
        self.visible(key)
        user = self.user()
        if not user.can_write(key):
            raise Forbidden
        return user

    def contributor(self, key: RepoKey) -> Identity:
        """The user, if they can see the repository and may open pull requests.

        Raises:
            RepoNotFound, Unauthorized, Forbidden
        """
        self.visible(key)
        user = self.user()
        if not user.can_propose(key):
            raise Forbidden
        return user


Handler = Callable[[Call], Response]
AsyncHandler = Callable[[Call], Awaitable[Response]]
Endpoint = Callable[[HttpRequest], Awaitable[Response]]


def endpoint(
    hub: Hub, handler: Handler, repo_type: RepoType = "model", signed: bool = False, own_tokens: bool = False
) -> Endpoint:
    """Wrap a handler that takes the whole body and runs in a worker thread, where it may block on the disk.

    ``signed`` and ``own_tokens`` are as in :func:`streaming_endpoint`.
    """

    async def with_body(call: Call) -> Response:
        body = bytearray()
        async for chunk in call.http.stream():
            body += chunk
            if len(body) > _BODY_LIMIT:
                raise HubError(413, "The request is too large")
        return await run_in_threadpool(handler, replace(call, body=bytes(body)))

    return streaming_endpoint(hub, with_body, repo_type, signed, own_tokens)


def streaming_endpoint(
    hub: Hub, handler: AsyncHandler, repo_type: RepoType = "model", signed: bool = False, own_tokens: bool = False
) -> Endpoint:
    """Wrap a handler that streams the body itself.

    ``signed`` marks URLs that stand for external storage: a request with a token is refused, as on S3, so tests catch
    clients that leak their token. ``own_tokens`` marks storage that has its own tokens; the handler checks them.
    """

    async def run(http: HttpRequest) -> Response:
        try:
            try:
                identity = None if signed or own_tokens else await run_in_threadpool(_identify, hub, http)
                if signed and "authorization" in http.headers:
                    raise HubError(400, "Only one auth mechanism allowed: the URL is signed, and there is a token")
                return await handler(Call(hub, http, identity, repo_type))
            except HubError:
                # The client sees a response in the middle of an upload as a broken connection: read the rest first.
                with suppress(RuntimeError):  # the stream was already consumed
                    async for _ in http.stream():
                        pass
                raise
        except ClientDisconnect:
            # No client is left to respond to; the handler has dropped what it received.
            return Response(status_code=499)

    return run


def objects_in(payload: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The array of objects that a JSON body has under the key ``name``.

    Raises:
        HubError: 400, the value is not an array of objects.
    """
    value = payload.get(name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise HubError(400, f"{name} must be an array of objects")
    return value


def answer(value: object, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(value, headers=headers)


def refusal(error: HubError) -> JSONResponse:
    """An error response: the client maps the headers to exceptions, the body is for people."""
    # Anything but printable ASCII in a header would end the connection instead of the request.
    printable = (char if char.isprintable() else " " for char in error.message[:_MESSAGE_LIMIT])
    message = " ".join("".join(printable).split()).encode("ascii", "backslashreplace").decode()
    headers = {"X-Error-Message": message, **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message, **error.body}, status_code=error.status, headers=headers)


def _identify(hub: Hub, http: HttpRequest) -> Identity | None:
    header = http.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    identity = hub.accounts.identify(token.strip()) if scheme.lower() == "bearer" else None
    if identity is None:
        # The client uses this wording to tell a bad token from a missing repository.
        whoami = http.url.path == "/api/whoami-v2"
        raise Unauthorized("Invalid username or password." if whoami else "Invalid credentials in Authorization header")
    http.state.user = identity.name
    return identity
