"""Weights fetched layer by layer give the numbers of weights in memory, and leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.models import converting, streaming
from gradmap_hub.models.architectures import ARCHITECTURES, Architecture
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.models.streaming import (
    StreamedDecoder,
    key_report,
    open_streamed,
    pruned_logits,
)
from gradmap_hub.models.weight_files import WeightFiles
from gradmap_hub.pruning.removal import parameter_count
from gradmap_hub.pruning.scoring import score_layers
from gradmap_hub.pruning.verification import logits_of, probe_ids, verify
from gradmap_hub.pruning.writing import PlannedTensor, write_pruned, write_safetensors

TOKENS = 40
REMOVED = (1, 3)
KEPT = [0, 2, 4]
LLAMA = ARCHITECTURES["llama"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def saved(model: Any, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def on_meta(decoder: StreamedDecoder) -> bool:
    return all(parameter.is_meta for layer in decoder.layers for parameter in layer.parameters())


@pytest.fixture
def checkpoint(model_of: Callable[..., Any], tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A tiny untied Llama on disk, and the same in memory."""
    model = model_of("llama")
    yield saved(model, tmp_path / "llama"), model


@pytest.mark.parametrize("tied", [False, True])
def test_scores_and_losses_are_those_of_the_model_in_memory(
    family: str, tied: bool, model_of: Callable[..., Any], random_rows: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = model_of(family, tied=tied)
    folder = saved(model, tmp_path / family)
    ids = random_rows(3, TOKENS)
    inside = Decoder(model, ARCHITECTURES[family], TOKENS)
    streamed = open_streamed(folder, ARCHITECTURES[family], TOKENS)
    assert score_layers(streamed, ids) == score_layers(inside, ids)
    assert streamed.losses(ids, KEPT) == inside.losses(ids, KEPT)
    assert on_meta(streamed)
    assert parameter_count(streamed.model) == parameter_count(model)


def test_rows_go_through_a_layer_together_or_not_with_the_same_result(
    checkpoint: tuple[Path, Any], random_rows: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = open_streamed(checkpoint[0], LLAMA, TOKENS)
    ids = random_rows(3, TOKENS)
    together = score_layers(streamed, ids)
    monkeypatch.setattr(streaming, "STREAM_BUDGET", 2 * 6 * TOKENS * 64 * 4)
    assert streamed.rows_per_pass == 2
    two = score_layers(streamed, ids)
    monkeypatch.setattr(streaming, "STREAM_BUDGET", 1)
    assert streamed.rows_per_pass == 1
    one = score_layers(streamed, ids)
    # A layer's sum adds the rows' gradients in the same order, whichever rows share a pass.
    assert together == two == one


def test_a_batch_of_rows_is_run_row_by_row(checkpoint: tuple[Path, Any], random_rows: Callable[..., Tensor]) -> None:
    streamed = open_streamed(checkpoint[0], LLAMA, TOKENS)
    ids = random_rows(3, TOKENS)
    seen: list[int] = []
    handle = streamed.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))  # pyright: ignore
    with torch.no_grad():
        hidden = streamed.run(streamed.embed(ids), KEPT)
        alone = [streamed.run(streamed.embed(row), KEPT) for row in ids.split(1)]
    handle.remove()
    assert seen == [1] * 6 and torch.equal(hidden, torch.cat(alone))


