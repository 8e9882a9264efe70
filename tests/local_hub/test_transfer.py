"""Files go up and come down unchanged."""

import base64
import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url

from gradmap_hub.local_hub import LocalHub

Sums = Callable[[Path], dict[str, str]]


def count(hub: LocalHub, method: str, part: str = "") -> int:
    return sum(request.method == method and part in request.path for request in hub.requests)


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_roundtrip(hub: LocalHub, ada: HfApi, folder: Path, tmp_path: Path, sums: Sums, repo_type: str) -> None:
    if repo_type == "space":
        (folder / "README.md").write_text("---\nsdk: gradio\napp_file: app.py\n---\n")
    ada.create_repo("acme/tiny", repo_type=repo_type, space_sdk="gradio" if repo_type == "space" else None)
    made = ada.upload_folder(repo_id="acme/tiny", folder_path=folder, repo_type=repo_type, commit_message="First")
    assert made.repo_url.repo_id == "acme/tiny" and made.repo_url.repo_type == repo_type
    assert len(made.oid) == 40

    copy = snapshot_download(
        "acme/tiny", repo_type=repo_type, revision=made.oid, cache_dir=tmp_path / "cache", token=ada.token
    )
    got = sums(Path(copy))
    assert got.pop(".gitattributes")
    assert got == sums(folder)
    assert Path(copy).name == made.oid


def test_second_upload_sends_nothing(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    ada.create_repo("ada/tiny")
    first = ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    assert count(hub, "PUT") == 3
    hub.requests.clear()
    second = ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    assert second.oid == first.oid
    assert count(hub, "PUT") == 0 and count(hub, "POST", "/commit/") == 0


def test_stored_lfs_object_is_not_sent_again_under_another_name(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    ada.create_repo("ada/tiny")
    ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    hub.requests.clear()
    ada.upload_file(path_or_fileobj=folder / "model.safetensors", path_in_repo="b.safetensors", repo_id="ada/tiny")
    assert count(hub, "PUT") == 0 and count(hub, "POST", "/batch") == 1
    assert ada.file_exists("ada/tiny", "b.safetensors")


def test_lfs_objects_are_not_shared_between_repositories(hub: LocalHub, ada: HfApi, bob: HfApi, folder: Path) -> None:
    """Knowing a hash must not be enough to read somebody's private file."""
    ada.create_repo("ada/secret", private=True)
    ada.upload_folder(repo_id="ada/secret", folder_path=folder)
    bob.create_repo("bob/mine")
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    reply = requests.post(
        f"{hub.url}/api/models/bob/mine/commit/main",
        headers={"authorization": f"Bearer {bob.token}"},
        data=(
            '{"key":"header","value":{"summary":"steal"}}\n'
            f'{{"key":"lfsFile","value":{{"path":"a.bin","algo":"sha256","oid":"{oid}"}}}}\n'
        ),
    )
    assert reply.status_code == 400 and "does not exist" in reply.json()["error"]


def test_resumes_an_incomplete_download(ada: HfApi, folder: Path, tmp_path: Path, hub: LocalHub) -> None:
    ada.create_repo("ada/tiny")
    ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    content = (folder / "model.safetensors").read_bytes()
    blobs = tmp_path / "cache" / "models--ada--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(content).hexdigest()}.incomplete").write_bytes(content[:1_000_000])
    hub.requests.clear()
    file = hf_hub_download(
        "ada/tiny", "model.safetensors", cache_dir=tmp_path / "cache", token=ada.token, endpoint=hub.url
    )
    assert Path(file).read_bytes() == content
    # The rest of it; all of it from 1.x on, which leaves alone what another call began.
    assert [request.status for request in hub.requests if request.method == "GET"] in ([206], [200])


RANGES = [
    ("bytes=0-9", 206, 0, 10),
    ("bytes=15-", 206, 15, 20),
    ("bytes=-4", 206, 16, 20),
    ("bytes=5-500", 206, 5, 20),
    ("bytes=0-1,3-4", 200, 0, 20),
    ("bytes=20-", 416, 0, 0),
]


def test_ranges(ada: HfApi) -> None:
    content = bytes(range(20))
    ada.create_repo("ada/tiny")
    ada.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id="ada/tiny")
    for wanted, status, start, end in RANGES:
        reply = requests.get(hf_hub_url("ada/tiny", "a.bin"), headers={"Range": wanted})
        assert reply.status_code == status, wanted
        if status < 400:
            assert reply.content == content[start:end], wanted
        if status == 206:
            assert reply.headers["Content-Range"] == f"bytes {start}-{end - 1}/20"


def test_file_metadata(ada: HfApi, folder: Path) -> None:
    ada.create_repo("ada/tiny")
    made = ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    text = get_hf_file_metadata(hf_hub_url("ada/tiny", "LICENSE"), token=ada.token)
    content = (folder / "LICENSE").read_bytes()
    assert text.etag == hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
    assert text.size == len(content) and text.commit_hash == made.oid
    lfs = get_hf_file_metadata(hf_hub_url("ada/tiny", "model.safetensors"), token=ada.token)
    assert lfs.etag == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert lfs.size == 3_000_000


