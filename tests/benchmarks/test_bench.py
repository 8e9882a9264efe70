"""The benchmark on a tiny model: every method is in the table, nothing is computed twice, the verdicts can say no."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradmap_hub
from benchmarks import methods, table
from benchmarks.__main__ import _engine_sha256
from benchmarks.methods import DEFAULT, DENSE, ITERATIVE, ONE_SHOT, PAPER, PUBLISHED, STAGE_2, Cost
from benchmarks.plot import quality_time

LAYERS, TOKENS, COUNT = 10, 32, 2
pytestmark = pytest.mark.slow

SETTINGS = {"model": "tiny"}


@pytest.fixture(scope="module", autouse=True)
def _no_cleaning() -> Iterator[None]:
    """Before each of a hundred tiny pieces, collecting garbage would take longer than the pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_give_back_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def work_of(
    model_of: Callable[..., Any], decoder_of: Callable[..., Any], random_rows: Callable[..., Any]
) -> Callable[..., methods.Work]:
    from gradmap_hub.data.rows import Rows

    decoder = decoder_of(model_of("llama", num_hidden_layers=LAYERS), TOKENS)
    texts = [Rows(f"text {index}", "", random_rows(3, TOKENS, seed=10 + index)) for index in range(3)]
    pools = [random_rows(8, TOKENS, seed=draw) for draw in range(2)]

    def make(path: Path | None, **changes: Any) -> methods.Work:
        return dataclasses.replace(methods.Work(decoder, pools, texts, methods.Store(path, SETTINGS)), **changes)

    return make


