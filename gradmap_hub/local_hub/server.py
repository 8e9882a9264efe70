"""Starting and stopping the hub."""

import ipaddress
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

from .app import build_app
from .auth import Accounts, Role, Signer
from .context import Hub
from .faults import Faults
from .gate import cdn_host
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

    Everything is in ``root``: opening the same directory again, later or with another port, shows the same
    repositories, users and tokens. The methods that set up users and repositories work with or without the
    hub being started. Only one started hub may use a directory.

    Args:
        root: the directory, created as needed. It holds tokens: keep it to yourself.
        host: the address to listen on; must be a loopback address unless ``allow_remote`` is set.
        port: 0 takes any free one.
        paid_plan: off, creating a Gradio or Docker Space is answered with 402, as for a free account.
        log_file: mirror :attr:`requests` to this file, one JSON object a line.
        allow_remote: listen where other machines can connect. There is no TLS: tokens travel in clear text.
        browse_private: show private repositories on the pages for browsers, which carry no token. On, because
            only this machine can connect; switch it off together with ``allow_remote``, or on a machine that
            you share. The API never shows them without a token.
        multipart_bytes: LFS files larger than this are uploaded in parts of this size, by clients that can.
        cdn_port: a second port, from which LFS files are downloaded, as from the Hub's CDN: by signed addresses,
            and refusing whoever shows a token. 0 takes any free one; None serves everything at the first port.
        cdn_seconds: for how long such an address works.
        xet: offer uploads by xet, beside LFS. Off, as clients from 1.x on do not ask: tell them with
            HF_HUB_DISABLE_XET=1.

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
        browse_private: bool = True,
        multipart_bytes: int = 64 * 1024 * 1024,
        cdn_port: int | None = 0,
        cdn_seconds: float = 3600,
        xet: bool = False,
    ) -> None:
        if multipart_bytes < 1:
            raise ValueError(f"multipart_bytes must be positive, got {multipart_bytes}")
        if not allow_remote and not _is_loopback(host):
            raise ValueError(f"{host!r} can be reached from other machines; pass allow_remote=True if that is meant")
        self.root = Path(root)
        # Private repositories are in there: other users of the machine are to stay out.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.host = host
        self.port = port
        self.cdn_port = cdn_port
        self._allow_remote = allow_remote
        self._log = RequestLog(log_file)
        #: Failures to be injected; see :class:`~gradmap_hub.local_hub.faults.Fault`.
        self.faults = Faults()
        store = Store(self.root)
        self._hub = Hub(
            store=store,
            accounts=Accounts(self.root),
            shelf=Shelf(self.root, store.temporary),
            signer=Signer(self.root),
            faults=self.faults,
            paid_plan=paid_plan,
            browse_private=browse_private,
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
        """The address, without a trailing slash. Pass it as ``endpoint`` or set it as ``HF_ENDPOINT``.

        Raises:
            RuntimeError: the hub is not running.
        """
        if self._bound_port is None:
            raise RuntimeError("The hub is not running")
        return self._address(self._bound_port)

    @property
    def cdn_url(self) -> str | None:
        """The address of the second port, without a trailing slash; None where there is none.

        Raises:
            RuntimeError: the hub is not running.
        """
        if self._bound_port is None:
            raise RuntimeError("The hub is not running")
        return None if self._bound_cdn_port is None else self._address(self._bound_cdn_port, cdn_host(self.host))

    @property
    def requests(self) -> list[Request]:
        """The requests answered so far, oldest first. The list is the live one: it may be cleared."""
        return self._log.requests

    # Running

    def start(self) -> None:
        """Listen, and return once the hub answers. Does nothing if it is running.

        Raises:
            OSError: a port is taken.
            RuntimeError: another hub uses the same directory, or the server did not come up.
        """
        if self._thread is not None:
            return
        self._lock_file = _lock(self.root / "hub.lock")
        listeners: list[socket.socket] = []
        try:
            self._hub.store.clear_temporary()
            # Bound here rather than by uvicorn: the ports are known, and the caller gets the error.
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
            # After 5 s, uvicorn's own, a client that was busy elsewhere may write just as its connection is closed: a
            # failure that nobody asked for.
            timeout_keep_alive=_IDLE_SECONDS,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=(listeners,), name="local-hub", daemon=True)
        self._bound_port, self._bound_cdn_port = bound, cdn_port
        self._server, self._thread = server, thread
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("The hub did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        """Finish the requests under way and stop listening. Does nothing if the hub is not running."""
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
        """Serve until SIGINT or SIGTERM arrives (or the server dies), then stop and return.

        Starts the hub if it is not running. Call it from the main thread: signals reach no other.
        """
        stopped = threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            stopped.set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.start()
            # The timeout is for Windows, where a wait without one cannot be interrupted.
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
        """Create a user, or add one to more organisations; returns a token of that role.

        Organisations are created as needed, and members may write to them. Asking again for the same user, role
        and scopes returns the same token.

        Args:
            name: of the user.
            role: "read", "write" or "fineGrained".
            orgs: organisations to become a member of.
            scopes: for a fine-grained token, what it may do, as whoami shows it: ``{"entity": {"type": "model",
                "name": "ada/tiny"}, "permissions": ["repo.content.read", "repo.write"]}``. An entity is a user,
                an org, or one model, dataset or space. "repo.write" lets it change and (user, org) create
                repositories, "repo.content.read" read private ones, "discussion.write" open pull requests,
                "collection.write" make collections.

        Raises:
            ValueError: a name that the Hub would refuse or that is taken by an organisation; an unknown role;
                scopes that are none, or for a token that is not fine-grained.
        """
        return self._hub.accounts.add_user(name, role, orgs, scopes)

    def set_gated(self, repo_id: str, mode: Gated, repo_type: str = "model") -> None:
        """Gate a repository, or (False) open it to everybody.

        Raises:
            ValueError: an unknown mode.
        """
        if mode is not False and mode not in ("auto", "manual"):
            raise ValueError(f"mode must be 'auto', 'manual' or False, got {mode!r}")
        key = parse_repo_id(repo_id, repo_type)
        self._hub.store.update(key, lambda state: replace(state, gated=mode))

    def grant_access(self, repo_id: str, user: str, repo_type: str = "model") -> None:
        """Let a user read the files of a gated repository."""
        key = parse_repo_id(repo_id, repo_type)
        self._hub.store.update(key, lambda state: replace(state, granted=tuple(sorted({*state.granted, user}))))

    def set_private(self, repo_id: str, private: bool, repo_type: str = "model") -> None:
        """Hide a repository from everybody but its owners, or show it again."""
        key = parse_repo_id(repo_id, repo_type)
        self._hub.store.update(key, lambda state: replace(state, private=private))

    def set_space_build(self, repo_id: str, *, polls: int = 2, error: str | None = None) -> None:
        """Say how the builds of a Space go, from the next time its runtime is asked for.

        Without this they go as with the defaults. Every commit to ``main`` is a new build.

        Args:
            repo_id: the Space.
            polls: how many times the runtime is asked for before the last stage; the first half finds BUILDING,
                the rest APP_STARTING. With 0 the last stage is there at once.
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
        """Make the files of a repository those of ``folder``, without HTTP; returns the commit id.

        The repository is created as needed. Its owner need not exist: a user or an organisation of that name
        can be added later. Equal content makes no new commit. A repository that is private stays so.

        Raises:
            ValueError: an invalid repository id or file name.
            NotADirectoryError: there is no such folder.
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


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    # With the protocol named, asyncio turns Nagle's algorithm off: every answer on a connection that is kept would
    # otherwise wait 40 ms for the client's delayed acknowledgement.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # A hub that was just stopped leaves its port waiting for stray packets.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def _lock(path: Path) -> IO[bytes]:
    """Hold a file lock until the returned file is closed; the system releases it if the process dies."""
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # Windows: two hubs on one directory are not noticed there
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RuntimeError(f"Another hub is running on {path.parent}") from None
    return file
