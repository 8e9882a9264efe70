"""Large LFS files go up in parts."""

import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

from gradmap_hub.local_hub import Fault, LocalHub, Request
from gradmap_hub.local_hub.multipart import Plan, new_upload_id

On = Callable[[LocalHub, str], list[Request]]
CONTENT = os.urandom(250_001)
OID = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(start_hub: Callable[..., LocalHub]) -> LocalHub:
    return start_hub(multipart_bytes=100_000)


@pytest.fixture
def tiny(ada: HfApi) -> str:
    return ada.create_repo("ada/tiny").repo_id


def leftovers(hub: LocalHub) -> list[Path]:
    return list((hub.root / "tmp").iterdir())


def upload(api: HfApi, content: bytes = CONTENT) -> str:
    return api.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id="ada/tiny").oid


def action(hub: LocalHub, api: HfApi, transfers: list[str], content: bytes = CONTENT) -> dict[str, Any]:
    """The upload action that a batch request is answered with."""
    row = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    reply = requests.post(
        f"{hub.url}/ada/tiny.git/info/lfs/objects/batch",
        headers={"authorization": f"Bearer {api.token}"},
        json={"operation": "upload", "transfers": transfers, "objects": [row]},
    ).json()
    found = reply["objects"][0]["actions"]["upload"]
    assert reply["transfer"] == ("multipart" if "header" in found else "basic")
    return found


def send_part(upload: dict[str, Any], number: int, content: bytes | None = None) -> requests.Response:
    size = int(upload["header"]["chunk_size"])
    sent = CONTENT[(number - 1) * size : number * size] if content is None else content
    return requests.put(upload["header"][f"{number:05}"], data=sent)


def finish(upload: dict[str, Any], etags: list[str], oid: str = OID) -> int:
    parts = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, 1)]
    return requests.post(upload["href"], json={"oid": oid, "parts": parts}).status_code


def test_in_parts(hub: LocalHub, ada: HfApi, tiny: str, tmp_path: Path, on: On) -> None:
    upload(ada)
    assert [request.received for request in on(hub, "lfs-part")] == [100_000, 100_000, 50_001]
    assert len(on(hub, "lfs-complete")) == len(on(hub, "lfs-verify")) == 1 and not on(hub, "lfs-put")
    assert not any("signature" in request.query for request in hub.requests)
    file = hf_hub_download("ada/tiny", "a.bin", cache_dir=tmp_path / "c", token=ada.token)
    assert Path(file).read_bytes() == CONTENT
    assert not leftovers(hub)
    # What is not larger than a part goes up whole, beside others that do not.
    small, large = os.urandom(100_000), os.urandom(100_001)
    operations = [CommitOperationAdd("small.bin", small), CommitOperationAdd("large.bin", large)]
    ada.create_commit("ada/tiny", operations, commit_message="Both")
    assert [request.received for request in on(hub, "lfs-put")] == [100_000]
    assert [request.received for request in on(hub, "lfs-part")[3:]] == [100_000, 1]
    assert {"small.bin", "large.bin"} <= set(ada.list_repo_files("ada/tiny"))


def test_only_for_clients_that_can(hub: LocalHub, ada: HfApi, tiny: str) -> None:
    assert "header" not in action(hub, ada, ["basic"])
    assert "header" not in action(hub, ada, [])
    header = action(hub, ada, ["basic", "multipart", "xet"])["header"]
    assert list(header) == ["chunk_size", "00001", "00002", "00003"] and header["chunk_size"] == "100000"


def test_parts_in_any_order(hub: LocalHub, ada: HfApi, tiny: str) -> None:
    content = os.urandom(1_050_000)
    oid = hashlib.sha256(content).hexdigest()
    begun = action(hub, ada, ["multipart"], content)
    numbers = list(range(1, 12)) * 2  # every part twice
    random.Random(0).shuffle(numbers)

    def send(number: int) -> tuple[int, str]:
        reply = send_part(begun, number, content[(number - 1) * 100_000 : number * 100_000])
        return number, reply.headers["ETag"]

    with ThreadPoolExecutor(4) as pool:
        etags = dict(pool.map(send, numbers))
    assert finish(begun, [etags[number] for number in range(1, 12)], oid) == 200
    # The answer may have been lost: asking again does no harm.
    assert finish(begun, [etags[number] for number in range(1, 12)], oid) == 200
    assert not leftovers(hub)


