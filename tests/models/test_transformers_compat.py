"""What is written here is one model to transformers 4.57 and 5, and what either saves in its own way is read here."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmap_hub.errors import UnsupportedArchitecture
from gradmap_hub.layout import COMPANION_FILES
from gradmap_hub.models import checkpoint
from gradmap_hub.models.safetensors_files import readable
from gradmap_hub.models.support import architecture_of
from gradmap_hub.models.transformers_compat import (
    NotInBothForms,
    both_read_config,
    both_read_tokenizer_config,
    has_5,
    installed,
    needs_5,
)
from gradmap_hub.pruning.removal import remove_layers
from gradmap_hub.pruning.verification import logits_of

TOKENS = 48
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FACTORS = [1.0 + 0.3 * place for place in range(8)]
LONG = {"type": "longrope", "short_factor": FACTORS, "long_factor": [2 * factor for factor in FACTORS]}
MIXED = {"sliding_window": 12, "layer_types": ["full_attention", "sliding_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Model types and rotary embeddings that defaults of either generation would not hit upon.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5000.0, "rope_scaling": LLAMA3},
    "llama linear": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "qwen3": {"head_dim": 16, "rope_theta": 3000.0, "rope_scaling": YARN},
    "qwen3 without length": {
        "head_dim": 16, "rope_scaling": {name: YARN[name] for name in YARN if not name.startswith("original")},
    },
    "qwen3_moe": {"head_dim": 16, "rope_theta": 3000.0, **EXPERTS},
    "mixtral": {"rope_theta": 700.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED, "rope_scaling": YARN},
    "gemma3_text": {
        "head_dim": 16, "query_pre_attn_scalar": 16, "rope_theta": 9000.0, "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, **MIXED,
    },
    "olmo3": {"rope_theta": 4000.0, "rope_scaling": YARN, **MIXED},
    "cohere": {"logit_scale": 0.25, "rope_theta": 600.0},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 400},
    "stablelm": {"partial_rotary_factor": 0.5, "rope_theta": 400.0},
    "phi3": {
        "rope_theta": 3000.0, "rope_scaling": LONG, "original_max_position_embeddings": 32, "sliding_window": 20,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    },
}  # fmt: skip


def build(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = copy.deepcopy({**SIZES, **CASES[name], "model_type": name.partition(" ")[0]})  # they are written into
    config = AutoConfig.for_model(**both_read_config(settings))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exchanged(
    other_transformers: Callable[..., None],
    tokenizer: Any,
    random_rows: Callable[..., Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Tensor, Tensor]]:
    """Every case pruned and written here, and read and saved there, once: its folder, token ids, logits."""
    root, ids, expected = tmp_path_factory.mktemp("exchanged"), random_rows(1, TOKENS), {}
    tokenizer.save_pretrained(root / "tokenizer")
    for name in CASES:
        model = build(name)
        whole = logits_of(model, ids)
        remove_layers(model, architecture_of(model.config.to_dict()), [1])
        expected[name] = logits_of(model, ids)
        assert (expected[name] - whole).abs().max() > 0.02
        checkpoint.save_checkpoint(model, root / name, torch.float32)
        checkpoint.copy_companions(root / "tokenizer", root / name, COMPANION_FILES)
    other_transformers([root / name for name in CASES], ids, "Ada found 27 of them.")
    return lambda name: (root / name, ids, expected[name])


@pytest.mark.parametrize("name", CASES)
def test_the_other_transformers_reads_what_is_written_here(name: str, exchanged: Callable[..., Any]) -> None:
    folder, _, expected = exchanged(name)
    assert (torch.load(folder / "logits.pt", weights_only=True) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_what_the_other_transformers_saves_is_read_here(
    name: str, exchanged: Callable[..., Any], tmp_path: Path
) -> None:
    folder, ids, expected = exchanged(name)
    assert architecture_of(json.loads((folder / "again" / "config.json").read_text()))
    model, report = checkpoint.load_model(readable(folder / "again", tmp_path / "stand-in"))
    assert not report["unexpected_keys"]
    assert (logits_of(model, ids) - expected).abs().max() <= 1e-5


def test_both_read_the_same_tokens(exchanged: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, *_ = exchanged("llama")
    wanted = tokenizer("Ada found 27 of them.")["input_ids"]
    assert torch.load(folder / "tokens.pt", weights_only=True).tolist() == wanted
    back = AutoTokenizer.from_pretrained(readable(folder / "again", tmp_path / "stand-in"), local_files_only=True)
    assert back("Ada found 27 of them.")["input_ids"] == wanted
    assert back.all_special_tokens == tokenizer.all_special_tokens


# --- the translation, word for word -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parameters", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        ("llama", {**LLAMA3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 7.0, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ("phi3", {**LONG, "rope_theta": 3.0}, {"rope_theta": 3.0, "rope_scaling": LONG}),
    ],
)
def test_rotary_embeddings_in_the_words_of_4(kind: str, parameters: Any, expected: dict[str, Any]) -> None:
    found = both_read_config({"model_type": kind, "rope_parameters": parameters})
    assert found == {"model_type": kind, **expected}
    assert both_read_config(found) == found


@pytest.mark.parametrize(
    ("kind", "parameters", "reason"),
    [
        ("llama", {"rope_theta": 1.0, "rope_type": "default", "partial_rotary_factor": 0.5}, "part of each head"),
        ("llama", {**LONG, "rope_theta": 1.0}, "longrope"),
        ("qwen3", {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}, "layers"),
        ("olmo3", {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}, "base"),
    ],
)
def test_what_4_has_no_words_for_is_told(kind: str, parameters: Any, reason: str) -> None:
    config = {"model_type": kind, "rope_parameters": parameters, "num_hidden_layers": 4}
    with pytest.raises(NotInBothForms, match=reason):
        both_read_config(config)
    if has_5():
        assert architecture_of(config).model_type == kind
    else:
        with pytest.raises(UnsupportedArchitecture, match=f"{reason}.*transformers 5 can read it .{installed()}"):
            architecture_of(config)


def test_a_config_with_the_words_of_both_means_what_5_reads_from_it() -> None:
    """5 keeps fields that it does not know: those of 4, as they were when it read them."""
    config = {"model_type": "gpt_neox", "rope_theta": 3, "rope_parameters": {"rope_theta": 3, "rope_type": "default"}}
    assert both_read_config(config)["rotary_emb_base"] == 3
    config = {"model_type": "llama", "rope_theta": 3, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 4}}
    assert both_read_config(config) == {"model_type": "llama", "rope_theta": 3, "rope_scaling": LLAMA3}


def test_olmo_3_is_written_in_the_words_of_both() -> None:
    base = {"rope_theta": 7.0, "rope_type": "default"}
    parameters = {"full_attention": {**base, **YARN}, "sliding_attention": base}
    expected = {"model_type": "olmo3", "rope_theta": 7.0, "rope_scaling": YARN, "rope_parameters": parameters}
    for config in (expected, {name: value for name, value in expected.items() if name != "rope_parameters"},
                   {"model_type": "olmo3", "rope_parameters": parameters}):  # fmt: skip
        assert both_read_config(config) == expected


def test_what_needs_5_as_it_lies_in_its_repository() -> None:
    assert needs_5({"model_type": "cwm"}) and needs_5({"model_type": "llama", "rope_parameters": {"rope_theta": 3.0}})
    assert needs_5({"model_type": "llama", "rope_parameters": {**LONG, "rope_theta": 1.0}})
    assert not needs_5({"model_type": "llama", "rope_theta": 3.0}) and not needs_5({"model_type": "gpt2"})


def test_tokenizers_in_the_words_of_4() -> None:
    saved = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "eos_token": "</s>"}
    assert both_read_tokenizer_config(saved) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<x>"],
        "eos_token": "</s>",
    }
    for unchanged in ({"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<i>"}}, {}):
        assert both_read_tokenizer_config(unchanged) == unchanged


def test_a_folder_that_both_read_is_used_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "config.json").write_text(
        json.dumps(both_read_config(json.loads((tiny_folder / "config.json").read_text())))
    )
    settings = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(both_read_tokenizer_config(settings)))
    assert readable(tiny_folder, tmp_path / "stand-in") == tiny_folder
    assert not (tmp_path / "stand-in").exists()


def test_each_folder_has_a_stand_in_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    """`evaluate --against` another model, and another revision, must not be read through links to the first."""
    (tiny_folder / "tokenizer_config.json").write_text('{"extra_special_tokens": ["<x>"]}')
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"other")
    first, second = readable(tiny_folder, tmp_path / "stand-in"), readable(other, tmp_path / "stand-in")
    assert first != second and (second / "model.safetensors").read_bytes() == b"other"
    assert (first / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    (first / "model.safetensors").unlink()
    (first / "model.safetensors").symlink_to(tmp_path / "gone")  # a dangling link is not written through
    assert readable(tiny_folder, tmp_path / "stand-in") == first
    assert not (tmp_path / "gone").exists() and (first / "model.safetensors").is_file()


def test_the_original_is_not_written_to(tiny_folder: Path, tmp_path: Path) -> None:
    config = {**json.loads((tiny_folder / "config.json").read_text()), "rope_parameters": {"rope_theta": 77.0}}
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)
    (tiny_folder / "config.json").write_text(json.dumps(config))
    before = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    for _ in range(2):  # a run that is resumed finds it made
        found = readable(tiny_folder, tmp_path / "stand-in")
        assert json.loads((found / "config.json").read_text())["rope_theta"] == 77.0
    assert {path.name for path in found.iterdir()} == before.keys()
    assert {path.name: path.read_bytes() for path in tiny_folder.iterdir()} == before
    model, _ = checkpoint.load_model(found)
    rope = model.config.rope_parameters if has_5() else {"rope_theta": model.config.rope_theta}
    assert rope["rope_theta"] == 77.0
