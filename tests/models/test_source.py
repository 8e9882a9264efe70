"""What a source holds, judged from names, sizes and headers: every refusal happens before a weight is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gradmap_hub.errors import BrokenCheckpointError, RemoteCodeRefused, SourceError, UnsupportedArchitecture
from gradmap_hub.layout import folder_sizes, legal_texts, sha256_of
from gradmap_hub.models import checkpoint
from gradmap_hub.models.architectures import ARCHITECTURES, SUPPORTED
from gradmap_hub.models.safetensors_files import check_weights, choose_files, read_config, read_safetensors_header
from gradmap_hub.models.source import find_source
from gradmap_hub.models.support import architecture_of

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 5,
    "rope_theta": 10000.0,
}


# --- which files ------------------------------------------------------------------------------------------------------


def test_one_file_and_its_companions() -> None:
    files = choose_files(
        {
            "config.json": 10,
            "model.safetensors": 1000,
            "tokenizer.json": 5,
            "tokenizer_config.json": 5,
            "generation_config.json": 5,
            "chat_template.jinja": 5,
            "LICENSE": 5,
            "license.md": 5,
            "NOTICE.txt": 5,
            "USE_POLICY.md": 5,
            "README.md": 5,
            "training_args.bin": 5,
            "pytorch_model.bin": 1000,
            "onnx/model.onnx": 1000,
            "original/LICENSE": 5,
            "original/tokenizer.model": 5,
            "original/consolidated.00.pth": 1000,
        }
    )
    assert files.weights == ("model.safetensors",) and files.weight_bytes == 1000
    assert set(files.companions) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "license.md",
        "NOTICE.txt",
        "USE_POLICY.md",
    }


def test_shards_with_their_index() -> None:
    listing = {
        "config.json": 1,
        "model.safetensors.index.json": 7,
        "model-00002-of-00002.safetensors": 200,
        "model-00001-of-00002.safetensors": 300,
        "consolidated.safetensors": 500,
        "original/model-00001-of-00002.safetensors": 500,
    }
    files = choose_files(listing)
    assert files.weights == (
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    )
    assert files.weight_bytes == 500


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_never_opened(name: str) -> None:
    with pytest.raises(BrokenCheckpointError, match="pickle"):
        choose_files({"config.json": 1, name: 100})


@pytest.mark.parametrize(
    "listing",
    [
        {},
        {"config.json": 1, "README.md": 1},
        {"config.json": 1, "weights/model.safetensors": 9},
        {"config.json": 1, "model.safetensors.index.json": 7},
        {"adapter_config.json": 1, "adapter_model.safetensors": 9},
    ],
)
def test_no_model_at_all(listing: dict[str, int]) -> None:
    with pytest.raises(SourceError, match="no safetensors weights") as caught:
        choose_files(listing)
    assert not isinstance(caught.value, BrokenCheckpointError)


def test_legal_texts_and_sizes(tiny_folder: Path) -> None:
    assert legal_texts(["LICENSE", "licence.txt", "a/LICENSE", "README.md", "NOTICE"]) == [
        "LICENSE",
        "licence.txt",
        "NOTICE",
    ]
    (tiny_folder / "onnx").mkdir()
    (tiny_folder / "onnx" / "model.onnx").write_bytes(b"12345")
    sizes = folder_sizes(tiny_folder)
    assert sizes["onnx/model.onnx"] == 5 and sizes["LICENSE"] == (tiny_folder / "LICENSE").stat().st_size


def test_config_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(SourceError, match=r"has no config\.json"):
        read_config(path)
    for content, message in (
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "not a JSON object"),
    ):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=message):
            read_config(path)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- whole or damaged weights -----------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    check_weights(folder, choose_files(folder_sizes(folder)))


def test_whole_weights_pass(tiny_folder: Path) -> None:
    check(tiny_folder)
    header = read_safetensors_header(tiny_folder / "model.safetensors")
    assert header["model.norm.weight"]["shape"] == [64] and "__metadata__" not in header


def header_bytes(table: Any) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "damaged"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: data[:100], "longer than the file"),
        (lambda data: data[:5], "not a readable"),
        (lambda data: b"", "not a readable"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n", "longer than the file"),
        (lambda data: b"<!DOCTYPE html><html>" + b" " * 500, "longer than the file"),
        (lambda data: struct.pack("<Q", 2**63) + b"{}", "longer than the file"),
        (lambda data: struct.pack("<Q", 16) + b"\xff" * 16, "not a readable"),
        (lambda data: header_bytes([1, 2]), "not a readable"),
        (lambda data: header_bytes({"w": 3}), "not a readable"),
        (lambda data: header_bytes({"w": {"dtype": "F32"}}), "not a readable"),
        (lambda data: header_bytes({"w": {"data_offsets": [0, "end"]}}), "not a readable"),
    ],
)
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], message: str, tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(BrokenCheckpointError, match=message) as caught:
        check(tiny_folder)
    assert "model.safetensors" in caught.value.message


@pytest.fixture
def sharded(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    monkeypatch.setattr(checkpoint, "SHARD_LIMIT", "200KB")
    model, _ = checkpoint.load_model(tiny_folder)
    checkpoint.save_checkpoint(model, folder, model.dtype)
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    check(folder)
    return folder


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BrokenCheckpointError, match=shard.name):
        check(sharded)


def test_a_shard_cut_short_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(BrokenCheckpointError, match=f"{shard.name} is damaged"):
        check(sharded)


def test_a_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.layers.9.lost"] = next(iter(data["weight_map"].values()))
    index.write_text(json.dumps(data))
    with pytest.raises(BrokenCheckpointError, match=r"model\.layers\.9\.lost"):
        check(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}'])
def test_an_index_that_is_none(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BrokenCheckpointError, match="index"):
        check(sharded)


# --- which architecture -----------------------------------------------------------------------------------------------


def test_supported_types_as_transformers_writes_them(family: str, model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    row = architecture_of(read_config(tmp_path / "config.json"))
    assert row is ARCHITECTURES[family] and row.causal_lm == type(model).__name__
    assert len(model.get_submodule(row.layers)) == 5
    assert model.get_submodule(row.final_norm).weight.shape == (64,)
    for layer in model.get_submodule(row.layers):
        assert layer.get_submodule(row.mlp_output).weight.shape == (64, 96)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "an encoder, not a causal"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "an encoder-decoder"),
        ({"model_type": "fsmt", "is_encoder_decoder": True}, "an encoder-decoder"),
        ({"model_type": "jamba", "architectures": ["JambaForCausalLM"]}, "follow a period in depth"),
        ({"model_type": "gemma3n"}, "share keys and values"),
        ({"model_type": "mamba"}, "not known to be safe"),
        ({"model_type": "brand_new"}, "not known to be safe"),
        ({"model_type": None}, "'unknown'"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification, not a LlamaForCausalLM",
        ),
        ({"num_hidden_layers": 1}, "fewer than two layers"),
        ({"num_hidden_layers": None}, "fewer than two layers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
    ],
)
def test_refusals_say_why_and_what_is_supported(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=reason) as caught:
        architecture_of({**LLAMA, **change})
    assert all(name in (caught.value.hint or "") for name in SUPPORTED)
    assert caught.value.model_type == str(({**LLAMA, **change})["model_type"] or "unknown")


def test_own_code_is_refused_whatever_the_type() -> None:
    for model_type in ("llama", "brand_new"):
        config = {**LLAMA, "model_type": model_type, "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
        with pytest.raises(RemoteCodeRefused, match="has its own code"):
            architecture_of(config)


def test_a_config_without_architectures_is_judged_by_its_type() -> None:
    assert architecture_of({k: v for k, v in LLAMA.items() if k != "architectures"}).model_type == "llama"


def test_code_of_a_class_built_into_transformers_is_ignored() -> None:
    """Phi-3 repositories carry their old modelling code; another class than the built-in one is still refused."""
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 4}
    built_in = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert architecture_of({**config, "auto_map": built_in}).model_type == "phi3"
    with pytest.raises(RemoteCodeRefused):
        architecture_of({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}})


def test_a_link_out_of_the_folder_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """A folder may come from somebody else, and LICENSE is copied into what is published."""
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    (tiny_folder / "LICENSE").unlink(missing_ok=True)
    (tiny_folder / "LICENSE").symlink_to(secret)
    with pytest.raises(SourceError, match=r"LICENSE in .* is a link to a file outside"):
        find_source(str(tiny_folder), None, cast("Any", None))


def test_links_into_the_cache_of_the_hub_are_followed(tiny_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--tiny"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(tiny_folder.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert find_source(str(snapshot), None, cast("Any", None)).layer_count > 1
