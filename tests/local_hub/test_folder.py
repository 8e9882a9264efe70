"""What the Hub leaves in its folder: nothing that others can read, nothing acknowledged that is not there."""

import http.client
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from gradmap_hub.local_hub import LocalHub
from gradmap_hub.local_hub.gitids import blob_id


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_only_the_owner_reads(open_umask: None, start_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = start_hub(multipart_bytes=50_000)
    ada = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
    ada.create_repo("ada/tiny", private=True)
    content = {"small.bin": os.urandom(999), "large.bin": os.urandom(120_000), "a/text.txt": b"text"}
    added = [CommitOperationAdd(path, data) for path, data in content.items()]
    ada.create_commit("ada/tiny", added, commit_message="Files")
    hub.seed("ada/seeded", _folder(tmp_path), private=True)
    opened = {
        path.relative_to(hub.root).as_posix(): oct(mode)
        for path in hub.root.rglob("*")
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077 and path.name != "hub.lock"
    }
    assert not opened
    assert len(list(hub.root.glob("repos/models/ada/tiny/lfs/*/*"))) == 2


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_folders_of_older_versions_are_closed(tmp_path: Path) -> None:
    (tmp_path / "hub" / "repos").mkdir(parents=True, mode=0o755)
    LocalHub(tmp_path / "hub")
    assert stat.S_IMODE((tmp_path / "hub" / "repos").stat().st_mode) == 0o700


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "seed"
    folder.mkdir()
    (folder / "model.bin").write_bytes(os.urandom(300))
    return folder


class SlowCommit:
    """A commit of which the client sends one line at a time."""

    def __init__(self, hub: LocalHub, token: str, repo: str) -> None:
        self.connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=20)
        self.connection.putrequest("POST", f"/api/models/{repo}/commit/main")
        self.connection.putheader("Authorization", f"Bearer {token}")
        self.connection.putheader("Transfer-Encoding", "chunked")
        self.connection.endheaders()
        self.send({"key": "header", "value": {"summary": "Slowly"}})

    def send(self, row: object) -> None:
        line = json.dumps(row).encode() + b"\n"
        self.connection.send(b"%x\r\n%s\r\n" % (len(line), line))

    def end(self) -> tuple[int, bytes]:
        self.connection.send(b"0\r\n\r\n")
        answer = self.connection.getresponse()
        return answer.status, answer.read()


TEXT = b"The content of a file."
BLOB = blob_id(TEXT)


@pytest.mark.parametrize("when", ["after its files", "before its files", "away and back"])
def test_a_commit_is_not_lost_in_another_repository(hub: LocalHub, ada: HfApi, when: str) -> None:
    """The repository is deleted and made again, or moved away and back, while a commit arrives."""
    ada.create_repo("ada/tiny")
    blob = hub.root / "repos" / "models" / "ada" / "tiny" / "blobs" / BLOB[:2] / BLOB[2:]
    commit = SlowCommit(hub, str(ada.token), "ada/tiny")
    time.sleep(0.2)  # the Hub has seen for which repository it is

    def send_file() -> None:
        commit.send({"key": "file", "value": {"path": "a.txt", "content": TEXT.decode()}})
        until = time.monotonic() + 10
        while not blob.exists():
            assert time.monotonic() < until
            time.sleep(0.005)

    if when == "away and back":
        ada.move_repo("ada/tiny", "ada/other")
        send_file()
        ada.move_repo("ada/other", "ada/tiny")
    else:
        if when == "after its files":
            send_file()
        ada.delete_repo("ada/tiny")
        ada.create_repo("ada/tiny", private=True)
        if when == "before its files":
            send_file()
    status, answer = commit.end()
    assert status == 409 and b"Nothing was committed" in answer
    assert ada.list_repo_files("ada/tiny") == [".gitattributes"]


def test_a_slow_commit_is_a_commit(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    commit = SlowCommit(hub, str(ada.token), "ada/tiny")
    commit.send({"key": "file", "value": {"path": "a.txt", "content": TEXT.decode()}})
    assert commit.end()[0] == 200
    assert "a.txt" in ada.list_repo_files("ada/tiny")
