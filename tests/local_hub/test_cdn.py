"""LFS files come from a second port, by signed addresses, and no token goes there."""

import json
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import requests
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url

from gradmap_hub.local_hub import Fault, LocalHub, Request

from .conftest import HTTP_FAILURE

On = Callable[[LocalHub, str], list[Request]]
CONTENT = os.urandom(300_000)


@pytest.fixture
def made(ada: HfApi) -> str:
    """The commit of a private repository with one LFS file."""
    ada.create_repo("ada/tiny", private=True)
    return ada.upload_file(path_or_fileobj=CONTENT, path_in_repo="a b.bin", repo_id="ada/tiny").oid


@pytest.fixture
def location(ada: HfApi, made: str) -> str:
    return get_hf_file_metadata(hf_hub_url("ada/tiny", "a b.bin"), token=ada.token).location


def test_the_client_downloads_from_the_second_port(
    hub: LocalHub, ada: HfApi, made: str, tmp_path: Path, on: On
) -> None:
    hub.requests.clear()
    file = hf_hub_download("ada/tiny", "a b.bin", cache_dir=tmp_path / "c", token=ada.token)
    assert Path(file).read_bytes() == CONTENT and file.split("/")[-2] == made
    [head], [got] = on(hub, "resolve-head"), on(hub, "cdn-get")
    assert hub.requests == [head, got]
    assert (head.status, head.user, f"http://{head.host}") == (302, "ada", hub.url)
    assert (got.status, got.user, f"http://{got.host}") == (200, None, hub.cdn_url)
    assert got.query == "" and hub.cdn_url != hub.url


def test_redirect(hub: LocalHub, ada: HfApi, made: str) -> None:
    token = {"authorization": f"Bearer {ada.token}"}
    reply = requests.get(hf_hub_url("ada/tiny", "a b.bin"), headers=token)
    assert reply.content == CONTENT
    [redirect] = reply.history
    assert redirect.status_code == 302 and redirect.headers["X-Repo-Commit"] == made
    assert redirect.headers["X-Linked-Size"] == "300000" and len(redirect.headers["X-Linked-Etag"]) == 66
    assert "ETag" not in redirect.headers
    assert reply.headers["Content-Disposition"].endswith("''a%20b.bin")
    # Regular files stay where they are.
    reply = requests.get(hf_hub_url("ada/tiny", ".gitattributes"), headers=token)
    assert reply.status_code == 200 and not reply.history


def test_no_token_at_the_second_port(hub: LocalHub, ada: HfApi, location: str, on: On) -> None:
    for header in (f"Bearer {ada.token}", "Bearer hf_wrong", "Basic YTpi"):
        reply = requests.get(location, headers={"authorization": header})
        assert reply.status_code == 400 and "Only one auth mechanism" in reply.json()["error"]
    assert requests.get(location).content == CONTENT
    assert [request.status for request in on(hub, "cdn-get")] == [400, 400, 400, 200]


def test_no_token_with_an_upload(hub: LocalHub, ada: HfApi, made: str) -> None:
    token = {"authorization": f"Bearer {ada.token}"}
    batch = requests.post(
        f"{hub.url}/ada/tiny.git/info/lfs/objects/batch",
        headers=token,
        json={"operation": "upload", "objects": [{"oid": "0" * 64, "size": 3}]},
    )
    href = batch.json()["objects"][0]["actions"]["upload"]["href"]
    assert requests.put(href, data=b"123", headers=token).json()["error"].startswith("Only one auth mechanism")


def test_ranges_at_the_second_port(location: str) -> None:
    reply = requests.get(location, headers={"Range": "bytes=299990-"})
    assert reply.status_code == 206 and reply.content == CONTENT[-10:]
    assert reply.headers["Content-Range"] == "bytes 299990-299999/300000"
    assert requests.get(location, headers={"Range": "bytes=300000-"}).status_code == 416
    assert requests.head(location).headers["Content-Length"] == "300000"


def test_only_signed_addresses(hub: LocalHub, ada: HfApi, location: str) -> None:
    parts = urlsplit(location)
    assert requests.get(location.replace("a+b.bin", "c.exe")).status_code == 403
    assert requests.get(f"{hub.cdn_url}{parts.path}").status_code == 403
    assert requests.get(location.replace("expires=1", "expires=2")).status_code == 403
    ada.create_repo("ada/other")
    assert requests.get(location.replace("/ada/tiny/", "/ada/other/")).status_code == 403
    ada.delete_repo("ada/tiny")
    assert requests.get(location).status_code == 404


