"""What a source holds, judged from names, sizes and headers: every refusal happens before a weight is loaded."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradmap_hub.errors import BrokenCheckpointError, RemoteCodeRefused, SourceError, UnsupportedArchitecture
from gradmap_hub.layout import folder_sizes, legal_texts, sha256_of
from gradmap_hub.models import checkpoint, source
from gradmap_hub.models.architectures import ARCHITECTURES, SUPPORTED
from gradmap_hub.models.safetensors_files import check_weights, choose_files, read_config, read_safetensors_header
from gradmap_hub.models.source import RemoteFiles, find_source
from gradmap_hub.models.support import architecture_of

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 5,
    "rope_theta": 10000.0,
}


# --- which files ------------------------------------------------------------------------------------------------------


def no_index(name: str) -> Path:
    raise AssertionError(f"{name} is not needed")


def index_of(folder: Path, *shards: str) -> Callable[[str], Path]:
    """Writes an index that names these shards, and gives its place."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}}))
    return folder.joinpath


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
            "model.fp16.safetensors": 500,
            "model.safetensors.index.json": 5,
        },
        no_index,
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


@pytest.mark.parametrize(
    "shards",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("embeddings.safetensors", "layers.safetensors"),
        ("model.fp16-00001-of-00001.safetensors",),
        ("consolidated.safetensors",),
    ],
)
def test_the_index_decides_which_files_are_weights(shards: tuple[str, ...], tmp_path: Path) -> None:
    listing = {
        "config.json": 1,
        "model.safetensors.index.json": 7,
        "model-00002-of-00002.safetensors": 200,
        "model-00001-of-00002.safetensors": 300,
        "model.fp16-00001-of-00001.safetensors": 250,
        "consolidated.safetensors": 500,
        "consolidated-00001-of-00001.safetensors": 500,
        "embeddings.safetensors": 10,
        "layers.safetensors": 20,
        "original/model-00001-of-00002.safetensors": 500,
    }
    files = choose_files(listing, index_of(tmp_path, *shards, *shards))
    assert files.weights == ("model.safetensors.index.json", *shards)
    assert files.weight_bytes == sum(listing[shard] for shard in shards)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/model.safetensors", "..", "", "model.bin", "*.safetensors",
     "a\\b.safetensors", "\x1b]0;x.safetensors", "-rf.safetensors", ".hidden.safetensors", "x" * 300 + ".safetensors",
     None, 3, ["model.safetensors"]],
)  # fmt: skip
def test_a_shard_is_a_file_beside_the_index(shard: Any, tmp_path: Path) -> None:
    listing = {"config.json": 1, "model.safetensors.index.json": 7, "../model.safetensors": 9, "model.bin": 9}
    with pytest.raises(BrokenCheckpointError, match=r"index\.json names .* as the shard of \"w0\"") as caught:
        choose_files(listing, index_of(tmp_path, shard))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map":' * 10_000 + "1" + "}" * 10_000])
def test_an_index_that_is_no_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json is not"):
        choose_files({"config.json": 1, "model.safetensors.index.json": 7}, tmp_path.joinpath)


