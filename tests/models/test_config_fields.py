"""A config.json with a field of a wrong type or out of range is refused in one line that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradmap_hub.errors import GradmapError, SourceError, UnsupportedArchitecture
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.models.config_fields import check_config
from gradmap_hub.models.safetensors_files import in_both_forms, read_config
from gradmap_hub.models.support import architecture_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "dtype": "float32",
}


def read(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}))
    return read_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", -1), ("num_hidden_layers", "5"), ("num_hidden_layers", 5.0),
        ("num_hidden_layers", True), ("n_layer", 10**9), ("hidden_size", "64"), ("hidden_size", 0),
        ("hidden_size", [64]), ("hidden_size", 10**12), ("intermediate_size", {}), ("vocab_size", 10**10),
        ("num_attention_heads", 0), ("num_attention_heads", -4), ("num_key_value_heads", 0),
        ("num_key_value_heads", 3), ("num_key_value_heads", 8), ("head_dim", 0), ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", -1), ("rms_norm_eps", float("nan")), ("rms_norm_eps", float("inf")),
        ("max_position_embeddings", -1), ("max_position_embeddings", 10**12), ("max_position_embeddings", "long"),
        ("rope_theta", 0), ("rope_theta", -1.0), ("rope_theta", "10000"), ("rope_theta", float("inf")),
        ("rope_scaling", "linear"), ("rope_scaling", [8]), ("rope_parameters", "yarn"), ("rope_parameters", [1]),
        ("architectures", 5), ("architectures", {"a": 1}), ("architectures", [5]), ("architectures", "Llama"),
        ("model_type", 5), ("model_type", ["llama"]), ("dtype", "complex"), ("torch_dtype", "float8_e4m3fn"),
        ("torch_dtype", 16), ("layer_types", ["full_attention"]), ("layer_types", "full_attention"),
        ("layer_types", [1] * 5), ("layer_types", ["full_attention"] * 6), ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 0), ("attention_bias", "no"), ("pad_token_id", "<pad>"), ("pad_token_id", 1.5),
        ("eos_token_id", [2, "3"]), ("eos_token_id", {"a": 2}), ("hidden_act", 3), ("sliding_window", -4),
        ("attention_dropout", "0.0"), ("pruned_heads", {"0": [1]}), ("mlp_only_layers", 3), ("initializer_range", "x"),
        ("layer_types", ["linear_attention"] * 5), ("attention_layers", ["none"] * 5),
        ("unheard_of", float("nan")), ("unheard_of", {"inner": [float("-inf")]}), ("attn_config", [1]),
        ("attn_config", {"clip_qkv": float("inf")}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"config\.json: {field} is .* is expected|{field} is .*NaN") as caught:
        read(tmp_path, **{field: value})
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "linear", "factor": "8"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "none of these"}, "rope_type"),
        ({"type": 5}, "type"),
        ({"rope_type": "llama3", "original_max_position_embeddings": -1}, "original_max_position_embeddings"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "long_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": "x"}, "long_factor"),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": 5}, "sliding_attention"),
        ({"full_attention": {"rope_theta": 0}}, r"full_attention\.rope_theta"),
        ({"full_attention": {"rope_type": "default"}}, r"full_attention\.rope_theta"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_a_wrong_rotary_embedding_is_named(field: str, scaling: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"config\.json: {field}\.{named} is "):
        read(tmp_path, **{field: scaling})


def test_experts_within_bounds(tmp_path: Path) -> None:
    moe = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}
    with pytest.raises(SourceError, match="num_experts_per_tok is 9; at most the 8 experts"):
        read(tmp_path, **moe, num_experts_per_tok=9)
    with pytest.raises(SourceError, match="num_hidden_layers is 900; at most 16 with 4096 experts"):
        read(tmp_path, **{**moe, "num_experts": 4096, "num_hidden_layers": 900})
    assert read(tmp_path, **moe, num_experts_per_tok=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "auto"}, {"dtype": "torch.bfloat16"}, {"dtype": None}, {"pad_token_id": -1},
        {"eos_token_id": 2}, {"rope_theta": 10000}, {"sliding_window": None}, {"use_return_dict": False},
        {"rope_scaling": {}}, {"rope_scaling": {"type": "dynamic", "factor": 2}}, {"quantization_config": None},
        {"_attn_implementation": "flash_attention_2"}, {"layer_types": ["full_attention"] * 5}, {"own": [[["x"]]]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_what_transformers_and_others_write_is_right(changes: dict[str, Any], tmp_path: Path) -> None:
    assert architecture_of(read(tmp_path, **changes)).model_type == "llama"


def test_the_defaults_of_every_family_are_right() -> None:
    from transformers import CONFIG_MAPPING

    known = [kind for kind in ARCHITECTURES if kind in CONFIG_MAPPING]
    assert len(known) > 40
    for kind in known:
        config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        check_config(config, kind)
        check_config(in_both_forms(config), kind)


def test_a_type_that_is_refused_is_told_so_whatever_its_fields_are(tmp_path: Path) -> None:
    config = read(tmp_path, model_type="gemma3n_text", intermediate_size=[8, 8], num_attention_heads="many")
    with pytest.raises(UnsupportedArchitecture, match="share keys and values"):
        architecture_of(config)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config", "quantization"])
@pytest.mark.parametrize("value", [{"bits": 4}, {"quant_method": "fp8"}, "awq\x1b]0;", ["x"], True])
def test_quantised_checkpoints_by_any_field(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="the checkpoint is quantised") as caught:
        architecture_of(read(tmp_path, **{field: value}))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'{"hidden_size": 1' + b"0" * 5_000 + b"}", "an integer in it has 5,001 digits"),
        (b'{"a": "\\ud800"}', "not Unicode"),
        (b'{"\\udfff": 1}', "not Unicode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "Expecting value"),
        (b" " * (65 << 20), "at most 67,108,864 are read"),
    ],
    ids=["deep", "lists", "objects", "digits", "surrogate", "key", "bom", "empty", "large"],
)  # fmt: skip
def test_json_that_no_reader_takes(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=f"not valid JSON: .*{reason}") as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.message.isprintable()


def test_a_folder_or_a_pipe_is_no_config(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        read_config(tmp_path / "config.json")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**38) | st.just("llama"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor", "a"]), inner),
    max_leaves=4,
)
_CHANGES = st.dictionaries(
    st.sampled_from([*LLAMA, "rope_parameters", "layer_types", "head_dim", "auto_map", "quantization_config"]),
    _VALUES, min_size=1, max_size=3,
)  # fmt: skip


def _is_read_or_refused(changes: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps({**LLAMA, **changes}))
    try:
        config = read_config(path)
        architecture_of(config)
        in_both_forms(config)
    except GradmapError as error:
        assert "\n" not in error.message


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=_CHANGES)
def test_any_values_are_read_or_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    _is_read_or_refused(changes, tmp_path / "config.json")


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=_CHANGES)
def test_any_of_many_values_are_read_or_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    _is_read_or_refused(changes, tmp_path / "config.json")
