"""Training: it helps on the teacher's own text, repeats itself to the byte, and goes on where it was killed."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from gradmap_hub.data.rows import Rows
from gradmap_hub.healing import heal as healing
from gradmap_hub.healing import training
from gradmap_hub.healing.corpus import make_corpus
from gradmap_hub.healing.heal import heal_model
from gradmap_hub.healing.parts import Part, choose_part, layers_around_gaps
from gradmap_hub.healing.training import Check, Recipe, rate_at
from gradmap_hub.record import HealRecord

TOKENS = 40
ALL = Part("all", [0, 1, 2])
RECIPE = Recipe(rate=1e-3, sequences=2, micro=2, autocast=False, save_every=1e9)


class Stop:
    """A watcher that presses Ctrl-C after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, tokens: int) -> None:
        self.left -= tokens == RECIPE.sequences * TOKENS
        if self.left < 0:
            raise KeyboardInterrupt

    def checked(self, check: Check) -> None: ...


def run(
    world: Any, folder: str, *, part: Part = ALL, recipe: Recipe = RECIPE, watcher: Any = None
) -> tuple[HealRecord, dict[tuple[int, str], Tensor]]:
    return heal_model(world.student(), world.corpus, world.teacher, part, recipe, world.folder / folder, watcher)


def same(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma"])
def test_the_divergence_falls_and_is_the_one_on_record(family: str, world_of: Callable[..., Any]) -> None:
    world = world_of(family)
    record, values = run(world, "a")
    assert record.applied and record.steps == 30 and record.tokens == 60 * TOKENS and record.layers == [0, 1, 2]
    assert record.divergence_before is not None and record.divergence_after is not None
    assert record.divergence_after < 0.95 * record.divergence_before
    assert record.divergence_after == pytest.approx(min(check.held_out or 0 for check in record.checks), abs=1e-6)
    pruned = world.student().model
    for (layer, name), value in values.items():
        pruned.model.layers[layer].get_parameter(name).data = value
    watched = world.corpus.held_out[0].ids
    with torch.no_grad():
        logits = pruned(input_ids=watched).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), watched[:, 1:].flatten())
    assert float(loss) == pytest.approx(record.loss_after, abs=1e-4)
    names = {name for name, _ in world.model.model.layers[0].named_parameters()}
    assert set(values) == {(layer, name) for layer in range(3) for name in names}
    assert len(record.checks) == training.CHECKS and record.repeats == 60 / 8


def test_same_seed_same_bytes(world: Any) -> None:
    (first, values), (again, others) = run(world, "a"), run(world, "b")
    assert same(values, others)
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0)


@pytest.mark.long
def test_killed_anywhere_it_ends_with_the_same_bytes(world: Any) -> None:
    """Ten kills at random steps, with a state on disk from some steps before."""
    _, wanted = run(world, "whole")
    draw = random.Random(5)
    kills = sorted(draw.sample(range(1, 30), 10))
    saving = dataclasses.replace(RECIPE, save_every=0.0)
    done = 0
    for kill in kills:
        state = world.folder / "killed" / training.STATE
        older = state.read_bytes() if state.is_file() and draw.random() < 0.5 else None
        with pytest.raises(KeyboardInterrupt):
            run(world, "killed", recipe=saving, watcher=Stop(kill - done))
        if older is not None:  # the last states did not reach the disk
            state.write_bytes(older)
        else:
            done = kill
    record, values = run(world, "killed", recipe=saving)
    assert record.steps == 30 and same(values, wanted)
    assert not list((world.folder / "killed").glob("*.partial"))


