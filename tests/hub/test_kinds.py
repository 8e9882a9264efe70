"""Accounts and kinds of Space on the embedded Hub: which Space each combination ends with, or the line that says why
none. The models are small made-up files; tests/spaces runs real ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.comparison import raw_comparison
from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import SpaceImpossible
from gradmap_hub.hub.client import Hub
from gradmap_hub.layout import artifact, space_folder_of
from gradmap_hub.local_hub import Fault, LocalHub
from gradmap_hub.pipeline.plan import check_space_code, plan_publish
from gradmap_hub.pipeline.publish import PushResult, publish_folder
from gradmap_hub.space import vendor
from gradmap_hub.space.app import write_space
from gradmap_hub.space.folder import kind_of, set_kind
from gradmap_hub.space.plan import plan_of

from .conftest import Heard, graph, local_bytes, record_of, write_folders

ACCOUNTS = {
    "young": "free, younger than 30 days",
    "free": "free",
    "pro": "PRO",
    "team": "organisation with a plan",
}
WANTED = ("auto", "gradio", "browser", "zero", "none")
# Of the combinations, those of the default run.
ALWAYS = {("free", "auto"), ("free", "gradio")}
SDKS = {"browser": "static", "gradio": "gradio", "zero": "gradio"}


@pytest.fixture(autouse=True)
def small_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of a few bytes, in a cache of their own: nothing is fetched and little is uploaded."""
    contents = {name: name.encode() for name in vendor.LIBRARIES}
    for name, content in contents.items():
        small = vendor.Library(name, name, len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(vendor.LIBRARIES, name, small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vendor.cache_folder().mkdir(parents=True)
    for name, content in contents.items():
        (vendor.cache_folder() / name).write_bytes(content)


def small(root: Path, *, int8: bool = True) -> Path:
    """A model folder with a tokenizer, and int8 if wanted, and its Space folder as Gradio's."""
    folder = write_folders(root)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 1, "max_position_embeddings": 64}')
    record = record_of()
    if int8:
        (folder / "onnx" / "model_int8.onnx").write_bytes(graph(9))
        graphs = [artifact(folder / "onnx" / "model_int8.onnx", folder, "int8")]
        record = dataclasses.replace(record, artifacts=graphs)
    record.write(folder)
    space, plan = space_folder_of(folder), plan_of(record)
    companions = {"config.json": folder / "config.json"}
    write_space(record, plan, space, pruned_repo=record.target, companions=companions)
    (space / "original" / "model.onnx").unlink(missing_ok=True)
    if int8:
        (space / "original" / "model_int8.onnx").write_bytes(graph(8))
    return folder


@pytest.fixture
def hub_of(tmp_path: Path, point_client_at: Callable[[str], None]) -> Iterator[Callable[[str], tuple[Hub, LocalHub]]]:
    """The Hub as seen by ada, whose account, or organisation, has a plan."""
    servers: list[LocalHub] = []

    def start(plan: str) -> tuple[Hub, LocalHub]:
        plans: Any = {"acme": "team", "ada": "free"} if plan == "team" else {"ada": plan}
        server = LocalHub(tmp_path / "hub", plans=plans)
        server.start()
        servers.append(server)
        point_client_at(server.url)
        return Hub(server.url, server.add_user("ada", orgs=["acme"])), server

    yield start
    for server in servers:
        server.stop()


def publish(hub: Hub, folder: Path, heard: Heard | None = None, **options: Any) -> PushResult:
    return publish_folder(folder, PublishConfig(**{"wait_space": 0, **options}), hub=hub, reporter=heard or Heard())


@pytest.mark.parametrize(
    ("account", "wanted"),
    [
        pytest.param(account, wanted, marks=[] if (account, wanted) in ALWAYS else pytest.mark.slow)
        for account in ACCOUNTS
        for wanted in WANTED
    ],
)
def test_every_account_and_kind(
    account: str, wanted: str, tmp_path: Path, hub_of: Callable[..., Any], record_property: Any
) -> None:
    hub, _ = hub_of(account)
    folder, target = small(tmp_path), "acme/new" if account == "team" else "ada/new"
    planned = plan_publish(folder, PublishConfig(to=target, space=wanted), hub).targets.kinds
    heard = Heard()
    result = publish(hub, folder, heard, to=target, space=wanted)
    assert result.model.uploaded
    if result.space is None:
        assert wanted == "none" or ("status 402" in result.space_reason and "--space browser" in result.space_reason)
        outcome = "none" if wanted == "none" else "no Space (402): the line names --space browser"
    else:
        kind = kind_of(space_folder_of(folder))
        assert kind == planned.order[0] and heard.notes == []  # the plan knew
        info = hub.api.space_info(result.space.repo_id)
        assert info.sdk == SDKS[kind] and (info.runtime.requested_hardware == "zero-a10g") == (kind == "zero")
        outcome = kind
        check_space_code(space_folder_of(folder))
    expected = {
        ("young", "gradio"): "no Space", ("free", "gradio"): "no Space", ("young", "zero"): "no Space",
        ("team", "auto"): "gradio", ("pro", "auto"): "gradio",
    }.get((account, wanted), "browser" if wanted == "auto" else wanted)  # fmt: skip
    assert outcome.startswith(expected)
    record_property("reliability", ("accounts and kinds", ACCOUNTS[account], f"`{wanted}`", outcome))


def test_a_refusal_at_creation_falls_through(hub_of: Callable[..., Any], tmp_path: Path) -> None:
    """The account seems to have a plan, and the Hub disagrees."""
    hub, server = hub_of("pro")
    server.faults.add(Fault("repo-create", "status", status=402, skip=1))
    folder, heard = small(tmp_path), Heard()
    result = publish(hub, folder, heard, public=True)
    assert result.space is not None and hub.api.space_info(result.space.repo_id).sdk == "static"
    assert "Trying browser: a static Space, which is free for everybody" in heard.notes[0]
    facts = raw_comparison(space_folder_of(folder))
    assert facts["precisions"][0]["pruned"]["stored"] == "hub" and facts["pruned"]["revision"] == result.model.commit
    again = publish(hub, folder, public=True)  # the kind of the one that is there
    assert again.space is not None and not again.space.uploaded and not again.model.uploaded


@pytest.mark.slow
def test_without_the_libraries_the_next_kind_is_tried(
    hub_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, _ = hub_of("free")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    folder, heard = small(tmp_path), Heard()
    result = publish(hub, folder, heard)
    assert result.space is not None and kind_of(space_folder_of(folder)) == "zero"
    assert "cannot be fetched" in heard.notes[0] and "Trying zero" in heard.notes[0]


@pytest.mark.slow
def test_a_private_model_is_stored_in_the_space(hub_of: Callable[..., Any], tmp_path: Path) -> None:
    hub, _ = hub_of("free")
    folder = small(tmp_path)
    result = publish(hub, folder)
    assert result.space is not None
    stored = {entry.path: entry.size for entry in hub.api.list_repo_tree(
        result.space.repo_id, repo_type="space", recursive=True) if hasattr(entry, "size")}  # fmt: skip
    graph = (folder / "onnx" / "model_int8.onnx").stat().st_size
    assert stored["pruned/model_int8.onnx"] == graph and "tokenizer.json" in stored and "app.py" not in stored
    assert publish(hub, folder, public=True, update=True).space is not None
    names = hub.api.list_repo_files(result.space.repo_id, repo_type="space")
    assert "pruned/model_int8.onnx" not in names and "original/model_int8.onnx" in names


def test_there_and_back(hub_of: Callable[..., Any], tmp_path: Path) -> None:
    """A Space folder of one kind becomes one of another, and what is not of the page does not pass."""
    from gradmap_hub.pipeline.space import local_page

    folder = small(tmp_path)
    space = space_folder_of(folder)
    page = local_page(folder, "https://huggingface.co")
    before = local_bytes(space)
    set_kind(space, "browser", page)
    check_space_code(space)
    assert {"index.html", "vendor/jinja.js", "tokenizer.json"} <= set(local_bytes(space))
    set_kind(space, "zero")
    assert kind_of(space) == "zero"
    set_kind(space, "gradio")
    after = local_bytes(space)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} <= {"compare.json"}
    set_kind(space, "browser", page)
    for name, content in (("vendor/jinja.js", b"other"), ("pruned/a.html", b""), ("page.js", b"")):
        (space / name).parent.mkdir(exist_ok=True)
        there = (space / name).read_bytes() if (space / name).exists() else None
        (space / name).write_bytes(content)
        with pytest.raises(Exception, match=f"{name} is not part of the comparison app"):
            check_space_code(space)
        (space / name).unlink() if there is None else (space / name).write_bytes(there)
    check_space_code(space)


def test_asked_for_and_impossible(hub_of: Callable[..., Any], tmp_path: Path) -> None:
    hub, server = hub_of("pro")
    folder = small(tmp_path, int8=False)
    with pytest.raises(SpaceImpossible, match="--space browser is not possible: a browser needs ONNX files"):
        publish(hub, folder, space="browser")
    assert {entry.method for entry in server.requests} == {"GET"}
