"""Who may see, read and change what."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from gradmap_hub.local_hub import LocalHub

from .conftest import HTTP_FAILURE


def status_of(error: requests.HTTPError) -> int:
    assert error.response is not None
    return error.response.status_code


def test_whoami(hub: LocalHub, ada: HfApi) -> None:
    me = ada.whoami()
    assert me["name"] == "ada" and me["type"] == "user"
    assert [org["name"] for org in me["orgs"]] == ["acme"]
    assert me["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HTTP_FAILURE, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()
    with pytest.raises(HTTP_FAILURE):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info("ada/tiny")


def test_tokens_are_stable_and_private(hub: LocalHub) -> None:
    token = hub.add_user("ada")
    assert hub.add_user("ada") == token != hub.add_user("ada", role="read")
    for name in ("accounts.json", "upload.key"):
        assert stat.S_IMODE((hub.root / name).stat().st_mode) == 0o600
    with pytest.raises(ValueError):
        hub.add_user("../x")
    with pytest.raises(ValueError):
        hub.add_user("eve", orgs=["ada"])


def test_unknown_repository(ada: HfApi, anonymous: HfApi, tmp_path: Path) -> None:
    for api in (ada, anonymous):
        assert not api.repo_exists("ada/nothing")
        assert not api.repo_exists("gpt2")
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("ada/nothing", cache_dir=tmp_path, token=api.token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("gpt2", "config.json", cache_dir=tmp_path, token=api.token)
    with pytest.raises(RepositoryNotFoundError):
        ada.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="ada/nothing")
    with pytest.raises(RepositoryNotFoundError):
        ada.delete_repo("ada/nothing")
    ada.delete_repo("ada/nothing", missing_ok=True)


def test_create_repo(hub: LocalHub, ada: HfApi) -> None:
    url = ada.create_repo("ada/tiny")
    assert str(url) == f"{hub.url}/ada/tiny" and url.repo_id == "ada/tiny"
    assert ada.create_repo("ada/tiny", exist_ok=True).repo_id == "ada/tiny"
    with pytest.raises(HfHubHTTPError) as exists:
        ada.create_repo("ada/tiny")
    assert status_of(exists.value) == 409
    assert ada.create_repo("plain").repo_id == "ada/plain"
    assert ada.create_repo("acme/shared", repo_type="dataset").repo_type == "dataset"
    with pytest.raises(HfHubHTTPError) as foreign:
        ada.create_repo("bob/tiny")
    assert status_of(foreign.value) == 403
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.url, token=False).create_repo("ada/other")
    ada.delete_repo("ada/tiny")
    assert not ada.repo_exists("ada/tiny")
    assert ada.list_repo_files(ada.create_repo("ada/tiny").repo_id) == [".gitattributes"]


def test_private(hub: LocalHub, ada: HfApi, bob: HfApi, anonymous: HfApi, tmp_path: Path) -> None:
    ada.create_repo("acme/secret", private=True)
    ada.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/secret")
    assert ada.model_info("acme/secret").private
    for api in (bob, anonymous):
        assert not api.repo_exists("acme/secret")
        assert not list(api.list_models(author="acme"))
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("acme/secret", "a.txt", cache_dir=tmp_path / "c", token=api.token)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="b", repo_id="acme/secret", create_pr=True)
    assert [model.id for model in ada.list_models(author="acme")] == ["acme/secret"]
    colleague = HfApi(endpoint=hub.url, token=hub.add_user("eve", role="read", orgs=["acme"]))
    assert colleague.repo_exists("acme/secret")
    ada.update_repo_settings("acme/secret", private=False)
    assert anonymous.repo_exists("acme/secret")
    hub.set_private("acme/secret", True)
    assert not anonymous.repo_exists("acme/secret")


def test_read_token_cannot_write(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    reader = HfApi(endpoint=hub.url, token=hub.add_user("ada", role="read"))
    assert reader.repo_exists("ada/tiny")
    attempts: list[Callable[[], object]] = [
        lambda: reader.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="ada/tiny"),
        lambda: reader.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id="ada/tiny", create_pr=True),
        lambda: reader.create_repo("ada/other"),
        lambda: reader.delete_repo("ada/tiny"),
        lambda: reader.create_tag("ada/tiny", tag="v1"),
        lambda: reader.update_repo_settings("ada/tiny", private=True),
    ]
    for attempt in attempts:
        with pytest.raises(HfHubHTTPError, match="not the required permissions") as refused:
            attempt()
        assert status_of(refused.value) == 403


def test_others_cannot_write(ada: HfApi, bob: HfApi, anonymous: HfApi) -> None:
    ada.create_repo("ada/tiny")
    with pytest.raises(HfHubHTTPError) as refused:
        bob.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="ada/tiny")
    assert status_of(refused.value) == 403
    with pytest.raises(HfHubHTTPError) as refused:
        anonymous.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="ada/tiny")
    assert status_of(refused.value) == 401


def test_gated(hub: LocalHub, ada: HfApi, bob: HfApi, anonymous: HfApi, folder: Path, tmp_path: Path) -> None:
    hub.seed("acme/gated", folder)
    hub.set_gated("acme/gated", "manual")
    for api, status in ((anonymous, 401), (bob, 403)):
        assert api.model_info("acme/gated").gated == "manual"
        assert "config.json" in api.list_repo_files("acme/gated")
        for public in ("README.md", "LICENSE"):
            hf_hub_download("acme/gated", public, cache_dir=tmp_path / "c", token=api.token)
        with pytest.raises(GatedRepoError) as refused:
            hf_hub_download("acme/gated", "config.json", cache_dir=tmp_path / "c", token=api.token)
        assert status_of(refused.value) == status
        with pytest.raises(GatedRepoError):
            api.auth_check("acme/gated")
    hf_hub_download("acme/gated", "config.json", cache_dir=tmp_path / "a", token=ada.token)
    hub.grant_access("acme/gated", "bob")
    bob.auth_check("acme/gated")
    hf_hub_download("acme/gated", "config.json", cache_dir=tmp_path / "b", token=bob.token)
    ada.update_repo_settings("acme/gated", gated=False)
    anonymous.auth_check("acme/gated")


def test_upload_address_is_signed(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    oid = "0" * 64
    batch = requests.post(
        f"{hub.url}/ada/tiny.git/info/lfs/objects/batch",
        headers={"authorization": f"Bearer {ada.token}"},
        json={"operation": "upload", "objects": [{"oid": oid, "size": 3}]},
    )
    href = batch.json()["objects"][0]["actions"]["upload"]["href"]
    assert requests.put(href.replace("size=3", "size=4"), data=b"1234").status_code == 403
    assert requests.put(href.replace(oid, "1" * 64), data=b"123").status_code == 403
    assert requests.put(href, data=b"123").status_code == 400
    assert requests.put(href, data=b"1" * 100_000).status_code == 400
    assert not any("signature" in request.query for request in hub.requests)


def test_pages(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    ada.upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\n# <script>alert(1)</script>",
        path_in_repo="README.md",
        repo_id="ada/tiny",
    )
    ada.upload_file(path_or_fileobj=b"x", path_in_repo="<b>'.txt", repo_id="ada/tiny")
    ada.create_repo("ada/app", repo_type="space", space_sdk="gradio")
    home = requests.get(hub.url)
    assert "/ada/tiny" in home.text and "/spaces/ada/app" in home.text
    page = requests.get(f"{hub.url}/ada/tiny")
    assert page.status_code == 200 and "&lt;script&gt;" in page.text
    assert "<script" not in page.text and "<b>" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert requests.get(f"{hub.url}/spaces/ada/app").status_code == 200
    file = requests.get(f"{hub.url}/ada/tiny/blob/main/README.md")
    assert "# <script>" in file.text and file.headers["Content-Type"].startswith("text/plain")


def test_only_loopback(hub: LocalHub, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.1", "example.org"):
        with pytest.raises(ValueError, match="allow_remote"):
            LocalHub(tmp_path / "other", host=host)
    with LocalHub(tmp_path / "second", host="127.0.0.2") as second:
        assert requests.get(second.url).status_code == 200
    # A page elsewhere that resolves its own name to this machine.
    assert requests.get(hub.url, headers={"Host": "evil.example"}).status_code == 400


def test_a_pull_request_opens_nothing_that_is_gated(
    hub: LocalHub, ada: HfApi, bob: HfApi, anonymous: HfApi, tmp_path: Path
) -> None:
    """LFS content is named by its hash, which everybody sees; README.md is served to everybody."""
    weights = bytes(range(256)) * 10
    ada.create_repo("acme/gated")
    ada.upload_file(path_or_fileobj=weights, path_in_repo="model.safetensors", repo_id="acme/gated")
    hub.set_gated("acme/gated", "manual")
    [row] = [row for row in ada.list_repo_tree("acme/gated") if row.path == "model.safetensors"]
    url = f"{hub.url}/api/models/acme/gated/commit/main?create_pr=1"
    lines = [
        {"key": "header", "value": {"summary": "A card"}},
        {"key": "lfsFile", "value": {"path": "README.md", "algo": "sha256", "oid": row.lfs.sha256}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    refused = requests.post(url, data=body, headers={"Authorization": f"Bearer {bob.token}"})
    assert refused.status_code == 403 and refused.headers["X-Error-Code"] == "GatedRepo"
    # Whoever has access may do so, and the file stays gated: on its own, on the pages and in the card.
    assert requests.post(url, data=body, headers={"Authorization": f"Bearer {ada.token}"}).status_code == 200
    for path in ("resolve/refs%2Fpr%2F1/README.md", "blob/refs%2Fpr%2F1/README.md", "discussions/1"):
        answer = requests.get(f"{hub.url}/acme/gated/{path}")
        assert answer.status_code == (200 if path == "discussions/1" else 401), path
        assert weights[:64] not in answer.content and "\x01\x02" not in answer.text
    assert bob.upload_file(
        path_or_fileobj=b"# New", path_in_repo="README.md", repo_id="acme/gated", create_pr=True
    ).pr_url  # text is still welcome