@pytest.mark.slow
def test_a_state_of_another_run_is_not_used(world: Any) -> None:
    saving = dataclasses.replace(RECIPE, save_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(world, "a", recipe=dataclasses.replace(saving, rate=2e-3), watcher=Stop(9))
    _, values = run(world, "a", recipe=saving)
    assert same(values, run(world, "b")[1])


def test_micro_batches_add_up_to_the_step(world: Any) -> None:
    _, whole = run(world, "a")
    _, parts = run(world, "b", recipe=dataclasses.replace(RECIPE, micro=1))
    assert all(torch.allclose(value, parts[key], atol=2e-4) for key, value in whole.items())


def test_one_step_is_adam_on_the_divergence(world_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of Adam moves each weight by the rate, against the sign of a gradient taken by plain autograd."""
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)
    world = world_of(sequences=1)
    recipe = dataclasses.replace(RECIPE, sequences=1, micro=1)
    record, values = run(world, "a", recipe=recipe)
    plain = world.student().model
    ids = world.corpus.ids[:1]
    with torch.no_grad():
        teacher = world.model(input_ids=ids).logits.log_softmax(dim=-1)
    student = plain(input_ids=ids).logits.log_softmax(dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1).mean()
    divergence.backward()
    assert record.checks[0].divergence == pytest.approx(float(divergence.detach()), rel=1e-2)  # float16 in the cache
    agree = total = 0.0
    for (layer, name), value in values.items():
        parameter = plain.model.layers[layer].get_parameter(name)
        gradient = parameter.grad
        clear = gradient.abs() > 0.1 * gradient.abs().max()
        moved = (value - parameter.detach())[clear]
        assert torch.allclose(moved.abs(), torch.full_like(moved, recipe.rate), rtol=0.05)
        agree += float((moved.sign() == -gradient.sign()[clear]).sum())
        total += moved.numel()
    assert agree / total > 0.98


def test_what_does_not_help_is_not_applied(world: Any, world_of: Callable[..., Any], tmp_path: Path) -> None:
    """Held-out sequences on which the student is the teacher itself: any change makes that worse."""
    student = world.student()
    world.teacher.held_out.remove()
    world.teacher.held_out.fill(world.make["decoder"](copy.deepcopy(student.model), TOKENS))
    record, values = run(world, "a")
    assert not record.applied and not values and not record.layers
    assert record.loss_after == record.loss_before and "did not clearly lower" in record.reason


def test_a_loss_that_is_not_a_number_stops_it(world: Any) -> None:
    record, values = run(world, "a", recipe=dataclasses.replace(RECIPE, rate=1e30))
    assert not record.applied and not values and record.steps < 30
    assert "stopped at step" in record.reason and record.loss_after == record.loss_before
    json.dumps(dataclasses.asdict(record), allow_nan=False)


def test_after_a_good_state_it_is_kept(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate explodes late: the state of the last check is the result, and the reason says it."""
    monkeypatch.setattr(training, "rate_at", lambda step, steps: rate_at(step, steps) if step < 20 else 1e33)
    record, values = run(world, "a")
    assert record.applied and values and "stopped at step" in record.reason
    json.dumps(dataclasses.asdict(record), allow_nan=False)
    assert all(value.isfinite().all() for value in values.values())


def test_adapters_are_merged(world: Any) -> None:
    pytest.importorskip("peft")
    record, values = run(world, "a", part=Part("lora", [0, 1, 2]), recipe=dataclasses.replace(RECIPE, rate=2e-3))
    assert record.applied and record.part == "lora"
    pruned = world.student().model
    before = {key: pruned.model.layers[key[0]].get_parameter(key[1]).detach().clone() for key in values}
    assert all(value.shape == before[key].shape for key, value in values.items())
    changes = [torch.linalg.matrix_rank(value - before[key], rtol=1e-3) for key, value in values.items()]
    assert max(changes) <= 32 and min(changes) > 0
    for (layer, name), value in values.items():
        pruned.model.layers[layer].get_parameter(name).data = value
    watched = world.corpus.held_out[0].ids
    with torch.no_grad():
        loss = float(pruned(input_ids=watched, labels=watched).loss)
    assert loss == pytest.approx(record.loss_after, abs=1e-4)


FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param({}, id="DDP"), pytest.param(FSDP, id="FSDP2")])
def test_two_processes_reach_the_loss_of_one(world: Any, tmp_path: Path, how: dict[str, str]) -> None:
    """Over gloo, each with half of the sequences of a step, and with FSDP also half of each weight."""
    (tmp_path / "both").mkdir()
    wanted, _ = run(world, "one")
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_process, args=(rank, port, how, tmp_path / "both", world)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = json.loads((tmp_path / "both" / "record.json").read_text())
    assert found["divergence_after"] == pytest.approx(wanted.divergence_after, abs=1e-3)
    assert found["loss_after"] == pytest.approx(wanted.loss_after, abs=1e-3)
    assert found["steps"] == wanted.steps and found["tokens"] == wanted.tokens


