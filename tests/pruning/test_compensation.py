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

from gradmap_hub.config import PruneConfig
from gradmap_hub.data.rows import CalibrationRows
from gradmap_hub.progress import SilentReporter
from gradmap_hub.pruning.compensation import compensate_best, fit_compensation, lowers, with_shift
from gradmap_hub.pruning.fitting import accumulate_gram
from gradmap_hub.pruning.residual import ATTENTION, MLP
from gradmap_hub.pruning.ridge import Gram, RidgeSolution, folded_parameters, folded_weight, solve
from gradmap_hub.pruning.sites import Shift, Site, largest_shift, mean_shift, sites_at_gaps
from gradmap_hub.pruning.streams import Original, Streams, stream_losses
from gradmap_hub.record import Candidate

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


def gram_at(
    decoder: Any, ids: Tensor, kept: Sequence[int], site: Site, row_done: Callable[[], None] = lambda: None
) -> Gram:
    streams = Streams(decoder, Original(decoder, ids), kept, 0)
    targets = streams.targets(site)
    return accumulate_gram(decoder, site, streams.before(site.layer), targets, row_done)


def accumulate_grams(decoder: Any, ids: Tensor, kept: Sequence[int], sites: Sequence[int]) -> dict[int, Gram]:
    """Of the MLPs of several layers, each towards the original's stream behind the same layer."""
    return {layer: gram_at(decoder, ids, kept, Site(layer, MLP, layer)) for layer in sites}


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


