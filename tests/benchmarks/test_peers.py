"""The peers of the benchmark on a tiny model: what they bar, what they cost, and that their compensations are exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import peers

pytestmark = pytest.mark.slow

LAYERS = 10
TOKENS = 48
REMOVED = [3, 4, 5]
GAPPED = [2, 5, 6]


@pytest.fixture(scope="module")
def decoder(model_of: Callable[..., Any], decoder_of: Callable[..., Any]) -> Any:
    return decoder_of(model_of("llama", num_hidden_layers=LAYERS), TOKENS)


@pytest.fixture(scope="module")
def ids(random_rows: Callable[..., Any]) -> Any:
    return random_rows(3, TOKENS, seed=3)


def kept(removed: Sequence[int]) -> list[int]:
    return [layer for layer in range(LAYERS) if layer not in set(removed)]


def states_of(decoder: Any, row: Any) -> list[Any]:
    """x_0 ... x_L (tokens, d) of the model itself, by hooks: not through the code under test."""
    states: list[Any] = []
    handles = [
        layer.register_forward_hook(lambda _module, inputs, _output: states.append(inputs[0][0]))
        for layer in decoder.layers
    ]
    handles.append(decoder.norm.register_forward_hook(lambda _module, inputs, _output: states.append(inputs[0][0])))
    with torch.no_grad():
        decoder.model(row)
    for handle in handles:
        handle.remove()
    return states


def loss_without(decoder: Any, ids: Any, removed: Sequence[int]) -> float:
    return float(peers.Patch().row_losses(decoder, ids, kept(removed)).sum())


# Per peer: layers that it must never remove from ten.
BARRED = {
    "ShortGPT": set(),
    "SLEB": {0, 9},
    "Taylor+": {0, 1, 2, 3, 8, 9},
    "LLM-Streamline": set(),
    "ReplaceMe": {0},
    "LinearPatch": {0, 9},
    "Prune&Comp": {9},
    "reverse order": set(),
    "random": set(),
}


@pytest.mark.parametrize("name", list(peers.SELECTIONS))
def test_a_selection_removes_that_many_layers_and_keeps_the_barred(name: str, decoder: Any, ids: Any) -> None:
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    for count in (1, 3):
        selection = peers.SELECTIONS[name](decoder, ids, count)
        assert selection.removed == sorted(set(selection.order)) and len(selection.removed) == count
        assert set(selection.removed) <= set(range(LAYERS)) - BARRED[name]
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())
    assert all(parameter.grad is None for parameter in decoder.model.parameters())


@pytest.mark.parametrize("name", [name for name in BARRED if name != "random"])
def test_a_selection_refuses_what_it_cannot_give(name: str, decoder: Any, ids: Any) -> None:
    most = LAYERS - len(BARRED[name])
    assert len(peers.SELECTIONS[name](decoder, ids[:1], most).removed) == most
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f"^{count} layers to remove.* 1 to {most}$"):
            peers.SELECTIONS[name](decoder, ids, count)


def test_sleb_takes_the_cheapest_removal_each_time(decoder: Any, ids: Any) -> None:
    steps: list[list[int]] = []
    selection = peers.sleb(decoder, ids, 3, step_done=steps.append)
    expected: list[int] = []
    for _ in range(3):
        live = kept(expected)
        expected.append(min(live[1:-1], key=lambda layer: loss_without(decoder, ids, [*expected, layer])))
    assert selection.order == expected
    assert steps == [expected[:1], expected[:2], expected]
    # 8 trials of 9 layers, 7 of 8, 6 of 7, in passes of 10 layers.
    assert selection.forward_equivalents == pytest.approx((8 * 9 + 7 * 8 + 6 * 7) / 10)


def test_sleb_cached_equals_plain_bit_for_bit(decoder: Any, ids: Any) -> None:
    plain, cached = peers.sleb(decoder, ids, 3), peers.sleb(decoder, ids, 3, cached=True)
    assert cached.order == plain.order
    assert cached.forward_equivalents < 0.65 * plain.forward_equivalents
    live = kept([2])
    trials = range(1, len(live) - 1)
    assert peers._suffix_losses(decoder, ids, live, trials)[0] == peers._trial_losses(decoder, ids, live, trials)[0]


def test_cached_sleb_counts_the_layers_it_runs(decoder: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = type(decoder).step

    def counting(self: Any, hidden: Any, layer: int) -> Any:
        nonlocal steps
        steps += 1
        return step(self, hidden, layer)

    monkeypatch.setattr(type(decoder), "step", counting)
    for cached in (False, True):
        steps = 0
        selection = peers.sleb(decoder, ids, 2, cached=cached)
        assert steps / len(ids) / LAYERS == pytest.approx(selection.forward_equivalents)


def test_taylor_takes_the_absolute_value_after_summing_over_rows(decoder: Any, ids: Any) -> None:
    model = decoder.model
    model(ids, labels=ids).loss.backward()
    salience = [
        sum(float((p.detach() * p.grad).abs().sum()) for name, p in layer.named_parameters() if "weight" in name)
        for layer in decoder.layers
    ]
    model.zero_grad(set_to_none=True)
    assert peers.taylor_plus(decoder, ids, 3).order == sorted(range(4, 8), key=salience.__getitem__)[:3]


def test_windows_compare_their_two_ends(decoder: Any, ids: Any) -> None:
    count = 3
    rows = [states_of(decoder, row) for row in ids.split(1)]
    normed = [[*states[:-1], decoder.norm(states[-1]).detach()] for states in rows]

    def best(starts: range, likeness: Callable[[Any, Any], Any], states: list[Any]) -> list[int]:
        start = max(starts, key=lambda s: sum(float(likeness(x[s], x[s + count])) for x in states))
        return list(range(start, start + count))

    def mean_cosine(dim: int) -> Callable[[Any, Any], Any]:
        return lambda x, y: F.cosine_similarity(x, y, dim=dim).mean()

    assert peers.llm_streamline(decoder, ids, count).removed == best(range(0, 8), mean_cosine(1), normed)
    assert peers.linear_patch_window(decoder, ids, count).removed == best(range(1, 7), mean_cosine(0), rows)
    last = best(range(1, 8), lambda x, y: -F.cosine_similarity(x[-1], y[-1], dim=0).arccos(), normed)
    assert peers.replaceme(decoder, ids, count).removed == last


def test_reverse_order_and_random() -> None:
    decoder: Any = type("Ten", (), {"count": 10})()
    ids = torch.zeros(1, 1)
    assert peers.reverse_order(decoder, ids, 3).order == [9, 8, 7]
    assert peers.reverse_order(decoder, ids, 3, keep_last=True).order == [8, 7, 6]
    assert peers.random_layers(decoder, ids, 3) == peers.random_layers(decoder, ids, 3, seed=0)
    assert len({tuple(peers.random_layers(decoder, ids, 3, seed=seed).removed) for seed in range(9)}) > 3


@pytest.mark.parametrize("name", list(peers.COMPENSATIONS))
def test_nothing_removed_is_nothing_changed(name: str, decoder: Any, ids: Any) -> None:
    patch = peers.COMPENSATIONS[name](decoder, ids, [])
    assert not patch.parameters and not patch.before


@pytest.mark.parametrize("name", list(peers.COMPENSATIONS))
@pytest.mark.parametrize("removed", [REMOVED, GAPPED], ids=["window", "gaps"])
def test_layers_that_did_nothing_need_no_compensation(
    name: str, removed: list[int], ids: Any, model_of: Callable[..., Any], decoder_of: Callable[..., Any]
) -> None:
    model = model_of("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer in removed:  # these write nothing to the residual stream
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    decoder = decoder_of(model, TOKENS)
    patch = peers.COMPENSATIONS[name](decoder, ids, removed)
    assert patch.parameters or patch.before or name == "Prune&Comp"
    dense = peers.Patch().row_losses(decoder, ids, range(LAYERS))
    torch.testing.assert_close(patch.row_losses(decoder, ids, kept(removed)), dense, rtol=1e-5, atol=1e-5)


def test_a_patch_leaves_the_model_as_it_was(decoder: Any, ids: Any) -> None:
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    patch = peers.magnitude_rescale(decoder, ids, REMOVED)
    inside = {}
    with patch.apply(decoder):
        inside = {key: decoder.layers[key[0]].get_parameter(key[1]).clone() for key in patch.parameters}
    assert inside and all(torch.equal(inside[key], value) for key, value in patch.parameters.items())
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())


@pytest.mark.parametrize("removed", [REMOVED, GAPPED], ids=["window", "gaps"])
def test_replaceme_folds_the_least_squares_transform(removed: list[int], decoder: Any, ids: Any) -> None:
    patch = peers.replaceme_transform(decoder, ids, removed)
    first = min(removed)
    end = first + (3 if removed == REMOVED else 1)
    assert {layer for layer, _ in patch.parameters} == ({2} if removed == REMOVED else {1, 4})
    mlp: list[Any] = []
    handle = decoder.mlp_output(first - 1).register_forward_hook(lambda _m, _i, output: mlp.append(output[0].double()))
    states = [[state.double() for state in states_of(decoder, row)] for row in ids.split(1)]
    handle.remove()
    m = torch.cat(mlp).detach()
    x_s, x_e = (torch.cat([state[index] for state in states]) for index in (first, end))
    transform = torch.linalg.lstsq(m, x_e - (x_s - m)).solution
    # The folded model's state at the cut is the unfolded (x_s - M) + M T.
    with patch.apply(decoder), torch.no_grad():
        folded = torch.cat([decoder.run(decoder.embed(row), range(first))[0].double() for row in ids.split(1)])
    torch.testing.assert_close(folded, x_s - m + m @ transform, rtol=1e-4, atol=1e-4)
    assert (folded - x_e).norm() < (x_s - x_e).norm()


def test_replaceme_with_a_bias(ids: Any, model_of: Callable[..., Any], decoder_of: Callable[..., Any]) -> None:
    model = model_of("llama", num_hidden_layers=4, mlp_bias=True)
    decoder = decoder_of(model, TOKENS)
    patch = peers.replaceme_transform(decoder, ids, [2])
    assert set(patch.parameters) == {(1, "mlp.down_proj.weight"), (1, "mlp.down_proj.bias")}
    linear = decoder.mlp_output(1)
    turned, bias = (patch.parameters[1, f"mlp.down_proj.{name}"].double() for name in ("weight", "bias"))
    transform = turned @ torch.linalg.pinv(linear.weight.double())  # W (64, 96) has full rank: this is T^T
    torch.testing.assert_close(transform @ linear.bias.double(), bias, rtol=1e-4, atol=1e-4)


def test_replaceme_has_nothing_to_fold_into_before_the_first_layer(decoder: Any, ids: Any) -> None:
    assert {layer for layer, _ in peers.replaceme_transform(decoder, ids, [0, 1, 5]).parameters} == {4}


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 40, 60, 64, 108, 576, 896])
def test_hadamard(size: int) -> None:
    matrix = peers.hadamard(size)
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92])
def test_hadamard_says_what_it_cannot_build(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        peers.hadamard(size)


def test_linear_patch_scales_the_rotated_channels(decoder: Any, ids: Any) -> None:
    patch = peers.linear_patch(decoder, ids, GAPPED)
    assert not patch.parameters and sorted(patch.before) == [3, 7]
    rotation = peers.hadamard(64)
    scale = torch.zeros(64, dtype=torch.float64)
    for row in ids.split(1):
        before, after = (states_of(decoder, row)[index].double() @ rotation for index in (5, 7))
        scale += after.abs().mean(dim=0) / before.abs().mean(dim=0) / len(ids)
    torch.testing.assert_close(patch.before[7], rotation @ scale.diag() @ rotation.T)
    # The matrix acts where the gap was.
    with torch.no_grad():
        hidden = decoder.embed(ids)
        got = patch.run(decoder, hidden, kept(GAPPED))
        hidden = decoder.run(hidden, [0, 1]) @ patch.before[3].float()
        hidden = decoder.run(hidden, [3, 4]) @ patch.before[7].float()
        torch.testing.assert_close(got, decoder.run(hidden, [7, 8, 9]))


def test_magnitude_rescale_scales_the_stream_at_the_cut(decoder: Any, ids: Any) -> None:
    patch = peers.magnitude_rescale(decoder, ids, REMOVED)
    scale = 0.0
    for row in ids.split(1):
        states = states_of(decoder, row)
        scale += float((states[6].abs().mean(dim=0) / states[3].abs().mean(dim=0)).mean()) / len(ids)
    assert set(patch.parameters) == {
        (layer, f"{path}.weight") for layer in range(3) for path in ("self_attn.o_proj", "mlp.down_proj")
    }
    for (layer, name), value in patch.parameters.items():
        torch.testing.assert_close(value, decoder.layers[layer].get_parameter(name) * scale, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        plain = decoder.run(decoder.embed(ids), range(3)) * scale
        scaled = patch.run(decoder, decoder.embed(ids), range(3))
    assert (scaled - plain).norm() < 1e-3 * plain.norm()  # exact but for the epsilon of the norms


def test_prune_and_comp_measures_the_model_as_it_stands(decoder: Any, ids: Any) -> None:
    selection, patch = peers.prune_and_comp(decoder, ids, 3)
    again = peers.magnitude_rescale(decoder, ids, selection.order, one_by_one=True)
    assert patch.parameters.keys() == again.parameters.keys()
    for key, value in patch.parameters.items():
        torch.testing.assert_close(value, again.parameters[key])
    for index, matrix in patch.before.items():
        torch.testing.assert_close(matrix, again.before[index])
    assert selection.forward_equivalents == pytest.approx((10 + 9 + 8) / 10)
    # The first is the layer of lowest block influence of the original model, the last layer aside.
    full = peers.shortgpt(decoder, ids, LAYERS).order
    assert selection.order[0] == next(layer for layer in full if layer != 9)


def test_a_patch_acts_even_where_its_layer_is_gone(decoder: Any, ids: Any) -> None:
    """A matrix on the entry of a removed layer acts before the next kept one, or before the final norm."""
    matrix = 2 * torch.eye(64, dtype=torch.float64)
    with torch.no_grad():
        hidden = decoder.embed(ids)
        first = peers.Patch(before={0: matrix}).run(decoder, hidden, [1, 2])
        torch.testing.assert_close(first, decoder.run(2 * hidden, [1, 2]))
        last = peers.Patch(before={3: matrix}).run(decoder, hidden, [1, 2])
        torch.testing.assert_close(last, 2 * decoder.run(hidden, [1, 2]))
