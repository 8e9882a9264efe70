"""What a publish does besides the two repositories: the Space starts, on hardware that the account may have, and both
are put into a collection. And what it says before it does anything."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import (
    CardInvalid,
    CollectionNotFound,
    LicenseUnknown,
    NotAllowed,
    SourceError,
    TargetExists,
    UnsafeToPublish,
    UsageError,
)
from gradmap_hub.local_hub import Fault, LocalHub
from gradmap_hub.pipeline.plan import PublishPlan, plan_publish
from gradmap_hub.pipeline.publish import PushResult, publish_folder
from gradmap_hub.record import Artifact, Base
from gradmap_hub.space.app import content_folder
from gradmap_hub.space.zerogpu import is_for_zero, set_hardware

from .conftest import BASE, SPACE, TARGET, Side, local_bytes, record_of, remote_bytes, write_folders


def publish(side: Side, folder: Path, **options: Any) -> PushResult:
    config = PublishConfig(**{"wait_space": 0, **options})
    return publish_folder(folder, config, hub=side.hub, reporter=side.heard)


def plan(side: Side, folder: Path, **options: Any) -> PublishPlan:
    return plan_publish(folder, PublishConfig(**options), side.hub)


# -- the Space starts ------------------------------------------------------------------------------------------------


def test_it_is_looked_at_until_it_runs(server: LocalHub, ada: Side, folder: Path) -> None:
    state = publish(ada, folder, wait_space=60).space_state
    assert state is not None and (state.stage, state.failed) == ("RUNNING", False)
    assert state.words == f"running on cpu-basic: {server.url}/spaces/{SPACE}"
    assert ada.waits == [1.0, 2.0]  # building, starting, running
    assert f"Waiting for the Space to start: {state.words}" in ada.heard.lines
    again = publish(ada, folder, wait_space=60).space_state
    assert again == state and ada.waits == [1.0, 2.0]


def test_it_is_not_looked_at_for_ever(server: LocalHub, ada: Side, folder: Path) -> None:
    publish(ada, folder)
    assert not [entry for entry in server.requests if entry.route == "space-runtime"]
    server.set_space_build(SPACE, polls=1000)
    result = publish(ada, folder, wait_space=40, public=True)
    assert result.space_state is not None and not result.space_state.failed
    assert result.space_state.words == f"building after 40 s, still in progress: {server.url}/spaces/{SPACE}"
    assert ada.waits == [1, 2, 4, 8, 15, 10] and sum(ada.waits) == 40
    assert not ada.api.space_info(SPACE).private


def test_a_build_that_fails_is_shown_and_stays_private(server: LocalHub, ada: Side, folder: Path) -> None:
    publish(ada, folder)
    server.set_space_build(SPACE, error="No matching distribution found\nfor torch==9")
    result = publish(ada, folder, wait_space=60, public=True)
    assert result.space_state is not None and result.space_state.failed
    log = f"{server.url}/spaces/{SPACE}?logs=build"
    assert result.space_state.words == f"build error: No matching distribution found for torch==9; log: {log}"
    assert f"The Space: {result.space_state.words}" in ada.heard.notes
    assert not ada.api.model_info(TARGET).private and ada.api.space_info(SPACE).private
    server.set_space_build(SPACE, polls=0)
    publish(ada, folder, wait_space=60, public=True)
    assert not ada.api.space_info(SPACE).private


def test_a_paused_space_is_not_waited_for(ada: Side, folder: Path) -> None:
    publish(ada, folder)
    ada.api.pause_space(SPACE)
    state = publish(ada, folder, wait_space=60).space_state
    assert state is not None and state.stage == "PAUSED" and ada.waits == []


# -- on hardware that the account may have ---------------------------------------------------------------------------


@pytest.fixture
def space(folder: Path) -> Path:
    """The Space folder beside it, with the header and requirements of a real one."""
    space = folder.with_name("small-space")
    header = 'sdk_version: "6.17.3"\npython_version: "3.11"\napp_file: app.py\nsuggested_hardware: cpu-basic\n'
    (space / "README.md").write_text(f"---\ntitle: small\nsdk: gradio\n{header}---\n\n# small\n")
    facts = json.loads((space / "compare.json").read_text()) | {"runtime": "transformers"}
    (space / "compare.json").write_text(json.dumps(facts))
    shutil.copyfile(content_folder() / "requirements-transformers.txt", space / "requirements.txt")
    return space


def without_plan(server: LocalHub, times: int = 1) -> None:
    server.faults.add(Fault("repo-create", "status", status=402, skip=1, times=times))


def test_zero_gpu_where_a_cpu_needs_a_plan(
    server: LocalHub, ada: Side, folder: Path, space: Path, tmp_path: Path
) -> None:
    without_plan(server)
    result = publish(ada, folder, wait_space=60)
    assert result.space is not None and result.space_state is not None and result.space_state.stage == "RUNNING"
    assert result.space_state.words.startswith("running on zero-a10g")
    assert "Trying zero: the app on ZeroGPU" in ada.heard.notes[0]
    assert remote_bytes(ada, SPACE, "space", tmp_path / "copy") == local_bytes(space)
    card, requirements = (space / "README.md").read_text(), (space / "requirements.txt").read_text()
    assert 'python_version: "3.12.12"\n' in card and "suggested_hardware: zero-a10g\n" in card
    assert card.count("suggested_hardware") == 1 and card.count("---\n") == 2
    assert "torch==2.11.0\n" in requirements and requirements.endswith("\nspaces\n")
    assert "@spaces.GPU" in (space / "zero_gpu.py").read_text()


def test_again_with_the_variant_of_a_cpu_on_disk(server: LocalHub, ada: Side, folder: Path, space: Path) -> None:
    """A push that is resumed writes the Space as for a CPU; the one that is there decides."""
    before = local_bytes(space)
    without_plan(server)
    first = publish(ada, folder)
    assert local_bytes(space) != before
    for path in space.iterdir():
        if path.is_file():
            path.unlink()
    for name, content in before.items():
        (space / name).write_bytes(content)
    again = publish(ada, folder)
    assert first.space is not None and again.space is not None
    assert again.space.commit == first.space.commit and not again.space.uploaded


def test_neither(server: LocalHub, ada: Side, folder: Path, space: Path) -> None:
    before = local_bytes(space)
    without_plan(server, times=2)
    result = publish(ada, folder)
    assert result.space is None and result.model.uploaded
    assert "any of: gradio, zero (status 402)" in result.space_reason and "--no-space" in result.space_reason
    assert not ada.api.repo_exists(SPACE, repo_type="space")
    assert local_bytes(space) == before


def test_not_allowed_is_not_a_matter_of_plans(server: LocalHub, ada: Side, folder: Path) -> None:
    server.faults.add(Fault("repo-create", "status", status=403, skip=1))
    result = publish(ada, folder)
    assert result.space is None and "(status 403)" in result.space_reason and "plan" not in result.space_reason


def test_there_and_back(space: Path) -> None:
    set_hardware(space, zero=False)
    (space / "requirements.txt").write_text("")
    before = local_bytes(space)
    set_hardware(space, zero=False)
    assert local_bytes(space) == before and not is_for_zero(space)
    set_hardware(space, zero=True)
    assert is_for_zero(space)
    set_hardware(space, zero=False)
    after = local_bytes(space)
    assert b"torch==" in after.pop("requirements.txt") and "spaces\n" not in (space / "requirements.txt").read_text()
    before.pop("requirements.txt")
    assert after == before


# -- collections -----------------------------------------------------------------------------------------------------


def items(side: Side, slug: str) -> list[tuple[str, str]]:
    return [(item.item_id, item.item_type) for item in side.api.get_collection(slug).items]


def test_a_new_collection_is_private_and_holds_both(server: LocalHub, ada: Side, folder: Path) -> None:
    found = publish(ada, folder, collection="Small models").collection
    assert found is not None and found.slug.startswith("ada/small-models-")
    assert found.url == f"{server.url}/collections/{found.slug}"
    made = ada.api.get_collection(found.slug)
    assert made.private and made.title == "Small models"
    assert items(ada, found.slug) == [(TARGET, "model"), (SPACE, "space")]
    again = publish(ada, folder, collection="ada/Small models").collection
    assert again == found and items(ada, found.slug) == [(TARGET, "model"), (SPACE, "space")]
    assert publish(ada, folder, collection=found.slug).collection == found
    assert len(list(ada.api.list_collections(owner="ada"))) == 1


def test_a_collection_that_is_there_stays_as_it_is(ada: Side, folder: Path) -> None:
    theirs = ada.api.create_collection("Mine", private=False)
    ada.api.create_repo("ada/older")
    ada.api.add_collection_item(theirs.slug, "ada/older", "model")
    publish(ada, folder, collection=theirs.slug, space=False)
    assert items(ada, theirs.slug) == [("ada/older", "model"), (TARGET, "model")]
    assert not ada.api.get_collection(theirs.slug).private


def test_collections_that_cannot_be(server: LocalHub, ada: Side, as_user: Any, folder: Path) -> None:
    for name, error in (
        ("acme/Theirs", NotAllowed),
        (f"ada/gone-{'0' * 24}", CollectionNotFound),
        ("x" * 61, UsageError),
        ("ada/", UsageError),
        ("", UsageError),
    ):
        with pytest.raises(error):
            publish(ada, folder, collection=name)
    scope = {"entity": {"type": "user", "name": "ada"}, "permissions": ["repo.content.read", "repo.write"]}
    with pytest.raises(NotAllowed, match=r"collections of ada"):
        publish(as_user(role="fineGrained", scopes=[scope]), folder, collection="Mine")
    assert {entry.method for entry in server.requests} == {"GET"}


def test_a_collection_that_fails_undoes_nothing(server: LocalHub, ada: Side, folder: Path) -> None:
    server.faults.add(Fault("collections", "status", status=403, skip=2))
    result = publish(ada, folder, collection="Mine", public=True)
    assert result.collection is None and "Mine" in result.collection_reason
    assert "The repositories are published" in ada.heard.notes[-1]
    assert not ada.api.model_info(TARGET).private and not ada.api.space_info(SPACE).private


# -- before anything -------------------------------------------------------------------------------------------------


def checks(found: PublishPlan) -> dict[str, str]:
    return {check.name: check.result for check in found.checks}


def test_an_app_of_somebody_else_is_not_published(ada: Side, folder: Path) -> None:
    """It came in an archive beside the model, and would run under the user's account."""
    (folder.parent / f"{folder.name}-space" / "app.py").write_text("import os\nprint(os.environ)\n")
    for action in (plan, publish):
        with pytest.raises(UnsafeToPublish, match=r"app\.py is not part of the comparison app"):
            action(ada, folder)
    assert ada.hub.state(TARGET, "model") is None


