"""Publishing where nothing breaks: what goes over the wire, whose repositories are touched, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.card.card import write_card
from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import (
    LicenseUnknown,
    NotAllowed,
    RepositoryNotFound,
    TargetExists,
    TargetPublic,
    UsageError,
    VerificationError,
)
from gradmap_hub.evaluation.staleness import folder_sha256
from gradmap_hub.local_hub import LocalHub
from gradmap_hub.measurements import BeforeAfter, Measured, MeasuredMetric, MeasuredTask, MeasuredText
from gradmap_hub.pipeline.publish import PushResult, publish_folder
from gradmap_hub.record import Base, RunRecord

from .conftest import BASE, SPACE, TARGET, Side, local_bytes, record_of, remote_bytes, tensors, write_folders


def publish(side: Side, folder: Path, **options: Any) -> PushResult:
    config = PublishConfig(**{"wait_space": 0, **options})
    return publish_folder(folder, config, hub=side.hub, reporter=side.heard)


def copy_of(folder: Path, to: Path) -> Path:
    """The model folder and its Space beside it."""
    to.mkdir()
    shutil.copytree(folder, to / "small")
    shutil.copytree(folder.with_name("small-space"), to / "small-space")
    return to / "small"


def titles(side: Side, repo_id: str, kind: str = "model") -> list[str]:
    return [item.title for item in side.api.list_repo_commits(repo_id, repo_type=kind)]


def evaluated(folder: Path) -> RunRecord:
    """A record with an evaluation of the folder's files."""
    metric = MeasuredMetric("acc", 0.6, 0.55, [-0.1, 0.0], 91.7)
    task = MeasuredTask(
        "boolq", "2.0", "aps/super_glue", "boolq", "validation", "aps/super_glue", 3270, 3270, "7" * 64, "acc", [metric]
    )
    text = MeasuredText(
        "wiki", "6" * 64, 4, 2048, 512, 12.0, 15.0, [1.1, 1.4], 0.5, [0.4, 0.6], 0.25, [0.2, 0.3]
    )  # fmt: skip
    measured = Measured(
        "0.1.0", folder_sha256(folder), BASE, "c" * 40, "5" * 64, BeforeAfter(600, 400), "float32", [text], [task]
    )
    return record_of(measured=measured)


# -- one push --------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_published_with_its_weights_only(
    server: LocalHub, ada: Side, folder: Path, tmp_path: Path
) -> None:
    record = evaluated(folder)
    record.write(folder)
    write_card(record, folder)
    publish(ada, folder)
    there = remote_bytes(ada, TARGET, "model", tmp_path / "first")
    assert there == local_bytes(folder) and b"value: 55.0" in there[".eval_results/boolq.yaml"]
    assert b"boolq" in there["README.md"]
    (folder / "model.safetensors").write_bytes(tensors(9))
    publish(ada, folder, update=True)
    there = remote_bytes(ada, TARGET, "model", tmp_path / "second")
    assert there == local_bytes(folder) and ".eval_results/boolq.yaml" not in there
    assert b"boolq" not in there["README.md"] and b"evaluation of other weights is not shown" in there["README.md"]
    assert json.loads(there["gradmap.json"])["measured"] is None
    assert any("evaluation of other weights" in note for note in ada.heard.notes)


def test_model_and_space(server: LocalHub, ada: Side, folder: Path, tmp_path: Path) -> None:
    result = publish(ada, folder)
    assert result.space is not None and result.model.uploaded and result.space.uploaded
    for published, kind, local in ((result.model, "model", folder), (result.space, "space", result.space_folder)):
        assert local is not None
        info = ada.api.repo_info(published.repo_id, repo_type=kind)
        assert info.sha == published.commit and info.private
        assert remote_bytes(ada, published.repo_id, kind, tmp_path / kind) == local_bytes(local)
        assert len(titles(ada, published.repo_id, kind)) == 2
    variables = ada.api.get_space_variables(SPACE)
    assert variables["PRUNED_REVISION"].value == result.model.commit
    commits = [entry for entry in server.requests if entry.route == "commit"]
    # No bytes of large files in it, however small they are here.
    # Large files are not in them; the app of the Space is.
    assert [entry.received < (50_000 if "/spaces/" in entry.path else 15_000) for entry in commits] == [True, True]


