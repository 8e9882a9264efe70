"""Every model type: a tiny model of its own config class is scored, pruned, corrected, saved, read back by plain
transformers, streamed and exported. What is found is the table of docs/architectures.md (`make architectures`).

The models have both kinds of attention and of MLP where the family has two, and rows are longer than any window.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmap_hub.config import PruneConfig
from gradmap_hub.data.rows import CalibrationRows, Rows
from gradmap_hub.errors import UnsupportedArchitecture, UsageError, VerificationError
from gradmap_hub.exporters import export as formats
from gradmap_hub.exporters import onnx
from gradmap_hub.healing.corpus import make_corpus
from gradmap_hub.healing.heal import Student, Teacher, heal_model
from gradmap_hub.healing.parts import Part
from gradmap_hub.healing.training import Recipe
from gradmap_hub.models import checkpoint
from gradmap_hub.models.architectures import (
    ARCHITECTURES,
    SUPPORTED,
    compensation_skipped,
)
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.models.safetensors_files import read_config, readable
from gradmap_hub.models.slicing import sliced_config
from gradmap_hub.models.source import check_family, find_source
from gradmap_hub.models.streaming import key_report, open_streamed, pruned_logits
from gradmap_hub.models.support import architecture_of
from gradmap_hub.models.transformers_compat import ONLY_5, has_5
from gradmap_hub.models.weight_check import check_tensors
from gradmap_hub.progress import SilentReporter
from gradmap_hub.pruning.compensation import fit_compensation
from gradmap_hub.pruning.fitting import accumulate_gram, fitted_gain, site_kind, solved, through_norm
from gradmap_hub.pruning.removal import parameter_count, remove_layers
from gradmap_hub.pruning.residual import ATTENTION, MLP, Tap, writer_of
from gradmap_hub.pruning.ridge import RidgeSolution
from gradmap_hub.pruning.scoring import score_layers
from gradmap_hub.pruning.sites import Site
from gradmap_hub.pruning.streams import Original, Streams
from gradmap_hub.pruning.verification import logits_of, probe_ids, verify
from gradmap_hub.pruning.writing import write_pruned

pytestmark = pytest.mark.long  # every model type; tests/pruning has six of them

TABLE = "model types with transformers 5" if has_5() else "model types"
LAYERS = 5
WINDOW = 12
TOKENS = 40
VOCABULARY = 300
LIKE_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FULL, SLIDING = "full_attention", "sliding_attention"
# A pattern that no rule derives from the index, and what is left of it without layers 1 and 3.
MIXED = {"sliding_window": WINDOW, "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING]}
MIXED_LEFT = {"layer_types": [FULL, SLIDING, SLIDING]}


@dataclass(frozen=True)
class Case:
    """`settings` of the config; `left`: what the config must say without the layers `removed`; `left_5`: what that of
    transformers 5 must say besides."""

    settings: dict[str, Any]
    left: dict[str, Any] = field(default_factory=dict)
    removed: tuple[int, ...] = (1, 3)
    depth: str = "num_hidden_layers"
    scale: float = 1.0
    left_5: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if has_5():
            self.left.update(self.left_5)

    @property
    def kept(self) -> list[int]:
        return [layer for layer in range(LAYERS) if layer not in self.removed]


def like_llama(
    left: dict[str, Any] | None = None,
    removed: tuple[int, ...] = (1, 3),
    left_5: dict[str, Any] | None = None,
    **settings: Any,
) -> Case:
    return Case({**LIKE_LLAMA, **settings}, dict(left or {}), removed, left_5=left_5 or {})


def mixed(**settings: Any) -> Case:
    return like_llama(MIXED_LEFT, **MIXED, **settings)


GPT = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 512, "n_inner": 96}
FALCON = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 96}
OPT = {**LIKE_LLAMA, "ffn_dim": 96}
GRANITE = {"residual_multiplier": 0.6, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_nextn_predict_layers": 1,
}  # fmt: skip

# By model type, with a variant in brackets where a family has several ways of putting a layer together.
CASES: dict[str, Case] = {
    "arcee": like_llama(mlp_bias=True),
    "bloom": Case({"hidden_size": 64, "n_layer": LAYERS, "n_head": 4}, depth="n_layer"),
    "cohere": like_llama(logit_scale=0.25),
    "cohere2": mixed(logit_scale=0.25),
    "deepseek_v3": like_llama({"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}, (0, 3), **DEEPSEEK),
    "exaone4": mixed(),
    "falcon": Case(FALCON),
    "falcon (new decoder)": Case({**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon (serial, ALiBi)": Case({**FALCON, "parallel_attn": False, "alibi": True, "bias": True}),
    "gemma": like_llama(head_dim=16),
    "gemma2": mixed(head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=4.0),
    "gemma3_text": mixed(head_dim=16, query_pre_attn_scalar=16),
    "glm": like_llama(head_dim=16, pad_token_id=0),
    "glm4": like_llama(head_dim=16, pad_token_id=0),
    "gpt2": Case(GPT, depth="n_layer"),
    "gpt_neo": Case(
        {
            "hidden_size": 64, "num_layers": LAYERS, "num_heads": 4, "intermediate_size": 96, "window_size": WINDOW,
            "max_position_embeddings": 512, "attention_types": [[["global", "local"], 2], [["local"], 1]],
        },
        {
            "attention_layers": ["global", "global", "local"],
            "attention_types": [[["global"], 1], [["global"], 1], [["local"], 1]],
        },
        depth="num_layers",
    ),
    "gpt_neox": like_llama(use_parallel_residual=True),
    "gpt_neox (serial)": like_llama(use_parallel_residual=False),
    "gpt_oss": mixed(head_dim=16, **EXPERTS),
    "gptj": Case({**GPT, "rotary_dim": 8}, depth="n_layer"),
    "granite": Case({**LIKE_LLAMA, **GRANITE}, scale=0.6),
    "granitemoe": Case({**LIKE_LLAMA, **GRANITE, **EXPERTS}, scale=0.6),
    "helium": like_llama(head_dim=16),
    "llama": like_llama(),
    "ministral": mixed(head_dim=16),
    "mistral": like_llama(sliding_window=WINDOW),
    "mixtral": like_llama(sliding_window=WINDOW, **EXPERTS),
    "mpt": Case({"d_model": 64, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 512}, depth="n_layers"),
    "nemotron": like_llama(mlp_bias=True),
    "olmo": like_llama(clip_qkv=2.0),
    "olmo2": like_llama(),
    "olmo3": mixed(),
    "olmoe": like_llama(num_experts=4, num_experts_per_tok=2),
    "opt": Case({**OPT, "word_embed_proj_dim": 64}),
    "opt (norm behind)": Case({**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi": like_llama(num_key_value_heads=4),
    "phi (grouped heads)": like_llama(),
    "phi3": like_llama(sliding_window=WINDOW, num_key_value_heads=4),
    "phi3 (grouped heads)": like_llama(sliding_window=WINDOW),
    "qwen2": like_llama(MIXED_LEFT, use_sliding_window=True, max_window_layers=0, **MIXED),
    "qwen2_moe": like_llama(
        {"decoder_sparse_step": 1, "mlp_only_layers": [2], "max_window_layers": 1},
        (0, 2),
        {"layer_types": [FULL] * 3},
        decoder_sparse_step=2,
        shared_expert_intermediate_size=48,
        max_window_layers=3,
        **QWEN_EXPERTS,
    ),
    # The types are derived from the index: the first two full, the rest sliding.
    "qwen3": like_llama(
        MIXED_LEFT, use_sliding_window=True, max_window_layers=2, sliding_window=WINDOW, head_dim=16
    ),
    "qwen3_moe": like_llama({"mlp_only_layers": [1]}, (0, 2), mlp_only_layers=[0, 3], head_dim=16, **QWEN_EXPERTS),
    "seed_oss": like_llama(head_dim=16),
    "smollm3": like_llama(
        {**MIXED_LEFT, "no_rope_layers": [1, 1, 0]}, no_rope_layers=[1, 0, 1, 1, 0], use_sliding_window=True, **MIXED
    ),
    "stablelm": like_llama(),
    "stablelm (parallel)": like_llama(use_parallel_residual=True),
    "starcoder2": like_llama(sliding_window=WINDOW),
}  # fmt: skip
if has_5():
    CASES |= {
        "cwm": mixed(head_dim=16),
        "granite_swa": Case(
            {**LIKE_LLAMA, **GRANITE, **MIXED, "layer_rope_theta": [1e4, 300.0, 0.0, 2e3, 50.0]},
            {**MIXED_LEFT, "layer_rope_theta": [1e4, 0.0, 50.0]},
            scale=0.6,
        ),
        "jais2": like_llama(mlp_bias=True),
        "mellum": like_llama(
            {**MIXED_LEFT, "mlp_layer_types": ["sparse", "dense", "sparse"]},
            mlp_layer_types=["sparse", "sparse", "dense", "dense", "sparse"],
            head_dim=16,
            **MIXED,
            **QWEN_EXPERTS,
        ),
        "ministral3": like_llama(sliding_window=WINDOW, head_dim=16),
        "nanochat": like_llama(final_logit_softcapping=4.0),
    }
# The models, saved once by the first test that wants one.
_built: dict[str, Any] = {}


def model_type(name: str) -> str:
    return name.partition(" ")[0]


def build(name: str) -> Any:
    """A copy of the tiny float32 model of a case, its weights drawn anew so that every layer, norm, bias, router and
    expert leaves a mark on the logits."""
    if name not in _built:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
        settings = {"vocab_size": VOCABULARY, **special, **CASES[name].settings}
        config = AutoConfig.for_model(model_type(name), **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        embeddings.add(id(model.get_output_embeddings().weight))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
                else:
                    parameter.normal_(0, 0.08 if id(parameter) in embeddings else 0.15)
            for buffer_name, buffer in model.named_buffers():
                if "correction_bias" in buffer_name:
                    buffer.normal_(0, 0.2)
        model.generation_config.eos_token_id = None
        _built[name] = model
    return copy.deepcopy(_built[name])


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# One of each kind of layer; `make architectures` and `make test-all` run the others as well.
OFTEN = ("llama", "gpt2", "phi3", "gemma3_text", "olmo2", "cohere2", "mixtral", "gpt_oss", "deepseek_v3", "falcon")

often = pytest.mark.parametrize(
    "name", [case if case in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)


@pytest.fixture
def tell(record_property: Callable[[str, Any], None], name: str) -> Callable[[str, str], None]:
    """Puts a cell into the table of docs/architectures.md."""
    return lambda column, cell: record_property("reliability", (TABLE, f"`{name}`", column, cell))


def decoder_of(model: Any, name: str, tokens: int = TOKENS) -> Decoder:
    return Decoder(model, ARCHITECTURES[model_type(name)], tokens)


def row_losses(model: Any, ids: Tensor) -> list[float]:
    """Mean next-token NLL of each row, from the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    return [float(F.cross_entropy(one[:-1], row[1:])) for one, row in zip(logits, ids, strict=True)]


