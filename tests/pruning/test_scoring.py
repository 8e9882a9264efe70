"""The decoder view against plain transformers, and every score against a computation that shares no code with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmap_hub.errors import BrokenCheckpointError
from gradmap_hub.models import decoder as decoder_module
from gradmap_hub.models.decoder import parameters_replaced
from gradmap_hub.pruning.candidates import decide
from gradmap_hub.pruning.scoring import iterative_removals, score_layers

TOKENS = 40


def streams(model: Any, ids: Tensor) -> list[Tensor]:
    """Residual stream before each layer and after the last, from transformers itself.

    The last entry of `hidden_states` is behind the final norm, so the stream before that norm is caught instead.
    """
    caught: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    finally:
        handle.remove()
    return [*output.hidden_states[:-1], caught[0]]


def plain_loss(model: Any, row: Tensor) -> Tensor:
    return model(input_ids=row, labels=row, use_cache=False).loss


def layer_gradients(model: Any, loss: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of the weight matrices of each layer."""
    found = []
    for layer in model.model.layers:
        named = {name: p for name, p in layer.named_parameters() if p.ndim == 2}
        grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        found.append(dict(zip(named, grads, strict=True)))
    return found


def test_without_weights_the_other_scores_are_the_same(decoder_of: Any, model_of: Any, random_rows: Any) -> None:
    decoder, ids = decoder_of(model_of("llama"), 24), random_rows(3, 24)
    whole, part = score_layers(decoder, ids), score_layers(decoder, ids, weights=False)
    assert part.gradient == part.taylor == []
    assert (part.gate, part.cost, part.distance, part.loss) == (whole.gate, whole.cost, whole.distance, whole.loss)
    assert all(parameter.grad is None for parameter in decoder.model.parameters())
    assert [decision.score for decision in decide(part, None, [0], "as asked")] == part.gate


def test_decoder_repeats_the_model(
    family: str, model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of(family)
    ids = random_rows(3, TOKENS)
    decoder = decoder_of(model, TOKENS)
    expected = streams(model, ids)
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        start = decoder.embed(ids)
        end = decoder.run(start, range(decoder.count), seen.__setitem__)
        losses = decoder.row_losses(end, ids)
    assert (start - expected[0]).abs().max() <= 1e-5
    for layer, hidden in seen.items():
        assert (hidden - expected[layer + 1]).abs().max() <= 1e-5
    wanted = [float(plain_loss(model, row).detach()) for row in ids.split(1)]
    assert losses.tolist() == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 3) for value in wanted}) == 3  # a loss per row, not one for all


def test_decoder_runs_a_subset_as_the_pruned_model(
    family: str,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    random_rows: Callable[..., Any],
) -> None:
    model = model_of(family)
    ids = random_rows(2, TOKENS)
    decoder = decoder_of(model, TOKENS)
    with torch.no_grad():
        hidden = decoder.run(decoder.embed(ids), [0, 2, 4])
    assert (hidden - streams(prune_copy(model, (1, 3)), ids)[-1]).abs().max() <= 1e-5


