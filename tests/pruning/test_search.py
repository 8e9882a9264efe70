"""The search on held-out loss against models that really have those layers, and against trying every set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradmap_hub.pruning.search import Search, search_layers

TOKENS = 24
LAYERS = 5


@pytest.fixture
def searched(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> tuple[Any, Any, Any]:
    """A model, its decoder, and rows the model itself wrote: removing any layer then costs something."""
    model = model_of("llama")
    with torch.no_grad():
        ids = model.generate(random_rows(6, 4), max_new_tokens=TOKENS - 4, do_sample=False, pad_token_id=0)
    return model, decoder_of(model, TOKENS), ids


def plain_loss(model: Any, ids: Any) -> float:
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row, use_cache=False).loss) for row in ids.split(1)]
    return sum(losses) / len(losses)


def test_losses_are_those_of_pruned_models(searched: tuple[Any, Any, Any], prune_copy: Callable[..., Any]) -> None:
    model, decoder, ids = searched
    search = Search(decoder, ids)
    assert search.loss([1, 3], "a") == pytest.approx(plain_loss(prune_copy(model, (1, 3)), ids), abs=1e-5)
    flipped = search.flips([1, 3], [0, 1, 2, 3, 4], ids)
    sets = {0: (0, 1, 3), 1: (3,), 2: (1, 2, 3), 3: (1,), 4: (1, 3, 4)}
    for layer, removed in sets.items():
        wanted = plain_loss(prune_copy(model, removed), ids)
        assert flipped[layer] / len(ids) == pytest.approx(wanted, abs=1e-5), layer


def test_a_race_gives_full_losses(searched: tuple[Any, Any, Any]) -> None:
    _, decoder, ids = searched
    search = Search(decoder, ids)
    raced = search.race([1], [0, 2, 3, 4])
    for layer, loss in raced.items():
        assert loss == pytest.approx(search.loss([1, layer], "x"), abs=1e-5)


def test_a_set_is_measured_once(searched: tuple[Any, Any, Any]) -> None:
    _, decoder, ids = searched
    done: list[int] = []
    search = Search(decoder, ids, done.append)
    first = search.loss([1, 3], "a")
    assert sum(done) == len(ids)
    assert search.loss([3, 1], "b") == first and sum(done) == len(ids)


@pytest.mark.parametrize("seed", [[0, 1], [0, 4], [3, 4]])
def test_a_swap_gains_most_of_what_the_best_swap_would(searched: tuple[Any, Any, Any], seed: list[int]) -> None:
    """Against measuring every set that differs by one layer, which costs several times as much."""
    _, decoder, ids = searched
    found = search_layers(decoder, ids, {"start": seed}, swaps=True)
    losses = [candidate.loss for candidate in found]
    assert losses == sorted(losses)
    search = Search(decoder, ids)
    pairs = [pair for pair in itertools.combinations(range(LAYERS), 2) if len(set(pair) & set(seed)) == 1]
    best = min(search.loss(pair, "x") for pair in pairs)
    start = next(candidate for candidate in found if candidate.name == "start")
    assert start.removed == seed and start.loss == search.loss(seed, "x")
    assert start.loss - found[0].loss >= 0.5 * max(start.loss - best, 0.0)
    assert all(len(candidate.removed) == 2 for candidate in found)
    if found[0].removed != seed:
        assert found[0].name == "start, swapped"


def test_many_seeds_race(searched: tuple[Any, Any, Any]) -> None:
    _, decoder, ids = searched
    seeds = {str(pair): list(pair) for pair in itertools.combinations(range(LAYERS), 2)}
    found = search_layers(decoder, ids, seeds, swaps=False)
    assert len(found) == 3
    everything = sorted(Search(decoder, ids).loss(pair, "x") for pair in seeds.values())
    assert found[0].loss <= everything[2]


def test_the_best_stem_grows_by_its_best_layers(searched: tuple[Any, Any, Any]) -> None:
    _, decoder, ids = searched
    found = search_layers(decoder, ids, {"seed": [0, 1]}, stems={"poor": [0], "good": [3]}, swaps=False)
    search = Search(decoder, ids)
    stem = min(
        ([0], [3]), key=lambda removed: sum(decoder.losses(ids[:1], [i for i in range(LAYERS) if i != removed[0]]))
    )
    name = "poor" if stem == [0] else "good"
    grown = {tuple(entry.removed): entry for entry in found if entry.name == f"{name} and one more"}
    assert len(grown) == len(found) - 1 >= 3
    for removed, entry in grown.items():
        assert set(stem) < set(removed) and entry.loss == pytest.approx(search.loss(removed, "x"), abs=1e-5)


def test_without_swaps_only_the_seeds_are_measured(searched: tuple[Any, Any, Any]) -> None:
    _, decoder, ids = searched
    found = search_layers(decoder, ids, {"a": [0, 1], "b": [1, 2]}, swaps=False)
    assert {candidate.name for candidate in found} == {"a", "b"}
    assert search_layers(decoder, ids, {"a": [0, 1], "b": [1, 2]}, swaps=False) == found


def test_all_but_one_layer_can_go(searched: tuple[Any, Any, Any]) -> None:
    _, decoder, ids = searched
    found = search_layers(decoder, ids, {"a": [0, 1, 2, 3]}, swaps=True)
    assert found[0].loss <= Search(decoder, ids).loss([0, 1, 2, 3], "a")
