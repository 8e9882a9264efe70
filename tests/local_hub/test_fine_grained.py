"""Fine-grained tokens: what whoami tells of them, and what they open."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from gradmap_hub.local_hub import LocalHub


def scope(entity_type: str, name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"type": entity_type, "name": name}, "permissions": list(permissions)}


@pytest.fixture
def limited(hub: LocalHub) -> Callable[..., HfApi]:
    """A client of ada with a token of these scopes."""
    return lambda *scopes: HfApi(endpoint=hub.url, token=hub.add_user("ada", "fineGrained", scopes=scopes))


def refused(action: Callable[[], object]) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        action()
    assert error.value.response is not None and error.value.response.status_code == 403


def upload(api: HfApi, repo_id: str, **more: Any) -> str:
    return api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=repo_id, **more).oid


def test_whoami(hub: LocalHub, limited: Callable[..., HfApi]) -> None:
    scopes = [scope("user", "ada", "repo.content.read", "repo.write"), scope("model", "acme/tiny", "repo.write")]
    token = limited(*scopes).whoami()["auth"]["accessToken"]
    assert token["role"] == "fineGrained"
    assert token["fineGrained"]["scoped"] == scopes and token["fineGrained"]["global"] == []
    assert hub.add_user("ada", "fineGrained", scopes=scopes) == hub.add_user("ada", "fineGrained", scopes=scopes)
    assert hub.add_user("ada", "fineGrained") != hub.add_user("ada", "fineGrained", scopes=scopes)
    assert "fineGrained" not in HfApi(endpoint=hub.url, token=hub.add_user("ada")).whoami()["auth"]["accessToken"]


def test_namespace(ada: HfApi, bob: HfApi, limited: Callable[..., HfApi]) -> None:
    api = limited(scope("user", "ada", "repo.write"))
    api.create_repo("ada/tiny", private=True)
    assert upload(api, "ada/tiny") and api.repo_exists("ada/tiny")
    refused(lambda: api.create_repo("acme/tiny"))
    ada.create_repo("acme/tiny")
    refused(lambda: upload(api, "acme/tiny"))
    org = limited(scope("org", "acme", "repo.write"))
    assert upload(org, "acme/tiny") and not org.repo_exists("ada/tiny")
    # A scope does not make a member.
    bob.create_repo("bob/tiny")
    stranger = limited(scope("user", "bob", "repo.write"))
    refused(lambda: upload(stranger, "bob/tiny"))


def test_one_repository(ada: HfApi, limited: Callable[..., HfApi], tmp_path: Path) -> None:
    for name in ("ada/one", "ada/two"):
        ada.create_repo(name, private=True)
        upload(ada, name)
    api = limited(scope("model", "ada/one", "repo.content.read", "repo.write"))
    assert upload(api, "ada/one") and not api.repo_exists("ada/two")
    refused(lambda: api.create_repo("ada/three"))
    assert [model.id for model in api.list_models(author="ada")] == ["ada/one"]
    reader = limited(scope("model", "ada/one", "repo.content.read"))
    assert Path(hf_hub_download("ada/one", "a.txt", cache_dir=tmp_path / "c", token=reader.token)).is_file()
    refused(lambda: upload(reader, "ada/one"))
    refused(lambda: reader.update_repo_settings("ada/one", private=False))
    nothing = limited()
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("ada/one", "a.txt", cache_dir=tmp_path / "d", token=nothing.token)


def test_pull_requests_and_collections(ada: HfApi, bob: HfApi, limited: Callable[..., HfApi]) -> None:
    bob.create_repo("bob/tiny")
    api = limited(scope("model", "bob/tiny", "discussion.write"), scope("user", "ada", "collection.write"))
    assert upload(api, "bob/tiny", create_pr=True)
    refused(lambda: upload(api, "bob/tiny"))
    refused(lambda: upload(limited(), "bob/tiny", create_pr=True))
    assert api.create_collection("Mine").slug.startswith("ada/mine-")
    refused(lambda: limited(scope("user", "ada", "repo.write")).create_collection("Other"))


def test_scopes_that_make_no_sense(hub: LocalHub) -> None:
    with pytest.raises(ValueError, match="Only fine-grained"):
        hub.add_user("ada", scopes=[scope("user", "ada", "repo.write")])
    for wrong in ({}, scope("planet", "ada"), {"entity": {"type": "user", "name": "ada"}, "permissions": "repo.write"}):
        with pytest.raises(ValueError, match="A scope needs"):
            hub.add_user("ada", "fineGrained", scopes=[wrong])
    with pytest.raises(ValueError, match="role must be one of"):
        hub.add_user("ada", "admin")  # pyright: ignore[reportArgumentType]