def test_each_large_file_has_a_line_with_bytes_and_rate(ada: Side, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(tensors(0, 12_000_000))
    publish(ada, folder, space=False)
    lines = [line for line in ada.heard.lines if line.startswith("Uploading")]
    assert [line.split(":")[0] for line in lines] == [
        "Uploading assets/layers.png", "Uploading onnx/model.onnx", "Uploading model.safetensors",
    ]  # fmt: skip
    assert "12.0 MB, " in lines[-1] and lines[-1].endswith("/s")
    assert ada.heard.told == sum((folder / line.split(":")[0].split()[1]).stat().st_size for line in lines)


def test_a_file_in_parts(tmp_path: Path, point_client_at: Callable[[str], None], folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(tensors(0, 1_000_000))
    with LocalHub(tmp_path / "own", multipart_bytes=300_000) as server:
        point_client_at(server.url)
        from gradmap_hub.hub.client import Hub

        hub = Hub(server.url, server.add_user("ada"))
        publish_folder(folder, PublishConfig(space=False), hub=hub)
        parts = [entry for entry in server.requests if entry.route == "lfs-part"]
        assert (
            len(parts) == 4 and sum(entry.received for entry in parts) == (folder / "model.safetensors").stat().st_size
        )


def test_again_does_nothing(server: LocalHub, ada: Side, folder: Path) -> None:
    first = publish(ada, folder)
    asked = len(server.requests)
    again = publish(ada, folder)
    assert again.model.commit == first.model.commit and not again.model.uploaded
    routes = {entry.route for entry in server.requests[asked:]}
    assert not routes & {"lfs-put", "commit", "repo-create", "repo-settings", "preupload"}
    assert any("already published" in line for line in ada.heard.lines)


def test_public_comes_last(server: LocalHub, ada: Side, folder: Path) -> None:
    publish(ada, folder, public=True)
    routes = [entry.route for entry in server.requests]
    assert routes[-2:] == ["repo-settings", "repo-settings"]
    assert not ada.api.model_info(TARGET).private and not ada.api.space_info(SPACE).private


def test_a_damaged_copy_is_noticed(ada: Side, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmap_hub.hub import publisher as publishing

    plain = publishing.sha256_of
    monkeypatch.setattr(publishing, "sha256_of", lambda path: plain(path) + "x" * ("gradmap-verify" in str(path)))
    with pytest.raises(VerificationError, match="differs from the uploaded file"):
        publish(ada, folder, public=True)
    assert ada.api.model_info(TARGET).private


# -- what is there already -------------------------------------------------------------------------------------------


def test_an_empty_private_repository_is_filled(ada: Side, folder: Path) -> None:
    ada.api.create_repo(TARGET, private=True)
    assert publish(ada, folder, space=False).model.uploaded


def test_an_empty_public_repository_is_not_changed_silently(server: LocalHub, ada: Side, folder: Path) -> None:
    ada.api.create_repo(TARGET, private=False)
    asked = len(server.requests)
    with pytest.raises(TargetPublic) as caught:
        publish(ada, folder, space=False)
    assert "--public" in str(caught.value.hint)
    assert {entry.method for entry in server.requests[asked:]} == {"GET"}
    assert not ada.api.model_info(TARGET).private
    assert publish(ada, folder, space=False, public=True).model.uploaded


def test_other_content_is_left_alone(ada: Side, folder: Path, tmp_path: Path) -> None:
    ada.api.create_repo("ada/thesis", private=True)
    ada.api.upload_file(path_or_fileobj=b"years", path_in_repo="thesis.txt", repo_id="ada/thesis")
    content = local_bytes(folder)
    for update in (False, True):
        with pytest.raises(TargetExists, match="was not changed"):
            publish(ada, folder, to="ada/thesis", update=update)
    assert local_bytes(folder) == content
    assert set(remote_bytes(ada, "ada/thesis", "model", tmp_path / "copy")) == {"thesis.txt"}


def test_a_foreign_space_keeps_its_variables(ada: Side, folder: Path) -> None:
    ada.api.create_repo(SPACE, repo_type="space", space_sdk="gradio", private=True)
    ada.api.upload_file(path_or_fileobj=b"print()", path_in_repo="app.py", repo_id=SPACE, repo_type="space")
    with pytest.raises(TargetExists):
        publish(ada, folder)
    assert ada.api.get_space_variables(SPACE) == {}


# -- --update --------------------------------------------------------------------------------------------------------


@pytest.fixture
def second(ada: Side, folder: Path, tmp_path: Path) -> Path:
    """A later push of the same model to the same names, after the first was published: other weights, no ONNX."""
    publish(ada, folder)
    later = write_folders(tmp_path / "later", seed=7)
    shutil.rmtree(later / "onnx")
    shutil.rmtree(later.with_name("small-space") / "original")
    return later


def test_update_replaces_an_earlier_push(
    server: LocalHub, ada: Side, folder: Path, second: Path, tmp_path: Path, sent: Any
) -> None:
    with pytest.raises(TargetExists) as caught:
        publish(ada, second)
    assert "--update" in str(caught.value.hint)
    asked = len(server.requests)
    publish(ada, second, update=True)
    for repo_id, kind, local in ((TARGET, "model", second), (SPACE, "space", second.with_name("small-space"))):
        assert remote_bytes(ada, repo_id, kind, tmp_path / kind) == local_bytes(local)
        assert len(titles(ada, repo_id, kind)) == 3
        assert ada.api.repo_info(repo_id, repo_type=kind).private
    assert any("onnx/model.onnx" in note for note in ada.heard.notes)
    assert len(sent(server.requests[asked:])) == 2  # weights and plot; the rest is the same, or small
    # Its history keeps what went.
    before = ada.api.list_repo_commits(TARGET)[1].commit_id
    assert remote_bytes(ada, TARGET, "model", tmp_path / "before", before) == local_bytes(folder)


def test_update_again_does_nothing(server: LocalHub, ada: Side, second: Path) -> None:
    publish(ada, second, update=True)
    asked = len(server.requests)
    publish(ada, second, update=True)
    assert not {entry.route for entry in server.requests[asked:]} & {"lfs-put", "commit"}


@pytest.mark.parametrize(
    "record",
    [record_of(base=Base("acme/other", "acme/other", license="mit")), record_of(target="ada/elsewhere")],
    ids=["other base", "other target"],
)
def test_update_knows_its_own(ada: Side, folder: Path, second: Path, tmp_path: Path, record: RunRecord) -> None:
    """What lies there names another original, or was made for another name: copied there, say."""
    ada.api.upload_file(
        path_or_fileobj=json.dumps(dataclasses.asdict(record)).encode(), path_in_repo="gradmap.json", repo_id=TARGET
    )
    before = remote_bytes(ada, TARGET, "model", tmp_path / "before")
    with pytest.raises(TargetExists, match="does not hold an earlier push"):
        publish(ada, second, update=True)
    assert remote_bytes(ada, TARGET, "model", tmp_path / "after") == before


def test_update_loses_nothing_of_the_users(ada: Side, second: Path) -> None:
    ada.api.upload_file(path_or_fileobj=b"{}", path_in_repo="results/mine.json", repo_id=TARGET)
    with pytest.raises(TargetExists, match=r"results/mine\.json"):
        publish(ada, second, update=True)
    assert "results/mine.json" in ada.api.list_repo_files(TARGET)


def test_update_of_what_is_public_by_now(server: LocalHub, ada: Side, second: Path) -> None:
    server.set_private(TARGET, False)
    with pytest.raises(TargetPublic):
        publish(ada, second, update=True, space=False)
    assert publish(ada, second, update=True, space=False, public=True).model.uploaded


# -- --create-pr -----------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(server: LocalHub, tmp_path: Path) -> str:
    """A public repository of somebody else."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    (theirs / "notes.txt").write_text("kept")
    server.seed("acme/pruned", theirs)
    return "acme/pruned"


def test_pull_request(server: LocalHub, ada: Side, folder: Path, foreign: str, tmp_path: Path) -> None:
    before = ada.api.model_info(foreign)
    result = publish(ada, folder, to=foreign, create_pr=True)
    assert result.model.pull_request == f"{server.url}/{foreign}/discussions/1"
    assert result.space is None and "pull request" in result.space_reason
    after = ada.api.model_info(foreign)
    assert (after.sha, after.private) == (before.sha, before.private)
    assert after.sha != result.model.commit
    proposed = remote_bytes(ada, foreign, "model", tmp_path / "pr", "refs/pr/1")
    assert proposed == local_bytes(folder) | {"notes.txt": b"kept"}
    assert not {entry.route for entry in server.requests} & {"repo-create", "repo-settings"}


def test_the_same_pull_request_is_opened_once(server: LocalHub, ada: Side, folder: Path, foreign: str) -> None:
    first = publish(ada, folder, to=foreign, create_pr=True)
    again = publish(ada, folder, to=foreign, create_pr=True)
    assert again.model.pull_request == first.model.pull_request and not again.model.uploaded


def test_a_closed_pull_request_is_not_one(ada: Side, as_user: Any, folder: Path, foreign: str) -> None:
    """What was turned down or withdrawn is proposed anew; of two, the open one counts."""
    first = publish(ada, folder, to=foreign, create_pr=True).model
    ada.api.change_discussion_status(foreign, 1, "closed")
    second = publish(ada, folder, to=foreign, create_pr=True).model
    assert second.uploaded and second.pull_request != first.pull_request
    assert not publish(ada, folder, to=foreign, create_pr=True).model.uploaded
    assert [entry.num for entry in ada.api.get_repo_discussions(foreign, discussion_status="open")] == [2]


@pytest.mark.parametrize("kind", ["reset-after", "truncate", "reset-before"])
def test_a_pull_request_whose_answer_is_lost(
    server: LocalHub, ada: Side, folder: Path, foreign: str, kind: Any
) -> None:
    from gradmap_hub.local_hub import Fault

    server.faults.add(Fault("commit", kind))
    result = publish(ada, folder, to=foreign, create_pr=True)
    refs = ada.api.list_repo_refs(foreign, include_pull_requests=True).pull_requests or []
    assert [(ref.ref, ref.target_commit) for ref in refs] == [("refs/pr/1", result.model.commit)]


def test_pull_request_needs_a_repository_and_excludes_the_rest(ada: Side, folder: Path, foreign: str) -> None:
    with pytest.raises(RepositoryNotFound):
        publish(ada, folder, to="acme/nothing", create_pr=True)
    wrong = ({"to": None}, *({"to": foreign, **more} for more in ({"public": True}, {"update": True},
                                                                 {"collection": "x"})))  # fmt: skip
    for options in wrong:
        with pytest.raises(UsageError, match="--create-pr"):
            publish(ada, folder, create_pr=True, **options)
    with pytest.raises(NotAllowed):
        publish(ada, folder, to=foreign)


# -- tokens ----------------------------------------------------------------------------------------------------------


def scope(kind: str, name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"type": kind, "name": name}, "permissions": list(permissions)}


def only_read(server: LocalHub, asked: int = 0) -> bool:
    return {entry.method for entry in server.requests[asked:]} <= {"GET", "HEAD"}


@pytest.mark.parametrize(
    "scopes",
    [
        (),
        (scope("user", "ada", "repo.content.read"),),
        (scope("org", "club", "repo.content.read", "repo.write"),),
        (scope("model", TARGET, "repo.content.read", "repo.write"),),  # covers it, and cannot create it
        (scope("model", "ada/other", "repo.write"), scope("space", TARGET, "repo.write")),
    ],
)
def test_fine_grained_token_that_does_not_cover_the_target(
    server: LocalHub, as_user: Any, folder: Path, scopes: Any
) -> None:
    ada = as_user(role="fineGrained", scopes=scopes)
    with pytest.raises(NotAllowed, match="fine-grained token does not cover"):
        publish(ada, folder)
    assert only_read(server)


def test_fine_grained_token_that_covers_the_target(ada: Side, as_user: Any, folder: Path) -> None:
    whole = as_user(role="fineGrained", scopes=[scope("user", "ada", "repo.content.read", "repo.write")])
    assert publish(whole, folder).model.uploaded
    ada.api.create_repo("ada/there", private=True)
    permissions = ("repo.content.read", "repo.write")
    one = as_user(role="fineGrained", scopes=[scope("model", "ada/there", *permissions)])
    assert publish(one, folder, to="ada/there", space=False).model.uploaded


def test_fine_grained_token_and_pull_requests(server: LocalHub, as_user: Any, folder: Path, foreign: str) -> None:
    without = as_user(role="fineGrained", scopes=[scope("user", "ada", "repo.write")])
    with pytest.raises(NotAllowed, match="does not cover"):
        publish(without, folder, to=foreign, create_pr=True)
    assert only_read(server)
    covered = as_user(role="fineGrained", scopes=[scope("org", "acme", "discussion.write")])
    assert publish(covered, folder, to=foreign, create_pr=True).model.pull_request


def test_read_token(server: LocalHub, as_user: Any, folder: Path) -> None:
    with pytest.raises(NotAllowed, match="is read-only"):
        publish(as_user(role="read"), folder)
    assert only_read(server)


def test_member_who_may_only_read() -> None:
    from gradmap_hub.hub.accounts import account_of, check_owner

    answer = {
        "name": "ada",
        "auth": {"accessToken": {"role": "write"}},
        "orgs": [{"name": "acme", "roleInOrg": "read"}, {"name": "club", "roleInOrg": "contributor"}],
    }
    account = account_of(answer)
    check_owner("club/x", "club", account)
    with pytest.raises(NotAllowed, match="read-only access to acme"):
        check_owner("acme/x", "acme", account)


# -- --license -------------------------------------------------------------------------------------------------------


@pytest.fixture
def unlicensed(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "unlicensed", record=record_of(base=Base(BASE, BASE, "main", "c" * 40)))


def test_license_for_a_record_without_one(ada: Side, unlicensed: Path, tmp_path: Path) -> None:
    with pytest.raises(LicenseUnknown):
        publish(ada, unlicensed, space=False)
    with pytest.raises(UsageError, match="mine-all-mine"):
        publish(ada, unlicensed, space=False, license="mine-all-mine")
    assert "license" not in str(ada.heard.lines)
    publish(ada, unlicensed, space=False, license="mit")
    record = RunRecord.read(unlicensed)
    assert (record.base.license, record.base.license_source) == ("mit", "publisher")
    assert b"license: mit" in remote_bytes(ada, TARGET, "model", tmp_path / "copy")["README.md"]
    publish(ada, unlicensed, space=False, license="apache-2.0", update=True)  # whoever stated it may correct it
    assert RunRecord.read(unlicensed).base.license == "apache-2.0"


def test_license_other_needs_a_name_and_a_link(server: LocalHub, ada: Side, unlicensed: Path, tmp_path: Path) -> None:
    from gradmap_hub.errors import CardInvalid

    with pytest.raises(CardInvalid) as caught:
        publish(ada, unlicensed, space=False, license="other")
    assert "--license-name" in str(caught.value.hint) and only_read(server)
    publish(ada, unlicensed, space=False, license="other", license_name="Ours", license_link="LICENSE")
    card = remote_bytes(ada, TARGET, "model", tmp_path / "copy")["README.md"].decode()
    assert "license: other\nlicense_name: Ours\nlicense_link: LICENSE\n" in card


def test_license_against_the_original(ada: Side, folder: Path) -> None:
    with pytest.raises(UsageError, match="states its licence, apache"):
        publish(ada, folder, license="mit")
    assert publish(ada, folder, license="apache-2.0", space=False).model.uploaded
