"""Uploads by xet, sent by the real hf_xet."""

import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.local_hub import LocalHub, Request
from gradmap_hub.local_hub.xet import BadXet, read_pieces, read_shard

On = Callable[[LocalHub, str], list[Request]]


@pytest.fixture(autouse=True)
def by_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not here: the client is to use xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> Iterator[LocalHub]:
    yield start_hub(xet=True)


def contents() -> dict[str, bytes]:
    """What is packed in each of the ways that xet knows: not at all, LZ4, LZ4 of sorted bytes."""
    draw = random.Random(0)
    return {
        "random.bin": draw.randbytes(300_001),
        "words.bin": b"hello world, " * 30_000 + draw.randbytes(7),
        "floats.bin": b"".join(struct.pack("<f", 1 + draw.random() / 8) for _ in range(120_000)),
    }


def upload(api: HfApi, repo_id: str, folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    additions = [CommitOperationAdd(name, folder / name) for name in files]
    api.create_commit(repo_id, additions, commit_message="Add")


def test_files_come_back_together(hub: LocalHub, ada: HfApi, tmp_path: Path, on: On) -> None:
    ada.create_repo("ada/tiny")
    upload(ada, "ada/tiny", tmp_path / "here", contents())
    assert on(hub, "xet-xorb") and on(hub, "xet-shard") and not on(hub, "lfs-put")
    for name, content in contents().items():
        copy = hf_hub_download("ada/tiny", name, token=ada.token, cache_dir=tmp_path / "cache")
        assert Path(copy).read_bytes() == content
    schemes = {scheme for stored in xorbs(hub) for scheme in schemes_of(stored)}
    assert schemes == {0, 1, 2}


def xorbs(hub: LocalHub) -> list[Path]:
    return [path for path in (hub.root / "xorbs").rglob("*") if path.is_file()]


def schemes_of(xorb: Path) -> Iterator[int]:
    body, start = xorb.read_bytes(), 0
    while start < len(body):
        yield body[start + 4]
        start += 8 + int.from_bytes(body[start + 1 : start + 4], "little")


def test_what_was_sent_is_not_sent_again(hub: LocalHub, ada: HfApi, tmp_path: Path, on: On) -> None:
    """Under another name, in another repository, and with a little changed: pieces are sent once."""
    ada.create_repo("ada/tiny")
    ada.create_repo("ada/other")
    content = random.Random(1).randbytes(1_000_000)
    upload(ada, "ada/tiny", tmp_path / "here", {"a.bin": content})
    sent = sum(request.received for request in on(hub, "xet-xorb"))
    assert sent >= len(content)
    hub.requests.clear()
    upload(ada, "ada/other", tmp_path / "here", {"b.bin": content})
    assert not on(hub, "xet-xorb")
    upload(ada, "ada/tiny", tmp_path / "here", {"c.bin": content + b"and more"})
    assert 0 < sum(request.received for request in on(hub, "xet-xorb")) < 200_000
    for repo_id, name, wanted in (("ada/other", "b.bin", content), ("ada/tiny", "c.bin", content + b"and more")):
        copy = hf_hub_download(repo_id, name, token=ada.token, cache_dir=tmp_path / "cache")
        assert Path(copy).read_bytes() == wanted


def test_another_hub_at_the_same_address(start_hub: Callable[..., LocalHub], tmp_path: Path, on: On) -> None:
    """It has nothing of what was sent to the first, and the client does not think so."""
    content = random.Random(2).randbytes(200_000)
    first = start_hub(xet=True)
    port = int(first.url.rpartition(":")[2])
    for number in range(2):
        if number:
            first.stop()
            second = LocalHub(tmp_path / "second", port=port, xet=True)
            second.start()
        hub = second if number else first
        api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
        api.create_repo("ada/tiny")
        upload(api, "ada/tiny", tmp_path / "here", {"a.bin": content})
        assert on(hub, "xet-xorb")
    second.stop()


def leave(hub: LocalHub, token: str | None, repo_id: str = "ada/tiny") -> requests.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return requests.get(f"{hub.url}/api/models/{repo_id}/xet-write-token/main", headers=headers)


def test_who_may_send(hub: LocalHub, ada: HfApi, bob: HfApi) -> None:
    ada.create_repo("ada/tiny", private=True)
    assert leave(hub, None).status_code in (401, 404) and leave(hub, bob.token).status_code == 404
    assert leave(hub, hub.add_user("ada", "read")).status_code == 403
    granted = leave(hub, ada.token).headers
    xorb = granted["X-Xet-Cas-Url"] + "/v1/xorbs/default/" + "0" * 64
    shards = granted["X-Xet-Cas-Url"] + "/v1/shards"
    for token in (ada.token, "", granted["X-Xet-Access-Token"][:-8], "x" * 40):
        for address in (xorb, shards):
            answer = requests.post(address, data=b"", headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == 401 and ada.token not in answer.text
    # A token of the storage is none of the Hub.
    mine = {"authorization": f"Bearer {granted['X-Xet-Access-Token']}"}
    other = requests.get(f"{hub.url}/api/whoami-v2", headers=mine)
    assert other.status_code == 401


def test_a_hub_without(start_hub: Callable[..., LocalHub]) -> None:
    hub = start_hub()
    token = hub.add_user("ada")
    HfApi(endpoint=hub.url, token=token).create_repo("ada/tiny")
    answer = leave(hub, token)
    assert answer.status_code == 404 and "X-Error-Code" not in answer.headers


def test_what_is_damaged_is_refused(hub: LocalHub, ada: HfApi, tmp_path: Path, on: On) -> None:
    ada.create_repo("ada/tiny")
    ada.create_repo("ada/other")
    upload(ada, "ada/tiny", tmp_path / "here", {"a.bin": contents()["words.bin"]})
    granted = leave(hub, ada.token, "ada/other").headers
    mine = {"authorization": f"Bearer {granted['X-Xet-Access-Token']}"}
    [stored] = xorbs(hub)
    whole, name = stored.read_bytes(), stored.parent.name + stored.name
    address = f"{granted['X-Xet-Cas-Url']}/v1/xorbs/default/{name}"
    for body in (whole[:-1], b"\x01" + whole[1:], whole[:8] + bytes(len(whole) - 8), whole[:4] + b"\x07" + whole[5:]):
        assert requests.post(address, data=body, headers=mine).status_code == 400
        assert stored.read_bytes() == whole
    assert requests.post(address + "0", data=whole, headers=mine).status_code == 400
    assert not list((hub.root / "tmp").iterdir())
    for shard in (b"", b"nonsense", b"HFRepoMetaData\0" + bytes(33), b"HFRepoMetaData\0" + bytes(81)):
        answer = requests.post(f"{granted['X-Xet-Cas-Url']}/v1/shards", data=shard, headers=mine)
        assert answer.status_code == 400, shard
    with pytest.raises(HfHubHTTPError):
        hf_hub_download("ada/other", "a.bin", token=ada.token)


def shard_of(file: bytes, xorb: str, pieces: int, size: int) -> bytes:
    """A shard of one file, which is all of a xorb."""

    def raw(text: str) -> bytes:
        return struct.pack("<4Q", *(int(text[start : start + 16], 16) for start in range(0, 64, 16)))

    head = b"HFRepoMetaData\0".ljust(48, b"\0")
    entry = bytes(32) + struct.pack("<IIQ", 1 << 30, 1, 0)
    segment = raw(xorb) + struct.pack("<IIII", 0, size, 0, pieces)
    metadata = raw(hashlib.sha256(file).hexdigest()) + bytes(16)
    return head + entry + segment + metadata + b"\xff" * 32 + bytes(16)


def test_a_shard_that_says_something_else(hub: LocalHub, ada: HfApi, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    content = b"hello world, " * 3000
    upload(ada, "ada/tiny", tmp_path / "here", {"a.bin": content})
    ada.create_repo("ada/other")
    granted = leave(hub, ada.token, "ada/other").headers
    mine = {"authorization": f"Bearer {granted['X-Xet-Access-Token']}"}
    [stored] = xorbs(hub)
    name, pieces = stored.parent.name + stored.name, len(list(read_pieces(stored)))

    def send(shard: bytes) -> int:
        return requests.post(f"{granted['X-Xet-Cas-Url']}/v1/shards", data=shard, headers=mine).status_code

    assert [file.size for file in read_shard(shard_of(content, name, pieces, len(content)))] == [len(content)]
    assert send(shard_of(b"something else", name, pieces, len(content))) == 400
    assert send(shard_of(content, name, pieces, len(content) - 1)) == 400
    assert send(shard_of(content, name, pieces + 1, len(content))) == 400
    assert send(shard_of(content, "0" * 64, pieces, len(content))) == 400
    lfs = hub.root / "repos" / "models" / "ada" / "other" / "lfs"
    assert not [path for path in lfs.rglob("*") if path.is_file()]
    assert send(shard_of(content, name, pieces, len(content))) == 200
    assert [path.read_bytes() for path in lfs.rglob("*") if path.is_file()] == [content]


def test_no_shard_without_a_sha256() -> None:
    shard = bytearray(shard_of(b"x", "0" * 64, 1, 1))
    shard[48 + 32 : 48 + 36] = bytes(4)
    with pytest.raises(BadXet, match="SHA-256"):
        read_shard(bytes(shard))
