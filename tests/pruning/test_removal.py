"""Removing layers, for every family: what is saved and read back by plain transformers computes what it should."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gradmap_hub.errors import BrokenCheckpointError, VerificationError
from gradmap_hub.models import checkpoint
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.pruning.removal import layers_left_out, parameter_count, remove_layers, storage_dtype
from gradmap_hub.pruning.verification import logits_of, probe_ids, verify

REMOVED = [1, 3]
KEPT = [0, 2, 4]
WINDOW = 12
LAYER_TYPES = {
    "qwen2": ["full_attention", "sliding_attention", "sliding_attention"],
    "qwen3": ["full_attention", "sliding_attention", "sliding_attention"],
}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def reload(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model.eval()
    model.generation_config.eos_token_id = None
    return model, report


def built_by_slicing(original: Any) -> Any:
    """The pruned model made another way: a config written by hand, the kept layers' state copied by name."""
    settings = original.config.to_dict()
    settings["num_hidden_layers"] = len(KEPT)
    if settings.get("layer_types"):
        settings["layer_types"] = [settings["layer_types"][index] for index in KEPT]
    model = AutoModelForCausalLM.from_config(type(original.config)(**settings), dtype=torch.float32).eval()
    state = {}
    for name, value in original.state_dict().items():
        if ".layers." in name:
            head, tail = name.split(".layers.")
            index, rest = tail.split(".", 1)
            if int(index) not in KEPT:
                continue
            name = f"{head}.layers.{KEPT.index(int(index))}.{rest}"
        state[name] = value
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_model_computes_what_the_pruned_one_does(
    family: str, tied: bool, model_of: Callable[..., Any], random_rows: Callable[..., Any], tmp_path: Path
) -> None:
    model = model_of(family, tied=tied)
    reference = built_by_slicing(model)
    ids = random_rows(2, 4 * WINDOW)
    original_logits = logits(model, ids)

    kept = remove_layers(model, ARCHITECTURES[family], REMOVED)
    assert kept == KEPT
    in_memory = logits(model, ids)
    assert (in_memory - original_logits).abs().max() > 0.05  # the layers did something
    assert torch.allclose(in_memory, logits(reference, ids), atol=1e-5)

    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    reloaded, report = reload(tmp_path)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert (logits(reloaded, ids) - in_memory).abs().max() <= 1e-5

    assert reloaded.config.num_hidden_layers == len(KEPT) == len(reloaded.model.layers)
    for built in (model, reloaded):
        indices = [[m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")] for layer in built.model.layers]
        assert [set(found) for found in indices] == [{0}, {1}, {2}]
    assert json.loads((tmp_path / "config.json").read_text()).get("layer_types") == LAYER_TYPES.get(family)

    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        heads = [name for name in stored.keys() if "lm_head" in name or "embed_tokens" in name]  # noqa: SIM118
    assert len(heads) == (1 if tied else 2)
    same = reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert same == tied


def test_generation_with_cache_equals_decoding_without(
    family: str, model_of: Callable[..., Any], random_rows: Callable[..., Any], tmp_path: Path
) -> None:
    model = model_of(family)
    remove_layers(model, ARCHITECTURES[family], REMOVED)
    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    reloaded, _ = reload(tmp_path)
    ids = random_rows(1, WINDOW - 2)
    generated = reloaded.generate(ids, max_new_tokens=2 * WINDOW, do_sample=False, use_cache=True, pad_token_id=0)
    row = ids
    for _ in range(2 * WINDOW):
        row = torch.cat([row, logits(reloaded, row)[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == row.tolist()
    assert len(set(row[0, -2 * WINDOW :].tolist())) > 2  # not one token over and over


def test_config_objects_of_submodules_follow(model_of: Callable[..., Any]) -> None:
    model = model_of("qwen2")
    before = model.config
    remove_layers(model, ARCHITECTURES["qwen2"], REMOVED)
    assert before.num_hidden_layers == 5 and len(before.layer_types) == 5  # the caller's config is not changed
    assert all(m.config.num_hidden_layers == 3 for m in model.modules() if hasattr(m, "config"))


def everything_of(model: Any) -> dict[str, Any]:
    """What `layers_left_out` may not change: parameters by name and identity, indices, configurations."""
    named = {name: id(parameter) for name, parameter in model.named_parameters()}
    indices = {name: module.layer_idx for name, module in model.named_modules() if hasattr(module, "layer_idx")}
    configs = {name: id(module.config) for name, module in model.named_modules() if hasattr(module, "config")}
    return {"parameters": named, "indices": indices, "configs": configs, "config": model.config.to_dict()}


def test_layers_are_left_out_for_a_while(
    family: str, model_of: Callable[..., Any], random_rows: Callable[..., Any], prune_copy: Callable[..., Any]
) -> None:
    """Also for the KV cache: generation is that of the pruned model, and afterwards that of the original again."""
    model, ids = model_of(family), random_rows(1, WINDOW + 4)
    pruned, before, full = prune_copy(model, REMOVED), everything_of(model), logits(model, ids)
    wanted = pruned.generate(ids, max_new_tokens=WINDOW, do_sample=False, pad_token_id=0)
    with layers_left_out(model, ARCHITECTURES[family], REMOVED):
        assert torch.equal(logits(model, ids), logits(pruned, ids))
        found = model.generate(ids, max_new_tokens=WINDOW, do_sample=False, pad_token_id=0)
        assert torch.equal(found, wanted) and model.config.num_hidden_layers == len(KEPT)
    assert everything_of(model) == before and torch.equal(logits(model, ids), full)
    with pytest.raises(KeyboardInterrupt), layers_left_out(model, ARCHITECTURES[family], REMOVED):
        raise KeyboardInterrupt
    assert everything_of(model) == before and torch.equal(logits(model, ids), full)


@pytest.mark.parametrize("eos", [[2, 3, 4, 5, 6], 2])
def test_only_lists_about_layers_are_sliced(eos: Any, model_of: Callable[..., Any]) -> None:
    # Five end tokens in a model of five layers have nothing to do with its layers.
    model = model_of("llama", eos_token_id=eos)
    remove_layers(model, ARCHITECTURES["llama"], REMOVED)
    assert model.config.eos_token_id == eos


def test_the_original_is_left_alone_by_a_pruned_copy(
    model_of: Callable[..., Any], prune_copy: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of("mistral")
    ids = random_rows(1, 30)
    before = logits(model, ids)
    prune_copy(model)
    assert torch.equal(logits(model, ids), before)


def test_bfloat16_storage_keeps_rotary_frequencies(
    family: str, model_of: Callable[..., Any], random_rows: Callable[..., Any], tmp_path: Path
) -> None:
    model = model_of(family, max_position_embeddings=4096)
    remove_layers(model, ARCHITECTURES[family], REMOVED)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(frequencies, frequencies.bfloat16().float())  # rounding would show
    checkpoint.save_checkpoint(model, tmp_path, torch.bfloat16)
    rotary = dict(model.model.rotary_emb.named_buffers())["inv_freq"]
    assert rotary.dtype == torch.float32 and torch.equal(rotary, frequencies)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"

    checkpoint.cast_parameters(model, torch.float32)
    ids = random_rows(1, 4 * WINDOW)
    reloaded, report = checkpoint.load_model(tmp_path)
    assert not report["unexpected_keys"]
    assert (logits(reloaded, ids) - logits(model, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards(
    tied: bool,
    model_of: Callable[..., Any],
    random_rows: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama", tied=tied)
    remove_layers(model, ARCHITECTURES["llama"], REMOVED)
    ids = random_rows(1, 20)
    monkeypatch.setattr(checkpoint, "SHARD_LIMIT", "100KB")
    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    reloaded, report = reload(tmp_path)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(reloaded, ids), logits(model, ids))
    assert checkpoint.checkpoint_bytes(tmp_path) >= 4 * parameter_count(model)


@pytest.mark.parametrize("limits", [("100KB", "5GB"), ("5GB", "100KB")], ids=["then whole", "then shards"])
def test_saving_again_leaves_nothing_of_the_first_time(
    limits: tuple[str, str],
    model_of: Callable[..., Any],
    random_rows: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = random_rows(1, 20)
    for seed, limit in enumerate(limits):
        monkeypatch.setattr(checkpoint, "SHARD_LIMIT", limit)
        model = model_of("llama", seed=seed)
        checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
    assert checkpoint.checkpoint_bytes(tmp_path) < 1.1 * 4 * parameter_count(model)
    assert torch.equal(logits(reload(tmp_path)[0], ids), logits(model, ids))


def test_saving_writes_no_generation_config_and_no_path_of_this_machine(tiny_folder: Path, tmp_path: Path) -> None:
    model, _ = checkpoint.load_model(tiny_folder)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save_checkpoint(model, out, torch.float32)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (out / "config.json").read_text()
    checkpoint.copy_companions(tiny_folder, out, ["tokenizer.json", "generation_config.json", "LICENSE", "merges.txt"])
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert not (out / "merges.txt").exists()


def test_loading_refuses_missing_tensors_and_unreadable_weights(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(BrokenCheckpointError, match="missing keys"):
        checkpoint.load_model(tiny_folder)
    (tiny_folder / "config.json").write_text(json.dumps(config))
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpointError, match="cannot be loaded"):
        checkpoint.load_model(tiny_folder)


def test_storage_dtype() -> None:
    assert storage_dtype("auto", "bfloat16") == torch.bfloat16
    assert storage_dtype("float16", "bfloat16") == torch.float16


def saved(model: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    checkpoint.save_checkpoint(model, folder, torch.float32)
    return checkpoint.load_model(folder)


def test_verification_passes_what_is_right(family: str, model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of(family)
    remove_layers(model, ARCHITECTURES[family], REMOVED)
    ids = probe_ids(model.config)
    assert ids.shape[1] > WINDOW
    expected = logits_of(model, ids)
    reloaded, report = saved(model, tmp_path)
    record = verify(reloaded, report, tmp_path, expected)
    assert record.keys_match and record.generation_matches and record.max_logit_difference <= 1e-5


def test_verification_refuses_a_changed_weight(model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of("llama")
    reloaded, report = saved(model, tmp_path)
    expected = logits_of(model, probe_ids(model.config))
    with torch.no_grad():
        reloaded.model.layers[2].mlp.down_proj.weight[3, 5] += 0.5
    with pytest.raises(VerificationError, match="logits differ"):
        verify(reloaded, report, tmp_path, expected)
    with pytest.raises(VerificationError):  # not a number is not a small difference
        verify(model, report, tmp_path, expected * float("nan"))


def test_verification_refuses_unexpected_keys(model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of("llama")
    reloaded, report = saved(model, tmp_path)
    expected = logits_of(model, probe_ids(model.config))
    with pytest.raises(VerificationError, match="keys differ"):
        verify(reloaded, {**report, "unexpected_keys": ["model.layers.5.mlp.down_proj.weight"]}, tmp_path, expected)


def test_verification_sees_two_layers_sharing_a_cache_slot(model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of("llama")
    reloaded, report = saved(model, tmp_path)
    expected = logits_of(model, probe_ids(model.config))
    reloaded.model.layers[3].self_attn.layer_idx = 2
    with pytest.raises(VerificationError, match="generation with cache differs"):
        verify(reloaded, report, tmp_path, expected)


def test_verification_sees_a_wrong_attention_type(model_of: Callable[..., Any], tmp_path: Path) -> None:
    """The point of a probe longer than the window: layer types left unsliced load without any complaint about keys."""
    model = model_of("qwen2")
    remove_layers(model, ARCHITECTURES["qwen2"], REMOVED)
    expected = logits_of(model, probe_ids(model.config))
    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = copy.deepcopy(config)
    wrong["layer_types"] = ["full_attention", "full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    reloaded, report = checkpoint.load_model(tmp_path)
    with pytest.raises(VerificationError, match="keys match, logits differ"):
        verify(reloaded, report, tmp_path, expected)
