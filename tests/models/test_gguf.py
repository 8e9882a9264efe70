"""A GGUF file as a source: a real file, written by the gguf package, back through transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gradmap_hub.models.gguf import convert_gguf, gguf_config, read_metadata

HIDDEN, HEADS, LAYERS, FEED = 64, 4, 3, 96


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level BPE: 256 bytes, three merges, and special tokens whose roles must survive."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    specials = ["<unk>", "<start>", "<end>"]
    merges = ["h e", "he l", "l o"]
    tokens = specials + list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in merges]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, generator.standard_normal(shape, dtype=np.float32) * 0.1)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", FEED, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", FEED, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_conversion_reads_as_an_ordinary_model(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert read_metadata(gguf_file)["tokenizer.ggml.pre"] == "smollm"
    assert gguf_config(gguf_file)["num_hidden_layers"] == LAYERS
    convert_gguf(gguf_file, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert "gguf" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")
    inputs = tokenizer("hello 42", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}  # what `generate` takes
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == [
        "hel",
        "lo",
        "Ġ",
        "4",
        "2",
    ]  # no BOS, digits apart
    assert tokenizer.decode(inputs["input_ids"][0]) == "hello 42"
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert torch.isfinite(model(**inputs).logits).all()


def test_the_bench_writes_llama_cpp_the_same_model(gguf_file: Path, tmp_path: Path) -> None:
    """A checkpoint without its middle layer, to GGUF and back: the same tensors, the same tokenizer."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from benchmarks.llamacpp import write_gguf
    from gradmap_hub.models.architectures import ARCHITECTURES
    from gradmap_hub.pruning.removal import remove_layers

    whole, pruned, back = (tmp_path / name for name in ("whole", "pruned", "back"))
    convert_gguf(gguf_file, whole)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    remove_layers(model, ARCHITECTURES["llama"], (1,))
    model.save_pretrained(pruned)
    write_gguf(pruned, gguf_file, tmp_path / "pruned.gguf")
    convert_gguf(tmp_path / "pruned.gguf", back)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (pruned, back))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (back / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
