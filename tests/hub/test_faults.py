"""Every route of a publish, every way to fail at it: what the Hub holds afterwards is all or nothing, and never double.

One fault hits the first request to a route. What may pass is survived within the same call; what the Hub says no to is
told in one line, and the next run finishes. `pytest -v` prints the table at the end, `make reliability` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import (
    GradmapError,
    HubConflict,
    HubError,
    NotAllowed,
    NotLoggedIn,
    PaymentRequired,
    PublishInterrupted,
    RateLimited,
    TargetChanged,
    TargetGone,
)
from gradmap_hub.hub import xet
from gradmap_hub.local_hub import ROUTES, Fault, LocalHub, Request
from gradmap_hub.pipeline.publish import publish_folder

from .conftest import SPACE, TARGET, Side, local_bytes, remote_bytes

pytestmark = pytest.mark.long  # a fault at each request

# What a publish of a model and its Space with --public asks of a Hub; a test below sees to it that this is all. Before
# they download, clients from 1.x on ask for the tree as well.
ALWAYS = (
    "whoami", "repo-info", "repo-create", "xet-token", "preupload", "lfs-batch", "lfs-put", "lfs-verify",
    "validate-yaml", "commit", "resolve-head", "resolve-get", "cdn-get", "space-variables", "repo-settings",
)  # fmt: skip
BY_CLIENT = ("tree",)
USED = (*ALWAYS, *BY_CLIENT)
PASSING: dict[str, dict[str, Any]] = {
    "429 Retry-After": {"kind": "status", "status": 429, "retry_after": "7"},
    "429 RateLimit": {"kind": "status", "status": 429, "rate_limit": '"api";r=0;t=37'},
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
    "reset-before": {"kind": "reset-before"},
    "reset-after": {"kind": "reset-after"},
    "slow": {"kind": "slow", "seconds": 0.3},
    "truncate": {"kind": "truncate"},
}
REFUSALS = (401, 402, 403, 404, 409, 412)
# What a refusal becomes where a publish writes. Elsewhere it is some HubError, or what reading makes of it.
WRITES = (
    "repo-create", "preupload", "lfs-batch", "lfs-put", "lfs-verify", "commit", "space-variables", "repo-settings",
    "resolve-head", "tree", "resolve-get", "cdn-get",
)  # fmt: skip
TYPED: dict[int, type[GradmapError]] = {
    401: NotLoggedIn,
    402: PaymentRequired,
    403: NotAllowed,
    404: TargetGone,
    409: HubConflict,
    412: HubConflict,
}
# What the default run does of the matrix; `make test-all` runs all of it.
QUICK_ROUTES, QUICK = ("repo-create", "lfs-put", "commit"), ("429 Retry-After", "503", "reset-after", 403)
# Asked for when the repositories are published and verified: whatever becomes of it, the push stands.
AFTERWARDS = ("collections", "space-runtime")
TABLE = "What one fault does to a publish"


# Of the questions that come before anything is written: that a wait is told there too.
PLANNED = ("whoami", "429 Retry-After")


def _every(ways: Iterable[Any]) -> list[Any]:
    """Every route a publish uses with every way to fail."""
    return [
        pytest.param(
            route,
            way,
            marks=[] if (route in QUICK_ROUTES and way in QUICK) or (route, way) == PLANNED else [pytest.mark.slow],
        )
        for route in ROUTES
        if route in USED and route != "xet-token"  # whose refusals are those of test_xet.py
        for way in ways
    ]


def publish(side: Side, folder: Path, **options: Any) -> Any:
    config = PublishConfig(**{"wait_space": 0, **options})
    return publish_folder(folder, config, hub=side.hub, reporter=side.heard)


def commits(side: Side, repo_id: str, kind: str) -> int:
    return len(side.api.list_repo_commits(repo_id, repo_type=kind))


def stored_twice(requests: list[Request], lost: bool) -> list[str]:
    """Objects of which bytes arrived after the Hub had all of them. `lost`: an answer of 0 means stored, and untold."""
    having: set[str] = set()
    twice: list[str] = []
    for entry in requests:
        if entry.route != "lfs-put":
            continue
        if entry.path in having and entry.received:
            twice.append(entry.path)
        if entry.status == 200 or (lost and entry.status == 0):
            having.add(entry.path)
    return twice


def check_end_state(
    server: LocalHub, side: Side, folder: Path, cache: Path, *, lost: bool, private: bool, space: bool = True
) -> None:
    server.faults.clear()
    both = ((TARGET, "model", folder), (SPACE, "space", folder.with_name("small-space")))
    for repo_id, kind, local in both if space else both[:1]:
        assert remote_bytes(side, repo_id, kind, cache / kind) == local_bytes(local)
        assert commits(side, repo_id, kind) == 2  # the Hub's own first one, and ours
        assert side.api.repo_info(repo_id, repo_type=kind).private == private
    assert stored_twice(server.requests, lost) == []


def run_against(
    server: LocalHub, side: Side, folder: Path, fault: Fault, tmp_path: Path, *, space: bool
) -> GradmapError | None:
    """Publish against the fault; if that is refused, once more without. Returns the refusal."""
    public = fault.route == "repo-settings"
    server.faults.add(fault)
    refused: GradmapError | None = None
    try:
        publish(side, folder, public=public, space=space)
    except GradmapError as error:
        refused = error
    if fault.route in BY_CLIENT and not server.faults.fired:
        pytest.skip(f"this client does not ask {fault.route}")
    assert server.faults.fired == [fault], "the route was never asked"
    if refused is not None:
        publish(side, folder, public=public, space=space)
    lost = fault.route == "lfs-put" and fault.kind == "reset-after"
    check_end_state(server, side, folder, tmp_path, lost=lost, private=not public, space=space)
    return refused


def test_these_are_the_routes_of_a_publish(server: LocalHub, ada: Side, folder: Path) -> None:
    publish(ada, folder, public=True)
    # Clients from 2.x ask once a day who might be typing, and do without an answer.
    asked = {entry.route for entry in server.requests if entry.path != "/api/agent-harnesses"}
    assert asked - set(BY_CLIENT) == set(ALWAYS)
    assert set(USED) <= set(ROUTES)


@pytest.mark.parametrize(("route", "name"), _every(PASSING))
def test_what_passes_is_survived(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path, route: str, name: str, record_property: Any
) -> None:
    fault = Fault(route=route, **PASSING[name])
    refused = run_against(server, ada, folder, fault, tmp_path, space=route == "space-variables")
    assert refused is None, refused.message
    record_property("reliability", (TABLE, route, name, "survived"))
    if name.startswith("429"):
        seconds = 7 if "retry_after" in PASSING[name] else 37
        if route == "resolve-head" and not ada.waits:  # from 1.x on, the client itself asks once more, at once
            heads = [entry for entry in server.requests if entry.route == "resolve-head"]
            [failed] = [entry for entry in heads if entry.status == 429]
            assert [entry.status for entry in heads if entry.path == failed.path][:2] == [429, 200]
            return
        assert ada.waits == [seconds]
        assert ada.heard.notes == [f"The Hub requests a wait of {seconds} s (status 429)"]
    else:
        assert all(wait <= 16 for wait in ada.waits)


@pytest.mark.parametrize(("route", "status"), _every(REFUSALS))
def test_refusals_are_told_and_the_next_run_finishes(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path, route: str, status: int, record_property: Any
) -> None:
    fault = Fault(route=route, kind="status", status=status, message="Because of the test")
    refused = run_against(server, ada, folder, fault, tmp_path, space=route == "space-variables")
    assert refused is not None and ada.waits == []
    record_property("reliability", (TABLE, route, str(status), type(refused).__name__))
    assert ada.hub.token and ada.hub.token not in refused.message + (refused.hint or "") and "\n" not in refused.message
    if route in WRITES:
        assert type(refused) is (HubError if (route, status) == ("repo-create", 404) else TYPED[status])
    if route == "commit":
        assert "Nothing was committed" in f"{refused.message} {refused.hint}"


def matrix(routes: Iterable[str], quick: Callable[[str, str], bool]) -> list[Any]:
    """Routes with every way to fail: route, name and fields of the fault; those that are `quick` by default."""
    ways = {**PASSING, **{str(status): {"kind": "status", "status": status} for status in REFUSALS}}
    return [
        pytest.param(route, name, way, id=f"{route}-{name}", marks=[] if quick(route, name) else [pytest.mark.slow])
        for route in routes
        for name, way in ways.items()
    ]


@pytest.mark.parametrize(("route", "name", "way"), matrix(AFTERWARDS, lambda _, name: name in ("503", "403")))
def test_what_comes_after_never_takes_it_back(
    server: LocalHub,
    ada: Side,
    folder: Path,
    tmp_path: Path,
    route: str,
    name: str,
    way: dict[str, Any],
    record_property: Any,
) -> None:
    """The collection is added to, and the Space looked at, when both are published: a failure is told, no more. All
    requests to the route fail here, not only the first."""
    server.faults.add(Fault(route=route, times=1000, skip=1 if route == "collections" else 0, **way))
    result = publish(ada, folder, collection="Small ones", wait_space=30, public=True)
    assert server.faults.fired
    told = " ".join(ada.heard.notes)
    outcome = "told"
    if name == "slow":
        assert (
            result.collection is not None and result.space_state is not None and result.space_state.stage == "RUNNING"
        )
        outcome = "survived"
    elif route == "collections":
        lost = name in ("reset-after", "truncate") and result.collection is not None
        assert lost or (
            result.collection is None and result.collection_reason and "The collection was not updated: " in told
        )
    else:
        assert result.space_state is not None and result.space_state.stage == ""
        assert "its state could not be read" in told
    check_end_state(server, ada, folder, tmp_path, lost=False, private=False)
    record_property("reliability", (TABLE, route, name, outcome))


@pytest.mark.parametrize("name", ["503", "reset-after"])
@pytest.mark.parametrize("route", ["repo-create", "lfs-put", "commit"])
def test_the_space_too(server: LocalHub, ada: Side, folder: Path, tmp_path: Path, route: str, name: str) -> None:
    model_puts = {"repo-create": 1, "lfs-put": 3, "commit": 1}[route]
    fault = Fault(route=route, skip=model_puts, **PASSING[name])
    assert run_against(server, ada, folder, fault, tmp_path, space=True) is None


def test_a_refused_space_tells_that_the_model_is_published(server: LocalHub, ada: Side, folder: Path) -> None:
    server.faults.add(Fault(route="commit", kind="status", status=403, skip=1))
    with pytest.raises(NotAllowed) as caught:
        publish(ada, folder)
    head = ada.api.model_info(TARGET).sha
    assert f"The model is published and verified: {server.url}/{TARGET} at {head}" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["status", "reset-before", "reset-after", "truncate"])
def test_patience_ends(server: LocalHub, ada: Side, folder: Path, tmp_path: Path, kind: Any) -> None:
    """A Hub that never takes the commit: said after five tries, with what is certain; the next run finishes."""
    server.faults.add(Fault(route="commit", kind=kind, status=503, times=50))
    if kind in ("reset-after", "truncate"):  # it arrived, which the head tells at the second try
        publish(ada, folder)
        assert len(server.faults.fired) == 2  # the model's and the Space's
    else:
        with pytest.raises(PublishInterrupted, match="Nothing was committed"):
            publish(ada, folder)
        assert len(server.faults.fired) == 5 and len(ada.waits) == 4
        assert commits(ada, TARGET, "model") == 1
        server.faults.clear()
        publish(ada, folder)
    check_end_state(server, ada, folder, tmp_path, lost=False, private=True)


def test_not_known_is_said_so(server: LocalHub, ada: Side, folder: Path, tmp_path: Path) -> None:
    """The answer to the commit is lost, and then the Hub is gone: nobody can say whether it arrived."""
    looks = 2  # before and after the repository is created; two more were the preflight's
    server.faults.add(Fault(route="commit", kind="reset-after"))
    server.faults.add(Fault(route="repo-info", kind="reset-before", skip=2 + looks, times=100))
    with pytest.raises(PublishInterrupted, match="It is unknown whether the commit arrived"):
        publish(ada, folder)
    server.faults.clear()
    publish(ada, folder)
    check_end_state(server, ada, folder, tmp_path, lost=False, private=True)


def test_a_hub_that_asks_for_too_much(server: LocalHub, ada: Side, folder: Path) -> None:
    """An hour: waited for 120 s at a time, and not for ever."""
    server.faults.add(Fault(route="preupload", kind="status", status=429, retry_after="3600", times=50))
    with pytest.raises(RateLimited, match="3600 s"):
        publish(ada, folder)
    assert ada.waits == [120, 120]
    assert ada.heard.notes[0] == "The Hub requests a wait of 3600 s (status 429); retrying after 120 s"


class Racing:
    """Commits something of somebody else's just before ours arrives."""

    def __init__(self, side: Side, operation: Callable[[], Any]) -> None:
        self.side, self.operation, self.done = side, operation, False
        self.plain = side.hub.api.create_commit

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.done:
            self.done = True
            self.operation()
        return self.plain(*arguments, **options)


