"""The accuracy column on a tiny model: the harness' numbers are the log-likelihoods', of the model as pruned."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, methods, table
from benchmarks.__main__ import main
from benchmarks.methods import CORRECTED, DEFAULT, DENSE, ONE_SHOT, OWN, PAPER, PUBLISHED, Cell, Cost
from benchmarks.peers import Patch

LAYERS, TOKENS, COUNT, DOCUMENTS = 10, 32, 2, 20
pytestmark = pytest.mark.slow

SETTINGS = {"model": "tiny"}
WORDS = ("river", "lantern", "mill", "clock", "Ada found the violin", "on day 7", "ledger", "a basket of letters")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More of each task than are asked for, in the field names of the harness' data."""
    draw, folder = random.Random(3), tmp_path_factory.mktemp("documents")

    def words(count: int) -> list[str]:
        return draw.sample(WORDS, count)

    made: dict[str, list[dict[str, Any]]] = {name: [] for name in accuracy.TASKS}
    for number in range(DOCUMENTS + 2):
        asked = f"What did {draw.choice(WORDS)} do {number}?"
        choices = {"text": words(4), "label": ["A", "B", "C", "D"]}
        made["arc_easy"].append({"question": asked, "choices": choices, "answerKey": draw.choice("ABCD")})
        first, second = words(2)
        made["piqa"].append({"goal": asked, "sol1": first, "sol2": second, "label": draw.randrange(2)})
        sentence = f"{draw.choice(WORDS)} {number} because the _ was {draw.choice(WORDS)}."
        answer = draw.choice("12")
        made["winogrande"].append({"sentence": sentence, "option1": first, "option2": second, "answer": answer})
        made["lambada_openai"].append({"text": f"{asked} {' '.join(words(3))}"})
    for name, task in accuracy.TASKS.items():
        (folder / task.file).write_text("".join(json.dumps(row) + "\n" for row in made[name]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def work_of(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> Callable[..., methods.Work]:
    # Tied, as small models are: the harness ties weights once more.
    decoder = decoder_of(model_of("llama", tied=True, num_hidden_layers=LAYERS), TOKENS)
    pools = [random_rows(8, TOKENS, seed=draw) for draw in range(2)]

    def make(path: Path | None) -> methods.Work:
        return methods.Work(decoder, pools, [], methods.Store(path, SETTINGS))

    return make


def state_of(decoder: Any) -> tuple[Any, ...]:
    """What the model is and carries: layers, values, hooks, settings."""
    model = decoder.model
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    parameters = {name: value.data_ptr() for name, value in model.named_parameters()}
    return [id(layer) for layer in model.model.layers], parameters, hooks, model.config.to_dict()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """One sequence at a time, without the harness."""
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    chances = logits_of(model, ids)[0].double().log_softmax(-1)
    return sum(float(chances[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


@pytest.mark.parametrize("removed", [[], [3, 4, 7]])
def test_accuracies_are_those_of_the_log_likelihoods(
    removed: list[int],
    documents: Path,
    work_of: Callable[..., methods.Work],
    prune_copy: Callable[..., Any],
    tokenizer: Any,
) -> None:
    work = work_of(None)
    decoder = work.decoder
    with accuracy.pruned_view(decoder, work.kept(removed), Patch()):
        found = accuracy.run_harness(decoder.model, tokenizer, DOCUMENTS, documents)
    pruned = prune_copy(decoder.model, removed)
    arc, wino = [], []
    for line in (documents / "arc_easy.test.jsonl").read_text().splitlines()[:DOCUMENTS]:
        doc = json.loads(line)
        context = f"Question: {doc['question']}\nAnswer:"
        texts = doc["choices"]["text"]
        scores = [loglikelihood(pruned, tokenizer, context, f" {text}") / len(text) for text in texts]
        arc.append(float(scores.index(max(scores)) == "ABCD".index(doc["answerKey"])))
    for line in (documents / "winogrande.validation.jsonl").read_text().splitlines()[:DOCUMENTS]:
        doc = json.loads(line)
        before, after = doc["sentence"].split("_")
        scores = [loglikelihood(pruned, tokenizer, before + doc[f"option{n}"], f" {after.strip()}") for n in (1, 2)]
        wino.append(float(scores.index(max(scores)) + 1 == int(doc["answer"])))
    for name, right in (("arc_easy", arc), ("winogrande", wino)):
        mean = sum(right) / DOCUMENTS
        assert found[name]["value"] == pytest.approx(mean)
        assert found[name]["error"] == pytest.approx(math.sqrt(mean * (1 - mean) / (DOCUMENTS - 1)))
        assert found[name]["documents"] == DOCUMENTS
    assert found["arc_easy"]["metric"] == "acc_norm" and found["winogrande"]["metric"] == "acc"
    assert list(found) == list(accuracy.TASKS)


# Layer 0 gone: a matrix before the first one kept. The last gone: one before the final norm.
@pytest.mark.parametrize("removed", [[3, 4], [0, 1, 5], [8, 9]])
@pytest.mark.parametrize("kind", ["ReplaceMe", "LinearPatch", "Prune&Comp", methods.STAGE_2])
def test_view_is_what_patch_run_computes(
    kind: str, removed: list[int], work_of: Callable[..., methods.Work], random_rows: Callable[..., Any]
) -> None:
    work = work_of(None)
    decoder: Any = work.decoder
    kept, ids = work.kept(removed), random_rows(2, TOKENS, seed=9)
    patch, _ = methods.fitted_patch(decoder, work.pools[0], kind, removed)
    before = state_of(decoder)
    with torch.no_grad():
        expected = decoder.head(decoder.norm(patch.run(decoder, decoder.embed(ids), kept)))
    plain = logits_of(decoder.model, ids)
    with accuracy.pruned_view(decoder, kept, patch):
        assert len(decoder.model.model.layers) == len(kept)
        seen = logits_of(decoder.model, ids)
    assert torch.equal(seen, expected) and not torch.equal(seen, plain)
    assert torch.equal(logits_of(decoder.model, ids), plain)
    with pytest.raises(RuntimeError, match="in the midst"), accuracy.pruned_view(decoder, kept, patch):
        raise RuntimeError("in the midst")
    assert state_of(decoder) == before


def test_two_matrices_before_one_layer_act_in_order(
    work_of: Callable[..., methods.Work], random_rows: Callable[..., Any]
) -> None:
    work = work_of(None)
    decoder: Any = work.decoder
    ids = random_rows(1, TOKENS, seed=9)
    width = decoder.model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    for removed, places in (([3, 4], (3, 4)), ([7, 8, 9], (8, 10))):
        patch = Patch(before=dict(zip(places, matrices, strict=True)))
        with torch.no_grad():
            expected = decoder.head(decoder.norm(patch.run(decoder, decoder.embed(ids), work.kept(removed))))
        with accuracy.pruned_view(decoder, work.kept(removed), patch):
            assert torch.equal(logits_of(decoder.model, ids), expected)


def _cells(work: methods.Work) -> list[Cell]:
    """A table's worth, made up but for the sets: two methods that chose the same, and what is not to be measured."""
    cost = Cost(1.0, 1.0, 1.0)
    losses = {"text": [3.0, 3.5, 4.0]}
    methods._keep_selection(work.store, "Prune&Comp", 0, COUNT, [3, 6], [6, 3], cost)

    def cell(method: str, variant: str, removed: list[int], draw: int = 0, sites: tuple[str, ...] = ()) -> Cell:
        count = len(removed)
        return Cell(method, variant, draw, count, removed, losses, cost, sites=list(sites))

    return [
        cell(DENSE, PUBLISHED, []),
        cell(DEFAULT, methods.ALONE, [3, 4]),
        cell(DEFAULT, CORRECTED, [3, 4], sites=("2 mlp",)),
        cell(PAPER, CORRECTED, [3, 4]),  # no site was accepted: the set alone
        cell(ONE_SHOT, CORRECTED, [7, 8], sites=("6 mlp",)),
        cell("LLM-Streamline", PUBLISHED, [3, 4]),
        cell("LinearPatch", OWN, [3, 4]),
        cell("LinearPatch", methods.STAGE_2, [3, 4], sites=("2 mlp",)),
        cell("Prune&Comp", PUBLISHED, [3, 6]),
        cell("Prune&Comp", OWN, [3, 6]),
        cell("random 0", PUBLISHED, [1, 2]),
        cell("LLM-Streamline", PUBLISHED, [5, 6], draw=1),
    ]


@pytest.fixture(scope="module")
def measured(
    work_of: Callable[..., methods.Work], documents: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, ...]:
    path = tmp_path_factory.mktemp("bench") / "cells.jsonl"
    work = work_of(path)
    cells = _cells(work)
    before, ids = state_of(work.decoder), work.pools[0][:1]
    logits, padding = logits_of(work.decoder.model, ids), tokenizer.pad_token
    found = accuracy.measure(work, tokenizer, cells, DOCUMENTS, documents)
    assert state_of(work.decoder) == before and torch.equal(logits_of(work.decoder.model, ids), logits)
    assert tokenizer.pad_token == padding
    return cells, found, path, work.store.computed


@pytest.mark.slow
def test_a_handful_of_rows_share_their_sets_and_a_second_run_computes_nothing(
    measured: tuple[Any, ...],
    work_of: Callable[..., methods.Work],
    documents: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells, found, path, computed = measured
    assert set(found) == {
        (0, DENSE, PUBLISHED),
        (2, DEFAULT, CORRECTED),
        (2, PAPER, CORRECTED),
        (2, ONE_SHOT, CORRECTED),
        (2, "LLM-Streamline", PUBLISHED),
        (2, "LinearPatch", OWN),
        (2, "Prune&Comp", PUBLISHED),
        (2, "Prune&Comp", OWN),
    }
    # The selection kept by the test; then dense, two corrections, two own compensations and two sets alone.
    assert computed == 1 + 7
    assert found[2, PAPER, CORRECTED] == found[2, "LLM-Streamline", PUBLISHED]
    again = work_of(path)
    monkeypatch.setattr(accuracy, "run_harness", lambda *_args: pytest.fail("computed anew"))
    monkeypatch.setattr(accuracy, "fitted_patch", lambda *_args: pytest.fail("fitted anew"))
    assert accuracy.measure(again, tokenizer, cells, DOCUMENTS, documents) == found
    assert again.store.computed == 0
    with pytest.raises(pytest.fail.Exception, match="computed anew"):
        accuracy.measure(again, tokenizer, cells, DOCUMENTS + 1, documents)


def test_prune_and_comp_is_rescaled_in_its_own_order(
    work_of: Callable[..., methods.Work], documents: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(None)
    cells = [cell for cell in _cells(work) if cell.variant == OWN and cell.method == "Prune&Comp"]
    fitted: list[Any] = []
    monkeypatch.setattr(accuracy, "run_harness", lambda *_args: {})
    monkeypatch.setattr(accuracy, "accuracy_of", lambda _scores: None)
    refit = methods.fitted_patch
    monkeypatch.setattr(accuracy, "fitted_patch", lambda *args: fitted.append(args[2:]) or refit(*args))
    accuracy.measure(work, tokenizer, cells, DOCUMENTS, documents)
    assert fitted == [("Prune&Comp", [6, 3])]


def test_column_and_json(measured: tuple[Any, ...]) -> None:
    cells, found, *_ = measured
    rows = table.build_rows(cells, [1000] * LAYERS, 20_000, found)
    place = table.header(rows).index("accuracy")
    produced = table.markdown(rows, {}, [], [])
    assert "accuracy" in produced
    of = found[2, "LinearPatch", OWN]
    for row in rows:
        cells_of_row = table.line(row, table.has_accuracy(rows))
        assert len(cells_of_row) == len(table.header(rows))
        if (row.method, row.variant) == ("LinearPatch", OWN):
            assert cells_of_row[place] == f"{100 * of.mean:.1f} ± {100 * of.error:.1f}"
        if row.method == "random 0":
            assert cells_of_row[place] == "-"
    exported = json.loads(json.dumps([table.as_json(row) for row in rows]))
    tasks = next(row for row in exported if row["label"] == DEFAULT)["accuracy"]["tasks"]
    assert set(tasks) == set(accuracy.TASKS) and set(tasks["piqa"]) == {"metric", "value", "error", "documents"}
    without = table.build_rows(cells, [1000] * LAYERS, 20_000)
    assert "accuracy" not in table.markdown(without, {}, [], [])
    assert all(len(table.line(row)) == len(table.header(without)) for row in without)


def test_mean_over_tasks() -> None:
    scores = {name: accuracy.Score("acc", value, 0.06, 50) for name, value in (("a", 0.5), ("b", 0.25))}
    of = accuracy.accuracy_of(scores)
    assert of.mean == pytest.approx(0.375) and of.error == pytest.approx(0.06 / math.sqrt(2))
    assert dataclasses.asdict(of)["tasks"]["b"]["value"] == 0.25


def test_what_is_missing_is_said(documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert accuracy.missing(documents) is None
    absent = accuracy.missing(tmp_path) or ""
    assert "arc_easy.test.jsonl" in absent and str(tmp_path) in absent
    monkeypatch.setattr(accuracy.importlib.util, "find_spec", lambda _name: None)
    assert "pip install 'gradmap-hub[eval]'" in (accuracy.missing(documents) or "")


@pytest.mark.parametrize("number", ["1", "-3", "some"])
def test_one_document_is_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--accuracy", number])
    assert "--accuracy" in capsys.readouterr().err