def test_no_drift_before_the_first_gap(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    _, _, grams = grams_in_double(pair, decoder_of, random_rows(2, TOKENS), [0])
    assert not grams[0].ze.any()


def test_grams_before_a_gap_and_in_attention_equal_the_explicit_matrices(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """The MLP before a gap is fitted to the stream behind it; attention to the stream between attention and MLP."""
    ids = random_rows(ROWS, TOKENS)
    original, pruned = (copy.deepcopy(model).double() for model in pair)
    decoder = decoder_of(original, TOKENS)
    behind = residual_streams(original, ids)
    thin = residual_streams(pruned, ids)
    caught: list[Tensor] = []
    position = KEPT.index(2)
    layer = pruned.model.layers[position]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: caught.append(args[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: caught.append(args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: caught.append(args[0])),
        original.model.layers[2].post_attention_layernorm.register_forward_pre_hook(lambda _m, a: caught.append(a[0])),
    ]
    with torch.no_grad():
        pruned(input_ids=ids, use_cache=False)
        original(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    heads, middle, inner, wanted_middle = (value.double().flatten(0, 1).numpy() for value in caught)
    before_gap = gram_at(decoder, ids, KEPT, Site(2, MLP, 3))
    drift = (behind[3] - thin[position]).flatten(0, 1).numpy()
    assert relative(before_gap.zz, inner.T @ inner) <= 1e-9 and relative(before_gap.ze, inner.T @ drift) <= 1e-9
    attention = gram_at(decoder, ids, KEPT, Site(2, ATTENTION, 2))
    assert relative(attention.zz, heads.T @ heads) <= 1e-9
    assert relative(attention.ze, heads.T @ (wanted_middle - middle)) <= 1e-9


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

    found = solve(grams[site], weight, kind="weight", strength=strength)
    ridge = strength * np.mean(np.sum(matrices.z**2, axis=0))
    assert found.ridge == pytest.approx(ridge, rel=1e-9)
    assert relative(found.delta, ridge_by_lstsq(matrices.z, matrices.e, ridge).T) <= 1e-8
    assert found.projection is None and found.delta is not None and found.delta.shape == weight.shape

    found = solve(grams[site], weight, kind="projection", strength=strength)
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
        far = solve(grams[2], linear.weight, kind=kind, strength=1e14)
        near = solve(grams[2], linear.weight, kind=kind, strength=0.03)
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
            correction = solve(grams[site], linear.weight, kind=kind, strength=1e-11)
            moved = data.z @ (folded_weight(linear.weight, correction).numpy() - weight).T
            errors[kind] = np.sum((data.e - moved) ** 2)
        before = np.sum(data.e**2)
        assert errors["weight"] <= errors["projection"] * (1 + 1e-6) < before


def test_no_input_at_a_site_means_no_correction() -> None:
    """A block expanded with zeros: nothing to solve for, and no failure."""
    gram = Gram(torch.eye(6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), 10)
    correction = solve(gram, torch.zeros(4, 6), kind="projection", strength=0.03)
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
    correction = solve(grams[2], linear.weight, kind=kind, strength=0.03)
    ids = random_rows(2, TOKENS, seed=9)

    folded = copy.deepcopy(pruned)
    target = folded.model.layers[KEPT.index(2)].mlp.down_proj
    parameters = folded_parameters(linear, correction)
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
        correction = solve(grams[2], linear.weight, kind=kind, strength=0.01)
        folded = copy.deepcopy(pruned)
        for name, value in folded_parameters(linear, correction).items():
            folded.model.layers[KEPT.index(2)].mlp.down_proj.get_parameter(name).data = value
        assert np.sum(explicit(original, folded, ids, KEPT, 2).e ** 2) < 0.95 * before


def test_bias_follows_only_the_projection(model_of: Callable[..., Any]) -> None:
    linear = model_of("llama", mlp_bias=True).model.layers[0].mlp.down_proj
    d, f = linear.weight.shape
    projection = torch.diag(torch.arange(d, dtype=torch.float64))
    turned = folded_parameters(linear, RidgeSolution("projection", 0.1, 1.0, projection=projection))
    assert torch.allclose(turned["bias"], torch.arange(d).float() * linear.bias.detach())
    moved = folded_parameters(linear, RidgeSolution("weight", 0.1, 1.0, delta=torch.ones(d, f).double()))
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


def test_stream_loss_equals_the_corrected_model_and_leaves_the_original(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    original, pruned = pair
    state = {name: value.clone() for name, value in original.state_dict().items()}
    decoder = decoder_of(original, TOKENS)
    grams = accumulate_grams(decoder, random_rows(ROWS, TOKENS), KEPT, SITES)
    ids = random_rows(3, TOKENS, seed=5)
    for site in SITES:
        streams = Streams(decoder, Original(decoder, ids), KEPT, 0)
        hidden, rest = streams.before(site), [layer for layer in KEPT if layer >= site]
        linear = decoder.mlp_output(site)
        losses = {}
        for kind in ("weight", "projection"):
            correction = solve(grams[site], linear.weight, kind=kind, strength=0.03)
            values = {f"mlp.down_proj.{name}": value for name, value in folded_parameters(linear, correction).items()}
            with decoder.replaced(site, values):
                losses[kind] = float(stream_losses(decoder, hidden, ids, rest).mean())
            corrected = copy.deepcopy(pruned)
            for name, value in values.items():
                corrected.model.layers[KEPT.index(site)].get_parameter(name).data = value
            assert losses[kind] == pytest.approx(plain_loss(corrected, ids), abs=1e-5)
        baseline = decoder.losses(ids, KEPT)
        assert abs(losses["weight"] - losses["projection"]) > 1e-4
        assert abs(losses["weight"] - sum(baseline) / 3) > 1e-4
        assert stream_losses(decoder, hidden, ids, rest).tolist() == pytest.approx(baseline, abs=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


def test_an_interrupted_fit_leaves_the_original(
    pair: tuple[Any, Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    original, _ = pair
    state = {name: value.clone() for name, value in original.state_dict().items()}
    decoder = decoder_of(original, TOKENS)
    ids = own_text(original, random_rows(ROWS, 4))

    def stop() -> None:
        raise KeyboardInterrupt

    for interrupted in (
        lambda: gram_at(decoder, ids, KEPT, Site(2, ATTENTION, 2), stop),
        lambda: mean_shift(decoder, ids, KEPT, stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    for steps in (2, 5, 8, 11):
        reporter = Interrupting(steps)
        with pytest.raises(KeyboardInterrupt):
            fit(pair, decoder_of, CalibrationRows(ids, ids, [], []), reporter=reporter)
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in original.modules())


class Interrupting(SilentReporter):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def advance(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left <= 0:
            raise KeyboardInterrupt


def test_sites() -> None:
    shift = Shift([0, 1, 4, 5, 7, 8], [0.0, 0.0, 2.0, 3.0, 4.0, 9.0], [0.0, 0.0, 0.9, 0.5, 0.4, 0.3])
    assert largest_shift(shift) == Site(8, MLP, 8)
    assert sites_at_gaps([0, 1, 4, 5, 7, 8], [2, 3, 6]) == [Site(1, MLP, 3), Site(5, MLP, 6)]
    # no layer before the first gap: what is behind it is corrected; nothing is behind the last
    assert sites_at_gaps([1, 2], [0, 3]) == [Site(1, ATTENTION, 1), Site(1, MLP, 1), Site(2, MLP, 3)]
    # too many gaps: the largest are corrected
    assert sites_at_gaps([0, 2, 5, 6, 8], [1, 3, 4, 7], limit=1) == [Site(2, MLP, 4)]


def test_sites_behind_the_gaps_too() -> None:
    assert sites_at_gaps([0, 1, 4, 5, 7, 8], [2, 3, 6], behind=True) == [
        Site(1, MLP, 3), Site(4, ATTENTION, 4), Site(4, MLP, 4),
        Site(5, MLP, 6), Site(7, ATTENTION, 7), Site(7, MLP, 7),
    ]  # fmt: skip
    # the layer between two gaps has its MLP fitted once, towards what is behind the second
    assert sites_at_gaps([0, 2, 4], [1, 3], behind=True) == [
        Site(0, MLP, 1), Site(2, ATTENTION, 2), Site(2, MLP, 3), Site(4, ATTENTION, 4), Site(4, MLP, 4),
    ]  # fmt: skip
    assert sites_at_gaps([0, 2, 5, 6, 8], [1, 3, 4, 7], behind=True, limit=3) == [
        Site(2, MLP, 4), Site(5, ATTENTION, 5), Site(5, MLP, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ([3.0, 4.0, 5.0], [2.9, 3.9, 4.9], True),
        ([3.0, 4.0, 5.0], [2.9995, 3.9995, 4.9995], False),  # too little
        ([3.0, 4.0, 5.0], [2.0, 4.3, 5.3], False),  # lower on the mean, by luck of one row
        ([3.0, 4.0, 5.0], [2.0, 3.5, 5.1], True),
        ([3.0], [2.9], True),  # nothing is known about the error of one row
        ([3.0, 4.0], [2.9, float("nan")], False),
        ([float("inf"), 4.0], [3.0, 4.0], True),
    ],
)
def test_a_gain_must_exceed_its_standard_error(before: list[float], after: list[float], wanted: bool) -> None:
    assert lowers(torch.tensor(before), torch.tensor(after)) is wanted


def fit(
    pair: tuple[Any, Any],
    decoder_of: Callable[..., Any],
    rows: CalibrationRows,
    reporter: Any = None,
    **options: Any,
) -> tuple[Any, dict[tuple[int, str], Tensor]]:
    config = PruneConfig(drop=REMOVED, samples=ROWS + 1, **options)
    return fit_compensation(decoder_of(pair[0], TOKENS), rows, REMOVED, config, reporter or SilentReporter())


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
    assert {trial.kind for trial in record.trials} == {"weight" if kind == "auto" else kind}
    main = max(record.corrections, key=lambda entry: entry.loss_before - entry.loss_after)
    assert record.applied and (record.site, record.kind, record.strength) == (main.layer, main.kind, main.strength)
    assert record.loss_after == record.corrections[-1].loss_after < record.loss_before
    # a chain: every correction starts from the loss that the one before it left
    chain = [record.loss_before, *(entry.loss_after for entry in record.corrections)]
    assert [entry.loss_before for entry in record.corrections] == chain[:-1] and chain == sorted(chain, reverse=True)
    corrected = copy.deepcopy(pruned)
    for (layer, name), value in weights.items():
        corrected.model.layers[KEPT.index(layer)].get_parameter(name).data = value
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
    decoder = decoder_of(pair[0], TOKENS)
    config = PruneConfig(drop=REMOVED, samples=ROWS + 1)
    seen = with_shift(decoder, CalibrationRows(ids, ids, [], []), REMOVED, record, config, SilentReporter())
    assert seen.shift_layers == KEPT and len(seen.shift) == len(seen.relative_shift) == 3


def test_sets_corrected_together_are_those_corrected_alone(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """With a gap at the front, where attention is corrected too, and sets whose streams go on from each other's."""
    model = model_of("qwen3")
    ids = own_text(model, random_rows(ROWS, 4))
    rows = CalibrationRows(ids, ids, [], [])
    config = PruneConfig(layers=2, samples=ROWS + 1)
    sets = [Candidate("a", [1, 3], 9.0), Candidate("b", [0, 2], 9.0), Candidate("c", [2, 3], 9.0)]
    alone = [fit_compensation(decoder_of(model, TOKENS), rows, s.removed, config, SilentReporter()) for s in sets]
    decoder = decoder_of(model, TOKENS)
    embedded = 0
    embed = decoder.embed

    def counted(row: Tensor) -> Tensor:
        nonlocal embedded
        embedded += 1
        return embed(row)

    decoder.embed = counted
    corrected, place, record, overrides = compensate_best(decoder, rows, sets, config, SilentReporter())
    assert embedded == 2 * ROWS  # fitting and deciding rows once each, for three sets
    losses = [found.loss_after for found, _ in alone]
    assert [candidate.corrected for candidate in corrected] == losses
    assert place == losses.index(min(losses)) and record == alone[place][0]
    assert overrides.keys() == alone[place][1].keys() and overrides
    assert all(torch.equal(value, alone[place][1][key]) for key, value in overrides.items())
    assert {entry.part for found, _ in alone for entry in found.corrections} == {ATTENTION, MLP}