def test_chunks_of_logits_do_not_change_the_loss(
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    random_rows: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    ids = random_rows(2, TOKENS)
    decoder = decoder_of(model, TOKENS)
    monkeypatch.setattr(decoder_module, "LOGIT_CHUNK", 7)  # does not divide 39
    with torch.no_grad():
        losses = decoder.row_losses(decoder.run(decoder.embed(ids), range(5)), ids).tolist()
    assert losses == pytest.approx([float(plain_loss(model, row).detach()) for row in ids.split(1)], abs=1e-5)


def test_a_config_that_asks_for_hidden_states_leaves_no_wrappers(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of("llama", output_hidden_states=True)
    decoder = decoder_of(model, TOKENS)
    with torch.no_grad():
        before = [layer.forward for layer in model.model.layers]
        for _ in range(3):
            decoder.embed(random_rows(1, TOKENS))
    assert [layer.forward for layer in model.model.layers] == before


def test_replaced_parameters_come_back(model_of: Callable[..., Any]) -> None:
    linear = model_of("llama").model.layers[0].mlp.down_proj
    before = linear.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), parameters_replaced(linear, {"weight": torch.zeros_like(before)}):
        assert not linear.weight.any()
        raise KeyboardInterrupt
    assert torch.equal(linear.weight, before)


def test_gradient_and_taylor_equal_plain_autograd_per_row(
    family: str, model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of(family, tied=True)
    ids = random_rows(3, TOKENS)
    scores = score_layers(decoder_of(model, TOKENS), ids)

    gradient = [0.0] * 5
    taylor = [0.0] * 5
    total: list[dict[str, Tensor]] = [{} for _ in range(5)]
    losses = []
    for row in ids.split(1):
        loss = plain_loss(model, row)
        losses.append(float(loss.detach()))
        for index, grads in enumerate(layer_gradients(model, loss)):
            weights = dict(model.model.layers[index].named_parameters())
            for name, grad in grads.items():
                gradient[index] += float(grad.double().abs().sum())
                taylor[index] += float((grad * weights[name].detach()).double().abs().sum())
                total[index][name] = total[index].get(name, 0) + grad
    assert scores.gradient == pytest.approx(gradient, rel=1e-5)
    assert scores.taylor == pytest.approx(taylor, rel=1e-5)
    assert scores.loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert scores.layers == [0, 1, 2, 3, 4] and scores.rows == 3

    # Accumulated first, gradients of different rows cancel: another score, and a smaller one.
    accumulated = [sum(float(grad.double().abs().sum()) for grad in grads.values()) for grads in total]
    assert all(sum_first < 0.95 * score for sum_first, score in zip(accumulated, scores.gradient, strict=True))


def test_gate_and_cost_equal_plain_autograd_per_token(
    family: str, model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of(family)
    ids = random_rows(3, TOKENS)
    scores = score_layers(decoder_of(model, TOKENS), ids)
    gate = torch.zeros(5, dtype=torch.float64)
    cost = torch.zeros(6, 6, dtype=torch.float64)
    for row in ids.split(1):
        stream: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _module, args, kwargs: seen(args, kwargs), with_kwargs=True)
            for layer in model.model.layers
        ]
        last = model.model.norm.register_forward_pre_hook(lambda _module, args: seen(args, {}))

        def seen(args: tuple[Any, ...], kwargs: dict[str, Any], stream: list[Tensor] = stream) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden.retain_grad()
            stream.append(hidden)

        model.get_input_embeddings().weight.requires_grad_(True)
        plain_loss(model, row).backward()
        for handle in (*handles, last):
            handle.remove()
        # Without the first token of the sequence.
        states = [hidden.detach()[0, 1:].double() for hidden in stream]
        gradients = [hidden.grad[0, 1:].double() for hidden in stream if hidden.grad is not None]
        for layer in range(5):
            inner = (gradients[layer + 1] * (states[layer + 1] - states[layer])).sum(-1)
            gate[layer] += inner.abs().mean() / 3
        for start, end in itertools.combinations(range(6), 2):
            moved = (states[end] - states[start]).square().sum(-1)
            cost[start, end] += (gradients[end].square().sum(-1) * moved).mean() / 3
    assert scores.gate == pytest.approx(gate.tolist(), rel=1e-4)
    for found, wanted in zip(scores.cost, cost.tolist(), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_only_matrices_of_the_layers_count(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    """A layer's score leaves out its biases and norm gains."""
    model = model_of("qwen2")  # has biases and norms
    ids = random_rows(1, TOKENS)
    scores = score_layers(decoder_of(model, TOKENS), ids)
    everything = 0.0
    for parameter in model.model.layers[0].parameters():
        (grad,) = torch.autograd.grad(plain_loss(model, ids), [parameter])
        everything += float(grad.abs().sum())
    assert scores.gradient[0] < everything * (1 - 1e-4)


def test_influence_and_windows_equal_the_hidden_states(
    family: str, model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of(family)
    ids = random_rows(2, TOKENS)
    scores = score_layers(decoder_of(model, TOKENS), ids)
    stream = streams(model, ids)

    def distance(first: int, last: int) -> float:
        a, b = stream[first].double(), stream[last].double()
        return float(1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())

    assert scores.influence == pytest.approx([distance(i, i + 1) for i in range(5)], abs=1e-6)
    assert scores.windows(2) == pytest.approx([distance(i, i + 2) for i in range(4)], abs=1e-6)
    assert scores.windows(5) == pytest.approx([distance(0, 5)], abs=1e-6)
    means = [state.double().mean(dim=(0, 1)) for state in stream]
    moved = [float((after - before).norm() / after.norm()) for before, after in itertools.pairwise(means)]
    assert scores.shift == pytest.approx(moved, rel=1e-5)


def test_a_subset_of_layers_is_scored_as_it_stands(
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    random_rows: Callable[..., Any],
) -> None:
    model = model_of("mistral")
    ids = random_rows(2, TOKENS)
    subset = score_layers(decoder_of(model, TOKENS), ids, layers=[0, 2, 4])
    alone = score_layers(decoder_of(prune_copy(model, (1, 3)), TOKENS), ids)
    assert subset.layers == [0, 2, 4] and alone.layers == [0, 1, 2]
    assert subset.gradient == pytest.approx(alone.gradient, rel=1e-5)
    assert subset.influence == pytest.approx(alone.influence, abs=1e-6)


def trainable(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("where", ["nowhere", "between rows", "in a layer"])
def test_the_model_is_as_before(
    where: str, model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    flags = trainable(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = decoder_of(model, TOKENS)
    ids = random_rows(3, TOKENS)
    rows_done = 0

    def row_done() -> None:
        nonlocal rows_done
        rows_done += 1
        if where == "between rows" and rows_done == 2:
            raise KeyboardInterrupt

    def fail(*_: Any) -> None:
        if rows_done == 1:
            raise RuntimeError("in the middle")

    handle = model.model.layers[3].mlp.down_proj.register_forward_hook(
        fail if where == "in a layer" else lambda *_: None
    )
    expected = {"between rows": KeyboardInterrupt, "in a layer": RuntimeError}.get(where)
    if expected is None:
        score_layers(decoder, ids, row_done=row_done)
        assert rows_done == 3
    else:
        with pytest.raises(expected):
            score_layers(decoder, ids, row_done=row_done)
    handle.remove()
    assert trainable(model) == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # and no hook is left behind that would free somebody else's gradients
    plain_loss(model, ids[:1]).backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_only_one_gradient_is_alive_at_a_time(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of("llama")
    alive: list[int] = []
    weights = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    handles = [
        w.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in weights)))
        for w in weights
    ]
    score_layers(decoder_of(model, TOKENS), random_rows(2, TOKENS))
    for handle in handles:
        handle.remove()
    assert len(alive) == 2 * len(weights) and max(alive) == 1


def test_iterative_removes_distinct_layers_scored_anew(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    model = model_of("llama", seed=3)
    decoder = decoder_of(model, TOKENS)
    ids = random_rows(2, TOKENS)
    rows_done: list[int] = []
    removed = iterative_removals(decoder, ids, 3, row_done=lambda: rows_done.append(1))
    assert removed == sorted(set(removed)) and len(removed) == 3 and len(rows_done) == 6

    left = list(range(5))
    gone = []
    for _ in range(3):
        scores = score_layers(decoder, ids, layers=left)
        gone.append(left.pop(scores.gradient.index(min(scores.gradient))))
    assert removed == sorted(gone)
    assert iterative_removals(decoder, ids, 3) == removed


def test_scores_are_deterministic_and_depend_on_the_rows(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> None:
    decoder = decoder_of(model_of("gemma"), TOKENS)
    first = score_layers(decoder, random_rows(2, TOKENS))
    assert score_layers(decoder, random_rows(2, TOKENS)) == first
    assert score_layers(decoder, random_rows(2, TOKENS, seed=1)) != first


@pytest.mark.parametrize(
    ("scale", "where", "said"),
    [
        (1e30, "model.layers.2.mlp.down_proj", "output of layer 2 of the original"),
        (float("nan"), "model.embed_tokens", "output of the embedding"),
        (1e30, "lm_head", "loss of the original is"),
    ],
)
def test_weights_beyond_use_are_named(
    scale: float,
    where: str,
    said: str,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    random_rows: Callable[..., Any],
) -> None:
    model = model_of("llama")
    model.get_submodule(where).weight.data.mul_(scale)
    with pytest.raises(BrokenCheckpointError, match=said):
        score_layers(decoder_of(model, TOKENS), random_rows(2, TOKENS))
