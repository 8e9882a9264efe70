"""Failures on demand, and what the real client makes of them."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from gradmap_hub.local_hub import ANY, ROUTES, Fault, LocalHub, Request
from gradmap_hub.local_hub.app import build_app

from .conftest import HTTP_FAILURE

On = Callable[[LocalHub, str], list[Request]]


@pytest.fixture
def tiny(ada: HfApi) -> str:
    return ada.create_repo("ada/tiny").repo_id


def upload(api: HfApi, path: str = "a.bin", size: int = 5000) -> str:
    return api.upload_file(path_or_fileobj=os.urandom(size), path_in_repo=path, repo_id="ada/tiny").oid


def test_every_name_has_a_route(hub: LocalHub) -> None:
    app = build_app(hub._hub, hub._log, None)  # pyright: ignore[reportPrivateUsage]
    names = {getattr(route, "name", "") for route in app.routes} - {"_no_such_repo"}
    assert names == set(ROUTES) and len(ROUTES) == len(set(ROUTES))


def test_faults_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="Unknown route 'comit'"):
        Fault("comit", "status")
    with pytest.raises(ValueError, match="Unknown kind of fault"):
        Fault("commit", "explode")  # pyright: ignore[reportArgumentType]
    for numbers in ({"status": 200}, {"times": 0}, {"skip": -1}, {"seconds": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            Fault("commit", "status", **numbers)  # pyright: ignore[reportArgumentType]


def test_the_log_tells_route_bytes_and_host(hub: LocalHub, ada: HfApi, tiny: str, on: On) -> None:
    upload(ada, size=5000)
    hf_hub_download("ada/tiny", ".gitattributes", token=ada.token, cache_dir=hub.root / "cache")
    requests.get(f"{hub.url}/api/nothing/of/the/kind")
    names = [request.route for request in hub.requests]
    assert names[0] == "repo-create" and names[-1] == "none"
    assert names[-3:-1] == ["resolve-head", "resolve-get"]
    [put], [commit] = on(hub, "lfs-put"), on(hub, "commit")
    assert put.received == 5000 and put.user is None and put.query == ""
    assert commit.received > 100 and commit.user == "ada"
    assert {f"http://{request.host}" for request in hub.requests[:-3]} == {hub.url}


def test_rate_limit(hub: LocalHub, ada: HfApi, tiny: str, on: On) -> None:
    limit = Fault("commit", "status", 429, retry_after="2", rate_limit='"api";r=0;t=1', message="Slow down")
    hub.faults.add(limit)
    before = ada.repo_info("ada/tiny").sha
    with pytest.raises(HfHubHTTPError, match="Slow down") as refused:
        upload(ada)
    reply = refused.value.response
    assert reply is not None and reply.status_code == 429
    assert reply.headers["Retry-After"] == "2" and reply.headers["RateLimit"] == '"api";r=0;t=1'
    assert ada.repo_info("ada/tiny").sha == before
    # The body was read to its end, so that the client got the answer.
    assert on(hub, "commit")[0].status == 429 and on(hub, "commit")[0].received > 0
    assert upload(ada) and hub.faults.fired == [limit]


@pytest.mark.usefixtures("impatient")
def test_skip_times_and_order(hub: LocalHub, ada: HfApi, tiny: str, on: On) -> None:
    third, next_one = Fault("lfs-put", "status", 503, skip=2, times=2), Fault("lfs-put", "status", 500)
    hub.faults.add(third)
    hub.faults.add(next_one)
    for number in range(3):
        upload(ada, f"{number}.bin")
    # The fault that came second hit a request that the first one let through.
    assert [request.status for request in on(hub, "lfs-put")] == [500, 200, 503, 503, 200, 200]
    assert hub.faults.fired == [next_one, third, third]
    hub.faults.add(Fault("commit", "status"))
    hub.faults.clear()
    assert hub.faults.fired == [] and upload(ada, "last.bin")


@pytest.mark.parametrize("kind", ["reset-before", "reset-after"])
def test_lost_answer_of_a_commit(hub: LocalHub, ada: HfApi, tiny: str, kind: str, on: On) -> None:
    before = ada.repo_info("ada/tiny").sha
    hub.faults.add(Fault("commit", kind))  # pyright: ignore[reportArgumentType]
    with pytest.raises(HTTP_FAILURE):
        upload(ada)
    landed = ada.repo_info("ada/tiny").sha != before
    assert landed == (kind == "reset-after") == ada.file_exists("ada/tiny", "a.bin")
    assert [request.status for request in on(hub, "commit")] == [0]
    assert upload(ada, "b.bin")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["reset-before", "reset-after"])
def test_upload_of_a_large_file_survives_a_cut(hub: LocalHub, ada: HfApi, tiny: str, kind: str, on: On) -> None:
    hub.faults.add(Fault("lfs-put", kind))  # pyright: ignore[reportArgumentType]
    upload(ada, size=3_000_000)
    first, second = on(hub, "lfs-put")
    assert (first.status, second.status) == (0, 200) and second.received == 3_000_000
    assert not list((hub.root / "tmp").iterdir())


def test_created_but_not_told(hub: LocalHub, ada: HfApi) -> None:
    hub.faults.add(Fault("repo-create", "reset-after"))
    with pytest.raises(HTTP_FAILURE):
        ada.create_repo("ada/tiny")
    assert ada.create_repo("ada/tiny", exist_ok=True).repo_id == "ada/tiny"


def test_slow_answers(hub: LocalHub, ada: HfApi, tiny: str, tmp_path: Path) -> None:
    content = os.urandom(100_000)
    ada.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id="ada/tiny")
    actions: list[tuple[str, Callable[[], object]]] = [
        ("whoami", ada.whoami),
        ("resolve-head", lambda: requests.head(f"{hub.url}/ada/tiny/resolve/main/README.md")),
    ]
    for route, action in actions:
        hub.faults.add(Fault(route, "slow", seconds=0.6))
        began = time.monotonic()
        action()
        assert time.monotonic() - began >= 0.6, route
    hub.faults.add(Fault("page", "slow", seconds=2))
    # requests calls a timeout in the body a connection error.
    with pytest.raises((requests.ReadTimeout, requests.ConnectionError)):
        requests.get(hub.url, timeout=(10, 0.05))


@pytest.mark.usefixtures("impatient")
def test_truncated_download(hub: LocalHub, ada: HfApi, tiny: str, tmp_path: Path, on: On) -> None:
    content = b"text\n" * 10_000
    ada.upload_file(path_or_fileobj=content, path_in_repo="a.txt", repo_id="ada/tiny")
    hub.faults.add(Fault("resolve-get", "truncate"))
    with suppress(HTTP_FAILURE):  # from 1.x on, the client itself tries again
        hf_hub_download("ada/tiny", "a.txt", cache_dir=tmp_path / "c", token=ada.token)
    assert all(path.read_bytes() == content for path in (tmp_path / "c").rglob("snapshots/*/*"))
    file = hf_hub_download("ada/tiny", "a.txt", cache_dir=tmp_path / "c", token=ada.token)
    assert Path(file).read_bytes() == content
    # The client holds back what is less than its 10 MB, so it starts anew.
    assert [request.status for request in on(hub, "resolve-get")] == [200, 200]
    hub.faults.add(Fault("resolve-get", "truncate"))
    with requests.get(f"{hub.url}/ada/tiny/resolve/main/a.txt", stream=True) as reply:
        assert reply.headers["Content-Length"] == "50000" and reply.raw.read(25_000) == content[:25_000]
        with pytest.raises(urllib3.exceptions.ProtocolError):
            reply.raw.read(1)


def test_refused_metadata_is_an_offline_error(hub: LocalHub, ada: HfApi, tiny: str, tmp_path: Path) -> None:
    hub.faults.add(Fault("resolve-head", "status", 403))
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("ada/tiny", ".gitattributes", cache_dir=tmp_path / "c", token=ada.token)


def test_faults_and_a_stopped_hub(hub: LocalHub, ada: HfApi, tiny: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What was cut leaves nothing behind: no message on stderr, no request that keeps the hub from stopping."""
    hub.faults.add(Fault("commit", "reset-after"))
    hub.faults.add(Fault("page", "truncate"))
    with pytest.raises(HTTP_FAILURE):
        ada.create_commit("ada/tiny", [CommitOperationAdd("a", b"1")], commit_message="One")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(hub.url)
    began = time.monotonic()
    hub.stop()
    assert time.monotonic() - began < 5
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("kind", "landed"), [("reset-before", False), ("reset-after", True)])
def test_something_happens_at_a_request(hub: LocalHub, ada: HfApi, tiny: str, kind: Any, landed: bool) -> None:
    """Counted over all routes, before the effect of one or after it."""
    seen: list[int] = []

    def look() -> None:
        seen.append(len(list((hub.root / "repos").rglob("second"))))

    hub.faults.add(Fault(ANY, kind, skip=1, then=look))
    ada.model_info(tiny)
    with pytest.raises(HTTP_FAILURE):
        ada.create_repo("ada/second")
    assert seen == [int(landed)]
    assert ada.repo_exists("ada/second") == landed
