"""What goes wrong when decoder layers are removed, and the test that would tell.

Each trap names a piece of the handling and what is left without it; then every one of its tests fails, which is tried
in a copy of the package (slow).
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradmap_hub.models.transformers_compat import has_5

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trap:
    """In `file` the text `old` handles it; with `new` in its place each of `tests` fails."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ARCHITECTURES = "gradmap_hub/models/architectures.py"
SLICING = "gradmap_hub/models/slicing.py"
SUPPORT = "gradmap_hub/models/support.py"
PRUNING = "gradmap_hub/pruning/removal.py"
RESIDUAL = "gradmap_hub/pruning/residual.py"
SKELETON = "gradmap_hub/models/skeleton.py"
VERIFICATION = "gradmap_hub/pruning/verification.py"
_FAMILIES = "tests/models/test_families.py"
_PRUNING = "tests/pruning/test_removal.py"
_BUILDER = "tests/exporters/test_formats.py::test_what_the_builder_would_get_wrong_is_known_from_the_config"


def _pruned(*cases: str) -> tuple[str, ...]:
    return tuple(f"{_FAMILIES}::test_a_pruned_checkpoint_is_a_stock_model[{case}]" for case in cases)


def _folded(*cases: str) -> tuple[str, ...]:
    return tuple(f"{_FAMILIES}::test_what_is_folded_is_what_was_fitted[{case}]" for case in cases)


def _refused(*cases: str) -> tuple[str, ...]:
    return tuple(f"{_FAMILIES}::test_hybrids_are_refused_by_name[{case}]" for case in cases)