def test_addresses_expire(start_hub: Callable[..., LocalHub]) -> None:
    hub = start_hub(cdn_seconds=-1)
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
    api.create_repo("ada/tiny")
    api.upload_file(path_or_fileobj=CONTENT, path_in_repo="a.bin", repo_id="ada/tiny")
    assert requests.get(f"{hub.url}/ada/tiny/resolve/main/a.bin").status_code == 403


def test_each_port_has_its_own_addresses(hub: LocalHub, ada: HfApi, location: str) -> None:
    parts = urlsplit(location)
    assert requests.get(f"{hub.url}{parts.path}?{parts.query}").status_code == 404
    for path in ("/", "/api/whoami-v2", "/ada/tiny/resolve/main/.gitattributes", "/cdn%2Fx/y"):
        reply = requests.get(f"{hub.cdn_url}{path}", headers={"authorization": f"Bearer {ada.token}"})
        assert reply.status_code == 404, path
    assert requests.get(location, headers={"Host": "evil.example"}).status_code == 400
    # Pages for browsers are whole on the first port.
    token = {"authorization": f"Bearer {ada.token}"}
    page = requests.get(f"{hub.url}/ada/tiny/blob/main/a%20b.bin", headers=token, allow_redirects=False)
    assert page.status_code == 200 and page.content == CONTENT


def test_without_a_second_port(start_hub: Callable[..., LocalHub], on: On, tmp_path: Path) -> None:
    hub = start_hub(cdn_port=None)
    assert hub.cdn_url is None
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
    api.create_repo("ada/tiny")
    api.upload_file(path_or_fileobj=CONTENT, path_in_repo="a.bin", repo_id="ada/tiny")
    file = hf_hub_download("ada/tiny", "a.bin", cache_dir=tmp_path / "c", token=api.token)
    assert Path(file).read_bytes() == CONTENT
    assert [request.status for request in on(hub, "resolve-get")] == [200] and not on(hub, "cdn-get")
    assert requests.get(f"{hub.url}/cdn/models/ada/tiny/{'0' * 64}").status_code == 404


def test_a_port_that_is_taken(hub: LocalHub, tmp_path: Path) -> None:
    port = urlsplit(hub.url).port
    other = LocalHub(tmp_path / "other", cdn_port=port)
    with pytest.raises(OSError):
        other.start()
    other.cdn_port = 0
    with other:
        assert requests.get(other.url).status_code == 200


def test_other_loopback_addresses(start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("This machine has no IPv6")
    # Clients 1.x take their token to another port of the same host, and ::1 has no other name.
    second_port = None if huggingface_hub.__version__.startswith("1.") else 0
    hub = start_hub(host="::1", cdn_port=second_port)
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
    api.create_repo("ada/tiny")
    api.upload_file(path_or_fileobj=CONTENT, path_in_repo="a.bin", repo_id="ada/tiny")
    file = hf_hub_download("ada/tiny", "a.bin", cache_dir=tmp_path / "c", token=api.token)
    assert Path(file).read_bytes() == CONTENT
    assert hub.cdn_url is None if second_port is None else str(hub.cdn_url).startswith("http://[::1]:")


def test_the_address_by_which_the_hub_was_reached(hub: LocalHub, ada: HfApi, made: str) -> None:
    url = hub.url.replace("127.0.0.1", "localhost")
    reply = requests.head(f"{url}/ada/tiny/resolve/main/a b.bin", headers={"authorization": f"Bearer {ada.token}"})
    assert reply.headers["Location"].startswith(str(hub.cdn_url).replace("localhost", "127.0.0.1") + "/cdn/")


@pytest.mark.usefixtures("impatient")
def test_download_goes_on_after_a_cut(
    hub: LocalHub, ada: HfApi, made: str, tmp_path: Path, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It writes what it has in pieces of this size.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.faults.add(Fault("cdn-get", "truncate"))
    with suppress(HTTP_FAILURE):  # from 1.x on, the client itself goes on
        hf_hub_download("ada/tiny", "a b.bin", cache_dir=tmp_path / "c", token=ada.token)
    file = hf_hub_download("ada/tiny", "a b.bin", cache_dir=tmp_path / "c", token=ada.token)
    assert Path(file).read_bytes() == CONTENT
    assert [request.status for request in on(hub, "cdn-get")] == [200, 206]


def test_ranges_through_the_redirect(hub: LocalHub, ada: HfApi, on: On) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}).encode()
    ada.create_repo("ada/private", private=True)
    ada.upload_file(
        path_or_fileobj=struct.pack("<Q", len(header)) + header + bytes(128),
        path_in_repo="model.safetensors",
        repo_id="ada/private",
    )
    found = ada.get_safetensors_metadata("ada/private")
    assert found.parameter_count == {"F32": 32}
    assert {request.status for request in on(hub, "cdn-get")} == {206}
