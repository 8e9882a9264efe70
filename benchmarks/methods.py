"""The cells of the benchmark: the layers a method removes, the gain of a compensation, and the cost of both.

Results go to a `Store`, one line each, keyed by everything they depend on. A second run computes only missing results,
and methods that remove the same layers share one evaluation and one fit of stage 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import (
    COMPENSATIONS,
    SELECTIONS,
    Patch,
    PeerSelection,
    magnitude_rescale,
    prune_and_comp,
    random_layers,
    sleb,
)
from gradmap_hub.config import PruneConfig, paper_preset
from gradmap_hub.data.rows import CalibrationRows, Rows
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.progress import SilentReporter
from gradmap_hub.pruning.candidates import candidates, finalists, stems
from gradmap_hub.pruning.compensation import Overrides, compensate_best, fit_compensation
from gradmap_hub.pruning.scoring import iterative_removals, score_layers
from gradmap_hub.pruning.search import search_layers
from gradmap_hub.record import Candidate, CompensationRecord

RANDOM_SEEDS = (0, 1, 2)
PUBLISHED, OWN, STAGE_2 = "as published", "+ own compensation", "+ our stage 2"
PAPER, ONE_SHOT, ITERATIVE, DEFAULT = (
    "GradMAP paper preset",
    "gradmap-hub one-shot, one site",
    "gradmap-hub iterative",
    "gradmap-hub default",
)
OURS = (DEFAULT, PAPER, ONE_SHOT, ITERATIVE)
# Variants of our own methods: the layers alone, and with their compensation.
ALONE, CORRECTED = "selection only", "whole"
DENSE = "dense"
# Peers that need only forward passes run on every draw. All other peers, and our stage 2 on the peers' layers, run on
# the first draw only.
EVERY_DRAW = ("ShortGPT", "LLM-Streamline", "ReplaceMe", "LinearPatch", "Prune&Comp")
# Peers that need at least one pass over the sequences per removed layer.
GREEDY = ("SLEB", "Prune&Comp")
# One random set is enough to show the effect of stage 2 on a bad choice.
_WITHOUT_STAGE_2 = tuple(f"random {seed}" for seed in RANDOM_SEEDS[1:])


# ---------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """`seconds`; `memory`: peak in MiB above the start; `forwards`: forward passes of the whole model over the
    calibration sequences, counted by layers run (a layer's backward pass counts as two; the head is not counted)."""

    seconds: float
    memory: float
    forwards: float


class Meter:
    """Context manager that measures work on a decoder: time, memory above the start, and layer calls."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self._decoder = decoder
        self._unit = rows * decoder.tokens * decoder.count
        self._layer_tokens = 0
        self.cost = Cost(0.0, 0.0, 0.0)

    def __enter__(self) -> Meter:
        _give_back_memory()
        self._call = self._decoder._call
        self._decoder._call = self._counted  # pyright: ignore
        self._memory = _MemoryPeak(self._decoder.device)
        self._memory.start()
        _synchronize(self._decoder.device)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_exception: object) -> None:
        _synchronize(self._decoder.device)
        seconds = time.perf_counter() - self._started
        del self._decoder._call  # restores the class's method
        self.cost = Cost(seconds, self._memory.stop() / 2**20, self._layer_tokens / self._unit)

    def _counted(self, module: nn.Module, hidden: Tensor, index: int) -> Tensor:
        output = self._call(module, hidden, index)
        tokens = hidden.shape[0] * hidden.shape[1]
        self._layer_tokens += tokens
        if output.requires_grad:
            # Fires only when a gradient arrives: autograd also records layers that have no backward pass.
            output.register_hook(partial(self._went_back, tokens))
        return output

    def _went_back(self, tokens: int, _gradient: Tensor) -> None:
        self._layer_tokens += 2 * tokens


class _MemoryPeak:
    """Peak RssAnon, sampled by a thread, or the allocator's peak on a GPU; bytes above the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = self._peak = 0

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return
        self._start = self._peak = _anonymous_bytes()
        self._thread.start()

    def stop(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        self._stop.set()
        self._thread.join()
        return max(self._peak, _anonymous_bytes()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._peak = max(self._peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


def _give_back_memory() -> None:
    """Return freed memory to the system; otherwise the C library reuses it and the next peak is too low."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------
# Store
# ---------------------------------------------------------------------------------------------------------------


class Store:
    """Finished results, one JSON line each: {"settings", "key", "value"}. Lines of other settings are ignored."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path = path
        self._settings = _digest(settings)
        self._known: dict[str, Any] = {}
        self.computed = 0
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError):  # a line truncated by a killed run
                    entry = json.loads(line)
                    if entry["settings"] == self._settings:
                        self._known[_canonical(entry["key"])] = entry["value"]

    def get(self, key: Mapping[str, Any]) -> Any:
        return self._known.get(_canonical(key))

    def put(self, key: Mapping[str, Any], value: Any) -> Any:
        """Store a value and return it after a JSON round trip, so that the first run sees the same value as later
        ones."""
        self._known[_canonical(key)] = value = json.loads(json.dumps(value))
        self.computed += 1
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self._settings, "key": key, "value": value}) + "\n")
        return value

    def or_compute(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        known = self.get(key)
        return known if known is not None else self.put(key, compute())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ours:
    """The result of our chain: `removed` layers, the `winner` with its compensation, and the cost of both stages."""

    removed: list[int]
    winner: Candidate
    record: CompensationRecord
    overrides: Overrides
    selection: Cost
    compensation: Cost


def our_config(name: str, count: int, fit_rows: int) -> PruneConfig:
    """The settings of one of our methods; `samples` is the number of fitting sequences, as in a run."""
    config = PruneConfig(layers=count, samples=max(fit_rows, 4))
    if name == PAPER:
        return paper_preset(config)
    if name == ONE_SHOT:
        return dataclasses.replace(config, metric="gradient", compensation="weight", site="largest-shift")
    if name == ITERATIVE:
        return dataclasses.replace(config, schedule="iterative")
    return config


def split_pool(pool: Tensor) -> CalibrationRows:
    """A quarter of the sequences is for selection, the rest for fitting; the pool is interleaved, so both parts
    contain every text."""
    deciding = max(1, len(pool) // 4)
    return CalibrationRows(pool[: len(pool) - deciding], pool[len(pool) - deciding :], [], [])


def ours(decoder: Decoder, pool: Tensor, config: PruneConfig, count: int, *, scoring: Tensor | None = None) -> Ours:
    """The computation of `gradmap_hub.pruning.prune_model.prune_model` on the sequences `pool`, with its cost.

    `scoring`: sequences for the backward pass; None: those that `prune_model` would take.
    """
    rows = split_pool(pool)
    score_rows = rows.fit[: config.scoring_rows] if scoring is None else scoring
    with Meter(decoder, len(pool)) as choosing:
        if config.schedule == "iterative":
            # A run also scores once before, only for its record; the selection does not need it.
            sets, grown = {"gradient, iterative": iterative_removals(decoder, score_rows, count)}, {}
        else:
            scores = score_layers(decoder, score_rows)
            sets, grown = candidates(scores, count, config.metric), stems(scores, count, config.metric)
        found = search_layers(decoder, rows.selection, sets, stems=grown, swaps=config.swaps)
    with Meter(decoder, len(pool)) as correcting:
        sets = finalists(found, config.compensation != "none")
        corrected, place, record, overrides = compensate_best(decoder, rows, sets, config, SilentReporter())
        winner = corrected[place]
    return Ours(list(winner.removed), winner, record, overrides, choosing.cost, correcting.cost)


# ---------------------------------------------------------------------------------------------------------------
# Cells of the table
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One method, one draw of calibration sequences, one count. `losses`: text -> mean NLL of each sequence, nats."""

    method: str
    variant: str
    draw: int
    count: int
    removed: list[int]
    losses: dict[str, list[float]]
    selection: Cost | None = None
    compensation: Cost | None = None
    sites: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Work:
    """The inputs of every method. `pools[draw]` (rows, tokens): all calibration sequences of a draw."""

    decoder: Decoder
    pools: list[Tensor]
    texts: list[Rows]
    store: Store
    # SLEB uses the first `sleb_rows` sequences of the pool (None: all). `sleb_shares`: its trials share the hidden
    # states before the tried layer, which gives the same layers in half the time; otherwise each trial runs in full, as
    # published, and one run gives both layers and time.
    sleb_rows: int | None = None
    sleb_shares: bool = True
    say: Callable[[str], None] = lambda _text: None

    def kept(self, removed: Sequence[int]) -> list[int]:
        return [layer for layer in range(self.decoder.count) if layer not in set(removed)]

    def measure(self, removed: Sequence[int], patch: Patch) -> dict[str, list[float]]:
        """Text -> mean NLL of each sequence, nats."""
        kept = self.kept(removed)
        return {text.name: patch.row_losses(self.decoder, text.ids, kept).tolist() for text in self.texts}

    def plain(self, removed: Sequence[int]) -> dict[str, list[float]]:
        """Losses without compensation; shared by all methods and draws with this set."""
        key = {"what": "plain", "removed": sorted(removed)}
        return self.store.or_compute(key, lambda: self.measure(removed, Patch()))


def cells(
    work: Work, counts: Sequence[int], draws: int, sleb_draws: int, peer_draws: int | None = None, *, first: int = 0
) -> Iterator[Cell]:
    """Every cell, dense first, then draw by draw.

    `first` > 0 skips the draws before it and runs our method first and the greedy peers last, so that an interrupted
    run has all draws of the cheap methods.
    """
    yield Cell(DENSE, PUBLISHED, 0, 0, [], work.plain([]))
    turns = [
        (draw, count, name)
        for draw in range(first, draws)
        for count in counts
        for name in (*(OURS if draw == 0 else (DEFAULT,)), *peer_names(draw, draw < sleb_draws))
        if name in OURS or peer_draws is None or draw < peer_draws
    ]
    if first:
        turns.sort(key=lambda turn: (turn[2] not in OURS) + (turn[2] in GREEDY))
    for draw, count, name in turns:
        if name in OURS:
            yield from _our_cells(work, name, draw, count)
        else:
            yield from _peer_cells(work, name, draw, count, counts)


def peer_names(draw: int, with_sleb: bool) -> list[str]:
    """The peers that run on a draw."""
    if draw:
        return [*EVERY_DRAW, *(["SLEB"] if with_sleb else [])]
    names = [name for name in SELECTIONS if name != "random" and (with_sleb or name != "SLEB")]
    return names + [f"random {seed}" for seed in RANDOM_SEEDS]


def _our_cells(work: Work, name: str, draw: int, count: int) -> Iterator[Cell]:
    pool = work.pools[draw]
    config = our_config(name, count, len(split_pool(pool).fit))

    def compute() -> dict[str, Any]:
        work.say(f"{name}, {count} layers, draw {draw}")
        result = ours(work.decoder, pool, config, count)
        return {
            "removed": result.removed,
            "selection": dataclasses.asdict(result.selection),
            "compensation": dataclasses.asdict(result.compensation),
            "sites": _sites(result.record),
            "losses": work.measure(result.removed, Patch(parameters=result.overrides)),
        }

    found = work.store.or_compute({"what": "ours", "method": name, "draw": draw, "count": count}, compute)
    selection, removed = Cost(**found["selection"]), found["removed"]
    yield Cell(name, ALONE, draw, count, removed, work.plain(removed), selection)
    costs = selection, Cost(**found["compensation"])
    yield Cell(name, CORRECTED, draw, count, removed, found["losses"], *costs, found["sites"])


def _peer_cells(work: Work, name: str, draw: int, count: int, counts: Sequence[int]) -> Iterator[Cell]:
    found = work.store.get(_selection_key(name, draw, count))
    if found is None:
        work.say(f"{name}, {count} layers, draw {draw}")
        if name in GREEDY:
            _run_greedy(work, name, draw, counts)
        else:
            with Meter(work.decoder, len(work.pools[draw])) as meter:
                selected = _select(name, work.decoder, work.pools[draw], count)
            _keep_selection(work.store, name, draw, count, selected.removed, selected.order, meter.cost)
        found = work.store.get(_selection_key(name, draw, count))
    removed, cost = found["removed"], Cost(**found["cost"])
    yield Cell(name, PUBLISHED, draw, count, removed, work.plain(removed), cost)
    if name in COMPENSATIONS:
        own = _compensated(work, name, draw, found["order"])
        # Prune&Comp rescales during selection: the seconds of its selection include its compensation.
        own_cost = None if name == "Prune&Comp" else Cost(**own["cost"])
        yield Cell(name, OWN, draw, count, removed, own["losses"], cost, own_cost)
    if draw or name in _WITHOUT_STAGE_2:
        return
    fitted = _compensated(work, STAGE_2, draw, removed)
    yield Cell(name, STAGE_2, draw, count, removed, fitted["losses"], cost, Cost(**fitted["cost"]), fitted["sites"])


def _select(name: str, decoder: Decoder, pool: Tensor, count: int) -> PeerSelection:
    if name.startswith("random "):
        return random_layers(decoder, pool, count, seed=int(name.split()[1]))
    return SELECTIONS[name](decoder, pool, count)


def _run_greedy(work: Work, name: str, draw: int, counts: Sequence[int]) -> None:
    """SLEB or Prune&Comp: one run to the largest count also gives the smaller counts, each with its share of the
    cost."""
    pool, store = work.pools[draw], work.store
    spent = Cost(0.0, 0.0, 0.0)
    # One meter per removal: `step_done` closes it and opens the next; neither measures the time in between.
    meter = Meter(work.decoder, len(work.pools[draw]))

    def close(removed: list[int]) -> None:
        nonlocal spent, meter
        meter.__exit__()
        cost = meter.cost
        spent = Cost(spent.seconds + cost.seconds, max(spent.memory, cost.memory), spent.forwards + cost.forwards)
        if len(removed) in counts:
            _keep_selection(store, name, draw, len(removed), sorted(removed), removed, spent)
        meter = Meter(work.decoder, len(work.pools[draw]))
        meter.__enter__()

    meter.__enter__()
    try:
        if name == "SLEB":
            sleb(work.decoder, pool[: work.sleb_rows], max(counts), cached=work.sleb_shares, step_done=close)
        else:
            prune_and_comp(work.decoder, pool, max(counts), step_done=close)
    finally:
        meter.__exit__()


def _selection_key(name: str, draw: int, count: int) -> dict[str, Any]:
    return {"what": "selection", "method": name, "draw": draw, "count": count}


def _keep_selection(
    store: Store, name: str, draw: int, count: int, removed: list[int], order: list[int], cost: Cost
) -> None:
    value = {"removed": removed, "order": order, "cost": dataclasses.asdict(cost)}
    store.put(_selection_key(name, draw, count), value)


def _compensated(work: Work, kind: str, draw: int, removed: Sequence[int]) -> dict[str, Any]:
    """Losses of a set with one kind of compensation, fitted on the draw's sequences; shared by all methods that chose
    the set.

    `removed` is in order of removal if the compensation depends on it.
    """
    ordered = list(removed) if kind == "Prune&Comp" else sorted(removed)
    pool, decoder = work.pools[draw], work.decoder

    def compute() -> dict[str, Any]:
        work.say(f"{kind} on {sorted(removed)}, draw {draw}")
        with Meter(decoder, len(pool)) as meter:
            patch, sites = fitted_patch(decoder, pool, kind, ordered)
        cost = dataclasses.asdict(meter.cost)
        return {"cost": cost, "sites": sites, "losses": work.measure(removed, patch)}

    key = {"what": "compensation", "kind": kind, "draw": draw, "removed": ordered}
    return work.store.or_compute(key, compute)


def fitted_patch(decoder: Decoder, pool: Tensor, kind: str, removed: Sequence[int]) -> tuple[Patch, list[str]]:
    """One kind of compensation fitted on a set of removed layers, and its sites if it is ours.

    `kind`: STAGE_2, one of our methods (only its compensation), or a peer. `removed` is in order of removal for
    Prune&Comp.
    """
    if kind in (STAGE_2, DEFAULT, PAPER, ONE_SHOT, ITERATIVE):
        rows = split_pool(pool)
        config = our_config(DEFAULT if kind == STAGE_2 else kind, len(removed), len(rows.fit))
        record, overrides = fit_compensation(decoder, rows, sorted(removed), config, SilentReporter())
        return Patch(parameters=overrides), _sites(record)
    if kind == "Prune&Comp":
        return magnitude_rescale(decoder, pool, removed, one_by_one=True), []
    return COMPENSATIONS[kind](decoder, pool, removed), []


def removal_order(work: Work, cell: Cell) -> list[int]:
    """The layers of a peer's cell in order of removal."""
    return work.store.get(_selection_key(cell.method, cell.draw, cell.count))["order"]


def _sites(record: CompensationRecord) -> list[str]:
    return [f"{entry.layer} {entry.part}" for entry in record.corrections]


# ---------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------

TIMED_COUNT = 7
FLOOR, SLEB_PLAIN = "floor", "SLEB, every trial in full"


def times(work: Work, rows: int, *, with_sleb: bool, count: int = TIMED_COUNT) -> dict[str, dict[str, float]]:
    """Seconds and forward-equivalents on the same `rows` sequences: the floor (see `_floor_seconds`), SLEB as
    published, and ours.

    Floor and one-shot run three times in turn; their medians are returned. One-shot scores all sequences here, because
    the floor differentiates all.
    """
    pool = work.pools[0][:rows]
    decoder = work.decoder

    def once(name: str, scoring: Tensor | None = None) -> dict[str, float]:
        work.say(f"time of {name}")
        config = our_config(name, count, len(split_pool(pool).fit))
        result = ours(decoder, pool, config, count, scoring=scoring)
        return {
            "seconds": result.selection.seconds + result.compensation.seconds,
            "forwards": result.selection.forwards + result.compensation.forwards,
        }

    def alternating() -> dict[str, dict[str, float]]:
        work.say("time of the floor and of one-shot, in turn")
        floors, shots = [], []
        for _ in range(3):
            floors.append(_floor_seconds(decoder, pool))
            shots.append(once(ONE_SHOT, pool))
        seconds = statistics.median(shot["seconds"] for shot in shots)
        return {
            FLOOR: {"seconds": statistics.median(floors), "forwards": 5.0},
            ONE_SHOT: {"seconds": seconds, "forwards": shots[0]["forwards"]},
        }

    def slow() -> dict[str, float]:
        known = work.store.get(_selection_key("SLEB", 0, count))
        if known is not None and work.sleb_rows == rows and not work.sleb_shares:
            # The stored number of forwards refers to the whole pool, this one to these sequences.
            forwards = known["cost"]["forwards"] * len(work.pools[0]) / rows
            return {"seconds": known["cost"]["seconds"], "forwards": forwards}
        work.say("time of SLEB, every trial in full")
        with Meter(decoder, len(pool)) as meter:
            sleb(decoder, pool, count)
        return {"seconds": meter.cost.seconds, "forwards": meter.cost.forwards}

    key = {"what": "time", "rows": rows, "count": count}
    result = dict(work.store.or_compute({**key, "method": "floor and one-shot"}, alternating))
    for name in (ITERATIVE, DEFAULT):
        result[name] = work.store.or_compute({**key, "method": name}, partial(once, name))
    if with_sleb:
        result[SLEB_PLAIN] = work.store.or_compute({**key, "method": SLEB_PLAIN}, slow)
    return result


def _floor_seconds(decoder: Decoder, rows: Tensor) -> float:
    """Seconds of one plain forward and backward pass and two forward passes of the model, sequence by sequence."""
    model: Any = decoder.model
    with _matrices_trainable(decoder):
        _synchronize(decoder.device)
        started = time.perf_counter()
        for row in rows.to(decoder.device).split(1):
            model(input_ids=row, labels=row, use_cache=False).loss.backward()
            for parameter in model.parameters():
                parameter.grad = None
        with torch.no_grad():
            for _ in range(2):
                for row in rows.to(decoder.device).split(1):
                    model(input_ids=row, use_cache=False)
        _synchronize(decoder.device)
        return time.perf_counter() - started


@contextmanager
def _matrices_trainable(decoder: Decoder) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in decoder.model.named_parameters()}
    decoder.model.requires_grad_(False)
    for parameter in decoder.layers.parameters():
        parameter.requires_grad_(parameter.ndim >= 2)
    try:
        yield
    finally:
        for name, parameter in decoder.model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