def own_text(model: Any, prompts: Tensor, tokens: int = TOKENS) -> Tensor:
    """Rows as the model itself would go on: there its loss is low, and the removal of layers shows."""
    with torch.no_grad():
        return model.generate(prompts, max_new_tokens=tokens - prompts.shape[1], do_sample=False, pad_token_id=0)


def sliced_by_hand(original: Any, name: str) -> Any:
    """The pruned model made another way: a config with what the case says, the kept layers' state copied by name."""
    case = CASES[name]
    settings = {**original.config.to_dict(), case.depth: len(case.kept), **case.left}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(type(original.config)(**settings), dtype=torch.float32).eval()
    state = {}
    for tensor, value in original.state_dict().items():
        number = re.search(r"\.(\d+)\.", tensor)  # the first number in a name is the layer's, experts come later
        if number is not None:
            if int(number[1]) not in case.kept:
                continue
            tensor = f"{tensor[: number.start(1)]}{case.kept.index(int(number[1]))}{tensor[number.end(1) :]}"
        state[tensor] = value
    model.load_state_dict(state, strict=True)
    return model


def indices_of(layer: nn.Module) -> set[int]:
    return {
        getattr(module, name)
        for module in layer.modules()
        for name in ("layer_idx", "layer_id")
        if hasattr(module, name)
    }


