"""An original is described, complete, finite and alone in its folder before anything is computed from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradmap_hub.errors import BrokenCheckpointError, SourceError
from gradmap_hub.models import checkpoint
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.models.original import OriginalModel
from gradmap_hub.models.skeleton import described_model
from gradmap_hub.models.source import find_source
from gradmap_hub.models.streaming import open_streamed
from gradmap_hub.models.transformers_compat import has_5
from gradmap_hub.models.weight_check import check_tensors

LLAMA = ARCHITECTURES["llama"]
DOWN = "model.layers.3.mlp.down_proj.weight"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def original_of(folder: Path, tmp_path: Path, notes: list[str] | None = None) -> OriginalModel:
    source = find_source(str(folder), None, cast("Any", None))
    return OriginalModel(source, cast("Any", None), tmp_path / "work", (notes if notes is not None else []).append)


# --- a model that transformers can build ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": 300}, {"hidden_act": "no such function"}, {"to_dict": 5}, {"get_text_config": "x"},
        {"sub_configs": 5}, {"initializer_range": -1},
    ],
)  # fmt: skip
def test_what_transformers_cannot_build_is_told_in_one_line(
    changes: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    change_config(tiny_folder, **changes)
    original = original_of(tiny_folder, tmp_path)
    for ask in (original.tokenizer, original.checkpoint):
        with pytest.raises(SourceError, match=r"config\.json of tiny does not describe a model") as caught:
            ask()
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "</s>"}', 'eos_token_id is "</s>"; a token id or a list of them'),
        ("generation_config.json", '{"eos_token_id": [2, null]}', "eos_token_id is"),
        ("generation_config.json", "[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("generation_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": "\\ud800"}', "not Unicode"),
    ],
)
def test_files_beside_the_config(name: str, content: str, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / name).write_text(content)
    original = original_of(tiny_folder, tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        original.companions()
    assert name in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "kernels-community/flash-attn"}, {"torch_dtype": "auto", "dtype": "auto"},
        {"use_return_dict": False}, {"return_dict": False}, {"torchscript": True}, {"quantization_config": None},
        {"transformers_weights": "other.safetensors"},
    ],
)  # fmt: skip
def test_settings_of_the_loader_are_left_out(changes: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    expected = checkpoint.load_model(tiny_folder)[0]
    change_config(tiny_folder, **changes)
    folder = original_of(tiny_folder, tmp_path).checkpoint()
    model, _ = checkpoint.load_model(folder)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert open_streamed(folder, LLAMA, 17).losses(ids) == pytest.approx(
        [float(expected(ids, labels=ids).loss.detach())], abs=1e-5
    )
    assert json.loads((tiny_folder / "config.json").read_text()).items() >= changes.items()


def test_whatever_the_loader_raises_is_told_in_one_line(tiny_folder: Path) -> None:
    change_config(tiny_folder, _attn_implementation="flash_attention_2")
    with pytest.raises(BrokenCheckpointError, match=r"cannot be loaded: .*[Ff]lash"):  # an ImportError
        checkpoint.load_model(tiny_folder)


def test_integers_are_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    change_config(tiny_folder, attention_bias=True)
    weights = load_file(tiny_folder / "model.safetensors")
    for layer in range(5):
        for name, width in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.ones(width, dtype=torch.int8)
    save_file(weights, tiny_folder / "model.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"q_proj\.bias of tiny is stored as torch\.int8"):
        original_of(tiny_folder, tmp_path).checkpoint()


# --- complete ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 50}, r"no tensor model\.layers\.5\."),
        (
            {"tie_word_embeddings": False, "attention_bias": True},
            r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            {"vocab_size": 16_000_000},
            r"embed_tokens\.weight of tiny has shape \(300, 64\); .* requires \(16000000, 64\)",
        ),
        ({"hidden_size": 128}, "has shape"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight of tiny has shape \(32, 64\)"),
    ],
)
def test_a_config_of_another_size_than_the_weights(
    changes: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    change_config(tiny_folder, **changes)
    with pytest.raises(BrokenCheckpointError, match=message):
        original_of(tiny_folder, tmp_path).checkpoint()


# --- finite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_value_that_is_not_finite_is_found(
    value: float, dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[DOWN][-1, -1] = value

    change_weights(tiny_folder, change)
    with pytest.raises(BrokenCheckpointError, match=f"tensor {DOWN} of tiny has values that are not finite"):
        original_of(tiny_folder, tmp_path).checkpoint()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_outside_of_the_layers_too(name: str, tiny_folder: Path) -> None:
    change_weights(tiny_folder, lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")) and None)
    with pytest.raises(BrokenCheckpointError, match=f"tensor {name} of x has"):
        check_tensors(tiny_folder, LLAMA, "x")


def test_the_largest_values_of_a_dtype_are_finite(tiny_folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][:] = torch.finfo(torch.float32).max

    change_weights(tiny_folder, change)
    assert check_tensors(tiny_folder, LLAMA, "x") == []


# --- tensors without a place ------------------------------------------------------------------------------------------


def test_tensors_without_a_place_are_noted_once(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extra = {f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.ones(64) for layer in range(5) for part in "qo"}
    change_weights(tiny_folder, lambda tensors: tensors.update(extra))
    notes: list[str] = []
    original = original_of(tiny_folder, tmp_path, notes)
    folder = original.checkpoint()
    assert original.checkpoint() == folder and len(notes) == 1
    assert notes[0].startswith("Ignored 10 tensors of the checkpoint that a llama with this config.json does not have")
    assert "such as model.layers." in notes[0] and len(original.unused) == 10
    checkpoint.load_model(folder)
    assert "Ignored" not in "".join(capfd.readouterr())


def test_one_tensor_without_a_place(tiny_folder: Path, tmp_path: Path) -> None:
    change_weights(tiny_folder, lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))
    notes: list[str] = []
    original_of(tiny_folder, tmp_path, notes).checkpoint()
    assert notes[0].startswith("Ignored 1 tensor of the checkpoint") and notes[0].endswith("such as score.weight.")


def test_what_older_versions_stored_is_not_noted(tiny_folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(tiny_folder, lambda tensors: tensors.update(extra))
    assert check_tensors(tiny_folder, LLAMA, "x") == []


def test_a_tied_head_that_is_stored_is_not_noted(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "tied", "llama", tied=True)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(300, 64)}))
    assert check_tensors(folder, LLAMA, "x") == []


def test_masks_of_gpt2_are_not_noted(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    change_weights(tmp_path, change)
    assert check_tensors(tmp_path, ARCHITECTURES["gpt2"], "x") == []
    assert len(open_streamed(tmp_path, ARCHITECTURES["gpt2"], 8).losses(torch.arange(8)[None])) == 1


# --- alone in its folder ----------------------------------------------------------------------------------------------


def test_an_adapter_beside_the_model_is_not_loaded(
    tiny_folder: Path, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers with peft would load the model that the adapter names."""
    other = folder_of(tmp_path / "other", "llama", seed=5)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(other), "task_type": "CAUSAL_LM"}
    expected = checkpoint.load_model(tiny_folder)[0].state_dict()
    (tiny_folder / "adapter_config.json").write_text(json.dumps(adapter))
    folder = original_of(tiny_folder, tmp_path).checkpoint()
    assert not (folder / "adapter_config.json").exists()
    found = checkpoint.load_model(folder)[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (tiny_folder / "adapter_config.json").exists()


def test_weights_beside_those_of_the_model_are_not_counted(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        shutil.copyfile(tiny_folder / "model.safetensors", tiny_folder / name)
    original = original_of(tiny_folder, tmp_path)
    folder = original.checkpoint()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert checkpoint.checkpoint_bytes(folder) == original.source.weight_bytes
    assert {"tokenizer.json", "LICENSE", "generation_config.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.skipif(has_5(), reason="transformers 5 saves the folder in a form of its own")
def test_a_folder_of_its_own_is_used_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    original = original_of(tiny_folder, tmp_path)
    assert original.checkpoint() == original.companions() == tiny_folder
    assert not (tmp_path / "work").exists()


class _Hub:
    """A repository with the files of a folder, fetched into a cache."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.asked_for = folder, cache, list[str]()

    def model(self, repo_id: str, revision: str | None) -> Any:
        from types import SimpleNamespace

        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        return SimpleNamespace(commit="0123", files=sizes, card={}, gated=False, private=False)

    def fetch(self, repo_id: str, commit: str, names: Sequence[str]) -> Path:
        self.cache.mkdir(exist_ok=True)
        for name in names:
            self.asked_for.append(name)
            shutil.copyfile(self.folder / name, self.cache / name)
        return self.cache

    def tensor_dtypes(self, repo_id: str, commit: str, name: str) -> dict[str, str]:
        return {}


def test_a_config_is_refused_before_the_weights_are_fetched(tiny_folder: Path, tmp_path: Path) -> None:
    change_config(tiny_folder, hidden_act="no such function")
    hub = _Hub(tiny_folder, tmp_path / "cache")
    original = OriginalModel(find_source("acme/tiny", None, hub), hub, tmp_path / "work")
    with pytest.raises(SourceError, match="does not describe a model"):
        original.checkpoint()
    assert "model.safetensors" not in hub.asked_for


def test_an_adapter_in_the_cache_is_not_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    """The folder of a commit in the cache also holds what others have fetched."""
    hub = _Hub(tiny_folder, tmp_path / "cache")
    original = OriginalModel(find_source("acme/tiny", None, hub), hub, tmp_path / "work")
    original.companions()
    hub.fetch("acme/tiny", "0123", ["LICENSE"])
    (hub.cache / "adapter_config.json").write_text("{}")
    folder = original.checkpoint()
    assert folder.parent == tmp_path / "work" / "readable"
    assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()


def test_what_is_described_has_no_memory(tiny_folder: Path) -> None:
    model = described_model(tiny_folder, "tiny")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