@pytest.mark.parametrize("tied", [False, True])
def test_another_dtype_than_stored(
    tied: bool, model_of: Callable[..., Any], random_rows: Callable[..., Tensor], tmp_path: Path
) -> None:
    """bfloat16 weights used in float32 give what the model loaded in float32 gives."""
    folder = saved(model_of("gemma", tied=tied).to(torch.bfloat16), tmp_path / "gemma")
    ids = random_rows(2, TOKENS)
    model = load(folder)
    expected = score_layers(Decoder(model, ARCHITECTURES["gemma"], TOKENS), ids)
    streamed = open_streamed(folder, ARCHITECTURES["gemma"], TOKENS, dtype=torch.float32)
    assert parameter_count(streamed.model) == parameter_count(model)
    found = score_layers(streamed, ids)
    assert found.gradient == pytest.approx(expected.gradient, rel=1e-5)
    assert found.taylor == pytest.approx(expected.taylor, rel=1e-5)
    assert found.windows(2) == pytest.approx(expected.windows(2), abs=1e-6)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert streamed.parameter(0, "mlp.down_proj.weight").dtype == torch.float32
    as_stored = open_streamed(folder, ARCHITECTURES["gemma"], TOKENS)
    assert as_stored.dtype == torch.bfloat16
    assert score_layers(as_stored, ids).gradient == pytest.approx(expected.gradient, rel=0.1)


