"""Stage 2 against plain linear algebra on matrices collected by hooks, and against the models it describes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradmap_hub.calibration import CalibrationRows
from gradmap_hub.compensation import (
    Correction,
    Gram,
    Shift,
    Suffix,
    accumulate_grams,
    candidate_sites,
    corrected_parameters,
    fit_correction,
    folded_weight,
    mean_shift,
    solve,
)
from gradmap_hub.config import PruneConfig
from gradmap_hub.evaluation import row_losses
from gradmap_hub.progress import SilentReporter

TOKENS = 40
ROWS = 3  # more tokens than the MLP is wide
REMOVED = (1, 3)
KEPT = [0, 2, 4]
SITES = [2, 4]
BIAS = {"llama": {"mlp_bias": True}}


@pytest.fixture(params=["llama", "llama with bias", "mistral", "gemma"])
def pair(
    request: pytest.FixtureRequest, model_of: Callable[..., Any], prune_copy: Callable[..., Any]
) -> tuple[Any, Any]:
    """An original and its pruned copy."""
    name, _, bias = request.param.partition(" with ")
    model = model_of(name, **(BIAS[name] if bias else {}))
    return model, prune_copy(model, REMOVED)


def residual_streams(model: Any, ids: Tensor) -> list[Tensor]:
    """(rows, tokens, d) after each layer of a model, by hooks."""
    caught: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _module, _args, output: caught.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [hidden.double() for hidden in caught]


def explicit(original: Any, pruned: Any, ids: Tensor, kept: Sequence[int], site: int) -> SimpleNamespace:
    """The matrices of the definition, as float64 numpy: z (n, f), m (n, d), E (n, d)."""
    caught: list[Tensor] = []
    position = list(kept).index(site)
    linear = pruned.model.layers[position].mlp.down_proj
    handle = linear.register_forward_hook(lambda _module, args, output: caught.extend([args[0], output]))
    after = residual_streams(pruned, ids)[position]
    handle.remove()
    drift = residual_streams(original, ids)[site] - after
    z, m, e = (value.double().flatten(0, 1).numpy() for value in (*caught, drift))
    return SimpleNamespace(z=z, m=m, e=e)


def ridge_by_lstsq(inputs: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """argmin ||target - inputs X||^2 + ridge ||X||^2 by stacking sqrt(ridge) I under the inputs."""
    width = inputs.shape[1]
    stacked = np.vstack([inputs, np.sqrt(ridge) * np.eye(width)])
    padded = np.vstack([target, np.zeros((width, target.shape[1]))])
    return np.linalg.lstsq(stacked, padded, rcond=None)[0]


def relative(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def grams_in_double(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], ids: Tensor, sites: Sequence[int] = SITES
) -> tuple[Any, Any, Any]:
    original, pruned = (copy.deepcopy(model).double() for model in pair)
    decoder = decoder_of(original, TOKENS)
    return decoder, pruned, accumulate_grams(decoder, ids, KEPT, sites)


def test_grams_equal_the_explicit_matrices(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    ids = random_rows(ROWS, TOKENS)
    decoder, pruned, grams = grams_in_double(pair, decoder_of, ids)
    for site in SITES:
        matrices = explicit(decoder.model, pruned, ids, KEPT, site)
        assert relative(grams[site].zz, matrices.z.T @ matrices.z) <= 1e-9
        assert relative(grams[site].ze, matrices.z.T @ matrices.e) <= 1e-9
        assert grams[site].tokens == ROWS * TOKENS
    # and in float32, as a run does it, close to that
    rough = accumulate_grams(decoder_of(pair[0], TOKENS), ids, KEPT, SITES)
    assert all(relative(rough[site].zz, grams[site].zz) <= 1e-5 for site in SITES)
    assert all(relative(rough[site].ze, grams[site].ze) <= 1e-4 for site in SITES)
    assert rough[2].zz.dtype == torch.float64


def test_grams_do_not_depend_on_the_other_sites_asked_for(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    ids = random_rows(2, TOKENS)
    _, _, together = grams_in_double(pair, decoder_of, ids, [0, 2, 4])
    for site in (0, 2, 4):
        _, _, alone = grams_in_double(pair, decoder_of, ids, [site])
        assert torch.allclose(alone[site].zz, together[site].zz, rtol=1e-12)
        assert torch.allclose(alone[site].ze, together[site].ze, rtol=1e-9, atol=1e-9)
    assert not together[0].ze.any()  # before the first gap there is no drift


@pytest.mark.parametrize(("site", "strength"), [(2, 0.003), (4, 0.3)])
def test_closed_forms_equal_least_squares(
    site: int,
    strength: float,
    pair: tuple[Any, Any],
    decoder_of: Callable[..., Any],
    random_rows: Callable[..., Any],
) -> None:
    ids = random_rows(ROWS, TOKENS)
    decoder, pruned, grams = grams_in_double(pair, decoder_of, ids)
    matrices = explicit(decoder.model, pruned, ids, KEPT, site)
    weight = decoder.mlp_output(site).weight

    found = solve(grams[site], weight, site=site, kind="weight", strength=strength)
    ridge = strength * np.mean(np.sum(matrices.z**2, axis=0))
    assert found.ridge == pytest.approx(ridge, rel=1e-9)
    assert relative(found.delta, ridge_by_lstsq(matrices.z, matrices.e, ridge).T) <= 1e-8
    assert found.projection is None and found.delta is not None and found.delta.shape == weight.shape

    found = solve(grams[site], weight, site=site, kind="projection", strength=strength)
    ridge = strength * np.mean(np.sum(matrices.m**2, axis=0))  # m is what the layer adds, its bias included
    assert found.ridge == pytest.approx(ridge, rel=1e-9)
    assert relative(found.projection, np.eye(len(weight)) + ridge_by_lstsq(matrices.m, matrices.e, ridge).T) <= 1e-8
    assert found.delta is None


def test_infinite_ridge_changes_nothing(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    decoder, _, grams = grams_in_double(pair, decoder_of, random_rows(ROWS, TOKENS))
    linear = decoder.mlp_output(2)
    for kind in ("weight", "projection"):
        far = solve(grams[2], linear.weight, site=2, kind=kind, strength=1e14)
        near = solve(grams[2], linear.weight, site=2, kind=kind, strength=0.03)
        assert relative(folded_weight(linear.weight, far), linear.weight.detach()) <= 1e-10
        assert relative(folded_weight(linear.weight, near), linear.weight.detach()) > 1e-2


def test_weight_never_fits_worse_than_projection(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """P W is one of the matrices that the weight kind may choose; a bias aside, which only P turns."""
    ids = random_rows(ROWS, TOKENS)
    decoder, pruned, grams = grams_in_double(pair, decoder_of, ids)
    for site in SITES:
        linear = decoder.mlp_output(site)
        if linear.bias is not None:
            continue
        data = explicit(decoder.model, pruned, ids, KEPT, site)
        weight = linear.weight.detach().numpy()
        errors = {}
        for kind in ("weight", "projection"):
            correction = solve(grams[site], linear.weight, site=site, kind=kind, strength=1e-11)
            moved = data.z @ (folded_weight(linear.weight, correction).numpy() - weight).T
            errors[kind] = np.sum((data.e - moved) ** 2)
        before = np.sum(data.e**2)
        assert errors["weight"] <= errors["projection"] * (1 + 1e-6) < before


def test_no_input_at_a_site_means_no_correction() -> None:
    """A block expanded with zeros: nothing to solve for, and no failure."""
    gram = Gram(torch.eye(6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), 10)
    correction = solve(gram, torch.zeros(4, 6), site=0, kind="projection", strength=0.03)
    assert torch.equal(correction.projection, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["weight", "projection"])
def test_folded_equals_unfolded(
    kind: str, pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """In float32: the corrected weight against the correction as an extra step behind (or beside) the linear."""
    original, pruned = pair
    decoder = decoder_of(original, TOKENS)
    grams = accumulate_grams(decoder, random_rows(ROWS, TOKENS), KEPT, [2])
    linear = decoder.mlp_output(2)
    correction = solve(grams[2], linear.weight, site=2, kind=kind, strength=0.03)
    ids = random_rows(2, TOKENS, seed=9)

    folded = copy.deepcopy(pruned)
    target = folded.model.layers[KEPT.index(2)].mlp.down_proj
    parameters = corrected_parameters(linear, correction)
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in parameters.values())
    for name, value in parameters.items():
        target.get_parameter(name).data = value

    def extra(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if correction.projection is not None:
            return (output.double() @ correction.projection.T).float()
        return (output.double() + args[0].double() @ correction.delta.T).float()

    unfolded = copy.deepcopy(pruned)
    unfolded.model.layers[KEPT.index(2)].mlp.down_proj.register_forward_hook(extra)
    with torch.no_grad():
        a, b, without = (m(input_ids=ids, use_cache=False).logits for m in (folded, unfolded, pruned))
    assert (a - b).abs().max() <= 1e-4
    assert (a - without).abs().max() > 1e-2  # the correction does something


def test_correction_brings_the_stream_closer(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """The whole of stage 2 from outside: fold, run, and the drift on the calibration rows is smaller."""
    original, pruned = pair
    ids = random_rows(ROWS, TOKENS)
    decoder = decoder_of(original, TOKENS)
    grams = accumulate_grams(decoder, ids, KEPT, [2])
    before = np.sum(explicit(original, pruned, ids, KEPT, 2).e ** 2)
    for kind in ("weight", "projection"):
        linear = decoder.mlp_output(2)
        correction = solve(grams[2], linear.weight, site=2, kind=kind, strength=0.01)
        folded = copy.deepcopy(pruned)
        for name, value in corrected_parameters(linear, correction).items():
            folded.model.layers[KEPT.index(2)].mlp.down_proj.get_parameter(name).data = value
        assert np.sum(explicit(original, folded, ids, KEPT, 2).e ** 2) < 0.95 * before


def test_bias_follows_only_the_projection(model_of: Callable[..., Any]) -> None:
    linear = model_of("llama", mlp_bias=True).model.layers[0].mlp.down_proj
    d, f = linear.weight.shape
    projection = torch.diag(torch.arange(d, dtype=torch.float64))
    turned = corrected_parameters(linear, Correction(0, "projection", 0.1, 1.0, projection=projection))
    assert torch.allclose(turned["bias"], torch.arange(d).float() * linear.bias.detach())
    moved = corrected_parameters(linear, Correction(0, "weight", 0.1, 1.0, delta=torch.ones(d, f).double()))
    assert set(moved) == {"weight"}
    assert torch.allclose(moved["weight"], linear.weight.detach() + 1)


def test_mean_shift_equals_hidden_states(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    original, pruned = pair
    ids = random_rows(ROWS, TOKENS)
    shift = mean_shift(decoder_of(original, TOKENS), ids, KEPT)
    assert shift.layers == KEPT
    with torch.no_grad():
        dense = original(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        thin = pruned(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    # hidden_states[l + 1] is the stream after layer l, save for the last layer, where it is behind the final norm
    for position, layer in enumerate(KEPT[:-1]):
        h = dense[layer + 1].double().mean(dim=(0, 1))
        drift = float((thin[position + 1].double().mean(dim=(0, 1)) - h).norm())
        assert shift.absolute[position] == pytest.approx(drift, abs=1e-5)
        assert shift.relative[position] == pytest.approx(drift / float(h.norm()), abs=1e-5)
    h, changed = (residual_streams(model, ids)[-1].mean(dim=(0, 1)) for model in (original, pruned))
    assert shift.absolute[-1] == pytest.approx(float((changed - h).norm()), abs=1e-5)
    assert shift.relative[-1] == pytest.approx(float((changed - h).norm() / h.norm()), abs=1e-5)
    assert shift.absolute[0] == 0.0 < min(shift.absolute[1:])


def test_suffix_loss_equals_the_corrected_model_and_leaves_the_original(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    original, pruned = pair
    state = {name: value.clone() for name, value in original.state_dict().items()}
    decoder = decoder_of(original, TOKENS)
    grams = accumulate_grams(decoder, random_rows(ROWS, TOKENS), KEPT, SITES)
    ids = random_rows(3, TOKENS, seed=5)
    for site in SITES:
        suffix = Suffix(decoder, ids, KEPT, site)
        linear = decoder.mlp_output(site)
        losses = {}
        for kind in ("weight", "projection"):
            correction = solve(grams[site], linear.weight, site=site, kind=kind, strength=0.03)
            losses[kind] = suffix.loss(correction)
            corrected = copy.deepcopy(pruned)
            for name, value in corrected_parameters(linear, correction).items():
                corrected.model.layers[KEPT.index(site)].mlp.down_proj.get_parameter(name).data = value
            with torch.no_grad():
                wanted = [float(corrected(input_ids=row, labels=row, use_cache=False).loss) for row in ids.split(1)]
            assert losses[kind] == pytest.approx(sum(wanted) / 3, abs=1e-5)
        baseline = row_losses(decoder, ids, KEPT)
        assert abs(losses["weight"] - losses["projection"]) > 1e-4
        assert abs(losses["weight"] - sum(baseline) / 3) > 1e-4
        nothing = solve(grams[site], linear.weight, site=site, kind="weight", strength=1e14)
        assert suffix.loss(nothing) == pytest.approx(sum(baseline) / 3, abs=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


def test_an_interrupted_trial_leaves_the_original(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    original, _ = pair
    state = {name: value.clone() for name, value in original.state_dict().items()}
    decoder = decoder_of(original, TOKENS)
    ids = random_rows(2, TOKENS)
    grams = accumulate_grams(decoder, ids, KEPT, [2])
    correction = solve(grams[2], decoder.mlp_output(2).weight, site=2, kind="projection", strength=0.03)

    def stop() -> None:
        raise KeyboardInterrupt

    for interrupted in (
        lambda: Suffix(decoder, ids, KEPT, 2).loss(correction, stop),
        lambda: accumulate_grams(decoder, ids, KEPT, [2], stop),
        lambda: mean_shift(decoder, ids, KEPT, stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in original.modules())


def test_candidate_sites() -> None:
    shift = Shift([0, 1, 4, 5, 7, 8], [0.0, 0.0, 2.0, 3.0, 4.0, 9.0], [0.0, 0.0, 0.9, 0.5, 0.4, 0.3])
    removed = [2, 3, 6]
    assert candidate_sites(shift, removed, "largest-shift") == [8]
    assert candidate_sites(shift, removed, "auto") == [4, 7]  # largest relative shift, which is behind a gap; 7
    assert candidate_sites(shift, [2, 3, 6], "auto", limit=1) == [4]
    many = Shift([1, 3, 5, 7], [1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4])
    assert candidate_sites(many, [0, 2, 4, 6], "auto") == [7, 5, 3]


def fit(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], rows: CalibrationRows, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    config = PruneConfig(drop=REMOVED, samples=ROWS + 1, **options)
    return fit_correction(decoder_of(pair[0], TOKENS), rows, KEPT, REMOVED, config, SilentReporter())


def plain_loss(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float(np.mean([float(model(input_ids=row, labels=row, use_cache=False).loss) for row in ids.split(1)]))


def own_text(model: Any, prompts: Tensor) -> Tensor:
    """Rows as the model itself would go on, where its loss is low."""
    length = TOKENS - prompts.shape[1]
    with torch.no_grad():
        return model.generate(prompts, max_new_tokens=length, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kind", ["auto", "projection", "weight"])
def test_what_is_applied_has_the_loss_on_record(
    kind: str, pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """On the original's own text, also used for fitting: moving towards the original surely helps."""
    original, pruned = pair
    ids = own_text(original, random_rows(ROWS, 4))
    record, weights = fit(pair, decoder_of, CalibrationRows(ids, ids, [], []), compensation=kind)
    assert record.loss_before == pytest.approx(plain_loss(pruned, ids), abs=1e-5)
    assert {trial.kind for trial in record.trials} == ({kind} if kind != "auto" else {"weight", "projection"})
    best = min(record.trials, key=lambda trial: trial.loss)
    assert record.applied and record.site == best.site and record.kind == best.kind
    assert record.strength == best.strength and record.loss_after == best.loss < record.loss_before
    corrected = copy.deepcopy(pruned)
    for name, value in weights.items():
        corrected.model.layers[KEPT.index(best.site)].mlp.down_proj.get_parameter(name).data = value
    assert plain_loss(corrected, ids) == pytest.approx(record.loss_after, abs=1e-5)


def test_a_correction_that_does_not_help_is_not_applied(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """Held-out rows on which the pruned model is at its best, its own text: any change makes that worse."""
    rows = CalibrationRows(random_rows(ROWS, TOKENS), own_text(pair[1], random_rows(ROWS, 4)), [], [])
    record, weights = fit(pair, decoder_of, rows)
    assert not record.applied and not weights
    assert min(trial.loss for trial in record.trials) >= record.loss_before == record.loss_after


def test_no_correction_when_none_is_wanted(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    ids = random_rows(ROWS, TOKENS)
    record, weights = fit(pair, decoder_of, CalibrationRows(ids, ids, [], []), compensation="none")
    assert not record.applied and not weights and not record.trials
    assert record.shift_layers == KEPT and len(record.shift) == len(record.relative_shift) == 3
