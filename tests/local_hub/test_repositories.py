"""Metadata, cards, Spaces, seeding, and what survives a restart."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, ModelCard, SpaceHardware, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile, RepoFolder

from gradmap_hub.local_hub import LocalHub

Sums = Callable[[Path], dict[str, str]]


def test_model_info(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
    ada.create_repo("acme/tiny")
    made = ada.upload_folder(repo_id="acme/tiny", folder_path=folder)
    info = ada.model_info("acme/tiny", files_metadata=True)
    assert info.sha == made.oid and info.author == "acme" and info.gated is False and info.private is False
    assert info.config == {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert info.pipeline_tag == "text-generation" and info.library_name == "transformers"
    assert info.card_data is not None and info.card_data["license"] == "mit"
    # Neither the card nor the Hub says how the ONNX files came about.
    assert {"license:mit", "safetensors", "onnx", "base_model:quantized:acme/base"} <= set(info.tags or [])
    assert info.safetensors is not None and info.safetensors.total == 32
    rows = {row.rfilename: row for row in info.siblings or []}
    assert rows["onnx/model.onnx"].lfs is not None and rows["onnx/model.onnx"].lfs["size"] == 20_000
    assert rows["LICENSE"].lfs is None and rows["LICENSE"].size == 12
    first = ada.list_repo_commits("acme/tiny")[-1]
    assert first.title == "initial commit" and first.authors == ["ada"]
    assert ada.model_info("acme/tiny", revision=first.commit_id).pipeline_tag is None
    assert ada.model_info("acme/tiny", expand=["gated", "sha"]).sha == made.oid
    assert ModelCard.load("acme/tiny").data.to_dict()["license"] == "mit"


def test_default_attributes_are_the_hubs(ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    [file] = ada.list_repo_tree("ada/tiny")
    assert isinstance(file, RepoFile)
    # The blob that a new model on huggingface.co has.
    assert file.blob_id == "a6344aac8c09253b3b630fb776ae94478aa0275b" and file.size == 1519


def test_tree(ada: HfApi, folder: Path) -> None:
    ada.create_repo("ada/tiny")
    ada.upload_folder(repo_id="ada/tiny", folder_path=folder)
    top = {row.path: row for row in ada.list_repo_tree("ada/tiny")}
    assert isinstance(top["onnx"], RepoFolder) and "onnx/model.onnx" not in top
    inside = list(ada.list_repo_tree("ada/tiny", "onnx", recursive=True, expand=True))
    assert [row.path for row in inside] == ["onnx/model.onnx"]
    assert inside[0].last_commit is not None
    paths = ada.get_paths_info("ada/tiny", ["LICENSE", "onnx", "missing"], expand=True)
    assert {row.path for row in paths} == {"LICENSE", "onnx"}
    with pytest.raises(HfHubHTTPError):
        list(ada.list_repo_tree("ada/tiny", "nowhere"))


def test_last_commit_of_each_file(ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    first = ada.upload_file(path_or_fileobj=b"1", path_in_repo="d/a.txt", repo_id="ada/tiny").oid
    second = ada.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="ada/tiny").oid
    rows = {row.path: row.last_commit for row in ada.list_repo_tree("ada/tiny", recursive=True, expand=True)}
    assert {path: row.oid for path, row in rows.items() if row and path != ".gitattributes"} == {
        "d": first,
        "d/a.txt": first,
        "b.txt": second,
    }


def test_long_listings_come_in_pages(hub: LocalHub, ada: HfApi, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(2300):
        (many / f"{number:04}.txt").write_text(str(number))
    hub.seed("ada/many", many)
    assert len(list(ada.list_repo_tree("ada/many", recursive=True))) == 2301
    pages = [request for request in hub.requests if "/tree/" in request.path]
    assert len(pages) == 3 and "cursor=1000" in pages[1].query


def test_commit_and_tree_ids_are_gits(hub: LocalHub, ada: HfApi, tmp_path: Path) -> None:
    root = tmp_path / "src"
    (root / "a").mkdir(parents=True)
    for name in ("a/x.txt", "a.txt", "a-b"):
        (root / name).write_text(name)
    hub.seed("ada/tiny", root)
    rows = {row.path: row for row in ada.list_repo_tree("ada/tiny")}
    git = {"cwd": root, "capture_output": True, "text": True, "check": True}
    subprocess.run(["git", "init", "-q"], **git)
    subprocess.run(["git", "-c", "core.autocrlf=false", "add", "a"], **git)
    tree = subprocess.run(["git", "write-tree", "--prefix=a/"], **git).stdout.strip()
    folder = rows["a"]
    assert isinstance(folder, RepoFolder) and folder.tree_id == tree


BAD_CARDS = {
    "license: [unclosed": "Invalid YAML",
    "- a\n- b": "must be a mapping",
    "license: my-own": '"license" must be one of',
    "license: mit\nlicense: mit": "duplicated mapping key",
    "tags: pruned": '"tags" must be an array',
    "base_model_relation: pruned": '"base_model_relation" must be one of',
    "model-index:\n- name: x\n  results:\n  - task: {type: a}": r"results\[0\]\.dataset",
    "score: .nan": "cannot be written as JSON",
    "a: &a [*a]": "too large",
    "a: &a [x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in pairwise("abcdefghijklm")
    ): "too large",
    "model-index: 3": '"model-index" must be an array',
}


def test_bad_cards_are_refused(hub: LocalHub, ada: HfApi) -> None:
    ada.create_repo("ada/tiny")
    for card, message in BAD_CARDS.items():
        content = f"---\n{card}\n---\n".encode()
        with pytest.raises(ValueError, match=message):
            ada.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id="ada/tiny")
    assert not any("/preupload/" in request.path for request in hub.requests)


GOOD_CARDS = [
    "---\nlanguage: [en, deu, code]\n---\n",
    "---\nlicense: other\nlicense_name: mine\nlanguage: no\ntags: [pruned]\n---\n",
    "---\nlicense: llama3.2\nbase_model: [gpt2, a/b]\nbase_model_relation: finetune\n"
    "model-index:\n- name: x\n"
    "  results:\n  - task: {type: text-generation}\n    dataset: {name: W, type: wikitext}\n"
    "    metrics: [{type: perplexity, value: 12.5}]\n---\n",
]


def test_good_cards_pass(ada: HfApi, tmp_path: Path) -> None:
    ada.create_repo("ada/tiny")
    for card in GOOD_CARDS:
        ada.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="ada/tiny")
        file = ada.hf_hub_download("ada/tiny", "README.md", cache_dir=tmp_path / "c")
        assert Path(file).read_text() == card
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        ada.upload_file(path_or_fileobj=b"# Bare", path_in_repo="README.md", repo_id="ada/tiny")


def test_space(hub: LocalHub, ada: HfApi, bob: HfApi) -> None:
    url = ada.create_repo(
        "ada/app",
        repo_type="space",
        space_sdk="gradio",
        space_variables=[{"key": "MODEL_ID", "value": "ada/tiny", "description": "Which"}],
        space_secrets=[{"key": "HF_TOKEN", "value": "hush-hush"}],
    )
    assert str(url) == f"{hub.url}/spaces/ada/app" and url.repo_type == "space"
    assert ada.get_space_variables("ada/app")["MODEL_ID"].description == "Which"
    ada.add_space_variable("ada/app", "OTHER", "1")
    left = ada.delete_space_variable("ada/app", "MODEL_ID")
    assert {key: row.value for key, row in left.items()} == {"OTHER": "1"}
    ada.add_space_secret("ada/app", "SECOND", "hush-hush")
    ada.delete_space_secret("ada/app", "SECOND")
    assert not any(b"hush" in file.read_bytes() for file in hub.root.rglob("*") if file.is_file())
    with pytest.raises(HfHubHTTPError):
        bob.get_space_variables("ada/app")
    assert ada.get_space_runtime("ada/app").stage == "NO_APP_FILE"
    ada.upload_file(path_or_fileobj=b"pass", path_in_repo="app.py", repo_id="ada/app", repo_type="space")
    assert ada.get_space_runtime("ada/app").stage == "BUILDING"
    info = ada.space_info("ada/app")
    assert info.sdk == "gradio" and info.runtime is not None
    assert info.runtime.requested_hardware == "cpu-basic"
    with pytest.raises(ValueError, match='"sdk" must be one of'):
        ada.upload_file(
            path_or_fileobj=b"---\nsdk: flask\n---\n",
            path_in_repo="README.md",
            repo_id="ada/app",
            repo_type="space",
        )


def test_spaces_without_a_paid_plan(tmp_path: Path, point_client_at: Callable[[str], None]) -> None:
    with LocalHub(tmp_path / "hub", paid_plan=False) as hub:
        point_client_at(hub.url)
        api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
        with pytest.raises(HfHubHTTPError, match="requires a PRO subscription") as refused:
            api.create_repo("ada/app", repo_type="space", space_sdk="gradio", exist_ok=True)
        assert refused.value.response is not None and refused.value.response.status_code == 402
        assert not api.repo_exists("ada/app", repo_type="space")
        api.create_repo("ada/page", repo_type="space", space_sdk="static")
        for number in (1, 2):
            api.create_repo(
                f"ada/zero{number}",
                repo_type="space",
                space_sdk="gradio",
                space_hardware=SpaceHardware.ZERO_A10G,
            )
        with pytest.raises(HfHubHTTPError, match="402"):
            api.create_repo("ada/zero3", repo_type="space", space_sdk="gradio", space_hardware=SpaceHardware.ZERO_A10G)
        api.create_repo("ada/zero1", repo_type="space", space_sdk="gradio", exist_ok=True)
        api.create_repo("ada/tiny")


def test_seed(hub: LocalHub, ada: HfApi, folder: Path, tmp_path: Path, sums: Sums) -> None:
    first = hub.seed("acme/base", folder)
    assert hub.seed("acme/base", folder) == first
    copy = snapshot_download("acme/base", cache_dir=tmp_path / "c", token=ada.token)
    got = sums(Path(copy))
    got.pop(".gitattributes")
    assert got == sums(folder) and Path(copy).name == first
    (folder / "empty.txt").unlink()
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    second = hub.seed("acme/base", folder)
    assert second != first and hub.seed("acme/base", folder) == second
    assert "empty.txt" not in ada.list_repo_files("acme/base")
    # The folder may change afterwards without the hub noticing.
    (folder / "model.safetensors").write_bytes(b"other")
    again = snapshot_download("acme/base", revision=first, cache_dir=tmp_path / "d", token=ada.token)
    assert (Path(again) / "model.safetensors").stat().st_size == 3_000_000
    hub.seed("acme/rows", folder, repo_type="dataset", private=True)
    assert ada.dataset_info("acme/rows").private
    assert hub.requests  # seeding itself went past HTTP, the checks did not
    assert not any(request.method == "PUT" for request in hub.requests)


def test_restart(tmp_path: Path, folder: Path, sums: Sums, point_client_at: Callable[[str], None]) -> None:
    root = tmp_path / "hub"
    with LocalHub(root, log_file=tmp_path / "log.jsonl") as hub:
        point_client_at(hub.url)
        token = hub.add_user("ada", orgs=["acme"])
        api = HfApi(endpoint=hub.url, token=token)
        api.create_repo("acme/tiny", private=True)
        oid = api.upload_folder(repo_id="acme/tiny", folder_path=folder).oid
        api.create_tag("acme/tiny", tag="v1")
        hub.set_gated("acme/tiny", "auto")
        api.create_repo("ada/app", repo_type="space", space_sdk="gradio")
        api.add_space_variable("ada/app", "A", "1")
        pull = api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="acme/tiny", create_pr=True)
        with pytest.raises(RuntimeError, match="Another hub"):
            LocalHub(root).start()
    (root / "tmp" / "half-written").write_bytes(b"...")
    with LocalHub(root) as hub:
        point_client_at(hub.url)
        api = HfApi(endpoint=hub.url, token=token)
        assert hub.add_user("ada") == token
        info = api.model_info("acme/tiny", revision="v1")
        assert info.sha == oid and info.private and info.gated == "auto"
        assert api.model_info("acme/tiny", revision="refs/pr/1").sha == pull.oid
        assert api.get_space_variables("ada/app")["A"].value == "1"
        copy = snapshot_download("acme/tiny", cache_dir=tmp_path / "c", token=token)
        got = sums(Path(copy))
        got.pop(".gitattributes")
        assert got == sums(folder)
        assert not (root / "tmp" / "half-written").exists()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["user"] for row in log} == {"ada", None}
    assert "hf_local" not in (tmp_path / "log.jsonl").read_text()


def test_start_and_stop_by_hand(tmp_path: Path) -> None:
    hub = LocalHub(tmp_path / "hub")
    with pytest.raises(RuntimeError, match="not running"):
        _ = hub.url
    hub.start()
    hub.start()
    url = hub.url
    assert requests.get(url).status_code == 200
    hub.stop()
    hub.stop()
    with pytest.raises(OSError):
        requests.get(url)
    hub.start()
    assert requests.get(hub.url).status_code == 200
    hub.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_forever_stops_on_signals(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys, pathlib; from gradmap_hub.local_hub import LocalHub\n"
        "hub = LocalHub(pathlib.Path(sys.argv[1])); hub.start(); print(hub.url, flush=True)\n"
        "hub.serve_forever(); print('stopped')\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "hub")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert requests.get(url).status_code == 200
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert output.strip() == "stopped" and process.returncode == 0