def test_somebody_else_commits_something_else(
    server: LocalHub, ada: Side, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs() -> None:
        ada.api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=TARGET)

    monkeypatch.setattr(ada.hub.api, "create_commit", Racing(ada, theirs))
    with pytest.raises(TargetChanged, match="Somebody else committed"):
        publish(ada, folder, space=False)
    assert ada.api.list_repo_commits(TARGET)[0].title == "Upload theirs.txt with huggingface_hub"
    assert "theirs.txt" in ada.api.list_repo_files(TARGET) and "config.json" not in ada.api.list_repo_files(TARGET)


def test_somebody_else_commits_the_same(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of the same push at once: both end well, with one commit."""

    def theirs() -> None:
        with xet.switched(False):
            ada.api.upload_folder(repo_id=TARGET, folder_path=folder)

    monkeypatch.setattr(ada.hub.api, "create_commit", Racing(ada, theirs))
    published = publish(ada, folder, space=False).model
    assert published.commit == ada.api.model_info(TARGET).sha
    assert remote_bytes(ada, TARGET, "model", tmp_path / "copy") == local_bytes(folder)
    assert commits(ada, TARGET, "model") == 2


def test_an_upload_that_was_stopped_goes_on(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path, sent: Any
) -> None:
    """Ctrl-C in the middle: what the Hub has by then is not sent again."""
    plain = ada.hub.api.preupload_lfs_files

    def stopped(repo_id: str, additions: list[Any], **options: Any) -> None:
        if additions[0].path_in_repo == "model.safetensors":
            raise KeyboardInterrupt
        plain(repo_id, additions, **options)

    ada.hub.api.preupload_lfs_files = stopped  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        publish(ada, folder)
    before = {entry.path for entry in sent(server.requests)}
    assert len(before) == 2
    ada.hub.api.preupload_lfs_files = plain  # type: ignore[method-assign]
    publish(ada, folder)
    assert "already on the Hub" in [line for line in ada.heard.lines if " onnx/model.onnx" in line][-1]
    check_end_state(server, ada, folder, tmp_path, lost=False, private=True)
