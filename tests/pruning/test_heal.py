"""Healing: it helps on the teacher's own text, leaves everything else alone, and repeats itself to the byte."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from gradmap_hub.card.card import card_text
from gradmap_hub.cli.app import app
from gradmap_hub.config import PruneConfig
from gradmap_hub.data.rows import CalibrationRows
from gradmap_hub.errors import UsageError
from gradmap_hub.progress import SilentReporter
from gradmap_hub.pruning import heal as healing
from gradmap_hub.pruning.compensation import fit_compensation
from gradmap_hub.pruning.heal import divergence_gradient, heal_model, layers_around_gaps, rate_at
from gradmap_hub.record import HealCheck, HealRecord, RunRecord

TOKENS = 40
REMOVED = (1, 3)
KEPT = [0, 2, 4]
STEPS = 120


class Counting(SilentReporter):
    """Adds up the steps; Ctrl-C after so many of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps = self.announced = 0
        self._stop_at = stop_at

    def total(self, steps: int) -> None:
        self.announced += steps

    def advance(self, steps: int = 1) -> None:
        self.steps += steps
        if self._stop_at is not None and self.steps >= self._stop_at:
            raise KeyboardInterrupt


def own_text(model: Any, prompts: Tensor) -> Tensor:
    """Rows as the model itself would go on, where its loss is low."""
    with torch.no_grad():
        return model.generate(prompts, max_new_tokens=TOKENS - prompts.shape[1], do_sample=False, pad_token_id=0)


@pytest.fixture
def rows_of(random_rows: Callable[..., Any]) -> Callable[..., CalibrationRows]:
    """A model's own text, to train on and to decide by: moving towards that model surely helps. `judge`: the model
    whose text decides instead."""

    def make(model: Any, judge: Any = None) -> CalibrationRows:
        prompts = random_rows(6, 4)
        return CalibrationRows(own_text(model, prompts), own_text(judge or model, prompts), [], [])

    return make


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def untouched(model: Any, state: dict[str, Tensor]) -> bool:
    """Same bytes, everything trainable as before, no gradient and no hook left."""
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    still = all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    return same and still and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def loss_of(decoder: Any, ids: Tensor, overrides: dict[tuple[int, str], Tensor]) -> float:
    """Of a pruned copy into which the overrides were put."""
    copied = copy.deepcopy(decoder.model)
    for (layer, name), value in overrides.items():
        copied.model.layers[layer].get_parameter(name).data = value
    rebuilt = type(decoder)(copied, decoder.architecture, TOKENS)
    losses = rebuilt.losses(ids, KEPT)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma"])
def test_held_out_loss_falls_and_is_the_one_on_record(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    rows_of: Callable[..., CalibrationRows],
) -> None:
    monkeypatch.setattr(healing, "RATE", 1e-3)  # a model this small can be moved faster
    model = model_of(name)
    state = state_of(model)
    decoder, rows, reporter = decoder_of(model, TOKENS), rows_of(model), Counting()
    config = PruneConfig(drop=REMOVED, samples=8)
    correction, corrected = fit_compensation(decoder, rows, REMOVED, config, SilentReporter())
    record, overrides = heal_model(decoder, rows, REMOVED, corrected, STEPS, 0, reporter)
    assert record.applied and record.layers == KEPT and record.steps == STEPS
    assert record.loss_before == pytest.approx(correction.loss_after, abs=1e-5)
    assert record.loss_after < 0.995 * record.loss_before
    assert loss_of(decoder, rows.selection, corrected | overrides) == pytest.approx(record.loss_after, abs=1e-5)
    # every weight matrix of the region and nothing else, in the precision of the model
    wanted = {
        (layer, name) for layer in KEPT for name, p in model.model.layers[layer].named_parameters() if p.ndim >= 2
    }
    assert set(overrides) == wanted and all(value.dtype == torch.float32 for value in overrides.values())
    assert [check.step for check in record.checks] == [30, 60, 90, 120]
    assert record.loss_after == min(check.loss for check in record.checks)
    assert record.checks[-1].divergence < record.checks[0].divergence
    assert reporter.steps == reporter.announced == 2 * len(rows.fit) + STEPS + 5 * len(rows.selection)
    assert untouched(model, state)


def test_same_seed_same_bytes_and_another_seed_others(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], rows_of: Callable[..., CalibrationRows]
) -> None:
    model = model_of("llama")
    rows = rows_of(model)

    def once(seed: int) -> tuple[HealRecord, dict[tuple[int, str], Tensor]]:
        return heal_model(decoder_of(model, TOKENS), rows, REMOVED, {}, 12, seed, SilentReporter())

    (first, values), (again, same), (_, others) = once(3), once(3), once(4)
    assert first == again and first.applied
    assert all(torch.equal(value, same[key]) for key, value in values.items())
    assert any(not torch.equal(value, others[key]) for key, value in values.items())