def test_every_family_has_a_case() -> None:
    assert {model_type(name) for name in CASES} == set(SUPPORTED) - (set() if has_5() else ONLY_5)


def test_layers_are_run_and_scored_as_the_model_does(name: str, random_rows: Callable[..., Tensor]) -> None:
    """Losses and gradients of the decoder, layer by layer, against one pass of the whole model: embedding, arguments
    of the layers, final norm, head and what is done to the logits behind it."""
    model = build(name)
    ids = random_rows(2, TOKENS)
    decoder = decoder_of(model, name)
    assert decoder.losses(ids) == pytest.approx(row_losses(model, ids), abs=1e-5)
    found = score_layers(decoder, ids[:1])
    logits = model(input_ids=ids[:1], use_cache=False).logits.float()
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    layers = model.get_submodule(decoder.architecture.layers)
    for index, layer in enumerate(layers):
        grads = [
            parameter.grad
            for parameter_name, parameter in layer.named_parameters()
            if parameter.ndim >= 2 and "bias" not in parameter_name and parameter.grad is not None
        ]
        assert found.gradient[index] == pytest.approx(sum(float(grad.abs().sum()) for grad in grads), rel=2e-3)
        assert found.gradient[index] > 0


def test_a_pruned_checkpoint_is_a_stock_model(
    name: str, random_rows: Callable[..., Tensor], tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    """Layers out of the middle are removed; logits are those of a model of the sliced config, before and after saving;
    keys are exact, and generation with the cache is generation without."""
    case = CASES[name]
    model = build(name)
    reference = sliced_by_hand(model, name)
    ids = random_rows(2, TOKENS)
    before = logits_of(model, ids[:1])
    count = parameter_count(model)
    assert remove_layers(model, ARCHITECTURES[model_type(name)], case.removed) == case.kept
    assert parameter_count(model) < count
    with torch.no_grad():
        pruned = model(input_ids=ids, use_cache=False).logits
        wanted = reference(input_ids=ids, use_cache=False).logits
    assert (pruned[0] - before).abs().max() > 0.02  # the layers did something
    assert (pruned - wanted).abs().max() <= 1e-5

    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    reloaded, report = checkpoint.load_model(tmp_path)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert architecture_of(read_config(tmp_path / "config.json")) is ARCHITECTURES[model_type(name)]
    assert check_tensors(tmp_path, ARCHITECTURES[model_type(name)], name) == []
    with torch.no_grad():
        assert (reloaded(input_ids=ids, use_cache=False).logits - pruned).abs().max() <= 1e-5
    probe = probe_ids(reloaded.config)
    assert probe.shape[1] > 2 * WINDOW
    record = verify(reloaded, report, tmp_path, logits_of(model, probe))
    assert record.generation_matches and record.keys_match

    written = json.loads((tmp_path / "config.json").read_text())
    assert written[case.depth] == len(case.kept) and {key: written[key] for key in case.left} == case.left
    assert architecture_of(written) is ARCHITECTURES[model_type(name)]  # it can be pruned again
    for built in (model, reloaded):
        layers = built.get_submodule(ARCHITECTURES[model_type(name)].layers)
        assert [indices_of(layer) for layer in layers] == [{0}, {1}, {2}]
    tell("pruned", "yes")


def gap_of(case: Case) -> Site:
    """The MLP before the first gap that has a layer before it. (It has experts, if any layer of the case has.)"""
    last = next(layer for layer in case.removed if layer > 0)
    return Site(last - 1, MLP, last)


@pytest.mark.parametrize("part", [MLP, ATTENTION])
def test_what_is_folded_is_what_was_fitted(name: str, part: str, random_rows: Callable[..., Tensor]) -> None:
    """The change of the stream by a folded correction, against the correction applied outside the weights."""
    case = CASES[name]
    model = build(name)
    if compensation_skipped(ARCHITECTURES[model_type(name)], model.config):
        pytest.skip("not corrected")
    decoder = decoder_of(model, name)
    gap = gap_of(case)
    site = gap if part == MLP else Site(case.kept[-1], ATTENTION, case.kept[-1])
    streams = Streams(decoder, Original(decoder, random_rows(3, TOKENS)), case.kept, 0)
    targets, hidden = streams.targets(site), streams.before(site.layer)
    gram = accumulate_gram(decoder, site, hidden, targets)
    kind = site_kind(decoder, site, "weight")
    correction, values = solved(decoder, site, gram, kind, 0.001)
    writer = writer_of(decoder.layers[site.layer], decoder.architecture, part)
    assert part == ATTENTION or writer.experts == (decoder.architecture.experts is not None)
    with torch.no_grad():
        with Tap(writer.tapped) as plain, Tap(writer.added) as added:
            after = decoder.step(hidden[0], site.layer)
        with decoder.replaced(site.layer, values), Tap(writer.tapped) as folded, Tap(writer.added) as changed:
            corrected = decoder.step(hidden[0], site.layer)
    if correction.projection is not None:
        assert writer.experts
        extra = plain.output.double() @ (correction.projection - torch.eye(len(correction.projection))).T
    else:
        assert correction.delta is not None
        extra = plain.input.double() @ correction.delta.T
    moved = folded.output.double() - plain.output.double()
    assert extra.abs().max() > 1e-3 and (moved - extra).abs().max() <= 1e-4 * extra.abs().max() + 1e-5
    if part == ATTENTION:  # what is behind it in the layer is another matter
        after = hidden[0] + case.scale * added.output.view(hidden[0].shape)
        corrected = hidden[0] + case.scale * changed.output.view(hidden[0].shape)
    elif not through_norm(decoder, site):
        shown = (corrected - after).double().view(-1) - case.scale * extra.view(-1)
        assert shown.abs().max() <= 1e-4 * extra.abs().max() + 1e-5
    assert (targets[0] - corrected).norm() < (targets[0] - after).norm()


@pytest.mark.parametrize("case", ["llama", "granite", "granitemoe"])
def test_the_equation_finds_the_change_that_made_a_drift(case: str, random_rows: Callable[..., Tensor]) -> None:
    """With all that stands between the weight and the stream in it, such as a residual multiplier."""
    decoder = decoder_of(build(case), case)
    ids = random_rows(4, TOKENS)
    writer = writer_of(decoder.layers[1], decoder.architecture, MLP)
    change = 0.1 * torch.randn(writer.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = (
        RidgeSolution("projection", 0, 0, projection=writer.weight.double() + change)
        if writer.experts
        else RidgeSolution("weight", 0, 0, delta=change)
    )
    hidden = decoder.run(decoder.embed(ids), [0])
    with torch.no_grad():
        with Tap(writer.tapped) as tap:
            before = decoder.step(hidden, 1)
        with decoder.replaced(1, writer.folded(made)):
            drift = decoder.step(hidden, 1) - before
    z, e = writer.equation(tap, drift.double().view(-1, drift.shape[-1]))
    assert torch.allclose(torch.linalg.lstsq(z, e).solution.T, change, atol=1e-3)


@pytest.mark.parametrize("case", ["gemma2", "olmo2", "glm4"])
def test_the_fit_through_a_norm_holds_its_rms_and_solves_for_its_gain(
    case: str, random_rows: Callable[..., Tensor]
) -> None:
    decoder = decoder_of(build(case), case)
    site = gap_of(CASES[case])
    streams = Streams(decoder, Original(decoder, random_rows(3, TOKENS)), CASES[case].kept, 0)
    targets, hidden = streams.targets(site), streams.before(site.layer)
    writer = writer_of(decoder.layers[site.layer], decoder.architecture, MLP)
    with torch.no_grad(), Tap(writer.tapped) as tap, Tap(writer.added) as added:
        after = decoder.step(hidden[0], site.layer)
    with torch.no_grad():
        gain = writer.added(torch.ones(len(writer.weight)))  # of a vector whose rms is 1
    drift = (targets[0] - after)[0]
    z, e = writer.equation(tap, drift)
    # What W makes of z, times the gain, is what the norm puts out; so what D makes of it adds up to the drift.
    assert torch.allclose((z @ writer.weight.T) * gain, added.output[0], atol=1e-4)
    clear = gain.abs() > gain.square().mean().sqrt()
    assert clear.sum() > 8 and torch.allclose((e * gain)[:, clear], drift[:, clear], rtol=0.02)
    correction, values = solved(decoder, site, accumulate_gram(decoder, site, hidden, targets), "weight", 0.001)
    assert correction.delta is not None
    left = []
    for more in ({}, fitted_gain(decoder, site, hidden, targets, values)):
        with torch.no_grad(), decoder.replaced(site.layer, {**values, **more}):
            left.append(sum(float((wanted - decoder.step(states, site.layer)).square().sum())
                            for wanted, states in zip(targets, hidden, strict=True)))  # fmt: skip
    assert left[1] < 0.99 * left[0]


def in_words(decoder: Decoder, case: Case) -> str:
    kinds = {site_kind(decoder, Site(layer, MLP, layer), "weight") for layer in case.kept}
    if through_norm(decoder, gap_of(case)):
        return "yes, through the norm behind the MLP"
    if kinds == {"projection"}:
        return "yes, all experts by one projection"
    return "yes, experts by one projection" if "projection" in kinds else "yes"


@often
def test_a_corrected_checkpoint_has_the_loss_on_record(
    name: str, random_rows: Callable[..., Tensor], tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    """On the original's own text, also used for fitting: moving towards the original surely helps."""
    case = CASES[name]
    model = build(name)
    ids = own_text(model, random_rows(4, 4))
    decoder = decoder_of(model, name)
    rows = CalibrationRows(ids, ids, [], [])
    config = PruneConfig(drop=case.removed, samples=4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    record, values = fit_compensation(decoder, rows, case.removed, config, SilentReporter())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    skipped = compensation_skipped(decoder.architecture, model.config)
    if skipped is not None:
        assert not record.applied and not values and record.reason == f"compensation skipped: {skipped}"
        tell("corrected", f"skipped: {skipped}")
        return
    assert record.applied and values and record.loss_after is not None and record.loss_before is not None
    assert record.loss_after < record.loss_before
    for (layer, parameter), value in values.items():
        decoder.put(layer, {parameter: value})
    cell = in_words(decoder, case)
    remove_layers(model, decoder.architecture, case.removed)
    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    reloaded, report = checkpoint.load_model(tmp_path)
    assert not report["unexpected_keys"]
    losses = row_losses(reloaded, ids)
    assert sum(losses) / len(losses) == pytest.approx(record.loss_after, abs=1e-4)
    tell("corrected", cell)


@often
def test_weights_streamed_from_disk_give_the_same(
    name: str, random_rows: Callable[..., Tensor], tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    case = CASES[name]
    model = build(name)
    row = ARCHITECTURES[model_type(name)]
    model.save_pretrained(tmp_path / "original")
    if row.unstreamed is not None:
        config = PruneConfig(layers=1, low_memory=True)
        with pytest.raises(UsageError, match=f"(?s)low-memory.*{model_type(name)}.*{row.unstreamed}"):
            check_family(find_source(str(tmp_path / "original"), None, None), config)  # pyright: ignore
        tell("`--low-memory`", f"refused: {row.unstreamed}")
        return
    ids = random_rows(2, TOKENS)
    inside = decoder_of(model, name)
    streamed = open_streamed(tmp_path / "original", row, TOKENS)
    assert streamed.losses(ids, case.kept) == pytest.approx(inside.losses(ids, case.kept), abs=1e-6)
    assert score_layers(streamed, ids).gradient == pytest.approx(score_layers(inside, ids).gradient, rel=1e-5)
    site = gap_of(case)
    overrides = {}
    if not compensation_skipped(row, model.config):
        found = []
        for decoder in (inside, streamed):
            streams = Streams(decoder, Original(decoder, ids), case.kept, 0)
            gram = accumulate_gram(decoder, site, streams.targets(site), streams.before(site.layer))
            found.append(solved(decoder, site, gram, site_kind(decoder, site, "weight"), 0.01)[1])
        assert found[0].keys() == found[1].keys()
        assert all(torch.allclose(found[0][key], found[1][key], atol=1e-4) for key in found[0])
        overrides = {(site.layer, key): value for key, value in found[0].items()}
    write_pruned(tmp_path / "original", tmp_path / "streamed", row, case.removed, overrides, torch.float32)
    for (layer, key), value in overrides.items():
        inside.put(layer, {key: value})
    expected = pruned_logits(inside, case.kept, ids[:1])
    remove_layers(model, row, case.removed)
    assert (logits_of(model, ids[:1]) - expected).abs().max() <= 1e-5
    (tmp_path / "plain").mkdir()
    checkpoint.save_checkpoint(model, tmp_path / "plain", torch.float32)
    plain, streamed_config = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "streamed"))
    assert plain == streamed_config
    reloaded, report = checkpoint.load_model(tmp_path / "streamed")
    assert not report["unexpected_keys"] and not any(key_report(tmp_path / "streamed").values())
    assert (logits_of(reloaded, ids[:1]) - expected).abs().max() <= 1e-5
    tell("`--low-memory`", "yes")


def test_experts_that_no_token_reaches_can_be_trained_with_the_others(
    random_rows: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = build("mixtral")
    for layer in model.model.layers:
        router = (layer.mlp if has_5() else layer.block_sparse_moe).gate
        router.weight.data[3] = 0
        router.weight.data[:3] *= 50  # of two among three at least one is surely above 0
    decoder = decoder_of(model, "mixtral")
    ids = own_text(model, random_rows(2, 4))
    corpus = make_corpus([(Rows("own", "", ids), 1.0)], [Rows("own", "", ids)], 4, 0)
    teacher = Teacher.of(corpus, tmp_path / "teacher", decoder.vocabulary, "mixtral")
    for cache in teacher.parts:
        cache.fill(decoder)
    thin = copy.deepcopy(model)
    remove_layers(thin, ARCHITECTURES["mixtral"], [1, 3])
    student = Student(thin, thin.lm_head, ARCHITECTURES["mixtral"], "thin")
    recipe = Recipe(1e-3, 2, 2, autocast=False)
    record, _ = heal_model(student, corpus, teacher, Part("all", [0, 1, 2]), recipe, tmp_path / "state")
    assert record.steps == 2 and len(record.checks) > 0


@pytest.mark.slow
def test_the_other_transformers_reads_the_same_models(
    other_transformers: Callable[..., None], random_rows: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Every type, pruned and written here, by plain transformers of the other generation; and what that saves in its
    own way, here."""
    ids = random_rows(1, TOKENS)
    names = [name for name in CASES if model_type(name) not in ONLY_5]
    folders, expected = [tmp_path / str(number) for number in range(len(names))], {}
    for name, folder in zip(names, folders, strict=True):
        model = build(name)
        remove_layers(model, ARCHITECTURES[model_type(name)], CASES[name].removed)
        if name == "gemma2":  # 4.57 would not cap its attention
            model.set_attn_implementation("eager")
        expected[name] = logits_of(model, ids)
        checkpoint.save_checkpoint(model, folder, torch.float32)
    other_transformers(folders, ids)
    differences = {}
    for name, folder in zip(names, folders, strict=True):
        there = torch.load(folder / "logits.pt", weights_only=True)
        back, report = checkpoint.load_model(readable(folder / "again", folder / "stand-in"))
        assert not report["unexpected_keys"], name
        if name == "gemma2":
            back.set_attn_implementation("eager")
        differences[name] = [float((found - expected[name]).abs().max()) for found in (there, logits_of(back, ids))]
    assert {name: found for name, found in differences.items() if max(found) > 1e-5} == {}


# --- what must not be guessed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jamba", "period"),
        ("bamba", "recurrent state"),
        ("lfm2", "recurrent state"),
        ("zamba2", "share weights"),
        ("nemotron_h", "recurrent state"),
        ("qwen3_next", "recurrent state"),
        ("gemma3n_text", "share keys and values"),
        ("mllama", "attend to an image"),
        ("llama4_text", "pattern"),
        ("afmoe", "not known to be safe"),
        ("flex_olmo", "not known to be safe"),
        ("glm4_moe", "not known to be safe"),
        ("gemma4_text", "share keys and values"),
        ("qwen3_5", "recurrent state"),
        ("qwen4_exp", "recurrent state"),
        ("kimi_linear", "recurrent state"),
        ("glm_moe_dsa", "with an indexer"),
    ],
)
def test_hybrids_are_refused_by_name(kind: str, reason: str) -> None:
    config = {"model_type": kind, "num_hidden_layers": 8}
    with pytest.raises(UnsupportedArchitecture, match=f"'{kind}' cannot be pruned: .*{reason}"):
        architecture_of(config)


@pytest.mark.skipif(has_5(), reason="transformers 5 knows them")
@pytest.mark.parametrize("kind", sorted(ONLY_5))
def test_types_that_only_transformers_5_knows_are_refused_with_4(kind: str) -> None:
    config = {"model_type": kind, "num_hidden_layers": 8}
    with pytest.raises(UnsupportedArchitecture, match=f"'{kind}' cannot be pruned: .*transformers 5 can read it .4.57"):
        architecture_of(config)


@pytest.mark.parametrize(
    ("kind", "setting", "reason"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", "index of the layer"),
        ("gpt2", "add_cross_attention", "cross-attention"),
        ("bloom", "apply_residual_connection_post_layernorm", "residual stream"),
    ],
)
def test_settings_that_depend_on_the_depth_are_refused(kind: str, setting: str, reason: str) -> None:
    config = {"model_type": kind, "n_layer": 4, "architectures": [ARCHITECTURES[kind].causal_lm]}
    assert architecture_of({**config, setting: False}).model_type == kind
    with pytest.raises(UnsupportedArchitecture, match=reason):
        architecture_of({**config, setting: True})


def test_lists_of_another_meaning_are_not_sliced() -> None:
    """As long as there are layers, by chance."""
    model = build("llama")
    model.config.eos_token_id = [2, 3, 4, 5, 6]
    model.config.mlp_only_layers = [0, 1, 2, 3, 4]
    model.config.suppress_tokens = [7, 8, 9, 10, 11]
    found = sliced_config(model.config, [0, 2, 4])
    assert found.eos_token_id == [2, 3, 4, 5, 6] and found.suppress_tokens == [7, 8, 9, 10, 11]
    assert found.mlp_only_layers == [0, 1, 2, 3, 4]


@pytest.mark.skipif(has_5(), reason="transformers 5 has no such attention for Gemma 2")
def test_torch_attends_without_the_cap_of_gemma_2(random_rows: Callable[..., Tensor]) -> None:
    """docs/architectures.md tells of it; once transformers applies the cap by default, that goes."""
    model = build("gemma2")
    ids = random_rows(1, TOKENS)
    logits = {}
    for implementation in ("sdpa", "eager"):
        for cap in (0.5, 5.0):
            for layer in model.model.layers:
                layer.self_attn.attn_logit_softcapping = cap
            model.set_attn_implementation(implementation)
            logits[implementation, cap] = logits_of(model, ids)
    assert build("gemma2").config._attn_implementation == "sdpa"
    assert torch.equal(logits["sdpa", 0.5], logits["sdpa", 5.0])
    assert (logits["eager", 0.5] - logits["eager", 5.0]).abs().max() > 0.01


def test_types_of_layers_are_written_out_when_transformers_derives_them(tmp_path: Path) -> None:
    """Derived anew from the shorter depth they would be others."""
    config = build("qwen3").config
    assert config.layer_types == [FULL, FULL, SLIDING, SLIDING, SLIDING]
    found = sliced_config(config, [0, 2, 4])
    derived = type(config)(**{**found.to_dict(), "layer_types": None})
    assert found.layer_types == [FULL, SLIDING, SLIDING] != derived.layer_types


def test_tied_embeddings_stay_tied_and_are_no_part_of_any_score(tmp_path: Path, random_rows: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = build("gpt2").config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).eval()
    seen: list[str] = []
    decoder = decoder_of(model, "gpt2")
    hidden = decoder.embed(random_rows(1, TOKENS))
    decoder.backward(hidden, 0, torch.ones_like(hidden), lambda parameter, _: seen.append(parameter))
    assert sorted(seen) == [f"{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    remove_layers(model, decoder.architecture, [1, 3])
    checkpoint.save_checkpoint(model, tmp_path, torch.float32)
    reloaded, report = checkpoint.load_model(tmp_path)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert reloaded.lm_head.weight is reloaded.transformer.wte.weight


def test_checkpoints_without_the_head_of_the_model_are_streamed_too(tmp_path: Path, random_rows: Any) -> None:
    """GPT-2 lies on the Hub as it was before there were heads: names without `transformer.`, and masks among them."""
    from safetensors.torch import save_file

    model = build("gpt2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.config.save_pretrained(tmp_path)
    tensors = {key: value.contiguous() for key, value in model.transformer.state_dict().items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, tmp_path / "model.safetensors", {"format": "pt"})
    ids = random_rows(2, TOKENS)
    streamed = open_streamed(tmp_path, ARCHITECTURES["gpt2"], TOKENS)
    assert streamed.losses(ids) == pytest.approx(row_losses(model, ids), abs=1e-5)
    write_pruned(tmp_path, tmp_path / "out", ARCHITECTURES["gpt2"], [1, 3], {}, torch.float32)
    reloaded, report = checkpoint.load_model(tmp_path / "out")
    assert not report["unexpected_keys"]
    assert decoder_of(reloaded, "gpt2").losses(ids) == pytest.approx(streamed.losses(ids, [0, 2, 4]), abs=1e-5)


# --- the whole run ----------------------------------------------------------------------------------------------------


def folder_of(name: str, folder: Path, tokenizer: Any) -> Path:
    build(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2_moe", "opt (norm behind)", "gpt2", "gemma2"])
def test_prune_and_what_it_records(case: str, tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    from gradmap_hub.pipeline.prune import prune
    from gradmap_hub.record import RunRecord

    folder = folder_of(case, tmp_path / "model", tokenizer)
    config = PruneConfig(layers=2, samples=8, seq_len=32, eval_rows=4, calibration=(str(text_file),))
    record = prune(str(folder), tmp_path / "out", config)
    assert record.verification is not None and record.verification.keys_match and record.layers_after == 3
    again = RunRecord.read(tmp_path / "out")
    if case == "opt (norm behind)":
        assert again.compensation.reason == "compensation skipped: a norm follows every addition to the residual stream"
        assert "a norm follows every addition" in (tmp_path / "out" / "README.md").read_text()
    else:
        kinds = {trial.kind for trial in again.compensation.trials}
        assert kinds <= ({"projection", "weight"} if case == "qwen2_moe" else {"weight"}) and kinds


# --- ONNX -------------------------------------------------------------------------------------------------------------


def exported_types() -> Sequence[str]:
    return [name for name in CASES if onnx.unsupported(stated(name)) is None]


def stated(name: str) -> dict[str, Any]:
    return {"hidden_size": 64, **CASES[name].settings, "model_type": model_type(name)}


def test_what_optimum_exports_is_known_before_anything_is_computed() -> None:
    if has_5():
        pytest.skip("Optimum's export needs transformers 4.57")
    import optimum.exporters.onnx.model_configs  # noqa: F401 - its import registers what it knows
    from optimum.exporters.tasks import TasksManager

    def known(kind: str) -> bool:
        try:
            tasks = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
        except KeyError:
            return False
        return "text-generation-with-past" in tasks

    for kind in SUPPORTED:
        assert known(kind) == (ARCHITECTURES[kind].optimum is not None), kind


def test_a_type_that_optimum_does_not_export_is_refused(tell: Callable[[str, str], None], name: str) -> None:
    reason = onnx.unsupported(stated(name))
    if reason is None:
        assert formats.supported("onnx", stated(name)) is None
        return
    for kind in ("onnx", "int8"):
        with pytest.raises(UsageError, match=f"cannot be exported to {kind}: "):
            formats.require(kind, stated(name))
    tell("ONNX", f"no: {reason}")


def exported(name: str, folder: Path, tokenizer: Any) -> Any:
    model = build(name)
    remove_layers(model, ARCHITECTURES[model_type(name)], CASES[name].removed)
    (folder / "pruned").mkdir()
    checkpoint.save_checkpoint(model, folder / "pruned", torch.float32)
    tokenizer.save_pretrained(folder / "pruned")
    onnx.export_onnx(folder / "pruned", folder / "onnx")
    parity = onnx.check_parity(folder / "pruned", folder / "onnx")
    assert parity.greedy_tokens_equal
    graph = onnx.open_graph(folder / "onnx")
    ids = probe_ids(model.config)
    assert ids.shape[1] > 2 * WINDOW
    with torch.no_grad():
        whole = graph(ids, attention_mask=torch.ones_like(ids)).logits
        assert float((whole - logits_of(model, ids)).abs().max()) <= 1e-4
        assert onnx._with_past(graph, model, ids) <= 1e-4
    return model


@pytest.mark.skipif(has_5(), reason="the environment for exports does not read what transformers 5 saves")
@pytest.mark.parametrize("case", ["gpt2"])
def test_onnx(case: str, tokenizer: Any, tmp_path: Path) -> None:
    model = exported(case, tmp_path, tokenizer)
    with torch.no_grad():
        model.get_submodule(ARCHITECTURES[model_type(case)].final_norm).weight[0] += 0.5
    checkpoint.save_checkpoint(model, tmp_path / "pruned", torch.float32)
    with pytest.raises(VerificationError, match="differs from PyTorch: logits by"):
        onnx.check_parity(tmp_path / "pruned", tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", exported_types())
def test_onnx_of_every_type(name: str, tokenizer: Any, tmp_path: Path, tell: Callable[[str, str], None]) -> None:
    exported(name, tmp_path, tokenizer)
    tell("ONNX", "yes")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3 (grouped heads)"])
def test_the_lines_of_the_card_load_the_graph(
    case: str, tokenizer: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optimum.onnxruntime", reason="the lines are for transformers 4.57")
    from gradmap_hub.pipeline.export import export_folder
    from gradmap_hub.pipeline.prune import prune

    out = tmp_path / "out"
    config = PruneConfig(layers=2, samples=8, seq_len=32, eval_rows=4, calibration=(str(text_file),))
    folder = folder_of(case, tmp_path / "model", tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # generate refuses others
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    prune(str(folder), out, config)
    export_folder(out, ["onnx"])
    blocks = re.findall(r"(?s)```python\n(.*?)```", (out / "README.md").read_text())
    (code,) = (block for block in blocks if "ORTModelForCausalLM" in block)
    assert ("num_key_value_heads" in code) == ARCHITECTURES[model_type(case)].cache_from_graph
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/", ""), found)
    assert found["output"].shape[1] > found["inputs"]["input_ids"].shape[1]