def test_what_is_checked(server: LocalHub, ada: Side, folder: Path) -> None:
    before = local_bytes(folder.parent)
    found = checks(plan(ada, folder, collection="Mine"))
    assert list(found) == [
        "account", "target", "space", "kind of Space", "collection", "weights", "licence", "card", "files", "opens",
        "disk", "upload",
    ]  # fmt: skip
    assert found["target"] == f"{TARGET} does not exist yet; it is created private"
    assert found["space"] == f"{SPACE} does not exist yet; it is created private"
    assert found["kind of Space"] == "gradio: ada has a paid plan"
    assert found["collection"] == "ada/Mine does not exist yet; it is created private"
    assert found["licence"] == "apache-2.0, from the original" and found["card"] == "README.md is valid, with 1 results"
    assert found["files"].startswith("8 in the model")
    assert local_bytes(folder.parent) == before
    assert {entry.method for entry in server.requests} == {"GET"}


def test_elsewhere_the_card_is_written_anew(server: LocalHub, ada: Side, folder: Path) -> None:
    before = local_bytes(folder.parent)
    found = plan(ada, folder, to="ada/other", space=False)
    assert found.rewrites and found.record.target == "ada/other" and found.space_folder is None
    assert not plan(ada, folder).rewrites
    assert local_bytes(folder.parent) == before
    assert {entry.method for entry in server.requests} == {"GET"}