def test_what_does_not_help_is_not_applied(
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    rows_of: Callable[..., CalibrationRows],
) -> None:
    """Held-out rows on which the pruned model is at its best, its own text: any change makes that worse."""
    model = model_of("llama")
    state = state_of(model)
    rows = rows_of(model, judge=prune_copy(model, REMOVED))
    record, overrides = heal_model(decoder_of(model, TOKENS), rows, REMOVED, {}, 24, 0, SilentReporter())
    assert not record.applied and not overrides and not record.layers
    assert record.loss_after == record.loss_before < min(check.loss for check in record.checks)
    assert "did not clearly lower" in record.reason
    assert untouched(model, state)


def test_what_diverges_is_not_applied(
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    rows_of: Callable[..., CalibrationRows],
) -> None:
    monkeypatch.setattr(healing, "RATE", 1e30)
    model = model_of("llama")
    state = state_of(model)
    record, overrides = heal_model(decoder_of(model, TOKENS), rows_of(model), REMOVED, {}, 8, 0, SilentReporter())
    assert not record.applied and not overrides
    json.dumps(dataclasses.asdict(record), allow_nan=False)
    assert untouched(model, state)


@pytest.mark.parametrize("stop_at", [1, 7, 13, 19, 22, 30])
def test_an_interruption_leaves_the_model(
    stop_at: int, model_of: Callable[..., Any], decoder_of: Callable[..., Any], rows_of: Callable[..., CalibrationRows]
) -> None:
    model = model_of("llama")
    state = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        heal_model(decoder_of(model, TOKENS), rows_of(model), REMOVED, {}, 12, 0, Counting(stop_at))
    assert untouched(model, state)


def test_a_bfloat16_model_is_trained_in_float32(
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    rows_of: Callable[..., CalibrationRows],
) -> None:
    """Steps far smaller than bfloat16 resolves add up in the masters; what comes out is bfloat16 again."""
    monkeypatch.setattr(healing, "RATE", 1e-4)
    model = model_of("llama").bfloat16()
    rows = rows_of(model)
    record, overrides = heal_model(decoder_of(model, TOKENS), rows, REMOVED, {}, 32, 0, SilentReporter())
    assert record.applied and all(value.dtype == torch.bfloat16 for value in overrides.values())
    moved = [
        (value != model.model.layers[layer].get_parameter(name)).float().mean()
        for (layer, name), value in overrides.items()
    ]
    assert min(moved) > 0.2


def test_one_step_is_adam_on_the_divergence(
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
    prune_copy: Callable[..., Any],
    rows_of: Callable[..., CalibrationRows],
) -> None:
    """The first step of Adam moves each weight by the rate, against the sign of a gradient taken by plain autograd."""
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)
    model = model_of("llama").double()
    rows = rows_of(model)
    rows = CalibrationRows(rows.fit[:1], rows.selection, [], [])
    record, overrides = heal_model(decoder_of(model, TOKENS), rows, REMOVED, {}, 1, 0, SilentReporter())
    thin = prune_copy(model, REMOVED)
    with torch.no_grad():
        teacher = model(input_ids=rows.fit, use_cache=False).logits.log_softmax(dim=-1)
    student = thin(input_ids=rows.fit, use_cache=False).logits.log_softmax(dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1).mean()
    divergence.backward()
    assert record.checks[0].divergence == pytest.approx(float(divergence.detach()), rel=1e-5)
    for (layer, name), value in overrides.items():
        before = model.model.layers[layer].get_parameter(name).detach()
        gradient = thin.model.layers[KEPT.index(layer)].get_parameter(name).grad
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        assert torch.allclose((value - before)[clear], -healing.RATE * gradient.sign()[clear], rtol=0.05, atol=0)


@pytest.mark.parametrize("chunk", [7, 256])
def test_divergence_and_its_gradient_equal_autograd(
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
    model_of: Callable[..., Any],
    decoder_of: Callable[..., Any],
) -> None:
    monkeypatch.setattr(healing, "LOGIT_CHUNK", chunk)
    model = model_of("gemma").requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    wanted, reached = (torch.randn(2, TOKENS, model.config.hidden_size, generator=draw) for _ in range(2))
    found, gradient = divergence_gradient(decoder_of(model, TOKENS), reached, wanted)
    reached.requires_grad_(True)
    teacher, student = (model.lm_head(model.model.norm(states)).log_softmax(dim=-1) for states in (wanted, reached))
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean()
    divergence.backward()
    assert found == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert reached.grad is not None and torch.allclose(
        gradient, reached.grad, atol=1e-5 * float(reached.grad.abs().max())
    )