@pytest.fixture(scope="module")
def ran(work_of: Callable[..., methods.Work], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A whole run: its cells, its times and the file it left."""
    path = tmp_path_factory.mktemp("bench") / "cells.jsonl"
    work = work_of(path)
    cells = list(methods.cells(work, [COUNT], 1, 1))
    times = methods.times(work, 4, with_sleb=True, count=COUNT)
    return cells, times, path


@pytest.fixture(scope="module")
def rows(ran: tuple[Any, ...]) -> list[table.Row]:
    return table.build_rows(ran[0], [1000] * LAYERS, 20_000)


def test_every_method_is_in_the_table(rows: list[table.Row]) -> None:
    found = {(row.method, row.variant) for row in rows}
    peers = methods.peer_names(0, True)
    assert len(peers) == 11
    assert {(name, PUBLISHED) for name in peers} <= found
    assert {(name, STAGE_2) for name in peers if name not in ("random 1", "random 2")} <= found
    assert {(name, methods.OWN) for name in ("ReplaceMe", "LinearPatch", "Prune&Comp")} <= found
    assert {(name, methods.CORRECTED) for name in (DEFAULT, PAPER, ONE_SHOT, ITERATIVE)} <= found
    assert rows[0].method == DENSE and rows[0].parameters == 20_000
    assert all(row.parameters == 18_000 and len(row.removed) == COUNT for row in rows[1:])


def test_second_run_computes_nothing(ran: tuple[Any, ...], work_of: Callable[..., methods.Work]) -> None:
    cells, times, path = ran
    again = work_of(path)
    assert list(methods.cells(again, [COUNT], 1, 1)) == cells
    assert methods.times(again, 4, with_sleb=True, count=COUNT) == times
    assert again.store.computed == 0
    with path.open("a", encoding="utf-8") as file:
        file.write('{"settings": "cut sh')  # killed while writing
    assert methods.Store(path, SETTINGS).get({"what": "plain", "removed": []}) is not None
    assert methods.Store(path, {"model": "other"}).get({"what": "plain", "removed": []}) is None


def test_a_patch_fitted_anew_is_the_one_that_was_measured(
    ran: tuple[Any, ...], work_of: Callable[..., methods.Work]
) -> None:
    work = work_of(ran[2])
    whole = [cell for cell in ran[0] if cell.variant in (methods.CORRECTED, methods.OWN)]
    for cell in whole:
        ordered = methods.removal_order(work, cell) if cell.variant == methods.OWN else cell.removed
        patch, sites = methods.fitted_patch(work.decoder, work.pools[0], cell.method, ordered)
        assert work.measure(cell.removed, patch) == cell.losses and sites == cell.sites
    assert {cell.method for cell in whole if cell.sites}, "no correction was accepted: nothing was compared"


def test_equal_sets_share_one_evaluation_and_one_fit(
    work_of: Callable[..., methods.Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, measured = work_of(None), []
    measure = methods.Work.measure
    monkeypatch.setattr(methods.Work, "measure", lambda *args: measured.append(args[1]) or measure(*args))
    for name in ("random 0", "random 1"):
        cost = Cost(1.0, 1.0, 1.0)
        methods._keep_selection(work.store, name, 0, COUNT, [3, 4], [4, 3], cost)
        list(methods._peer_cells(work, name, 0, COUNT, [COUNT]))
    assert measured == [[3, 4], [3, 4]]  # plain and with stage 2, each once


def test_one_sleb_run_gives_every_count(work_of: Callable[..., methods.Work]) -> None:
    work = work_of(None, sleb_rows=2, sleb_shares=False)
    methods._run_greedy(work, "SLEB", 0, [1, 3])
    one, three = (work.store.get(methods._selection_key("SLEB", 0, count)) for count in (1, 3))
    assert three["order"][0] == one["removed"][0]
    # 2 of 8 rows: trials x layers run, over 8 rows of 10 layers.
    assert one["cost"]["forwards"] == pytest.approx(8 * 9 * 2 / 80)
    assert three["cost"]["forwards"] == pytest.approx((8 * 9 + 7 * 8 + 6 * 7) * 2 / 80)
    assert methods.times(work, 2, with_sleb=True, count=3)[methods.SLEB_PLAIN]["seconds"] == three["cost"]["seconds"]


def test_meter_counts_backward_as_two(work_of: Callable[..., methods.Work]) -> None:
    work = work_of(None)
    with methods.Meter(work.decoder, 8) as meter:
        work.decoder.losses(work.pools[0])
    assert meter.cost.forwards == pytest.approx(1.0)
    with methods.Meter(work.decoder, 8) as meter:
        methods.score_layers(work.decoder, work.pools[0])
    assert meter.cost.forwards == pytest.approx(4.0)  # forward, the same again from its input, and backward
    with methods.Meter(work.decoder, 8) as meter:
        methods.SELECTIONS["Taylor+"](work.decoder, work.pools[0], COUNT)
    # Backward passes reach down to the first layer: its weights are wanted too.
    assert meter.cost.forwards == pytest.approx(3.0)
    assert "_call" not in vars(work.decoder)


def test_model_is_as_before(ran: tuple[Any, ...], work_of: Callable[..., methods.Work]) -> None:
    assert ran[0][0].losses == work_of(None).plain([])
    assert all(parameter.grad is None for parameter in work_of(None).decoder.model.parameters())


def test_one_prune_and_comp_run_gives_every_count(work_of: Callable[..., methods.Work]) -> None:
    work = work_of(None)
    methods._run_greedy(work, "Prune&Comp", 0, [1, 3])
    for count in (1, 3):
        alone = methods.SELECTIONS["Prune&Comp"](work.decoder, work.pools[0], count)
        kept = work.store.get(methods._selection_key("Prune&Comp", 0, count))
        assert kept["order"] == alone.order
        assert kept["cost"]["forwards"] == pytest.approx(alone.forward_equivalents)


def test_further_draws_run_the_default_and_the_cheap_peers(ran: tuple[Any, ...], work_of: Callable[..., Any]) -> None:
    cells = list(methods.cells(work_of(ran[2]), [COUNT], 2, 1))
    second = {(cell.method, cell.variant) for cell in cells if cell.draw == 1}
    assert {name for name, _ in second} == {DEFAULT, *methods.EVERY_DRAW}
    assert not any(variant == STAGE_2 for _, variant in second)


def test_a_change_of_the_engine_changes_its_sum(tmp_path: Path) -> None:
    copy = tmp_path / "gradmap_hub"
    shutil.copytree(Path(gradmap_hub.__file__).parent, copy)
    before = _engine_sha256(copy)
    assert before == _engine_sha256()
    residual = copy / "pruning" / "residual.py"
    residual.write_bytes(residual.read_bytes() + b"\n")
    assert _engine_sha256(copy) != before


def _row(method: str, variant: str, values: list[float], draws: int = 1, worst: float = 0.0) -> table.Row:
    mean = float(torch.tensor(values).log().mean().exp())
    losses = {f"text {index}": math.log(value) for index, value in enumerate(values)}
    return table.Row(
        method=method, variant=variant, count=7, by_draw=dict.fromkeys(range(draws), losses), removed=[1],
        sets=1, parameters=1,
        perplexities={f"text {i}": table.Perplexity(v, v, v) for i, v in enumerate(values)}, mean=mean,
        worst=worst or mean, selection=1.0, compensation=None, memory=1.0, forwards=1.0, sites=[],
    )  # fmt: skip


def _holds(found: list[table.Verdict], words: str) -> bool | None:
    (verdict,) = [verdict for verdict in found if words in verdict.line]
    return verdict.holds


def test_verdicts() -> None:
    peer = [_row("SLEB", PUBLISHED, [40.0, 40.0, 40.0]), _row("random 0", PUBLISHED, [90.0, 90.0, 90.0])]
    good = table.verdicts([_row(DEFAULT, methods.CORRECTED, [30.0, 30.0, 30.0], 5, 39.0), *peer], {})
    assert all(_holds(good, words) for words in ("of all rows", "20%", "worst of 5", "random"))
    assert "without SLEB for draws [1, 2, 3, 4]" in next(v.found for v in good if "worst" in v.line)
    assert _holds(good, "1/20") is None
    bad = table.verdicts([_row(DEFAULT, methods.CORRECTED, [95.0, 30.0, 30.0], 5, 60.0), *peer], {})
    assert not any(_holds(bad, words) for words in ("of all rows", "20%", "worst of 5"))
    lucky = [_row(DEFAULT, methods.CORRECTED, [30.0] * 3), peer[0], _row("random 0", PUBLISHED, [35.0] * 3)]
    assert _holds(table.verdicts(lucky, {}), "random") is False
    assert _holds(table.verdicts([*lucky, _row("SLEB", STAGE_2, [29.0, 30.0, 30.0])], {}), "of all rows") is False


def test_verdicts_on_time() -> None:
    seconds = {methods.SLEB_PLAIN: 100.0, methods.FLOOR: 4.0, ONE_SHOT: 5.0, DEFAULT: 13.0, ITERATIVE: 16.0}
    found = table.verdicts([], {name: {"seconds": value, "forwards": 1.0} for name, value in seconds.items()})
    assert [verdict.holds for verdict in found] == [True, True, False, True]


def test_interval_holds_the_mean_and_collapse_is_a_number() -> None:
    low, high = table.interval([3.0, 3.5, 4.0, 3.2])
    assert low < torch.tensor(3.425).exp() < high
    assert table.interval([2000.0] * 3)[0] > 1e300


def test_markdown_and_plot(ran: tuple[Any, ...], rows: list[table.Row], tmp_path: Path) -> None:
    _, times, _ = ran
    produced = table.markdown(rows, times, table.verdicts(rows, times), ["a fact"])
    assert all(name in produced for name in (DEFAULT, "Prune&Comp + own compensation", "random 2", "- a fact"))
    page = f"before {table.DOCS_BEGIN} old {table.DOCS_END} after"
    assert table.into_docs(table.into_docs(page, "x"), produced) == table.into_docs(page, produced)
    with pytest.raises(ValueError):
        table.into_docs("no markers", produced)
    quality_time(rows, COUNT, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