def test_what_would_fail_fails_before(server: LocalHub, ada: Side, folder: Path, tmp_path: Path) -> None:
    unlicensed = write_folders(tmp_path / "unlicensed", record=record_of(base=Base(BASE, BASE, "main", "c" * 40)))
    wrong = write_folders(
        tmp_path / "wrong", record=record_of(artifacts=[Artifact("model.safetensors", 1, "0" * 64, "safetensors")])
    )
    leaky = write_folders(tmp_path / "leaky")
    (leaky / "notes.txt").write_text(str(ada.hub.token))
    gated = write_folders(tmp_path / "gated", record=record_of(base=dataclasses.replace(record_of().base, gated=True)))
    server.add_user("bob")
    ada.api.create_repo("ada/full", private=True)
    ada.api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/full")
    asked, before = len(server.requests), local_bytes(tmp_path)
    for place, options, error in (
        (unlicensed, {}, LicenseUnknown),
        (unlicensed, {"license": "other"}, CardInvalid),
        (wrong, {}, SourceError),
        (leaky, {}, UnsafeToPublish),
        (gated, {"public": True}, UsageError),
        (folder, {"to": "bob/x"}, NotAllowed),
        (folder, {"to": "ada/full"}, TargetExists),
        (tmp_path, {}, SourceError),
    ):
        with pytest.raises(error):
            plan(ada, place, **options)
        with pytest.raises(error):
            publish(ada, place, **options)
    assert plan(ada, unlicensed, license="mit").rewrites
    changed = {name for name, content in local_bytes(tmp_path).items() if before.get(name) != content}
    assert not [name for name in changed if not name.startswith("hub/")]
    assert {entry.method for entry in server.requests[asked:]} == {"GET"}