def test_layers_around_gaps() -> None:
    kept = [layer for layer in range(30) if layer not in {12, 13, 14, 25}]
    assert layers_around_gaps(kept, [12, 13, 14, 25]) == [11, 15, 16, 24, 26, 27]
    assert layers_around_gaps([0, 2, 4], [1, 3]) == [0, 2, 4]
    # nothing before the first layer, nothing after the last
    assert layers_around_gaps([1, 2, 3, 4], [0, 5, 6]) == [1, 2, 4]
    assert layers_around_gaps([0], [1, 2]) == [0]
    assert layers_around_gaps([2], [0, 1]) == [2]


@pytest.mark.parametrize("steps", [1, 2, 10, 200])
def test_the_rate_rises_once_and_falls_to_little(steps: int) -> None:
    rates = [rate_at(step, steps) for step in range(steps)]
    assert max(rates) == 1 and min(rates) > 0
    top = rates.index(1)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


# --- from the command line to the written file ---------------------------------------------------------------------


def prune_tiny(folder: Path, output: Path, text: Path, *options: str) -> Any:
    command = ["prune", str(folder), str(output), "--drop", "1,3", "--samples", "6", "--seq-len", "32",
               "--eval-rows", "2", "-c", str(text), "--json", "--quiet", *options]  # fmt: skip
    return CliRunner().invoke(app, command, catch_exceptions=True)


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_prune_writes_what_healing_found(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Also that --resume takes the result from disk, and that other steps or none are not mistaken for it."""
    monkeypatch.setattr(healing, "lowers", lambda _before, _after: True)  # a random model has little to gain on text
    output = tmp_path / "healed"
    done = prune_tiny(tiny_folder, output, text_file, "--heal", "4")
    assert done.exit_code == 0, done.output
    record = RunRecord.read(output)
    assert record.heal is not None and record.heal.applied and record.heal.steps == 4
    found = load_healed(output)
    written = weights(output)
    assert found
    for key, value in found.items():
        layer, _, name = key.partition(":")
        assert torch.equal(written[f"model.layers.{KEPT.index(int(layer))}.{name}"], value)
    assert "heal" in record.timings
    assert "healed" in (output / "README.md").read_text(encoding="utf-8")

    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(healing, "heal_model", never)
        again = prune_tiny(tiny_folder, output, text_file, "--heal", "4", "--resume")
        assert again.exit_code == 0, again.output
        other = prune_tiny(tiny_folder, output, text_file, "--heal", "5", "--resume")
        assert isinstance(other.exception, AssertionError)
        plain = prune_tiny(tiny_folder, output, text_file, "--resume")
    assert plain.exit_code == 0, plain.output
    assert RunRecord.read(output).heal is None
    assert any(not torch.equal(value, written[name]) for name, value in weights(output).items())


def load_healed(output: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(output.with_name(f"{output.name}.work") / "healed.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--heal", "4", "--low-memory"), ("--heal", "--low-memory")), (("--heal", "-1"), ("--heal", "-1"))],
)
def test_refused_in_one_line(options: tuple[str, ...], words: tuple[str, ...], text_file: Path, tmp_path: Path) -> None:
    done = prune_tiny(tmp_path / "nowhere", tmp_path / "out", text_file, *options)
    assert isinstance(done.exception, UsageError)
    assert "\n" not in done.exception.message and all(word in done.exception.message for word in words)
    assert not (tmp_path / "out").exists()


def test_the_card_says_it(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    done = prune_tiny(tiny_folder, output, text_file)
    assert done.exit_code == 0, done.output
    plain = dataclasses.replace(RunRecord.read(output), command="gradmap-hub prune")  # not that of pytest
    assert plain.heal is None and "heal" not in card_text(plain)
    assert "no retraining" in card_text(plain)
    checks = [HealCheck(4, 0.25, 3.0)]
    healed = dataclasses.replace(
        plain, heal=HealRecord(True, 4, 3e-4, 3.5, 3.0, "lowest held-out loss", [0, 2, 4], checks)
    )
    text = card_text(healed)
    for denied in ("no retraining", "- The model was not retrained", "Nothing was fine-tuned"):
        assert denied not in text
    for words in ("4 steps", "3.5000", "3.0000", "layers 0, 2, 4", "teacher"):
        assert words in text
    assert "healed |" in text  # the column of perplexities
    refused = HealRecord(False, 4, 3e-4, 3.5, 3.5, "it did not lower the held-out loss", [], checks)
    text = card_text(dataclasses.replace(plain, heal=refused))
    assert "no retraining" in text and "healed |" not in text and "it did not lower the held-out loss" in text


def test_records_of_earlier_versions_load(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    assert prune_tiny(tiny_folder, output, text_file).exit_code == 0
    path = output / "gradmap.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["heal"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert RunRecord.read(output).heal is None
