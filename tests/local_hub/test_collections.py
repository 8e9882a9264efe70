"""Collections, and pull requests as discussions."""

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.community import DiscussionComment, DiscussionCommit
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.local_hub import LocalHub


def status_of(error: HfHubHTTPError) -> int:
    assert error.response is not None
    return error.response.status_code


def test_collection(hub: LocalHub, ada: HfApi, anonymous: HfApi) -> None:
    for number in range(6):
        ada.create_repo(f"ada/tiny{number}")
    ada.create_repo("ada/app", repo_type="space", space_sdk="gradio")
    made = ada.create_collection("Pruned & small!", namespace="acme", description="What was cut")
    assert made.slug.startswith("acme/pruned-small-") and made.items == [] and made.owner["name"] == "acme"  # pyright: ignore
    assert made.url == f"{hub.url}/collections/{made.slug}"
    added = ada.add_collection_item(made.slug, "ada/tiny0", "model", note="The first")
    [item] = added.items
    assert (item.item_id, item.item_type, item.position, item.note) == ("ada/tiny0", "model", 0, "The first")
    ada.add_collection_item(made.slug, "ada/app", "space")
    for number in range(1, 6):
        ada.add_collection_item(made.slug, f"ada/tiny{number}", "model")
    ada.add_collection_item(made.slug, "2307.09288", "paper")
    found = anonymous.get_collection(made.slug)
    assert [item.position for item in found.items] == list(range(8)) and found.description == "What was cut"
    [listed] = anonymous.list_collections(owner="acme")
    assert listed.slug == made.slug and len(listed.items) == 4
    assert not list(anonymous.list_collections(owner="ada"))
    assert [row.slug for row in anonymous.list_collections(item="spaces/ada/app")] == [made.slug]
    hub.stop()
    hub.start()
    assert len(HfApi(endpoint=hub.url, token=False).get_collection(made.slug).items) == 8


def test_what_is_there_already(ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    made = ada.create_collection("Pruned")
    with pytest.raises(HfHubHTTPError) as exists:
        ada.create_collection("Pruned")
    assert status_of(exists.value) == 409
    assert ada.create_collection("Pruned", exists_ok=True).slug == made.slug
    assert ada.create_collection("Pruned", namespace="acme").slug != made.slug
    ada.add_collection_item(made.slug, "ada/tiny", "model")
    with pytest.raises(HfHubHTTPError) as exists:
        ada.add_collection_item(made.slug, "ada/tiny", "model")
    assert status_of(exists.value) == 409
    assert len(ada.add_collection_item(made.slug, "ada/tiny", "model", exists_ok=True).items) == 1


def test_who_may_do_what(hub: LocalHub, ada: HfApi, bob: HfApi, anonymous: HfApi) -> None:
    ada.create_repo("ada/secret", private=True)
    ada.create_repo("ada/tiny")
    private = ada.create_collection("Mine", private=True)
    public = ada.create_collection("Ours")
    ada.add_collection_item(public.slug, "ada/secret", "model")
    ada.add_collection_item(public.slug, "ada/tiny", "model")
    assert [item.item_id for item in bob.get_collection(public.slug).items] == ["ada/tiny"]
    assert [row.title for row in anonymous.list_collections()] == ["Ours"]
    assert [row.title for row in ada.list_collections()] == ["Ours", "Mine"]
    reader = HfApi(endpoint=hub.url, token=hub.add_user("ada", role="read"))
    refusals = [
        (404, lambda: bob.get_collection(private.slug)),
        (404, lambda: ada.get_collection("ada/nothing-0123")),
        (403, lambda: bob.add_collection_item(public.slug, "ada/tiny", "model")),
        (403, lambda: bob.create_collection("Theirs", namespace="ada")),
        (403, lambda: reader.create_collection("Read only")),
        (404, lambda: ada.add_collection_item(public.slug, "ada/nothing", "model")),
    ]
    for status, action in refusals:
        with pytest.raises(HfHubHTTPError) as refused:
            action()
        assert status_of(refused.value) == status
    with pytest.raises(HfHubHTTPError, match="title must have"):
        ada.create_collection("x" * 61)


def test_pull_request_of_a_reader(hub: LocalHub, ada: HfApi, bob: HfApi) -> None:
    ada.create_repo("ada/tiny")
    made = bob.create_commit(
        "ada/tiny",
        [CommitOperationAdd("a.txt", b"1")],
        commit_message="Add a",
        commit_description="It was missing",
        create_pr=True,
    )
    assert made.pr_url == f"{hub.url}/ada/tiny/discussions/1" and made.pr_num == 1
    bob.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="ada/tiny", revision="refs/pr/1")
    [listed] = ada.get_repo_discussions("ada/tiny")
    assert (listed.num, listed.title, listed.author, listed.status) == (1, "Add a", "bob", "open")
    assert listed.is_pull_request and listed.repo_id == "ada/tiny" and listed.git_reference == "refs/pr/1"
    details = ada.get_discussion_details("ada/tiny", 1)
    comment, *commits = details.events
    assert isinstance(comment, DiscussionComment) and comment.content == "It was missing"
    summaries = [event.summary for event in commits if isinstance(event, DiscussionCommit)]
    assert len(summaries) == 2 and summaries[0] == "Add a"
    assert details.target_branch == "refs/heads/main" and details.conflicting_files == []
    with pytest.raises(HfHubHTTPError) as missing:
        ada.get_discussion_details("ada/tiny", 2)
    assert status_of(missing.value) == 404