def test_a_converted_head_has_the_values_and_the_gradient_of_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "_HEAD_ROWS", 7)  # does not divide 30
    weight = torch.nn.Parameter(torch.randn(30, 8).bfloat16(), requires_grad=False)
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    again = hidden.detach().clone().requires_grad_(True)
    found = converting.ConvertingHead(weight)(hidden)
    expected = again @ weight.float().T
    assert torch.allclose(found, expected, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert hidden.grad is not None and again.grad is not None
    assert torch.allclose(hidden.grad, again.grad, atol=1e-4)


def test_rotary_frequencies_are_real_and_float32(model_of: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(model_of("llama").to(torch.bfloat16), tmp_path / "llama")
    streamed = open_streamed(folder, LLAMA, TOKENS)
    buffers = dict(streamed.model.named_buffers())
    wanted = dict(load(folder).named_buffers())
    assert buffers and buffers.keys() == wanted.keys()
    assert all(torch.equal(buffers[name], wanted[name]) and buffers[name].dtype == torch.float32 for name in wanted)
    assert streamed.model.config._attn_implementation == "sdpa"  # pyright: ignore


def test_weights_are_there_inside_the_context_only(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    streamed = open_streamed(folder, LLAMA, TOKENS)
    name = "mlp.down_proj.weight"
    stored = model.model.layers[2].mlp.down_proj.weight
    assert on_meta(streamed)
    with streamed.layer(2) as module:
        with streamed.layer(2) as again:
            assert again is module
        assert torch.equal(module.get_parameter(name), stored)
        assert streamed.layers[1].get_parameter(name).is_meta
    assert on_meta(streamed)
    with pytest.raises(KeyboardInterrupt), streamed.layer(0), streamed.layer(1):
        raise KeyboardInterrupt
    assert on_meta(streamed)
    assert torch.equal(streamed.parameter(2, name), stored)
    with pytest.raises(AttributeError):
        streamed.parameter(2, "mlp.no_such_weight")


def test_opening_multiplies_nothing(checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a layer nor the head: both would be read from disk for nothing."""
    monkeypatch.setattr(torch.nn.Linear, "forward", _fail)
    streamed = open_streamed(checkpoint[0], LLAMA, TOKENS)
    assert "forward" not in vars(streamed.head)


def test_weights_are_views_of_the_file(checkpoint: tuple[Path, Any]) -> None:
    streamed = open_streamed(checkpoint[0], LLAMA, TOKENS)
    name = "mlp.up_proj.weight"
    address = streamed.parameter(0, name).data_ptr()
    with streamed.layer(0) as module:
        assert module.get_parameter(name).data_ptr() == address
    held = streamed.parameter(0, name)  # a view outlives the release of its pages
    before = held.clone()
    streamed.files.release([f"model.layers.0.{name}"])
    assert torch.equal(held, before)


def test_put_and_replaced(checkpoint: tuple[Path, Any], random_rows: Callable[..., Tensor]) -> None:
    folder, model = checkpoint
    name = "mlp.down_proj.weight"
    ids = random_rows(2, TOKENS)
    streamed, inside = open_streamed(folder, LLAMA, TOKENS), Decoder(model, LLAMA, TOKENS)
    first = streamed.losses(ids)
    draw = torch.Generator().manual_seed(1)
    new, other = (torch.randn(64, 96, generator=draw) * 0.1 for _ in range(2))
    with streamed.replaced(2, {name: new}):
        with inside.replaced(2, {name: new}):
            assert streamed.losses(ids) == inside.losses(ids) != first
        with streamed.layer(2) as module, streamed.replaced(2, {name: other}):
            assert torch.equal(module.get_parameter(name), other)  # also in a layer that is already open
        assert torch.equal(streamed.parameter(2, name), new)
    assert streamed.losses(ids) == first
    with pytest.raises(KeyboardInterrupt), streamed.replaced(2, {name: new}):
        raise KeyboardInterrupt
    assert streamed.losses(ids) == first
    streamed.put(2, {name: new.double()})
    inside.put(2, {name: new})
    assert streamed.losses(ids) == inside.losses(ids) != first
    with streamed.replaced(2, {name: other}):
        pass
    assert torch.equal(streamed.parameter(2, name), new)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj"):
        streamed.put(2, {name: new.T})


def test_shards(model_of: Callable[..., Any], random_rows: Callable[..., Tensor], tmp_path: Path) -> None:
    model = model_of("llama")
    folder = saved(model, tmp_path / "sharded", "200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = random_rows(2, TOKENS)
    streamed = open_streamed(folder, LLAMA, TOKENS)
    assert score_layers(streamed, ids) == score_layers(Decoder(model, LLAMA, TOKENS), ids)


def test_an_unaligned_file_is_read(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    path = checkpoint[0] / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    files, wanted = WeightFiles(checkpoint[0]), load_file(path)
    assert all(torch.equal(files.tensor(name), value) for name, value in wanted.items())


@pytest.mark.parametrize("damage", ["missing", "shape", "shard"])
def test_a_checkpoint_that_is_not_whole_is_refused(damage: str, model_of: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(model_of("llama"), tmp_path / "broken", "200KB" if damage == "shard" else "5GB")
    name = "model.layers.3.mlp.up_proj.weight"
    if damage == "shard":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    else:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors.pop(name)[: 0 if damage == "missing" else 5].clone()
        if damage == "missing":
            del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        report = key_report(folder)
        assert report["missing_keys" if damage == "missing" else "mismatched_keys"] == [name]
    with pytest.raises(BrokenCheckpointError, match=r"safetensors|up_proj"):
        open_streamed(folder, LLAMA, TOKENS)


def reference(model: Any, architecture: Architecture, overrides: dict[tuple[int, str], Tensor], folder: Path) -> Any:
    """What the in-memory path writes: layers removed from the loaded model, then `save_pretrained`."""
    from gradmap_hub.models.checkpoint import save_checkpoint
    from gradmap_hub.pruning.removal import remove_layers

    for (layer, name), value in overrides.items():
        model.model.layers[layer].get_parameter(name).data = value
    remove_layers(model, architecture, REMOVED)
    folder.mkdir()
    save_checkpoint(model, folder, torch.bfloat16)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_written_checkpoint_is_that_of_the_path_in_memory(
    family: str, tied: bool, model_of: Callable[..., Any], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[family]
    model = model_of(family, tied=tied)
    source = saved(model, tmp_path / "source")
    overrides = {(2, "mlp.down_proj.weight"): torch.randn(64, 96, generator=torch.Generator().manual_seed(2)) * 0.1}
    count = write_pruned(source, tmp_path / "streamed", architecture, REMOVED, overrides, torch.bfloat16)
    expected = reference(model, architecture, overrides, tmp_path / "plain")
    assert count == parameter_count(expected)
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "plain"))
    assert found.keys() == wanted.keys() and ("lm_head.weight" in found) is not tied
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == torch.bfloat16 for name in wanted)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("streamed", "plain")]
    assert configs[0] == configs[1]

    written = load(tmp_path / "streamed")
    ids = probe_ids(written.config)
    assert torch.equal(logits_of(written, ids), logits_of(load(tmp_path / "plain"), ids))


def test_the_written_folder_is_verified_by_streaming(family: str, model_of: Callable[..., Any], tmp_path: Path) -> None:
    """The calls of a run with --low-memory; no model is ever whole in memory."""
    architecture = ARCHITECTURES[family]
    source, output = saved(model_of(family), tmp_path / "source"), tmp_path / "pruned"
    overrides = {(4, "mlp.down_proj.weight"): torch.randn(64, 96, generator=torch.Generator().manual_seed(2)) * 0.1}
    write_pruned(source, output, architecture, REMOVED, overrides, torch.bfloat16)

    def check() -> Any:
        reread = open_streamed(output, architecture, 16, dtype=torch.float32)
        ids = probe_ids(reread.model.config)
        original = open_streamed(source, architecture, ids.shape[1], dtype=torch.float32, rounding=torch.bfloat16)
        original.put(4, {name: value for (_, name), value in overrides.items()})
        expected = pruned_logits(original, KEPT, ids)
        with reread.whole_model() as model:
            return verify(model, key_report(output), output, expected)

    record = check()
    assert record.keys_match and record.generation_matches and record.max_logit_difference < 1e-5

    from gradmap_hub.errors import VerificationError

    write_pruned(source, output, architecture, (0, 3), overrides, torch.bfloat16)  # not the layers that were meant
    with pytest.raises(VerificationError):
        check()


def test_a_whole_model_is_called_as_ever(checkpoint: tuple[Path, Any], random_rows: Callable[..., Tensor]) -> None:
    streamed = open_streamed(checkpoint[0], LLAMA, TOKENS)
    ids = random_rows(1, 20)
    with streamed.whole_model() as model:
        assert torch.equal(logits_of(model, ids), logits_of(checkpoint[1], ids))
    with pytest.raises(RuntimeError, match="in the middle"), streamed.whole_model() as model:
        model.model.layers[3].mlp.down_proj.register_forward_hook(_fail)
        logits_of(model, ids)
    assert on_meta(streamed) and all("forward" not in vars(layer) for layer in streamed.layers)


def _fail(*_: Any) -> None:
    raise RuntimeError("in the middle")


def test_shards_as_transformers_names_them(model_of: Callable[..., Any], tmp_path: Path) -> None:
    """The same model written by transformers in shards and by us: the same files hold the same tensors."""
    model = model_of("qwen2")
    theirs = saved(model, tmp_path / "theirs", "200KB")
    stale = tmp_path / "ours"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"from an earlier run")
    planned = [
        PlannedTensor(name, tuple(value.shape), lambda value=value: value.flatten().split(1000))
        for name, value in model.state_dict().items()
    ]
    write_safetensors(stale, planned, torch.float32, shard_bytes=200_000)
    index, wanted = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (stale, theirs))
    assert index == wanted
    assert {path.name for path in stale.glob("*.safetensors")} == set(index["weight_map"].values())
    for path in stale.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        ours_, theirs_ = load_file(path), load_file(theirs / path.name)
        assert ours_.keys() == theirs_.keys() and all(torch.equal(ours_[key], theirs_[key]) for key in ours_)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_too_few_pieces_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="24 were written"):
        write_safetensors(tmp_path, [PlannedTensor("w", (8,), lambda: [torch.ones(6)])], torch.float32)


def test_an_override_of_a_layer_that_is_removed_is_refused(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensor is written"):
        write_pruned(
            checkpoint[0], tmp_path / "out", LLAMA, REMOVED,
            {(1, "mlp.down_proj.weight"): torch.zeros(64, 96)}, torch.float32,
        )  # fmt: skip
