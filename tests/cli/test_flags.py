"""The options of publishing as a user types them; what they do in detail is in tests/publish."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long  # whole pushes

Sums = Callable[[Path], dict[str, str]]


def pruned_into(world: Any, name: str, *options: str) -> Path:
    done = world.cli.run("prune", "acme/tiny", world.root / name, "--quiet", *world.cli.quick, *options)
    assert done.code == 0, done.err
    return world.root / name


@pytest.fixture(scope="module")
def small(world: Any) -> Path:
    return pruned_into(world, "small", "--layers", "2")


@pytest.fixture(scope="module")
def smaller(world: Any) -> Path:
    """Another one of the same original."""
    return pruned_into(world, "smaller", "--layers", "3", "--compensation", "none")


@pytest.fixture
def unlicensed(small: Path, tmp_path: Path) -> Path:
    """A folder whose original states no licence."""
    folder = Path(shutil.copytree(small, tmp_path / "unlicensed"))
    record = json.loads((folder / "gradmap.json").read_text())
    record["base"]["license"] = None
    (folder / "gradmap.json").write_text(json.dumps(record))
    return folder


def api(world: Any) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=world.hub.url, token=world.cli.token)


def refused(done: Any, code: int, *words: str) -> None:
    assert done.code == code and done.out == "" and "Traceback" not in done.err, done.err
    assert all(word in done.err for word in words), done.err


def test_publish_dry_run(world: Any, small: Path, sums: Sums) -> None:
    before, content, asked = world.repositories(), sums(small), len(world.hub.requests)
    command = ("publish", small, "--to", "ada/planned", "--collection", "Small ones", "--dry-run")
    shown, parsed = world.cli.run(*command), world.cli.run(*command, "--json")
    assert (shown.code, parsed.code, shown.err, parsed.err) == (0, 0, "", "")
    assert "Nothing was written or published." in shown.out and "it is created private" in shown.out
    names = [check["name"] for check in parsed.json["checks"]]
    assert names == [
        "account",
        "target",
        "space",
        "collection",
        "weights",
        "licence",
        "card",
        "files",
        "opens",
        "disk",
        "upload",
    ]
    assert parsed.json["target"] == "ada/planned" and parsed.json["space"] is None and parsed.json["rewrites_card"]
    assert world.repositories() == before and sums(small) == content
    assert {entry.method for entry in world.hub.requests[asked:]} == {"GET"}
    refused(world.cli.run("publish", small, "--to", "bob/x", "--dry-run"), 1, "without write access to bob")


@pytest.mark.slow
def test_update(world: Any, small: Path, smaller: Path, tmp_path: Path, sums: Sums) -> None:
    first = world.cli.run("publish", small, "--to", "ada/updated", "--json")
    assert first.code == 0, first.err
    refused(world.cli.run("publish", smaller, "--to", "ada/updated"), 1, "was not changed", "--update")
    planned = world.cli.run(
        "push", "acme/tiny", "--layers", "1", "-o", "new", "--no-onnx", "--no-space", *world.cli.quick,
        "--to", "ada/updated", "--update", "--dry-run", "--json", cwd=tmp_path,
    )  # fmt: skip
    target = next(check["result"] for check in planned.json["checks"] if check["name"] == "target")
    assert "one commit replaces it" in target
    second = world.cli.run("publish", smaller, "--to", "ada/updated", "--update", "--json")
    assert second.code == 0, second.err
    copy = Path(api(world).snapshot_download("ada/updated", cache_dir=tmp_path / "cache"))
    assert sums(copy)["model.safetensors"] == sums(smaller)["model.safetensors"]
    assert len(api(world).list_repo_commits("ada/updated")) == 3
    again = world.cli.run("publish", smaller, "--to", "ada/updated", "--update", "--json")
    assert again.json["model"] == second.json["model"]


@pytest.mark.slow  # tests/hub/test_publish.py opens pull requests
def test_create_pr(world: Any, small: Path, tmp_path: Path) -> None:
    world.hub.seed("acme/theirs", world.base)
    proposed = world.cli.run("publish", small, "--to", "acme/theirs", "--create-pr", "--json")
    assert proposed.code == 0, proposed.err
    assert proposed.json["pull_request"] == f"{world.hub.url}/acme/theirs/discussions/1"
    assert "reason" in proposed.json["space"]
    shown = world.cli.run("publish", small, "--to", "acme/theirs", "--create-pr")
    assert "pull request  " in shown.out and "/discussions/1" in shown.out
    [one] = api(world).get_repo_discussions("acme/theirs")
    assert one.author == "ada" and "gradmap.json" not in api(world).list_repo_files("acme/theirs")
    refused(world.cli.run("publish", small, "--create-pr"), 2, "--create-pr needs --to")
    for option in (("--public",), ("--update",), ("--collection", "Mine")):
        refused(world.cli.run("publish", small, "--to", "acme/theirs", "--create-pr", *option), 2, option[0])
    planned = world.cli.run(
        "push", "acme/tiny", "--layers", "1", "-o", "new", "--no-onnx", *world.cli.quick,
        "--to", "acme/theirs", "--create-pr", "--dry-run", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert planned.json["visibility"] == "as it is" and planned.json["space"] is None


def test_licences(world: Any, small: Path, unlicensed: Path, variant: Any, tmp_path: Path) -> None:
    refused(world.cli.run("publish", small, "--to", "ada/x", "--license", "mit"), 2, "states its licence, apache-2.0")
    refused(world.cli.run("publish", unlicensed, "--to", "ada/x"), 1, "states no licence", "--license")
    refused(world.cli.run("publish", unlicensed, "--to", "ada/x", "--license", "mine-all-mine"), 2, "'mine-all-mine'")
    other = ("--to", "ada/x", "--license", "other")
    refused(world.cli.run("publish", unlicensed, *other), 1, "license_name", "--license-link")
    named = (*other, "--license-name", "Our own", "--license-link", "LICENSE")
    done = world.cli.run("publish", unlicensed, *named, "--json")
    assert done.code == 0, done.err
    card = Path(api(world).hf_hub_download("ada/x", "README.md", cache_dir=tmp_path / "cache")).read_text()
    assert "license: other\nlicense_name: Our own\nlicense_link: LICENSE\n" in card
    folder = variant(without=["README.md"])
    command = ["push", folder, "--layers", "1", "-o", "new", "--no-onnx", *world.cli.quick, "--dry-run"]
    command += ["--license", "other"]
    refused(world.cli.run(*command, cwd=tmp_path), 1, "license_name")
    planned = world.cli.run(*command, *named[4:], "--json", cwd=tmp_path)
    licence = next(check["result"] for check in planned.json["checks"] if check["name"] == "licence")
    assert licence == "other (Our own, LICENSE), stated with --license"


@pytest.mark.slow  # tests/hub/test_after.py adds to one
def test_collection(world: Any, small: Path) -> None:
    done = world.cli.run("publish", small, "--to", "club/collected", "--collection", "club/Small ones", "--json")
    assert done.code == 0, done.err
    slug = done.json["collection"]["slug"]
    assert slug.startswith("club/small-ones-")
    made = api(world).get_collection(slug)
    assert made.private and [item.item_id for item in made.items] == ["club/collected"]
    shown = world.cli.run("publish", small, "--to", "club/collected", "--collection", slug)
    assert f"collection  {world.hub.url}/collections/{slug}" in shown.out
    refused(world.cli.run("publish", small, "--to", "club/collected", "--collection", "acme/x"), 1, "write access")


def test_numbers_that_cannot_be(world: Any, small: Path) -> None:
    refused(world.cli.run("publish", small, "--wait-space", "-1"), 2, "--wait-space")
    refused(world.cli.run("hub", "--cdn-port", "70000"), 2, "--cdn-port")


def test_what_does_not_decide_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking longer, or another collection, must not change what is published."""
    from gradmap_hub.cli.options import command_line

    words = [
        "push",
        "a/b",
        "--wait-space",
        "9",
        "--collection=My own",
        "--layers",
        "2",
        "--collection",
        "x",
        "--resume",
    ]
    monkeypatch.setattr("sys.argv", ["gradmap-hub", *words])
    assert command_line() == "gradmap-hub push a/b --layers 2"


def test_hub_with_a_port_for_downloads(world: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = world.cli.start("hub", "--root", tmp_path / "root", "--cdn-port", str(port))
    try:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    finally:
        process.terminate()
        process.communicate(timeout=20)