def test_drafts_and_filters(ada: HfApi, bob: HfApi) -> None:
    ada.create_repo("ada/rows", repo_type="dataset")
    draft = bob.create_pull_request("ada/rows", "More rows", repo_type="dataset", description="Please")
    assert draft.status == "draft" and draft.num == 1 and draft.is_pull_request
    bob.upload_file(
        path_or_fileobj=b"1", path_in_repo="a.csv", repo_id="ada/rows", repo_type="dataset", revision="refs/pr/1"
    )
    assert "a.csv" not in ada.list_repo_files("ada/rows", repo_type="dataset")
    assert "a.csv" in ada.list_repo_files("ada/rows", repo_type="dataset", revision=draft.git_reference)
    for number in range(55):
        ada.create_pull_request("ada/rows", f"Change {number}", repo_type="dataset")
    every = list(ada.get_repo_discussions("ada/rows", repo_type="dataset"))
    assert [one.num for one in every] == list(range(56, 0, -1))
    assert [one.num for one in ada.get_repo_discussions("ada/rows", repo_type="dataset", author="bob")] == [1]
    assert not list(ada.get_repo_discussions("ada/rows", repo_type="dataset", discussion_status="closed"))
    with pytest.raises(HfHubHTTPError, match="Only pull requests"):
        ada.create_discussion("ada/rows", "Just talk", repo_type="dataset")


def test_closing_and_opening_again(ada: HfApi, bob: HfApi, hub: LocalHub) -> None:
    ada.create_repo("ada/tiny")
    carl = HfApi(endpoint=hub.url, token=hub.add_user("carl"))
    bob.create_pull_request("ada/tiny", "First")
    bob.create_pull_request("ada/tiny", "Second")
    assert bob.change_discussion_status("ada/tiny", 1, "closed").new_status == "closed"  # its author
    assert ada.change_discussion_status("ada/tiny", 2, "closed").new_status == "closed"  # the owner
    with pytest.raises(HfHubHTTPError) as refused:
        carl.change_discussion_status("ada/tiny", 1, "open")
    assert status_of(refused.value) == 403
    ada.change_discussion_status("ada/tiny", 2, "open")
    numbers = {
        status: [one.num for one in ada.get_repo_discussions("ada/tiny", discussion_status=status)]
        for status in ("open", "closed", "all")
    }
    assert numbers == {"open": [2], "closed": [1], "all": [2, 1]}
    assert ada.get_discussion_details("ada/tiny", 1).status == "closed"
    # What it proposed is still to be read.
    refs = ada.list_repo_refs("ada/tiny", include_pull_requests=True).pull_requests or []
    assert [ref.ref for ref in refs] == ["refs/pr/1", "refs/pr/2"]
