"""Publishing to a Hub that offers xet, with the real hf_xet: the same end, and only what is new is sent."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from gradmap_hub.local_hub import Fault, LocalHub

from .conftest import SPACE, TARGET, Side, local_bytes, remote_bytes, tensors, write_folders
from .test_faults import TABLE, TYPED, commits, matrix, publish, run_against

ROUTES = ("xet-token", "xet-xorb", "xet-shard")
QUICK = (("xet-token", "403"), ("xet-token", "404"), ("xet-xorb", "503"), ("xet-shard", "reset-after"))


@pytest.fixture
def server(tmp_path: Path, point_client_at: Callable[[str], None]) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", xet=True) as running:
        point_client_at(running.url)
        running.add_user("acme-owner", orgs=["acme"])
        yield running


def routes(server: LocalHub) -> set[str]:
    return {entry.route for entry in server.requests}


def sent_by_xet(server: LocalHub) -> int:
    return sum(entry.received for entry in server.requests if entry.route == "xet-xorb")


def test_the_same_end(server: LocalHub, ada: Side, folder: Path, tmp_path: Path) -> None:
    publish(ada, folder)
    assert set(ROUTES) <= routes(server) and "lfs-put" not in routes(server)
    for repo_id, kind, local in ((TARGET, "model", folder), (SPACE, "space", folder.with_name("small-space"))):
        assert remote_bytes(ada, repo_id, kind, tmp_path / kind) == local_bytes(local)
        assert commits(ada, repo_id, kind) == 2
    server.requests.clear()
    publish(ada, folder)
    assert not {*ROUTES, "lfs-put", "commit"} & routes(server)


def test_each_file_has_a_line_with_its_bytes(server: LocalHub, ada: Side, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(tensors(5, 3_000_000))
    publish(ada, folder, space=False)
    [line] = [line for line in ada.heard.lines if "model.safetensors" in line]
    assert re.search(r": 3\.0 MB, 3\.0 MB of them sent with xet, [\d.,]+ [kM]B/s$", line), line
    sizes = [(folder / name).stat().st_size for name in ("model.safetensors", "onnx/model.onnx", "assets/layers.png")]
    assert ada.heard.told == sum(sizes)
    # Pieces are compressed: the graph's names are shorter then.
    assert 0.99 * sum(sizes) <= sent_by_xet(server) < 1.01 * sum(sizes) + 2000


def test_a_display_that_is_no_more(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are counted where the client has its display; without, a file is told when it is finished."""
    monkeypatch.setattr("gradmap_hub.hub.xet._DISPLAYS", ())
    publish(ada, folder, space=False)
    assert len([line for line in ada.heard.lines if line.startswith("Uploading ") and "sent with xet" in line]) == 3
    assert remote_bytes(ada, TARGET, "model", tmp_path / "copy") == local_bytes(folder)


def test_an_update_sends_what_changed(server: LocalHub, ada: Side, tmp_path: Path) -> None:
    first = write_folders(tmp_path / "first")
    content = tensors(5, 3_000_000)
    (first / "model.safetensors").write_bytes(content)
    publish(ada, first, space=False)
    second = write_folders(tmp_path / "second")
    (second / "model.safetensors").write_bytes(content[:-100_000] + random.Random(9).randbytes(100_000))
    server.requests.clear()
    publish(ada, second, space=False, update=True)
    assert 0 < sent_by_xet(server) < 500_000
    assert remote_bytes(ada, TARGET, "model", tmp_path / "copy") == local_bytes(second)


def test_turned_off_it_stays_off(server: LocalHub, ada: Side, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    publish(ada, folder, space=False)
    assert "lfs-put" in routes(server) and not set(ROUTES) & routes(server)
    assert constants.HF_HUB_DISABLE_XET is True


def test_what_the_hub_has_is_not_sent_by_xet(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the commit; hf_xet remembers nothing, as on another machine."""

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ada.hub.api, "create_commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            publish(ada, folder, space=False)
    assert sent_by_xet(server)
    server.requests.clear()
    publish(ada, folder, space=False)
    assert not {"xet-xorb", "xet-shard", "lfs-put"} & routes(server)
    assert "already on the Hub" in [line for line in ada.heard.lines if "model.safetensors" in line][-1]
    assert remote_bytes(ada, TARGET, "model", tmp_path / "copy") == local_bytes(folder)


def test_a_pull_request(server: LocalHub, ada: Side, as_user: Callable[..., Side], folder: Path) -> None:
    publish(ada, folder, space=False, public=True)
    (folder / "model.safetensors").write_bytes(tensors(7))
    server.requests.clear()
    bob = as_user("bob")
    made = publish(bob, folder, space=False, create_pr=True, to=TARGET).model
    assert made.pull_request and "xet-xorb" in routes(server)


@pytest.mark.parametrize(("route", "name", "way"), matrix(ROUTES, lambda *place: place in QUICK))
def test_faults(
    server: LocalHub,
    ada: Side,
    folder: Path,
    tmp_path: Path,
    route: str,
    name: str,
    way: dict[str, Any],
    record_property: Any,
) -> None:
    """The Hub's refusal of leave is one like others, only that 404 says that it has no xet. At the storage hf_xet tries
    again, and the upload after it."""
    refused = run_against(server, ada, folder, Fault(route, **way), tmp_path, space=False)
    if route == "xet-token" and name.isdigit() and name not in ("404", "500", "503"):
        assert type(refused) is TYPED[int(name)]
    else:
        assert refused is None, refused.message
        assert ("lfs-put" in routes(server)) == ((route, name) == ("xet-token", "404"))
    record_property("reliability", (TABLE, route, name, type(refused).__name__ if refused else "survived"))