def test_a_shard_that_the_listing_lacks_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    listing = {"config.json": 1, "model.safetensors.index.json": 7, "one.safetensors": 9}
    with pytest.raises(BrokenCheckpointError, match=r"shard two\.safetensors named in .* is missing"):
        choose_files(listing, index_of(tmp_path, "one.safetensors", "two.safetensors"))
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json has 99,999,999 bytes"):
        choose_files({**listing, "model.safetensors.index.json": 99_999_999}, no_index)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_files_beside_quantised_weights(name: str) -> None:
    with pytest.raises(SourceError, match=f"quantised, as {name} says"):
        choose_files({"config.json": 1, "model.safetensors": 9, name: 1}, no_index)


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_no_model(config: bool, tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    if not config:
        (tiny_folder / "config.json").unlink()
    (tiny_folder / "adapter_model.safetensors").write_bytes(b"x")
    (tiny_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="is an adapter, such as LoRA, without the model"):
        find_source(str(tiny_folder), None, cast("Any", None))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_never_opened(name: str) -> None:
    with pytest.raises(BrokenCheckpointError, match="pickle"):
        choose_files({"config.json": 1, name: 100}, no_index)


@pytest.mark.parametrize(
    "listing",
    [
        {},
        {"config.json": 1, "README.md": 1},
        {"config.json": 1, "weights/model.safetensors": 9},
        {"config.json": 1, "consolidated.safetensors": 9, "model.fp16-00001-of-00001.safetensors": 9},
    ],
)
def test_no_model_at_all(listing: dict[str, int]) -> None:
    with pytest.raises(SourceError, match="no safetensors weights") as caught:
        choose_files(listing, no_index)
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
    check_weights(folder, choose_files(folder_sizes(folder), folder.joinpath))


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
        *(
            (lambda data, entry=entry: header_bytes({"w": entry}), f"not a readable .*: w has the {named}")
            for entry, named in (
                ({"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}, "offsets"),
                ({"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]}, "offsets"),
                ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "offsets"),
                ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "offsets"),
                ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "offsets"),
                ({"dtype": "F32", "shape": [1], "data_offsets": [False, 4]}, "offsets"),
                ({"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 4]}, "shape"),
                ({"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}, "shape"),
                ({"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}, "shape"),
                ({"dtype": "F32", "shape": None, "data_offsets": [0, 4]}, "shape"),
                ({"dtype": 32, "shape": [1], "data_offsets": [0, 4]}, "dtype"),
                ({"dtype": "F\x1b", "shape": [1], "data_offsets": [0, 4]}, "dtype"),
            )
        ),
        (
            lambda data: header_bytes({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
            "w has 4 bytes, and its",
        ),
        (
            lambda data: header_bytes({"w\x1b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
            "not that of a tensor",
        ),
        (
            lambda data: header_bytes({"w" * 600: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
            "not that of a",
        ),
        (lambda data: struct.pack("<Q", 20_000) + b"[" * 20_000, "nested too deeply"),
    ],
)
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], message: str, tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(BrokenCheckpointError, match=message) as caught:
        check(tiny_folder)
    assert "model.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("model.layers.0.mlp.down_proj.weight", "F8_E4M3", 1), ("model.layers.0.mlp.down_proj.weight", "I8", 1),
        ("model.embed_tokens.weight", "U32", 4), ("model.layers.0.mlp.down_proj.qweight", "I32", 4),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", 1), ("x.weight_packed", "I32", 4),
        ("model.layers.0.mlp.down_proj.weight", "F4_E2M1", 1),
    ],
)  # fmt: skip
def test_quantised_weights_are_known_by_their_dtype(name: str, dtype: str, size: int, tmp_path: Path) -> None:
    table = {name: {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
    (tmp_path / "model.safetensors").write_bytes(header_bytes(table) + bytes(size))
    with pytest.raises(SourceError, match=f"quantised: model.safetensors stores {name} as {dtype}"):
        check(tmp_path)


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.attention.bias", "model.embeddings.position_ids", "x.masked_bias"]
)
def test_masks_and_positions_are_not_quantised_weights(name: str, tmp_path: Path) -> None:
    table = {name: {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}
    (tmp_path / "model.safetensors").write_bytes(header_bytes(table) + b"1")
    check(tmp_path)


def _header_is_read_or_refused(table: Any, path: Path) -> None:
    path.write_bytes(header_bytes(table) + bytes(8))
    with contextlib.suppress(BrokenCheckpointError):
        assert all(isinstance(entry["shape"], list) for entry in read_safetensors_header(path).values())


_SIZES = st.lists(st.integers(-1, 9) | st.floats() | st.none() | st.integers(), max_size=3)
_ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "F64", "X", 4, None]), "shape": _SIZES, "data_offsets": _SIZES}
)
_TABLES = st.dictionaries(st.text(max_size=3), _ENTRIES | st.integers() | st.none(), max_size=3) | st.lists(_ENTRIES)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=_TABLES)
def test_any_header_is_read_or_refused(table: Any, tmp_path: Path) -> None:
    _header_is_read_or_refused(table, tmp_path / "model.safetensors")


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=_TABLES)
def test_any_of_many_headers_is_read_or_refused(table: Any, tmp_path: Path) -> None:
    _header_is_read_or_refused(table, tmp_path / "model.safetensors")


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


def test_a_tensor_in_another_shard_than_the_index_names(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shards = sorted(set(data["weight_map"].values()))
    name = next(name for name, shard in data["weight_map"].items() if shard == shards[0])
    data["weight_map"][name] = shards[1]
    index.write_text(json.dumps(data))
    with pytest.raises(BrokenCheckpointError, match=f"{shards[0]} contains the tensor {name}, for which .*{shards[1]}"):
        check(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}'])
def test_an_index_that_is_none(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BrokenCheckpointError, match="index"):
        check(sharded)


# --- a repository of the Hub ------------------------------------------------------------------------------------------


@dataclass
class Remote:
    """A repository as the Hub lists it, with the files of a folder; it writes down what is fetched."""

    folder: Path
    commit: str = "0123"
    gated: bool = False
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    asked_for: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, int]:
        return folder_sizes(self.folder)

    def model(self, repo_id: str, revision: str | None) -> RemoteFiles:
        return self

    def fetch(self, repo_id: str, commit: str, names: Sequence[str]) -> Path:
        self.asked_for += names
        return self.folder

    def tensor_dtypes(self, repo_id: str, commit: str, name: str) -> dict[str, str]:
        return {}


def test_only_the_shards_of_the_index_are_fetched(sharded: Path) -> None:
    for name in ("consolidated-00001-of-00001.safetensors", "model.fp16-00001-of-00001.safetensors"):
        (sharded / name).write_bytes(b"x" * 1000)
    remote = Remote(sharded)
    source = find_source("acme/tiny", None, remote)
    assert remote.asked_for == ["config.json", "model.safetensors.index.json"]
    assert all(name.startswith("model") and "fp16" not in name for name in source.files.weights)
    assert source.weight_bytes == sum((sharded / name).stat().st_size for name in source.files.weights[1:])


def test_a_quantised_repository_is_refused_before_its_weights_are_fetched(tiny_folder: Path) -> None:
    (tiny_folder / "hf_quant_config.json").write_text("{}")
    remote = Remote(tiny_folder)
    with pytest.raises(SourceError, match="quantised"):
        find_source("acme/tiny", None, remote)
    assert remote.asked_for == ["config.json"]


def test_a_config_too_large_to_read_is_not_fetched(tiny_folder: Path) -> None:
    with (tiny_folder / "config.json").open("ab") as stream:
        stream.truncate(10**9)  # of holes
    remote = Remote(tiny_folder)
    with pytest.raises(SourceError, match=r"config\.json has 1,000,000,000 bytes"):
        find_source("acme/tiny", None, remote)
    assert remote.asked_for == []


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


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("en", ["en"]), (["en", "deu", "code"], ["en", "deu", "code"]), ("English", []), ("en, fr", ["en", "fr"]),
        (["zh-CN", None, 5, "en", "en"], ["en"]), (False, ["no"]), (None, []), ({"a": 1}, []),
    ],
)  # fmt: skip
def test_languages_that_the_hub_accepts(value: Any, kept: list[str]) -> None:
    assert source._languages(value) == kept


def test_a_pipe_is_no_card(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "README.md")
    assert source._card_header(tmp_path / "README.md") == {}
