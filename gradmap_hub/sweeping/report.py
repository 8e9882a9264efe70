"""Writes the results of a sweep: sweep.json, the tables in sweep.md, the figure sweep.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradmap_hub.evaluation.speed import Ratio
from gradmap_hub.files import write_text
from gradmap_hub.sweeping.record import SweepPoint, SweepRecord

TABLE_FILE, PLOT_FILE = "sweep.md", "sweep.png"


def write_report(record: SweepRecord, folder: Path) -> None:
    """Write record and tables, and the figure once all ratios are measured; until then an old figure is removed."""
    from gradmap_hub.sweeping.plots import sweep_plot

    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder)
    write_text(folder / TABLE_FILE, markdown(record))
    if record.missing:
        (folder / PLOT_FILE).unlink(missing_ok=True)
    else:
        sweep_plot(record, folder / PLOT_FILE)


def columns(record: SweepRecord) -> list[str]:
    """The column headers of `rows`."""
    heads = ["ratio", "layers", "parameters", "weights", "perplexity [95 %]"]
    return heads if record.no_speed else [*heads, "prefill", "decode"]


def rows(record: SweepRecord, *, ranges: bool = True) -> list[list[str]]:
    """The table cells: the original, then one row per number of layers. Perplexity and speed are multiples of the
    original's; `ranges`: add the range of the rounds to the speed."""
    if not record.points:
        return []
    first = record.points[0]
    found = [["0", str(first.layers.before), f"{first.parameters.before / 1e6:.1f}M", _size(first.bytes.before), "1"]]
    if first.speed is not None:
        found[0] += ["1", "1"]
    for point in record.points:
        low, high = point.interval
        row = [
            " ".join(f"{ratio:g}" for ratio in point.ratios),
            str(point.layers.after),
            f"{point.parameters.after / 1e6:.1f}M (-{point.parameter_share:.1%})",
            _size(point.bytes.after),
            f"x{point.perplexity:.2f} [{low:.2f}, {high:.2f}]",
        ]
        if point.speed is not None:
            row += [_rate(rate, ranges) for rate in (point.speed.prefill, point.speed.decode)]
        found.append(row)
    return found


def recommended(record: SweepRecord) -> SweepPoint | None:
    """The recommended point, if any."""
    ratio = record.recommendation.ratio
    return next((point for point in record.points if ratio is not None and ratio in point.ratios), None)


def verdict(record: SweepRecord) -> str:
    """The recommendation and its reason, in one or two sentences."""
    given = record.recommendation
    if given.ratio is None:
        text = f"No ratio is recommended: {given.reason}."
    else:
        text = f"Recommended: {given.ratio:g}, {given.reason}."
    if given.max_loss is not None:
        text += (
            f" By the shape of the curve: {f'{given.knee:g}, ' if given.knee is not None else ''}{given.knee_reason}."
        )
    return text


def markdown(record: SweepRecord) -> str:
    """The content of sweep.md: table, recommendation, perplexity by text, and measurement settings."""
    calibration, settings = record.calibration, record.settings
    base = f"{record.base.name} at {record.base.commit}" if record.base.commit else record.base.name
    parts = [f"# {record.base.name}: quality against size", ""]
    parts += _table(columns(record), rows(record), left=0)
    if record.missing:
        left = ", ".join(f"{ratio:g}" for ratio in record.missing)
        parts += ["", f"Not finished: {left} not measured yet."]
    parts += ["", verdict(record), ""]
    if record.recommendation.push:
        parts += ["```", record.recommendation.push, "```", ""]
    if not record.missing:
        parts += [f"![Perplexity and speed by ratio]({PLOT_FILE})", ""]
    parts += ["## Perplexity by text", ""]
    for point in record.points:
        texts = [
            [text.name, text.kind, f"{text.tokens:,}", f"{text.original:.2f}", f"{text.pruned:.2f}",
             f"{text.compensated:.2f}", f"{text.interval[0]:.2f} to {text.interval[1]:.2f}"]
            for text in point.evaluation.texts
        ]  # fmt: skip
        heads = ["text", "kind", "tokens", "original", "pruned", "pruned and compensated", "of original, 95 %"]
        removed = ", ".join(map(str, point.removed))
        parts += [f"Ratio {' '.join(f'{ratio:g}' for ratio in point.ratios)}: without layers {removed} "
                  f"({point.metric}).", "", *_table(heads, texts, left=2), ""]  # fmt: skip
    parts += [
        "## Measurement",
        "",
        f"- {base}; gradmap-hub {record.gradmap_hub}; {record.hardware}; "
        + ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        f"- Calibrated on {calibration.samples} sequences of {calibration.sequence_length} tokens from "
        f"{calibration.source} (sha256: {calibration.sha256}), on which nothing is measured.",
        "- Perplexity relative to the original: exp of the mean difference of the losses per sequence, all sequences "
        "of all texts with equal weight; intervals by paired bootstrap over the sequences.",
        f"- {_speed_summary(record)}",
        f"- Computed in {settings.get('compute')} on {settings.get('device')}, "
        f"{sum(record.seconds.values()):.0f} s for the shared stages and "
        + ", ".join(f"{sum(point.seconds.values()):.0f}" for point in record.points)
        + " s per ratio.",
    ]
    return "\n".join(parts) + "\n"


def _speed_summary(record: SweepRecord) -> str:
    speed = next((point.speed for point in record.points if point.speed is not None), None)
    if speed is None:
        return f"Speed was not measured: {record.no_speed}."
    return (
        "Speed: tokens per second relative to the original, measured in alternation; PyTorch eager in "
        f"{speed.dtype} on {speed.device}, {speed.threads} threads, batch 1; prefill of {speed.prompt_tokens} "
        f"tokens, decode of {speed.new_tokens} with the KV cache; median and range of {speed.rounds} rounds."
    )


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table; all columns after the first `left` are right-aligned."""
    marks = ["---" if index < left else "---:" for index in range(len(heads))]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (heads, marks, *lines)]


def _rate(rate: Ratio, ranges: bool) -> str:
    return f"x{rate.ratio:.2f}" + (f" [{rate.spread[0]:.2f}, {rate.spread[1]:.2f}]" if ranges else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