def _process(rank: int, port: int, how: dict[str, str], folder: Path, world: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    } | how  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the parent process
    if how:
        PartialState(cpu=True)  # accelerate offers FSDP on accelerators alone, though it works over gloo
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    student = world.student()
    record, _ = heal_model(student, world.corpus, world.teacher, ALL, RECIPE, folder / "state", None)
    assert any(isinstance(value, DTensor) for value in student.model.parameters()) == bool(how)
    if rank == 0:
        (folder / "record.json").write_text(json.dumps(dataclasses.asdict(record)))
    torch.distributed.destroy_process_group()


# --- what is trained, on what, at which rate -----------------------------------------------------------------------


def test_layers_around_gaps() -> None:
    kept = [layer for layer in range(30) if layer not in {12, 13, 14, 25}]
    assert layers_around_gaps(kept, [12, 13, 14, 25]) == [11, 15, 16, 24, 26, 27, 28, 29]
    assert layers_around_gaps([0, 2, 4], [1, 3]) == [0, 2, 4]
    assert layers_around_gaps([0], [1, 2]) == [0]


def test_the_largest_part_that_fits_is_chosen() -> None:
    kept = [layer for layer in range(30) if layer not in range(10, 18)]
    weights = {"all": 78_000_000, "rest": 28_000_000}
    chosen = {
        free: choose_part("auto", kept, list(range(10, 18)), weights, free).name
        for free in (8_000_000_000, 1_500_000_000, 700_000_000)
    }
    assert list(chosen.values()) == ["all", "gaps", "lora"]
    assert choose_part("lora", kept, [10], weights, 10**12).name == "lora"
    gaps = choose_part("gaps", kept, list(range(10, 18)), weights, 0)
    assert gaps.layers == [9, 10, 11, 19, 20, 21]  # positions in the student


@pytest.mark.parametrize("steps", [1, 2, 10, 200])
def test_the_rate_rises_once_and_falls_to_little(steps: int) -> None:
    rates = [rate_at(step, steps) for step in range(steps)]
    assert max(rates) == 1 and min(rates) > 0
    top = rates.index(1)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_a_corpus_mixes_by_weight_and_uses_each_sequence_before_any_twice(random_rows: Callable[..., Any]) -> None:
    first, second = random_rows(12, 8, 1), random_rows(4, 8, 2)
    sources = [(Rows("a", "1", first), 3.0), (Rows("b", "2", second), 1.0)]
    corpus = make_corpus(sources, [], 40, 0)
    read = corpus.ids[corpus.order]
    times = {name: [int((read == row).all(1).sum()) for row in ids] for name, ids in (("a", first), ("b", second))}
    assert sum(times["a"]) == 30 and set(times["a"]) == {2, 3}
    assert sum(times["b"]) == 10 and set(times["b"]) == {2, 3}
    assert len(corpus.ids) == 16 and corpus.repeats == 2.5
    assert torch.equal(corpus.sources[1].ids.sort(0).values, second.sort(0).values)
    few = make_corpus(sources, [], 4, 0)
    assert [len(rows.ids) for rows in few.sources] == [3, 1] and sorted(few.order) == [0, 1, 2, 3]
    assert make_corpus(sources, [], 40, 1).order != corpus.order