def test_corrupted_upload_is_refused(hub: LocalHub, ada: HfApi, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    file = tmp_path / "a.bin"
    file.write_bytes(os.urandom(50_000))
    operation = CommitOperationAdd("a.bin", file)
    announced = operation.upload_info.sha256.hex()
    file.write_bytes(os.urandom(50_000))  # same size, other bytes than were hashed
    with pytest.raises(RuntimeError, match=r"Error while uploading 'a\.bin'"):
        ada.create_commit("ada/tiny", [operation], commit_message="Broken")
    assert count(hub, "PUT") == 1 and count(hub, "POST", "/commit/") == 0
    assert not list((hub.root / "repos").rglob(announced[2:]))
    assert not list((hub.root / "tmp").iterdir())


def test_commit_operations(ada: HfApi, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    add = [CommitOperationAdd(path, path.encode()) for path in ("a.txt", "d/b.txt", "d/e/c.txt", "w.bin")]
    ada.create_commit("ada/tiny", add, commit_message="Add")
    ada.create_commit(
        "ada/tiny",
        [
            CommitOperationCopy("w.bin", "copy.bin"),
            CommitOperationCopy("a.txt", "copy.txt"),
            CommitOperationDelete("a.txt"),
            CommitOperationDelete("d/e/"),
        ],
        commit_message="Copy and delete",
        commit_description="Some words",
    )
    assert sorted(ada.list_repo_files("ada/tiny")) == [
        ".gitattributes",
        "copy.bin",
        "copy.txt",
        "d/b.txt",
        "w.bin",
    ]
    copied = hf_hub_download("ada/tiny", "copy.bin", cache_dir=tmp_path, token=ada.token)
    assert Path(copied).read_bytes() == b"w.bin"
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        ada.delete_file("a.txt", "ada/tiny")
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        ada.upload_file(path_or_fileobj=b"x", path_in_repo="copy.txt/under", repo_id="ada/tiny")


def test_stale_parent(ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    head = ada.repo_info("ada/tiny").sha
    assert head
    made = ada.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="ada/tiny", parent_commit=head[:7])
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        ada.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="ada/tiny", parent_commit=head)
    assert refused.value.response is not None and refused.value.response.status_code == 412
    assert ada.repo_info("ada/tiny").sha == made.oid


def test_pull_request(ada: HfApi, bob: HfApi, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    head = ada.repo_info("ada/tiny").sha
    proposed = bob.upload_file(path_or_fileobj=os.urandom(99), path_in_repo="a.bin", repo_id="ada/tiny", create_pr=True)
    assert proposed.pr_num == 1 and proposed.pr_revision == "refs/pr/1"
    assert ada.repo_info("ada/tiny").sha == head
    assert "a.bin" in ada.list_repo_files("ada/tiny", revision="refs/pr/1")
    again = bob.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="ada/tiny", revision="refs/pr/1")
    refs = ada.list_repo_refs("ada/tiny", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", again.oid)]
    file = hf_hub_download("ada/tiny", "a.bin", revision="refs/pr/1", cache_dir=tmp_path / "c", token=bob.token)
    assert Path(file).stat().st_size == 99


def test_ignored_files_stay_at_home(ada: HfApi, tmp_path: Path) -> None:
    root = tmp_path / "src"
    (root / "logs").mkdir(parents=True)
    (root / ".gitignore").write_text("*.tmp\nlogs/\n!keep.tmp\n")
    for name in ("a.txt", "b.tmp", "keep.tmp", "logs/run.txt"):
        (root / name).write_text(name)
    ada.create_repo("ada/tiny")
    ada.upload_folder(repo_id="ada/tiny", folder_path=root)
    assert sorted(ada.list_repo_files("ada/tiny")) == [".gitattributes", ".gitignore", "a.txt", "keep.tmp"]


def test_attributes_of_the_repository_decide(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    ada.upload_file(
        path_or_fileobj=b"*.txt filter=lfs diff=lfs merge=lfs -text\n",
        path_in_repo=".gitattributes",
        repo_id="ada/tiny",
    )
    ada.upload_file(path_or_fileobj=b"text", path_in_repo="a.txt", repo_id="ada/tiny")
    ada.upload_file(path_or_fileobj=b"text", path_in_repo="a.onnx", repo_id="ada/tiny")
    rows = {row.rfilename: row for row in ada.model_info("ada/tiny", files_metadata=True).siblings or []}
    assert rows["a.txt"].lfs is not None and rows["a.onnx"].lfs is None


def test_binary_file_is_added_to_gitattributes(ada: HfApi, folder: Path, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    text = Path(hf_hub_download("ada/tiny", ".gitattributes", cache_dir=tmp_path / "c", token=ada.token))
    assert text.read_text().splitlines()[-1] == ("assets/plot[[:space:]]one.png filter=lfs diff=lfs merge=lfs -text")


def test_branches_tags_and_missing_things(ada: HfApi, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    first = ada.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="ada/tiny").oid
    ada.create_tag("ada/tiny", tag="v1.0", tag_message="One")
    ada.create_branch("ada/tiny", branch="feature/x")
    second = ada.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="ada/tiny", revision="feature/x").oid
    for revision, content in [("v1.0", "1"), ("feature/x", "2"), (first, "1"), (second[:8], "2")]:
        file = hf_hub_download(
            "ada/tiny", "a.txt", revision=revision, cache_dir=tmp_path / revision[:4], token=ada.token
        )
        assert Path(file).read_text() == content
    with pytest.raises(HfHubHTTPError, match="409"):
        ada.create_tag("ada/tiny", tag="v1.0")
    ada.create_branch("ada/tiny", branch="feature/x", exist_ok=True)
    refs = ada.list_repo_refs("ada/tiny")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/x": second}
    ada.delete_tag("ada/tiny", tag="v1.0")
    ada.delete_branch("ada/tiny", branch="feature/x")
    assert not ada.revision_exists("ada/tiny", "v1.0")
    with pytest.raises(RevisionNotFoundError):
        ada.model_info("ada/tiny", revision="feature/x")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("ada/tiny", "a.txt", revision="nope", cache_dir=tmp_path / "n", token=ada.token)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ada/tiny", "b.txt", cache_dir=tmp_path / "n", token=ada.token)
    assert not ada.file_exists("ada/tiny", "b.txt")


def test_concurrent_commits_all_land(ada: HfApi) -> None:
    ada.create_repo("ada/tiny")

    def upload(number: int) -> str:
        return ada.upload_file(path_or_fileobj=os.urandom(2000), path_in_repo=f"{number}.bin", repo_id="ada/tiny").oid

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(upload, range(16)))
    assert len(made) == 16
    assert len(ada.list_repo_files("ada/tiny")) == 17
    history = ada.list_repo_commits("ada/tiny")
    assert {commit.commit_id for commit in history} >= made and len(history) == 17


EVIL_PATHS = [
    "../evil",
    "/etc/x",
    "a/../../evil",
    ".git/config",
    "a/.GIT/b",
    "a\\..\\b",
    "a\0b",
    "",
    "a//b",
    "C:/x",
]


def test_traversal_in_a_commit(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    content = base64.b64encode(b"x").decode()
    for path in EVIL_PATHS:
        rows = [
            {"key": "header", "value": {"summary": "Evil"}},
            {"key": "file", "value": {"path": path, "encoding": "base64", "content": content}},
        ]
        reply = requests.post(
            f"{hub.url}/api/models/ada/tiny/commit/main",
            headers={"authorization": f"Bearer {ada.token}"},
            data="\n".join(map(json.dumps, rows)),
        )
        assert reply.status_code == 400, path
    assert not list(hub.root.parent.glob("**/evil"))
    assert ada.list_repo_files("ada/tiny") == [".gitattributes"]


EVIL_ADDRESSES = [
    "/ada/tiny/resolve/main/..%2f..%2f..%2faccounts.json",
    "/ada/tiny/resolve/main/%2e%2e/%2e%2e/accounts.json",
    "/ada/tiny/resolve/main/../../../../accounts.json",
    "/ada/tiny/resolve/..%2f..%2f..%2f/a",
    "/ada/tiny/resolve/main/a%00b",
    "/ada/tiny/resolve/main/%2fetc/passwd",
    "/ada/tiny/resolve/main/a%252f..%252fb",
    "/%2e%2e/%2e%2e/resolve/main/accounts.json",
    "/api/models/..%2f../tiny",
    "/api/models/ada/tiny/tree/main/..%2f..",
    "/ada/tiny/blob/main/..%2f..%2faccounts.json",
]


def test_traversal_in_an_address(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    for address in EVIL_ADDRESSES:
        # requests tidies such addresses up before it sends them.
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
        connection.request("GET", address, headers={"authorization": f"Bearer {ada.token}"})
        reply = connection.getresponse()
        assert reply.status in (400, 404), address
        assert b"hf_local" not in reply.read(), address
        connection.close()


def test_answers_on_a_kept_connection_wait_for_no_acknowledgement(hub: LocalHub) -> None:
    """The fastest of many, as a busy machine delays some: Nagle's algorithm would hold every one of them for 40 ms."""
    seconds = []
    with requests.Session() as session:
        for _ in range(20):
            began = time.perf_counter()
            session.get(f"{hub.url}/api/models/acme/none")
            seconds.append(time.perf_counter() - began)
    assert min(seconds[1:]) < 0.03
