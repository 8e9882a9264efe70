"""What never leaves the machine: tokens, its places and name, pickles, what is not ours. Cards are judged too."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import CardInvalid, UnsafeToPublish
from gradmap_hub.hub.card_check import check_card
from gradmap_hub.hub.screening import Private, publishable, screen, this_machine
from gradmap_hub.pipeline.publish import publish_folder

from .conftest import CARD, SPACE_CARD, Side

HOME = Path("/home/ada")
PRIVATE = Private("hf_" + "a" * 34, {"your home folder": HOME, "the work folder": Path("/data")}, "gpu-box-7")
OTHER_TOKEN = "hf_" + "Zq" * 17


def header(**metadata: str) -> bytes:
    text = json.dumps({"__metadata__": metadata, "w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0\0\0\0"


LEAKS: dict[str, tuple[str, bytes, str]] = {
    "token": ("gradmap.json", json.dumps({"command": PRIVATE.token}).encode(), "your token"),
    "another token": ("README.md", f"use {OTHER_TOKEN} here".encode(), "Hugging Face token"),
    "home": ("config.json", b'{"_name_or_path": "/home/ada/models/x"}', "your home folder"),
    "home alone": ("chat_template.jinja", b"{# /home/ada #}", "your home folder"),
    "work folder": ("compare.json", b'"/data/run/out"', "the work folder"),
    "host": ("README.md", b"made on GPU-box-7.", "the name of this machine"),
    "header": ("model.safetensors", header(made="/home/ada/train.py"), "your home folder"),
    "graph": ("onnx/model.onnx", b"\x08\x07" * 50 + b"/home/ada/.venv/x.py" + b"\0" * 50, "your home folder"),
    "tokenizer": ("tokenizer_config.json", b'{"name_or_path": "/home/ada/tok"}', "your home folder"),
    "in the middle": ("vocab.txt", b"x\n" * 9_000_000 + b"/home/ada/x" + b"\ny" * 10, "your home folder"),
    "across two blocks": ("vocab.txt", b"x" * (2**24 - 4) + b" /home/ada/x", "your home folder"),
}
HARMLESS: dict[str, tuple[str, bytes]] = {
    "another user": ("README.md", b"/home/adam/x and /mnt/home/ada/x, https://x.org/data/y"),
    "a short place as a word": ("vocab.txt", b'"/data" /data/ /dataset/x'),
    "the host in a vocabulary": ("tokenizer.json", b'{"gpu-box-7": 1}'),
    "a longer host": ("README.md", b"my-gpu-box-7 gpu-box-70"),
    "not a token": ("README.md", b"hf_transfer, hf_hub_download, HF_TOKEN, hf_" + b"a" * 20),
    "tensor data": ("model.safetensors", header() + b"/home/ada/x"),
    "weights of a graph": ("onnx/model.onnx_data", b"/home/ada/x"),
}


def put(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("case", LEAKS)
def test_leak(tmp_path: Path, case: str) -> None:
    name, content, what = LEAKS[case]
    put(tmp_path, name, content)
    with pytest.raises(UnsafeToPublish) as caught:
        screen(tmp_path, "model", PRIVATE)
    assert caught.value.path == name and what in caught.value.message and "Nothing was uploaded" in caught.value.message
    assert str(PRIVATE.token) not in caught.value.message and OTHER_TOKEN not in caught.value.message


@pytest.mark.parametrize("case", HARMLESS)
def test_no_leak(tmp_path: Path, case: str) -> None:
    put(tmp_path, *HARMLESS[case])
    screen(tmp_path, "model", PRIVATE)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "x.pt", "x.PKL", "a/x.ckpt", ".env", ".cache/x.json", "notes.docx", "run.sh", "id_rsa"],
)
def test_kinds_that_are_never_published(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, pickle.dumps({"w": 1}))
    with pytest.raises(UnsafeToPublish) as caught:
        screen(tmp_path, "model", Private())
    assert caught.value.path == name


def test_code_only_in_a_space() -> None:
    assert publishable("app.py", "space") and not publishable("modeling.py", "model")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "model-00001-of-00002.safetensors", "tokenizer.model"):
        assert publishable(name, "model")


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafeToPublish, match="link"):
        screen(tmp_path / "model", "model", Private())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_file_that_never_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "notes.txt")
    with pytest.raises(UnsafeToPublish, match="not a regular file"):
        screen(tmp_path, "model", Private())


@pytest.mark.parametrize(
    ("host", "kept"),
    [("gpu-box-7", True), ("workstation", True), ("laptop", False), ("localhost", False), ("llama-3", False),
     ("transformers", False)],
)  # fmt: skip
def test_host_names_that_say_something(monkeypatch: pytest.MonkeyPatch, host: str, kept: bool) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert (this_machine(None, {}, ["meta/Llama-3-8B"]).host == host) == kept


@pytest.mark.parametrize("where", ["model", "space"])
def test_nothing_is_uploaded(server: Any, ada: Side, folder: Path, where: str) -> None:
    """Also not the model, where it is the Space that holds a token."""
    place = folder if where == "model" else folder.with_name("small-space")
    put(place, "notes.txt", f"token {ada.hub.token}".encode())
    with pytest.raises(UnsafeToPublish, match=r"notes\.txt contains your token"):
        publish_folder(folder, PublishConfig(wait_space=0), hub=ada.hub)
    assert {entry.method for entry in server.requests} == {"GET"}


def test_the_folder_it_was_made_in(server: Any, ada: Side, folder: Path) -> None:
    put(folder, "notes.txt", str(folder).encode())
    with pytest.raises(UnsafeToPublish, match="path of the model folder"):
        publish_folder(folder, PublishConfig(wait_space=0), hub=ada.hub)


# -- cards -----------------------------------------------------------------------------------------------------------


def replaced(old: str, new: str) -> Callable[[], str]:
    assert old in CARD
    return lambda: CARD.replace(old, new)


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "none": (lambda: "# small\n", "it is missing"),
    "not yaml": (replaced("license: apache-2.0", "license: [apache-2.0"), "Invalid YAML"),
    "key twice": (replaced("license: apache-2.0", "license: mit\nlicense: mit"), "duplicated"),
    "no licence": (replaced("license: apache-2.0\n", ""), '"license" is missing'),
    "unknown licence": (replaced("apache-2.0", "mine"), '"license" must be one of'),
    "other without a name": (replaced("apache-2.0", "other"), 'needs "license_name"'),
    "no task": (replaced("pipeline_tag: text-generation\n", ""), '"pipeline_tag" is missing'),
    "base model": (replaced("acme/base", "/home/ada/base"), '"base_model"'),
    "relation": (replaced("finetune", "pruned"), '"base_model_relation"'),
    "results": (replaced("      value: 12.5\n", ""), "value"),
    "results of nothing": (replaced("    task:\n", "    tusk:\n") if "    task:\n" in CARD else
                           replaced("- task:", "- tusk:"), "task"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_card(case: str) -> None:
    text, word = BAD[case]
    with pytest.raises(CardInvalid) as caught:
        check_card(text(), "model")
    assert any(word in problem for problem in caught.value.problems), caught.value.problems


def test_good_cards() -> None:
    facts = check_card(CARD, "model")
    assert (facts.license, facts.base_model, facts.results) == ("apache-2.0", "acme/base", 1)
    check_card(SPACE_CARD, "space")
    check_card(CARD.replace("apache-2.0", "brand-new-1.0"), "model", accepted=("brand-new-1.0",))
    with pytest.raises(CardInvalid, match="sdk"):
        check_card(SPACE_CARD.replace("sdk: gradio", "sdk: none"), "space")


def test_a_bad_card_is_not_uploaded(server: Any, ada: Side, folder: Path) -> None:
    (folder.with_name("small-space") / "README.md").write_text("# no header\n")
    with pytest.raises(CardInvalid, match="small-space/README"):
        publish_folder(folder, PublishConfig(wait_space=0), hub=ada.hub)
    assert {entry.method for entry in server.requests} == {"GET"}