TRAPS = (
    # --- the invariant: read back, keys exact, logits equal beyond any window, the graph too
    Trap(
        "names of weights that no file holds", "gradmap_hub/models/checkpoint.py", "if report[kind]:", "if False:",
        (f"{_PRUNING}::test_loading_refuses_missing_tensors_and_unreadable_weights",),
    ),
    Trap(
        "weights left over in a file", VERIFICATION, "keys_match = not any(", "keys_match = any([True]) or any(",
        (f"{_PRUNING}::test_verification_refuses_unexpected_keys",),
    ),
    Trap(
        "logits after reading back", VERIFICATION, "not difference <= LOGIT_LIMIT", "False",
        (f"{_PRUNING}::test_verification_refuses_a_changed_weight",),
    ),
    Trap(
        "an input longer than the window", VERIFICATION, "min(max(64, window + 16), ", "min(8, ",
        (f"{_PRUNING}::test_verification_sees_a_wrong_attention_type", *_pruned("mistral")),
    ),
    Trap(
        "the graph against PyTorch", "exporters/onnx.py", "    if max(plain, with_past) > PARITY_LIMIT or not equal:",
        "    if False:", (f"{_FAMILIES}::test_onnx[gpt2]",),
    ),
    # --- indices and depth
    Trap(
        "index of the KV cache", PRUNING, "setattr(module, index_name, position)", "pass",
        _pruned("llama", "gpt2", "bloom", "deepseek_v3"),
    ),
    Trap(
        "two layers on one place of the cache", VERIFICATION, " or not generation:", ":",
        (f"{_PRUNING}::test_verification_sees_two_layers_sharing_a_cache_slot",),
    ),
    Trap(
        "number of layers", SLICING, "    result.num_hidden_layers = len(kept)\n", "",
        _pruned("llama", "gpt2", "gpt_neo", "mpt"),
    ),
    # --- lists and rules by index
    Trap(
        "sliding and full attention (layer_types)", SLICING,
        "setattr(result, name, [value[index] for index in kept])", "pass",
        _pruned("gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3", "exaone4", "ministral", "qwen2", "smollm3"),
    ),
    Trap(
        "types of layers that Qwen 2 and 3 derive from the index", SLICING,
        "    result.num_hidden_layers = len(kept)\n",
        "    result.num_hidden_layers = len(kept)\n"
        '    result = type(config)(**{**result.to_dict(), "layer_types": None})\n',
        (f"{_FAMILIES}::test_types_of_layers_are_written_out_when_transformers_derives_them",
         *_pruned("qwen2", "qwen3")),
    ),
    Trap(
        "max_window_layers", ARCHITECTURES, 'leading=("max_window_layers",),', "", _pruned("qwen2_moe"),
    ),
    Trap(
        "layers without rotary embedding (SmolLM 3)", SLICING, '_NOT_PER_LAYER = (',
        '_NOT_PER_LAYER = ("no_rope_layers", ', _pruned("smollm3"),
    ),
    Trap(
        "kinds of attention of GPT-Neo", ARCHITECTURES, 'run_lengths="attention_types",', "", _pruned("gpt_neo"),
    ),
    Trap(
        "lists as long as the layers that are about something else", SLICING, "and not name.endswith(", "and (",
        (f"{_FAMILIES}::test_lists_of_another_meaning_are_not_sliced",),
    ),
    Trap(
        "dense layers of DeepSeek (first_k_dense_replace)", ARCHITECTURES, 'leading=("first_k_dense_replace",),', "",
        _pruned("deepseek_v3"),
    ),
    Trap(
        "layers for further tokens (num_nextn_predict_layers)", ARCHITECTURES,
        'dropped=("num_nextn_predict_layers",),', "", _pruned("deepseek_v3"),
    ),
    Trap(
        "sparse layers of Qwen MoE (decoder_sparse_step, mlp_only_layers)", SLICING, "    if row.sparse:",
        "    if False:", _pruned("qwen2_moe", "qwen3_moe"),
    ),
    # --- what is refused
    Trap(
        "Gemma 3n and 4, hybrids, cross-attention, Llama 4, Qwen3-Next", SUPPORT, "_REFUSED.get(model_type, ",
        "({}).get(model_type, ",
        _refused(
            "gemma3n_text-share keys and values", "gemma4_text-share keys and values",
            "jamba-period", "bamba-recurrent state", "lfm2-recurrent state",
            "zamba2-share weights", "nemotron_h-recurrent state", "mllama-attend to an image", "llama4_text-pattern",
            "qwen3_next-recurrent state",
        ),
    ),
    Trap(
        "types that nobody has looked at (FlexOlmo, AFMoE, GLM MoE)", SUPPORT,
        "row = ARCHITECTURES.get(model_type)", 'row = ARCHITECTURES.get(model_type, ARCHITECTURES["llama"])',
        (*_refused(*(f"{kind}-not known to be safe" for kind in ("flex_olmo", "afmoe", "glm4_moe"))),
         "tests/cli/test_errors.py::test_architectures[config0-words0]"),
    ),
    Trap(
        "attention scaled by the index (GPT-2)", ARCHITECTURES, 'Condition("scale_attn_by_inverse_layer_idx", True,',
        'Condition("scale_attn_by_inverse_layer_idx", None,',
        (f"{_FAMILIES}::test_settings_that_depend_on_the_depth_are_refused"
         "[gpt2-scale_attn_by_inverse_layer_idx-index of the layer]",),
    ),
    # --- the compensation
    Trap(
        "transposed weights of Conv1D, fitted", RESIDUAL,
        "weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T", "weight = linear.weight",
        (f"{_FAMILIES}::test_a_corrected_checkpoint_has_the_loss_on_record[gpt2]",),
    ),
    Trap(
        "transposed weights of Conv1D, folded", RESIDUAL,
        'return {**values, "weight": values["weight"].T.contiguous()}', "return values",
        _folded("gpt2-mlp", "gpt2-attention"),
    ),
    Trap(
        "every expert", ARCHITECTURES, 'outputs = ("experts*down_proj*"', 'outputs = ("experts.0*down_proj*"',
        _folded("olmoe-mlp", "qwen3_moe-mlp"),
    ),
    Trap(
        "the shared expert", ARCHITECTURES, ', "shared_expert.down_proj.weight"', "", _folded("qwen2_moe-mlp"),
    ),
    Trap(
        "the shared experts of DeepSeek", ARCHITECTURES, ', "shared_experts.down_proj.weight"', "",
        _folded("deepseek_v3-mlp"),
    ),
    Trap(
        "experts in one tensor", ARCHITECTURES, '("mlp.experts.down_proj", COLUMNS)', '("mlp.experts.down_proj", ROWS)',
        _folded("gpt_oss-mlp"),
    ),
    Trap(
        "residual_multiplier of Granite", RESIDUAL,
        "scale = 1.0 if row.residual_multiplier is None else float(getattr(layer, row.residual_multiplier))",
        "scale = 1.0",
        (f"{_FAMILIES}::test_the_equation_finds_the_change_that_made_a_drift[granite]",
         f"{_FAMILIES}::test_the_equation_finds_the_change_that_made_a_drift[granitemoe]"),
    ),
    Trap(
        "a norm behind the MLP", ARCHITECTURES, '**_SANDWICH, "norm_offset"', '"norm_offset"',
        (f"{_FAMILIES}::test_the_fit_through_a_norm_holds_its_rms_and_solves_for_its_gain[gemma2]",
         *_folded("gemma2-mlp", "gemma3_text-mlp")),
    ),
    Trap(
        "a norm behind the MLP (OLMo 2)", ARCHITECTURES, '"Olmo2ForCausalLM", **_SANDWICH', '"Olmo2ForCausalLM"',
        (f"{_FAMILIES}::test_the_fit_through_a_norm_holds_its_rms_and_solves_for_its_gain[olmo2]",
         *_folded("olmo2-mlp")),
    ),
    Trap(
        "a norm behind the MLP (OLMo 3)", ARCHITECTURES, '"Olmo3ForCausalLM", **_SANDWICH', '"Olmo3ForCausalLM"',
        _folded("olmo3-mlp"),
    ),
    Trap(
        "a norm behind the MLP (EXAONE 4)", ARCHITECTURES, '"Exaone4ForCausalLM", **_SANDWICH', '"Exaone4ForCausalLM"',
        _folded("exaone4-mlp"),
    ),
    Trap(
        "a norm behind the MLP (GLM-4)", ARCHITECTURES, 'mlp_norm="post_mlp_layernorm",', "",
        (f"{_FAMILIES}::test_the_fit_through_a_norm_holds_its_rms_and_solves_for_its_gain[glm4]", *_folded("glm4-mlp")),
    ),
    Trap(
        "the gain of such a norm", RESIDUAL, "drift = drift * gain / (gain.", "drift = drift / (gain.",
        (f"{_FAMILIES}::test_the_fit_through_a_norm_holds_its_rms_and_solves_for_its_gain[gemma2]",),
    ),
    Trap(
        "a norm on the stream itself (OPT-350m)", ARCHITECTURES, 'Condition("do_layer_norm_before", False,',
        'Condition("do_layer_norm_before", None,',
        (f"{_FAMILIES}::test_prune_and_what_it_records[opt (norm behind)]",),
    ),
    # --- tied embeddings
    Trap(
        "the tie", SLICING, "    result.num_hidden_layers = len(kept)\n",
        "    result.num_hidden_layers = len(kept)\n    result.tie_word_embeddings = False\n",
        (f"{_FAMILIES}::test_tied_embeddings_stay_tied_and_are_no_part_of_any_score",),
    ),
    Trap(
        "the tie, streamed", SKELETON, "if model.config.tie_word_embeddings else set()", "if False else set()",
        ("tests/models/test_streaming.py::test_the_written_checkpoint_is_that_of_the_path_in_memory[llama-True]",),
    ),
    Trap(
        "scores of what is not a layer", "gradmap_hub/models/decoder.py",
        "for name, parameter in module.named_parameters()\n                if reduce",
        "for name, parameter in self.model.named_parameters()\n                if reduce",
        (f"{_FAMILIES}::test_tied_embeddings_stay_tied_and_are_no_part_of_any_score",),
    ),
    # --- other tools
    Trap(
        "patterns that GenAI's builder takes from the index (Gemma, gpt-oss)", "exporters/genai.py",
        "not row.genai:", 'not (row.genai or kind in ("gemma2", "gemma3_text", "gpt_oss")):',
        tuple(f"{_BUILDER}[changes{number}-{kind}]"
              for number, kind in ((10, "gemma2"), (11, "gemma3_text"), (12, "gpt_oss"))),
    ),
    Trap(
        "one window for all layers in GenAI's graph", "exporters/genai.py",
        'if "full_attention" in types:', "if False:",
        (f"{_BUILDER}[changes8-window]",),
    ),
)  # fmt: skip