def test_wrong_parts_are_refused(hub: LocalHub, ada: HfApi, tiny: str) -> None:
    begun = action(hub, ada, ["multipart"])
    etags = [send_part(begun, number).headers["ETag"] for number in (1, 2)]
    assert finish(begun, etags) == 400
    assert finish(begun, [*etags, '"no"']) == 400
    assert send_part(begun, 3, b"short").status_code == 400
    assert send_part(begun, 3, bytes(100_000)).status_code == 400
    assert finish(begun, [*etags, '"no"']) == 400
    etags.append(send_part(begun, 3).headers["ETag"])
    assert finish(begun, [etags[1], etags[0], etags[2]]) == 400
    assert finish(begun, [*etags, etags[2]]) == 400
    assert finish(begun, etags, oid="0" * 64) == 400
    for parts in ([{"partNumber": 2, "etag": etags[1]}], "all", [1], [{"partNumber": 1}]):
        assert requests.post(begun["href"], json={"oid": OID, "parts": parts}).status_code == 400
    # A part that is sent again with other bytes is another part.
    other = send_part(begun, 2, bytes(100_000)).headers["ETag"]
    assert finish(begun, etags) == 400
    assert not list((hub.root / "repos").rglob(OID[2:]))
    assert finish(begun, [etags[0], other, etags[2]]) == 400  # all parts as acknowledged, but not the announced bytes
    assert not leftovers(hub) and not list((hub.root / "repos").rglob(OID[2:]))
    # A part after all that is part of nothing.
    assert finish(begun, [etags[0], other, etags[2]]) == 400


def test_only_signed_addresses(hub: LocalHub, ada: HfApi, tiny: str) -> None:
    begun = action(hub, ada, ["multipart"])
    url = begun["header"]["00002"]
    for changed in (url.replace("part=2", "part=9"), url.replace("chunk=1", "chunk=2"), url.partition("?")[0]):
        assert requests.put(changed, data=b"x").status_code == 403
    assert requests.put(url, data=b"x", headers={"authorization": f"Bearer {ada.token}"}).status_code == 400
    as_completion = url.replace("/part?", "/complete?")
    assert requests.post(as_completion, json={"oid": OID, "parts": []}).status_code == 403
    assert requests.put(begun["href"].replace("/complete?", "/part?"), data=b"x").status_code == 403
    assert not leftovers(hub)


def test_corrupted_file_is_refused(hub: LocalHub, ada: HfApi, tiny: str, tmp_path: Path, on: On) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(CONTENT)
    operation = CommitOperationAdd("a.bin", file)
    assert operation.upload_info.size == 250_001 and operation.upload_info.sha256  # read now, whatever the client
    file.write_bytes(os.urandom(250_001))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'a\.bin'"):
        ada.create_commit("ada/tiny", [operation], commit_message="Broken")
    assert [request.status for request in on(hub, "lfs-complete")] == [400] and not on(hub, "commit")
    assert not leftovers(hub)


@pytest.mark.usefixtures("impatient")
def test_a_part_is_tried_again(hub: LocalHub, ada: HfApi, tiny: str, on: On) -> None:
    hub.faults.add(Fault("lfs-part", "status", 503, skip=1))
    hub.faults.add(Fault("lfs-part", "reset-after"))
    assert upload(ada)
    assert [request.status for request in on(hub, "lfs-part")] == [0, 503, 200, 200, 200]


@pytest.mark.usefixtures("impatient")
def test_interrupted(hub: LocalHub, ada: HfApi, tiny: str, on: On, point_client_at: Callable[[str], None]) -> None:
    hub.faults.add(Fault("lfs-part", "reset-before", skip=2, times=100))
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload(ada)
    assert not on(hub, "commit") and len(leftovers(hub)) == 1
    hub.faults.clear()
    hub.stop()
    hub.start()
    assert not leftovers(hub)
    point_client_at(hub.url)
    assert upload(HfApi(endpoint=hub.url, token=ada.token)) and not leftovers(hub)


def test_lost_answer_of_the_completion(hub: LocalHub, ada: HfApi, tiny: str, on: On) -> None:
    hub.faults.add(Fault("lfs-complete", "reset-after"))
    with suppress(RuntimeError):  # from 1.x on, the client itself asks again
        upload(ada)
    hub.requests.clear()
    assert upload(ada) and not on(hub, "lfs-part") and len(on(hub, "lfs-batch")) == 1


def test_plans() -> None:
    assert [Plan.for_size(size, 10).count for size in (11, 20, 21, 10_000)] == [2, 2, 3, 1000]
    large = Plan.for_size(1_000_001, 10)
    assert large.count <= 1000 and sum(large.part_size(number + 1) for number in range(large.count)) == 1_000_001
    with pytest.raises(ValueError, match="positive"):
        LocalHub(Path("nowhere"), multipart_bytes=0)


def test_old_uploads_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "multipart-old", tmp_path / "multipart-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (1, 1))
    assert new_upload_id(tmp_path, older_than=60) != new_upload_id(tmp_path, older_than=60)
    assert [folder.name for folder in tmp_path.iterdir()] == ["multipart-new"]
