"""A GGUF file as a source: files as llama.cpp writes them, compared with the models they were made of, or refused."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradmap_hub.errors import BrokenCheckpointError, SourceError
from gradmap_hub.models.gguf import convert_gguf, open_gguf
from gradmap_hub.models.source import find_source
from gradmap_hub.models.transformers_compat import has_5

IDS = torch.tensor([[1, 40, 70, 99, 7, 12, 200, 33, 100, 101, 102, 103, 60, 61, 62, 63]])


def converted(path: Path, folder: Path) -> Any:
    """The model of a GGUF file, as plain transformers reads its conversion."""
    from transformers import AutoModelForCausalLM

    convert_gguf(path, folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


# -- the same model ----------------------------------------------------------------------------------------------------


def llama3_scaling(original: int, factor: float = 8.0) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def llama3_factors(head: int, theta: float, original: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes `rope_freqs.weight`."""
    found = []
    for index in range(0, head, 2):
        length = 2 * math.pi * theta ** (index / head)
        if length < original / 4:
            found.append(1.0)
        elif length > original:
            found.append(factor)
        else:
            smooth = (original / length - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "llama": ("llama", "llama", {"tie_word_embeddings": False}, {}, {}),
    "llama, tied": ("llama", "llama", {"tie_word_embeddings": True}, {}, {}),
    "llama, linear": (
        "llama", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {},
    ),
    "llama, linear (old key)": (
        "llama", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"llama.rope.scale_linear": 2.0}, {},
    ),
    "llama 3.1": (
        "llama", "llama", {"rope_scaling": llama3_scaling(64)}, {},
        {"rope_freqs.weight": llama3_factors(16, 10_000.0, 64, 8.0)},
    ),
    "llama 3.2": (
        "llama", "llama", {"rope_scaling": llama3_scaling(8192, 32.0), "head_dim": 64, "rope_theta": 500_000.0}, {},
        {"rope_freqs.weight": llama3_factors(64, 500_000.0, 8192, 32.0)},
    ),
    "qwen2": ("qwen2", "qwen2", {"head_dim": 8}, {}, {}),
    "qwen3": ("qwen3", "qwen3", {"tie_word_embeddings": False}, {}, {}),
    "gemma2": (
        "gemma2", "gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0},
        {"gemma2.attn_logit_softcapping": 20.0}, {},
    ),
    "gemma3": (
        "gemma3", "gemma3_text", {"sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}, {}, {},
    ),
    "gemma3, linear": (
        "gemma3", "gemma3_text",
        {"sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 6,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, {},
    ),
    "gemma3, as deep as 27B": (
        "gemma3", "gemma3_text",
        {"sliding_window": 4, "query_pre_attn_scalar": 8, "num_hidden_layers": 62, "hidden_size": 32}, {}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits(name: str, gguf_writer: Any, tiny_model: Any, tmp_path: Path) -> None:
    arch, model_type, changes, keys, extra = FAMILIES[name]
    model = tiny_model(model_type, **changes)
    path = tmp_path / "tiny.gguf"
    theta = {f"{arch}.rope.freq_base": changes.get("rope_theta", 10_000.0)}
    gguf_writer(path, arch, model, keys=theta | keys, extra=extra)
    back = converted(path, tmp_path / "out")
    wanted = logits(model)
    assert (logits(back) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    scaling = changes.get("rope_scaling")
    if scaling and not has_5():  # which has another form
        found = back.config.rope_scaling
        assert {key: value if key == "rope_type" else pytest.approx(value) for key, value in scaling.items()} == found


def test_the_bench_writes_llama_cpp_the_same_model(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    """A checkpoint without its middle layer, to GGUF and back: the same tensors, the same tokenizer."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from benchmarks.llamacpp import write_gguf
    from gradmap_hub.models.architectures import ARCHITECTURES
    from gradmap_hub.pruning.removal import remove_layers

    whole, pruned, back = (tmp_path / name for name in ("whole", "pruned", "back"))
    gguf_writer(tmp_path / "tiny.gguf", "llama", llama)
    convert_gguf(tmp_path / "tiny.gguf", whole)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    remove_layers(model, ARCHITECTURES["llama"], (1,))
    model.save_pretrained(pruned)
    write_gguf(pruned, tmp_path / "tiny.gguf", tmp_path / "pruned.gguf")
    convert_gguf(tmp_path / "pruned.gguf", back)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (pruned, back))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (back / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_llama_cpp_computes_the_same(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from benchmarks.llamacpp import LlamaCpp

    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama)
    ours = torch.nn.functional.cross_entropy(logits(llama)[0, :-1], IDS[0, 1:], reduction="none")
    theirs = LlamaCpp(path, threads=1).losses(IDS[0].tolist())
    assert np.abs(ours.numpy() - theirs).max() <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same_logits(name: str, gguf_writer: Any, tiny_model: Any, tmp_path: Path) -> None:
    """400 tokens, of the converted file in transformers and of the file in llama.cpp, for all that is accepted."""
    pytest.importorskip("llama_cpp")
    from benchmarks.llamacpp import LlamaCpp

    arch, model_type, changes, keys, extra = FAMILIES[name]
    path = tmp_path / "tiny.gguf"
    theta = {f"{arch}.rope.freq_base": changes.get("rope_theta", 10_000.0)}
    gguf_writer(path, arch, tiny_model(model_type, **changes), keys=theta | keys, extra=extra)
    back = converted(path, tmp_path / "out")
    ids = torch.randint(4, back.config.vocab_size, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = back(ids, use_cache=False).logits[0].numpy()
    theirs = LlamaCpp(path, threads=1).logits(ids[0].tolist())
    # llama.cpp keeps keys and values in float16.
    assert np.abs(ours - theirs).max() <= 1e-2 * np.abs(ours).max()


@pytest.mark.long
def test_a_file_through_the_commands(gguf_writer: Any, llama: Any, tmp_path: Path, text_file: Path) -> None:
    """`prune` of a file answers as the model without those layers; a bent one is one line."""
    from transformers import AutoModelForCausalLM
    from typer.testing import CliRunner

    from gradmap_hub.cli.app import app
    from gradmap_hub.models.architectures import ARCHITECTURES
    from gradmap_hub.pruning.removal import remove_layers

    path, output = tmp_path / "tiny.gguf", tmp_path / "small"
    gguf_writer(path, "llama", llama)
    options = ["--drop", "1", "--samples", "4", "--seq-len", "16", "--eval-rows", "2", "-c", str(text_file)]
    options += ["--compensation", "none"]
    done = CliRunner().invoke(app, ["prune", str(path), str(output), *options])
    assert done.exit_code == 0, (done.output, done.exception)
    wanted = copy.deepcopy(llama)
    remove_layers(wanted, ARCHITECTURES["llama"], (1,))
    found: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert (logits(found) - logits(wanted)).abs().max() <= 1e-4 * logits(wanted).abs().max()
    path.write_bytes(path.read_bytes()[:-100])
    for command in (["prune", str(path), str(tmp_path / "a"), *options], ["inspect", str(path)]):
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, BrokenCheckpointError), done.exception
        assert "tiny.gguf" in done.exception.message and "\n" not in done.exception.message


def test_weights_in_several_files(
    gguf_writer: Any, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradmap_hub.models.gguf._SHARD_BYTES", 60_000)
    gguf_writer(tmp_path / "tiny.gguf", "llama", llama)
    back = converted(tmp_path / "tiny.gguf", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(back), logits(llama))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_a_quantised_tensor(kind: str, tmp_path: Path) -> None:
    import gguf

    from gradmap_hub.models.gguf import values_of
    from gradmap_hub.models.gguf_header import read_gguf_header

    values = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    stored = gguf.quantize(values, quantization)
    writer.add_tensor("a.weight", stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "one.gguf")
    found = values_of(header, header.tensors["a.weight"])
    assert found.dtype == np.float32 and np.array_equal(found, gguf.dequantize(stored, quantization))
    assert np.abs(found - values).max() < 0.2


def test_a_source_without_torch_or_weights(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama, keys={"general.license": "apache-2.0", "general.languages": ["en", "de"]})
    source = find_source(str(path), None, None)  # pyright: ignore[reportArgumentType]
    assert (source.base.license, source.base.language, source.layer_count) == ("apache-2.0", ["en", "de"], 3)
    assert source.weight_bytes == sum(4 * value.numel() for value in llama.state_dict().values())


# -- refused -----------------------------------------------------------------------------------------------------------

Edit = dict[str, Any]
REFUSED: dict[str, tuple[Edit, str]] = {
    "a tensor is missing": ({"without": ["blk.2.ffn_down.weight"]}, r"blk.2.ffn_down.weight is missing \(1 of 30"),
    "no embedding": ({"without": ["token_embd.weight"]}, "token_embd.weight is missing"),
    "half of the layers": (
        {"without": [f"blk.2.{name}.weight" for name in ("attn_q", "attn_k", "attn_norm")]}, r"\(3 of 30",
    ),
    "a tensor too many": ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "tensor blk.0.attn_q.bias,"),
    "a layer too many": ({"extra": {"blk.3.ffn_up.weight": np.ones((64, 32), np.float32)}}, "tensor blk.3.ffn_up.we"),
    "a wrong shape": (
        {"extra": {"blk.1.ffn_up.weight": np.ones((32, 64), np.float32)}}, r"shape \[32, 64\], not \[64, 32\]",
    ),
    "a type that is no number": ({"extra": {"output_norm.weight": np.ones(32, np.int32)}}, "output_norm.weight of ty"),
    "rotary factors of another scaling": (
        {"extra": {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}}, "rope_freqs.weight with these",
    ),
    "rotary factors that are not finite": (
        {"extra": {"rope_freqs.weight": np.full(8, np.nan, np.float32)}}, "rope_freqs.weight with these",
    ),
    "too few rotary factors": (
        {"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight with these",
    ),
    "no heads": ({"keys": {"llama.attention.head_count": 0}}, "llama.attention.head_count is 0; an integer from 1"),
    "heads by layer": ({"keys": {"llama.attention.head_count": [4, 4, 4]}}, "head_count is a list of 3"),
    "heads that do not divide": ({"keys": {"llama.attention.head_count_kv": 3}}, "a divisor of 4 is expected"),
    "10^9 layers": ({"keys": {"llama.block_count": 10**9}}, "llama.block_count is 1000000000; an i"),
    "more layers than there are": ({"keys": {"llama.block_count": 4}}, r"blk.3.attn_norm.weight is missing \(9"),
    "layers as text": ({"keys": {"llama.block_count": "three"}}, "llama.block_count is 'three'"),
    "no width": ({"keys": {"llama.embedding_length": None}}, "llama.embedding_length is missing"),
    "another width": ({"keys": {"llama.embedding_length": 48}}, "has the shape"),
    "another vocabulary": ({"keys": {"llama.vocab_size": 300}}, "vocab_size is 300; the number of embeddings, 264"),
    "an epsilon of 0": ({"keys": {"llama.attention.layer_norm_rms_epsilon": 0.0}}, "rms_epsilon is 0.0; a number"),
    "a frequency that is none": ({"keys": {"llama.rope.freq_base": float("nan")}}, "freq_base is nan"),
    "half of a head rotates": ({"keys": {"llama.rope.dimension_count": 8}}, "rope.dimension_count of another size"),
    "yarn": (
        {"keys": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}}, "type 'yarn' with the fac",
    ),
    "experts": ({"keys": {"llama.expert_count": 8}}, "a mixture of 8 experts"),
    "a key that changes the model": ({"keys": {"llama.attention.sliding_window": 4}}, "llama.attention.sliding_window"),
    "another unknown key": ({"keys": {"llama.logit_scale": 0.5}}, "the metadata key llama.logit_scale"),
    "an adapter": ({"keys": {"general.type": "adapter"}}, "general.type is 'adapter'"),
    "an unknown splitting": (
        {"keys": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre is 'tekken', which is not supported",
    ),
    "splitting by default": ({"keys": {"tokenizer.ggml.pre": None}}, "tokenizer.ggml.pre is 'default'"),
    "an unknown tokenizer": ({"keys": {"tokenizer.ggml.model": "t5"}}, "tokenizer.ggml.model is 't5'"),
    "no tokenizer": ({"keys": {"tokenizer.ggml.model": None}}, "tokenizer.ggml.model is missing"),
    "an unknown key of the tokenizer": ({"keys": {"tokenizer.ggml.normalizer.lowercase": True}}, "lowercase"),
    "a normalizer": ({"keys": {"tokenizer.ggml.remove_extra_whitespaces": True}}, "remove_extra_whitespaces is not"),
    "too few tokens": ({"keys": {"tokenizer.ggml.tokens": ["a", "b"]}}, "tokens is a list of 2; a list of 264"),
    "no tokens": ({"keys": {"tokenizer.ggml.tokens": None}}, "tokens is missing"),
    "tokens that are numbers": ({"keys": {"tokenizer.ggml.tokens": [1] * 264}}, "a list of str is expected"),
    "no types": ({"keys": {"tokenizer.ggml.token_type": None}}, "token_type is missing"),
    "an EOS beyond the end": ({"keys": {"tokenizer.ggml.eos_token_id": 264}}, "eos_token_id is 264"),
    "merges of unknown tokens": ({"keys": {"tokenizer.ggml.merges": ["q q"]}}, "merges has 'q q'"),
    "a merge of one": ({"keys": {"tokenizer.ggml.merges": ["h"]}}, "merges has 'h'"),
    "tokens twice": ({"keys": {"tokenizer.ggml.tokens": ["a"] * 264}}, "tokens has a token twice"),
    "letters without a token": (
        {"keys": {"tokenizer.ggml.tokens": [f"x{n}" for n in range(264)]}}, "has no token for",
    ),
    "a template that is a number": ({"keys": {"tokenizer.chat_template": 5}}, "chat_template is 5; a string is exp"),
    "BOS as a text": ({"keys": {"tokenizer.ggml.add_bos_token": "yes"}}, "add_bos_token is 'yes'; true or false"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_exactly_is_refused_by_name(name: str, gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    edit, words = REFUSED[name]
    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama, **edit)
    with pytest.raises((BrokenCheckpointError, SourceError), match=words) as caught:
        find_source(str(path), None, None)  # pyright: ignore[reportArgumentType]
    assert "tiny.gguf" in caught.value.message and caught.value.message.isprintable()
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "tiny.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="architecture 'mamba', which is not supported") as caught:
        open_gguf(tmp_path / "tiny.gguf")
    assert "llama, qwen2" in (caught.value.hint or "")


# -- the tokenizer -----------------------------------------------------------------------------------------------------

TEXTS = (
    "hello 42", "It costs 1234567 dollars", "WE'LL pay 20240131.\n\n", "\tif x:\n        return 1000000\n", "größe ² x",
    "", " ", "a  b\r\n c", "<end>hello<start>",
)  # fmt: skip


def loaded(path: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    convert_gguf(path, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_ends_and_roles_of_a_byte_level_bpe(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama, keys={"tokenizer.chat_template": "{{ messages[0].content }}"})
    tokenizer = loaded(path, tmp_path / "plain")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")
    inputs = tokenizer("hello 42", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}  # what `generate` takes
    # No BOS, digits apart.
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == ["hel", "lo", "Ġ", "4", "2"]
    assert tokenizer.decode(inputs["input_ids"][0]) == "hello 42"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hel"}], tokenize=False) == "hel"
    gguf_writer(path, "llama", llama, keys={"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    tokenizer = loaded(path, tmp_path / "ends")
    assert tokenizer.convert_ids_to_tokens(tokenizer("lo")["input_ids"]) == ["<start>", "lo", "<end>"]
    assert tokenizer("lo", "lo")["input_ids"] == tokenizer("lo")["input_ids"] * 2


def reference(pre: str, keys: dict[str, Any]) -> Any:
    """The published tokenizer of such a file, written out by hand."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    pattern = words + r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    vocabulary = {token: number for number, token in enumerate(keys["tokens"])}
    whole = pre == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in keys["merges"]], ignore_merges=whole))
    split = {"llama-bpe": "{1,3}", "qwen2": ""}.get(pre)
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern % split), "isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in keys["tokens"][:3]])
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_each_kind_of_splitting(
    pre: str, gguf_writer: Any, llama: Any, byte_level_keys: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama, keys={"tokenizer.ggml.pre": pre})
    tokenizer, wanted = loaded(path, tmp_path / "out"), reference(pre, byte_level_keys)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted.encode(text).ids, text
    digits = tokenizer.convert_ids_to_tokens(tokenizer("1234", add_special_tokens=False)["input_ids"])
    assert digits == (["1", "2", "3", "4"] if pre in ("smollm", "qwen2") else ["123", "4"])


def test_llama_3_begins_with_bos_unless_the_file_says_no(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama, keys={"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None})
    assert loaded(path, tmp_path / "out")("lo")["input_ids"][0] == 1


PIECES = {
    "▁": -9.0, "▁the": -3.0, "▁t": -1.0, "th": -2.0, "he": -0.5, "the": -2.5, "▁▁": -6.0, "ab": -4.0, "abc": -5.0,
    "bc": -3.5, **{letter: -20.0 - number for number, letter in enumerate("tehabcdx ")},
}  # fmt: skip


def sentencepiece(prefix: bool) -> dict[str, Any]:
    """Metadata of a tiny BPE of SentencePiece, of 264 tokens."""
    first = ["<unk>", "<s>", "</s>"]
    pieces = dict(PIECES)
    pieces.pop(" ")
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(220)), *pieces]
    tokens += ["\n\n", *(f"<unused{n}>" for n in range(264 - len(tokens) - 1))]
    types = [2, 3, 3, *[6] * 220, *[1] * len(pieces), 4, *[5] * (264 - 223 - len(pieces) - 1)]
    return {
        "model": "llama", "tokens": tokens, "scores": [pieces.get(token, 0.0) for token in tokens], "token_type": types,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": prefix,
    }  # fmt: skip


def merged(text: str) -> list[str]:
    """The algorithm of SentencePiece: join the neighbours whose token has the highest score, the first of equals."""
    symbols = list(text)
    while True:
        scores = [PIECES.get(left + right, -math.inf) for left, right in itertools.pairwise(symbols)]
        if not scores or max(scores) == -math.inf:
            return symbols
        place = scores.index(max(scores))
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_writer(path, "llama", llama, tokenizer=sentencepiece(prefix))
    tokenizer = loaded(path, tmp_path / "out")
    for text in ("the the", "abc ab", "bcabc  the", "thethe abcd", "he  x", "aab bbc tthe", "  the"):
        wanted = merged("▁" * prefix + text.replace(" ", "▁"))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *wanted], text
        assert tokenizer.decode(ids[1:]) == text
    found = tokenizer.convert_ids_to_tokens(tokenizer("a\x01\n\nb", add_special_tokens=False)["input_ids"])
    assert [token for token in found if token != "▁"] == ["a", "<0x01>", "\n\n", "b"]


def test_a_sentencepiece_token_that_is_too_long(gguf_writer: Any, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    keys = sentencepiece(True)
    keys["tokens"][-1] = "x" * 513
    gguf_writer(path, "llama", llama, tokenizer=keys)
    with pytest.raises(BrokenCheckpointError, match="more than 512 characters"):
        open_gguf(path)