def test_every_trap_is_found_in_the_code_and_its_tests_exist() -> None:
    functions: dict[str, set[str]] = {}
    for trap in TRAPS:
        assert (ROOT / trap.file).read_text(encoding="utf-8").count(trap.old) == 1, trap.name
        for test in trap.tests:
            file, _, name = test.partition("::")
            if file not in functions:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.partition("[")[0] in functions[file], trap.name


@pytest.mark.slow
@pytest.mark.skipif(has_5(), reason="some cases are only made with transformers 4.57")
def test_the_cases_of_the_tests_exist() -> None:
    tests = sorted({test for trap in TRAPS for test in trap.tests})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is installed: python finds it before the installed one when it starts there."""
    folder = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gradmap_hub", folder / "gradmap_hub", ignore=unwanted)
    for name in ("exporters", "model_cards", "spaces"):
        shutil.copytree(ROOT / name, folder / "gradmap_hub" / name, ignore=unwanted)
    return folder


@pytest.fixture
def without(copied: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The copy without the handling of a trap, or as it is."""
    trap: Trap | None = request.param
    if trap is None:
        yield copied
        return
    inside = trap.file if trap.file.startswith("gradmap_hub/") else f"gradmap_hub/{trap.file}"
    path = copied / inside
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(trap.old, trap.new), encoding="utf-8")
    yield copied
    path.write_text(text, encoding="utf-8")


def outcomes(folder: Path, tests: tuple[str, ...]) -> dict[str, int]:
    """How many of the tests failed, passed, ... against the copy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RELIABILITY"))}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "--tb=line", "-p", "no:cacheprovider", "--rootdir"]
    done = subprocess.run(
        [*command, str(ROOT), "-c", str(ROOT / "pyproject.toml"), *(str(ROOT / test) for test in tests)],
        # Two versions of a file may have the same size and second, by which compiled files are told apart.
        cwd=folder, env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1]
    found = {kind: int(count) for count, kind in re.findall(r"(\d+) (failed|passed|error|skipped)", last)}
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize("without", [None], indirect=True, ids=["nothing"])
def test_all_of_them_pass_with_the_handling(without: Path) -> None:
    tests = tuple(dict.fromkeys(test for trap in TRAPS for test in trap.tests))
    assert outcomes(without, tests) == {"passed": len(tests)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "trap"), [pytest.param(trap, trap, id=trap.name) for trap in TRAPS], indirect=["without"]
)
def test_without_the_handling_they_fail(without: Path, trap: Trap) -> None:
    assert outcomes(without, trap.tests) == {"failed": len(trap.tests)}
