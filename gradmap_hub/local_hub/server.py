"""The hub as a server: start, stop, set up."""

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, Self

import uvicorn

from gradmap_hub.files import lock
from gradmap_hub.machine import is_loopback

from .app import build_app
from .auth import Accounts, Role, Signer
from .context import Hub, Plan
from .faults import Faults
from .gate import STATIC_PREFIX, cdn_host
from .names import parse_repo_id
from .requestlog import Request, RequestLog
from .seeding import seed_folder
from .shelf import Shelf
from .spacebuild import SpaceBuild
from .store import Gated, SpaceSettings, Store
from .wire import OpenProtocol

_START_SECONDS = 30
_STOP_SECONDS = 10
_IDLE_SECONDS = 75


class LocalHub:
    """A Hugging Face Hub in a directory, served on this machine.

    All data is in ``root``: reopening the directory, on any port, restores the same repositories, users and tokens.
    The methods that set up users and repositories work whether or not the hub is running. Only one running hub may
    use a directory.

    Args:
        root: the directory, created as needed. It contains tokens: keep it private.
        host: the address to listen on; must be a loopback address unless ``allow_remote`` is set.
        port: 0 picks a free port.
        paid_plan: if False, creating a Gradio or Docker Space fails with 402, as for a free account.
        plans: the plan of each user and organisation to which ``paid_plan`` does not apply: "young" (a free account
            that may not use ZeroGPU yet), "free", "pro" or "team".
        log_file: mirror :attr:`requests` to this JSON Lines file.
        allow_remote: allow connections from other machines. There is no TLS: tokens are sent in clear text.
        multipart_bytes: LFS files above this size are uploaded in parts of this size, if the client supports it.
        cdn_port: a second port for LFS downloads, like the Hub's CDN: it takes signed URLs and refuses requests with
            a token. 0 picks a free port; None serves everything from the main port.
        cdn_seconds: the lifetime of a signed URL.
        xet: offer Xet uploads in addition to LFS. If False, clients from 1.x on need HF_HUB_DISABLE_XET=1, because they
            assume Xet.

    Raises:
        ValueError: ``host`` is not a loopback address and ``allow_remote`` is off; ``multipart_bytes`` is not
            positive.
    """

    def __init__(
        self,
        root: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        paid_plan: bool = True,
        log_file: Path | None = None,
        *,
        allow_remote: bool = False,
        multipart_bytes: int = 64 * 1024 * 1024,
        cdn_port: int | None = 0,
        cdn_seconds: float = 3600,
        xet: bool = False,
        plans: Mapping[str, Plan] | None = None,
    ) -> None:
        if multipart_bytes < 1:
            raise ValueError(f"multipart_bytes must be positive, got {multipart_bytes}")
        if not allow_remote and not is_loopback(host):
            raise ValueError(f"{host!r} can be reached from other machines; pass allow_remote=True to allow that")
        self.root = Path(root)
        # It contains private repositories: no access for other users of the machine.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.host = host
        self.port = port
        self.cdn_port = cdn_port
        self._allow_remote = allow_remote
        self._log = RequestLog(log_file)
        #: Failures to inject; see :class:`~gradmap_hub.local_hub.faults.Fault`.
        self.faults = Faults()
        store = Store(self.root)
        self._hub = Hub(
            store=store,
            accounts=Accounts(self.root),
            shelf=Shelf(self.root, store.temporary),
            signer=Signer(self.root),
            faults=self.faults,
            paid_plan=paid_plan,
            plans=dict(plans or {}),
            multipart_bytes=multipart_bytes,
            cdn_seconds=cdn_seconds,
            xet=xet,
        )
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._lock_file: IO[bytes] | None = None
        self._bound_port: int | None = None
        self._bound_cdn_port: int | None = None

    @property
    def url(self) -> str:
        """The URL, without a trailing slash. Pass it as ``endpoint`` or set it as ``HF_ENDPOINT``.

        Raises:
            RuntimeError: the hub is not running.
        """
        if self._bound_port is None:
            raise RuntimeError("The hub is not running")
        return self._address(self._bound_port)

    @property
    def cdn_url(self) -> str | None:
        """The URL of the CDN port, without a trailing slash; None if ``cdn_port`` is None.

        Raises:
            RuntimeError: the hub is not running.
        """
        if self._bound_port is None:
            raise RuntimeError("The hub is not running")
        return None if self._bound_cdn_port is None else self._address(self._bound_cdn_port, cdn_host(self.host))

    def static_url(self, repo_id: str) -> str:
        """The URL of the site of a public static Space. It has another origin than the API.

        Raises:
            RuntimeError: the hub is not running, or has no CDN port.
        """
        if self.cdn_url is None:
            raise RuntimeError("Static Spaces are served on the CDN port")
        return f"{self.cdn_url}{STATIC_PREFIX}{repo_id}/"

    @property
    def requests(self) -> list[Request]:
        """The requests so far, oldest first. This is the live list; clear it to reset the log."""
        return self._log.requests

    # Running

    def start(self) -> None:
        """Start the hub and return once it accepts requests. Does nothing if the hub is running.

        Raises:
            OSError: a port is in use.
            RuntimeError: another hub uses the same directory, or the server did not start within 30 seconds.
        """
        if self._thread is not None:
            return
        self._lock_file = _lock(self.root / "hub.lock")
        listeners: list[socket.socket] = []
        try:
            self._hub.store.clear_temporary()
            # Bound here, not by uvicorn: the ports are known at once, and errors reach the caller.
            for port in [self.port] if self.cdn_port is None else [self.port, self.cdn_port]:
                listeners.append(_listen(self.host, port))
        except BaseException:
            for listener in listeners:
                listener.close()
            self._unlock()
            raise
        bound, *others = [listener.getsockname()[1] for listener in listeners]
        cdn_port = others[0] if others else None
        hub = replace(self._hub, cdn_port=cdn_port)
        app = build_app(hub, self._log, host=None if self._allow_remote else self.host)
        config = uvicorn.Config(
            app,
            http=OpenProtocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_STOP_SECONDS // 2,
            # uvicorn's default of 5 s may close an idle connection just as a client reuses it.
            timeout_keep_alive=_IDLE_SECONDS,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=(listeners,), name="local-hub", daemon=True)
        self._bound_port, self._bound_cdn_port = bound, cdn_port
        self._server, self._thread = server, thread
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            exited = not thread.is_alive()
            if exited or time.monotonic() > deadline:
                self.stop()
                if exited:
                    raise RuntimeError("The embedded Hub's server thread exited while starting.")
                raise RuntimeError(f"The embedded Hub did not answer within {_START_SECONDS} s.")
            time.sleep(0.005)

    def stop(self) -> None:
        """Finish the running requests and stop listening. Does nothing if the hub is not running."""
        server, thread = self._server, self._thread
        if server is not None and thread is not None:
            server.should_exit = True
            thread.join(_STOP_SECONDS)
            if thread.is_alive():
                server.force_exit = True
                thread.join(_STOP_SECONDS)
        self._server = self._thread = self._bound_port = self._bound_cdn_port = None
        self._unlock()

    def serve_forever(self) -> None:
        """Serve until SIGINT or SIGTERM arrives or the server dies, then stop and return.

        Starts the hub if it is not running. Call it from the main thread, which receives the signals.
        """
        stopped = threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            stopped.set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.start()
            # On Windows, a wait without a timeout cannot be interrupted.
            while not stopped.wait(0.5) and self._thread is not None and self._thread.is_alive():
                pass
        finally:
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Setting up

    def add_user(
        self,
        name: str,
        role: Role = "write",
        orgs: Sequence[str] = (),
        scopes: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Create a user or add them to more organisations; return a token of this role.

        Organisations are created as needed, and members may write to them. A repeated call with the same user, role
        and scopes returns the same token.

        Args:
            name: the user name.
            role: "read", "write" or "fineGrained".
            orgs: organisations to join.
            scopes: the permissions of a fine-grained token, in whoami's format: ``{"entity": {"type": "model",
                "name": "ada/tiny"}, "permissions": ["repo.content.read", "repo.write"]}``. An entity is a user, an
                org, or one model, dataset or space. "repo.write" permits writing to repositories and (user, org)
                creating them, "repo.content.read" reading private ones, "discussion.write" opening pull requests,
                "collection.write" creating collections.

        Raises:
            ValueError: the Hub would refuse the name, or a user and an organisation would share it; an unknown role;
                an invalid scope, or scopes for a token that is not fine-grained.
        """
        return self._hub.accounts.add_user(name, role, orgs, scopes)

    def set_gated(self, repo_id: str, mode: Gated, repo_type: str = "model") -> None:
        """Set the gated mode of a repository, "auto" or "manual" as on the Hub; False removes the gate.

        Raises:
            ValueError: an unknown mode.
        """
        if mode is not False and mode not in ("auto", "manual"):
            raise ValueError(f"mode must be 'auto', 'manual' or False, got {mode!r}")
        key = parse_repo_id(repo_id, repo_type)
        self._hub.store.update(key, lambda state: replace(state, gated=mode))

    def grant_access(self, repo_id: str, user: str, repo_type: str = "model") -> None:
        """Grant a user access to the files of a gated repository."""
        key = parse_repo_id(repo_id, repo_type)
        self._hub.store.update(key, lambda state: replace(state, granted=tuple(sorted({*state.granted, user}))))

    def set_private(self, repo_id: str, private: bool, repo_type: str = "model") -> None:
        """Make a repository private or public."""
        key = parse_repo_id(repo_id, repo_type)
        self._hub.store.update(key, lambda state: replace(state, private=private))

    def set_space_build(self, repo_id: str, *, polls: int = 2, error: str | None = None) -> None:
        """Set how the builds of a Space proceed, from the next runtime request on.

        Every commit to ``main`` starts a new build.

        Args:
            repo_id: the Space.
            polls: the number of runtime requests before the final stage. The first half (all, if ``error`` is set)
                returns BUILDING, the rest APP_STARTING. 0 reaches the final stage at once.
            error: end with BUILD_ERROR and this message instead of RUNNING.

        Raises:
            ValueError: ``polls`` is negative.
        """
        if polls < 0:
            raise ValueError(f"polls must not be negative, got {polls}")
        key = parse_repo_id(repo_id, "space")
        self._hub.store.update(key, lambda state: replace(state, build=SpaceBuild(polls, error)))

    def seed(
        self,
        repo_id: str,
        folder: Path,
        repo_type: Literal["model", "dataset", "space"] = "model",
        private: bool = False,
    ) -> str:
        """Replace the files of a repository with those of ``folder``, without HTTP; return the commit id.

        The repository is created as needed. Its owner need not exist: a user or organisation of that name can be
        added later. If nothing differs, no commit is made. A private repository stays private.

        Raises:
            ValueError: an invalid repository id or file name.
            NotADirectoryError: ``folder`` is not a directory.
        """
        key = parse_repo_id(repo_id, repo_type)
        folder = Path(folder)
        if not folder.is_dir():
            raise NotADirectoryError(folder)
        store = self._hub.store
        with store.lock(key):
            if not store.exists(key):
                space = SpaceSettings(sdk="gradio") if key.type == "space" else None
                store.create(key, key.namespace, private, space)
            elif private:
                self.set_private(repo_id, True, repo_type)
            return seed_folder(store, key, folder)

    def _address(self, port: int, host: str | None = None) -> str:
        host = host or self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def _listen(host: str, port: int) -> socket.socket:
    # With an explicit protocol, asyncio disables Nagle's algorithm. Otherwise every response on a kept-alive connection
    # waits 40 ms for the client's delayed acknowledgement.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # The port of a hub that has just stopped is still in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def _lock(path: Path) -> IO[bytes]:
    """Lock the file and return it. Raises RuntimeError: another hub runs on this folder."""
    try:
        return lock(path)
    except BlockingIOError:
        raise RuntimeError(f"Another hub is running on {path.parent}") from None
