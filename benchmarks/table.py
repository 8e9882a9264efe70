"""Turns cells into table rows, acceptance verdicts and markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.accuracy import Accuracy
from benchmarks.methods import (
    CORRECTED,
    DEFAULT,
    DENSE,
    FLOOR,
    ITERATIVE,
    ONE_SHOT,
    OURS,
    OWN,
    PUBLISHED,
    SLEB_PLAIN,
    STAGE_2,
    Cell,
)
from gradmap_hub.evaluation.metrics import BOOTSTRAP_DRAWS

# Required relative gain over the best peer, on the mean of the logs.
WANTED_GAIN = 0.20
DOCS_BEGIN, DOCS_END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on one text with its 95% bootstrap interval over sequences."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A method at one count. Perplexities are geometric means over its draws.

    `mean`: exp of the mean log-perplexity over texts; `worst`: the same on the worst draw. `by_draw`: draw -> text ->
    mean NLL in nats. `removed`, `accuracy` and all costs are those of the first draw. `selection`, `compensation`:
    seconds; `memory`: MiB; `sets`: number of different sets over the draws.
    """

    method: str
    variant: str
    count: int
    by_draw: dict[int, dict[str, float]]
    removed: list[int]
    sets: int
    parameters: int
    perplexities: dict[str, Perplexity]
    mean: float
    worst: float
    selection: float | None
    compensation: float | None
    memory: float | None
    forwards: float | None
    sites: list[str]
    accuracy: Accuracy | None = None

    @property
    def draws(self) -> list[int]:
        return list(self.by_draw)

    def on(self, draws: Sequence[int]) -> dict[str, float]:
        """Text -> mean NLL in nats over the given draws."""
        texts = self.perplexities
        return {text: statistics.fmean(self.by_draw[draw][text] for draw in draws) for text in texts}

    @property
    def label(self) -> str:
        return self.method if self.variant in (PUBLISHED, CORRECTED) else f"{self.method} {self.variant}"

    @property
    def seconds(self) -> float | None:
        known = [value for value in (self.selection, self.compensation) if value is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Verdict:
    """One acceptance criterion, whether it holds (None: not measured in this run) and the measured values."""

    line: str
    holds: bool | None
    found: str


def interval(losses: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of exp(mean) over sequences."""
    values = torch.tensor(losses, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (BOOTSTRAP_DRAWS, len(values)), generator=generator)
    means = values[picks].mean(dim=1).sort().values
    low, high = means[int(0.025 * BOOTSTRAP_DRAWS)], means[int(0.975 * BOOTSTRAP_DRAWS) - 1]
    return _exp(float(low)), _exp(float(high))


def build_rows(
    cells: Sequence[Cell],
    layer_parameters: Sequence[int],
    total_parameters: int,
    accuracies: Mapping[tuple[int, str, str], Accuracy] | None = None,
) -> list[Row]:
    """One row per method, variant and count; dense first, then by count and mean perplexity.

    `accuracies`: (count, method, variant) -> accuracy, where measured.
    """
    groups: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.count, cell.method, cell.variant), []).append(cell)
    rows = []
    for (count, method, variant), group in groups.items():
        over_draws = {
            text: [statistics.fmean(losses) for losses in zip(*(cell.losses[text] for cell in group), strict=True)]
            for text in group[0].losses
        }
        perplexities = {
            text: Perplexity(_exp(statistics.fmean(losses)), *interval(losses)) for text, losses in over_draws.items()
        }
        by_draw = {
            cell.draw: {text: statistics.fmean(losses) for text, losses in cell.losses.items()} for cell in group
        }
        per_draw = [statistics.fmean(of.values()) for of in by_draw.values()]
        first = group[0]
        costs = [cost for cost in (first.selection, first.compensation) if cost is not None]
        rows.append(
            Row(
                method=method,
                variant=variant,
                count=count,
                by_draw=by_draw,
                removed=first.removed,
                sets=len({tuple(cell.removed) for cell in group}),
                parameters=total_parameters - sum(layer_parameters[layer] for layer in first.removed),
                perplexities=perplexities,
                mean=_exp(statistics.fmean(per_draw)),
                worst=_exp(max(per_draw)),
                selection=first.selection.seconds if first.selection else None,
                compensation=first.compensation.seconds if first.compensation else None,
                memory=max(cost.memory for cost in costs) if costs else None,
                forwards=math.fsum(cost.forwards for cost in costs) if costs else None,
                sites=first.sites,
                accuracy=(accuracies or {}).get((count, method, variant)),
            )
        )
    return sorted(rows, key=lambda row: (row.count, row.mean))


def verdicts(rows: Sequence[Row], times: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """The acceptance criteria, count by count, then those on time."""
    found: list[Verdict] = []
    for count in sorted({row.count for row in rows if row.count}):
        at = [row for row in rows if row.count == count]
        if any(row.method == DEFAULT for row in at):
            found += _quality(at, count)
    return found + _speed(times)


def _quality(rows: Sequence[Row], count: int) -> list[Verdict]:
    default = next(row for row in rows if (row.method, row.variant) == (DEFAULT, CORRECTED))
    others = [row for row in rows if row is not default]
    # Random is not a peer to beat; it shows that the table can tell good from bad.
    peers = [row for row in rows if row.method not in OURS and not row.method.startswith("random")]
    published = [row for row in peers if row.variant == PUBLISHED]
    either = [row for row in peers if row.variant in (PUBLISHED, OWN)]
    best, best_either = (min(of, key=lambda row: row.mean) for of in (published, either))
    # Two rows are compared on the draws they share; the default has all draws.

    def lowest_of(name: str, against: Sequence[Row]) -> Verdict:
        lower = sorted(
            {
                f"{row.label} on {text}"
                for row in against
                for text, loss in row.on(row.draws).items()
                if loss < default.on(row.draws)[text]
            }
        )
        return Verdict(
            f"{count} layers: the default is lowest of {name} on every text", not lower, "; ".join(lower) or "yes"
        )

    ours, theirs = (_exp(statistics.fmean(row.on(best.draws).values())) for row in (default, best))
    gain = 1 - ours / theirs
    no_sleb = sorted(set(default.draws) - {draw for row in published if row.method == "SLEB" for draw in row.draws})
    without = f"; without SLEB for draws {no_sleb}" if no_sleb else ""
    randoms = [row for row in rows if row.method.startswith("random") and row.variant == PUBLISHED]
    least = min(randoms, key=lambda row: row.mean, default=None)
    return [
        lowest_of("all rows", others),
        lowest_of("all peers as published or with their own compensation", either),
        Verdict(
            f"{count} layers: at least {WANTED_GAIN:.0%} below the best peer without compensation (mean of logs)",
            gain >= WANTED_GAIN,
            f"{gain:.1%} below {best.label} ({ours:.2f} against {theirs:.2f})",
        ),
        Verdict(
            f"{count} layers: worst of {len(default.draws)} draws below the best peer's mean over its draws",
            default.worst < best_either.mean,
            f"{default.worst:.2f} against {best_either.mean:.2f} ({best_either.label}, {len(best_either.draws)} "
            f"draws{without})",
        ),
        Verdict(
            f"{count} layers: random is worse than the default and the best peer",
            None if least is None else least.mean > max(default.mean, best_either.mean),
            "not run" if least is None else f"best random draw {least.mean:.2f}",
        ),
    ]


def _speed(times: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    def ratio(name: str, to: str, limit: float, words: str) -> Verdict:
        line = f"time: {name} at most {words} of {to}"
        if name not in times or to not in times:
            return Verdict(line, None, "not measured")
        value = times[name]["seconds"] / times[to]["seconds"]
        shown = f"{value:.2f} x" if limit > 1 else f"1/{1 / value:.1f}"
        return Verdict(line, value <= limit, f"{shown} ({times[name]['seconds']:.1f} s, {times[to]['seconds']:.1f} s)")

    return [
        ratio(ONE_SHOT, SLEB_PLAIN, 1 / 20, "1/20"),
        ratio(ONE_SHOT, FLOOR, 1.5, "1.5 x"),
        ratio(DEFAULT, SLEB_PLAIN, 1 / 8, "1/8"),
        ratio(ITERATIVE, SLEB_PLAIN, 1 / 6, "1/6"),
    ]


COLUMNS = (
    "out", "method", "layers removed", "parameters", "{texts}", "mean", "{accuracy}", "seconds", "MiB", "forwards",
)  # fmt: skip


def texts_of(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].perplexities)


def has_accuracy(rows: Sequence[Row]) -> bool:
    return any(row.accuracy is not None for row in rows)


def header(rows: Sequence[Row]) -> list[str]:
    filled = {
        "{texts}": [f"{text} [95%]" for text in texts_of(rows)],
        "{accuracy}": ["accuracy"] if has_accuracy(rows) else [],
    }
    return [name for column in COLUMNS for name in filled.get(column, [column])]


def line(row: Row, with_accuracy: bool = False) -> list[str]:
    """The columns of one row as text."""
    accuracy = "-"
    if row.accuracy is not None:
        accuracy = f"{100 * row.accuracy.mean:.1f} ± {100 * row.accuracy.error:.1f}"
    removed = ranges(row.removed) + (f" (+{row.sets - 1} other)" if row.sets > 1 else "")
    seconds = "-"
    if row.seconds is not None:
        seconds = f"{row.selection or 0:.1f}" + ("" if row.compensation is None else f" + {row.compensation:.1f}")
    return [
        str(row.count) if row.count else "-",
        row.label,
        removed or "-",
        f"{row.parameters / 1e6:.1f}M",
        *(f"{p.value:.1f} [{p.low:.1f}, {p.high:.1f}]" for p in row.perplexities.values()),
        f"{row.mean:.2f}" + (f" (worst of {len(row.draws)}: {row.worst:.2f})" if len(row.draws) > 1 else ""),
        *([accuracy] if with_accuracy else []),
        seconds,
        "-" if row.memory is None else f"{row.memory:.0f}",
        "-" if row.forwards is None else f"{row.forwards:.1f}",
    ]


def time_lines(times: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of: name, seconds, forward-equivalents, fraction of SLEB's time, multiple of the floor."""
    sleb, floor = times.get(SLEB_PLAIN), times.get(FLOOR)
    return [
        [
            name,
            f"{value['seconds']:.1f}",
            f"{value['forwards']:.1f}",
            f"1/{sleb['seconds'] / value['seconds']:.1f}" if sleb else "-",
            f"{value['seconds'] / floor['seconds']:.2f}" if floor else "-",
        ]
        for name, value in sorted(times.items(), key=lambda item: item[1]["seconds"])
    ]


TIME_HEADER = ("on the same sequences", "seconds", "forwards", "of SLEB", "x floor")


def markdown(
    rows: Sequence[Row], times: Mapping[str, Mapping[str, float]], found: Sequence[Verdict], facts: Sequence[str]
) -> str:
    """The text between the markers of docs/benchmarks.md."""
    parts = ["\n".join(f"- {fact}" for fact in facts)]
    accuracy = has_accuracy(rows)
    for count in sorted({row.count for row in rows if row.count}):
        dense = [row for row in rows if row.count == 0]
        chosen = dense + [row for row in rows if row.count == count]
        lines = [line(row, accuracy) for row in chosen]
        parts.append(f"### {count} layers removed\n\n" + _markdown_table(header(rows), lines))
    if times:
        parts.append("### Time\n\n" + _markdown_table(TIME_HEADER, time_lines(times)))
    checks = [[v.line, "not measured" if v.holds is None else "yes" if v.holds else "**no**", v.found] for v in found]
    parts.append("### Acceptance criteria\n\n" + _markdown_table(("line", "holds", "found"), checks))
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def into_docs(page: str, produced: str) -> str:
    """The page with the text between its markers replaced by `produced`.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = page.partition(DOCS_BEGIN)
    _, end, after = rest.partition(DOCS_END)
    if not begin or not end:
        raise ValueError(f"the page does not contain {DOCS_BEGIN} ... {DOCS_END}")
    return f"{before}{DOCS_BEGIN}\n\n{produced}\n{DOCS_END}{after}"


def as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "label": row.label, "seconds": row.seconds}


def ranges(indices: Sequence[int]) -> str:
    """[3, 12, 13, 14] -> '3, 12-14'."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _exp(value: float) -> float:
    """exp, clipped: the perplexity of a collapsed model can overflow a float."""
    return math.exp(min(value, 700.0))


__all__ = ["DENSE", "STAGE_2", "Perplexity", "Row", "Verdict", "build_rows", "markdown", "verdicts"]
