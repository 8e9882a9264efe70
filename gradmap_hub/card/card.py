"""RunRecord -> the model card: README.md with its YAML front matter, and its plots (drawn by `plots`).

The card depends on the record alone, not on clock, network or weights: the same record gives the same bytes. Strings
from users (model, licence and text names, the command) are escaped by default: the template only prints strings that
were escaped, or that a filter marked as `Safe`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradmap_hub.card.plots import layers_plot, shift_plot
from gradmap_hub.card.results import (
    is_measured,
    measured_results,
    one_line,
    perplexity_result,
    task_mean,
    write_results,
)
from gradmap_hub.figures import save_plot
from gradmap_hub.files import write_text
from gradmap_hub.layout import CARD
from gradmap_hub.measurements import TextMetric
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.record import (
    GROWN,
    SWAPPED,
    Artifact,
    Candidate,
    LayerDecision,
    RunRecord,
    SiteCompensation,
    TextPerplexity,
)

TEMPLATE = "card.md.jinja"
LAYERS_PLOT = "assets/layers.png"
SHIFT_PLOT = "assets/shift.png"
CALIBRATION_KIND = "calibration (held out)"
HUB = "https://huggingface.co"


def write_card(record: RunRecord, folder: Path) -> list[Path]:
    """Write README.md, its plots and .eval_results into `folder`; returns the files written."""
    plots = {LAYERS_PLOT: layers_plot}
    if record.compensation.shift_layers:
        plots[SHIFT_PLOT] = shift_plot
    written = [folder / CARD]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(written[0], card_text(record))
    for name, draw in plots.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        save_plot(partial(draw, record), path)
        written.append(path)
    return written + write_results(record, folder)


def card_text(record: RunRecord) -> str:
    """The whole README.md."""
    body = _environment().get_template(TEMPLATE).render(_context(record))
    lines = "\n".join(line.rstrip() for line in body.splitlines())
    return f"---\n{_front_matter_yaml(record)}---\n\n" + re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


# --- front matter -------------------------------------------------------------------------------------------------


def front_matter(record: RunRecord) -> dict[str, Any]:
    """The metadata of the card as plain data. Keys without a known value are left out."""
    base = record.base
    data: dict[str, Any] = {}
    if base.repo_id:
        # The Hub has adapter, merge, quantized and finetune, and none for pruning; the text explains it.
        data |= {"base_model": one_line(base.repo_id), "base_model_relation": "finetune"}
    if base.license:
        data["license"] = one_line(base.license)
        if base.license == "other":
            named = {"license_name": base.license_name, "license_link": base.license_link}
            data |= {key: one_line(value) for key, value in named.items() if value}
    if base.language:
        data["language"] = [one_line(language) for language in base.language]
    data |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _tags(record)}
    results = measured_results(record)
    results += [
        perplexity_result(one_line(text.name), text.compensated)
        for text in _texts(record)
        if math.isfinite(text.compensated) and not is_measured(record, text.name)
    ]
    if results:
        data["model-index"] = [{"name": one_line(record.name), "results": results}]
    return data


def _front_matter_yaml(record: RunRecord) -> str:
    return yaml.safe_dump(front_matter(record), sort_keys=False, allow_unicode=True, width=10_000)


def _tags(record: RunRecord) -> list[str]:
    tags = ["gradmap", "pruned", "layer-pruning"]
    if _onnx_graphs(record):
        tags.append("onnx")
    if record.base.model_type:
        tags.append(one_line(record.base.model_type))
    return tags


# --- context of the template ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRow:
    """A row of the table of layers. `position`: index in the pruned model, `-` for a removed layer."""

    layer: LayerDecision
    position: str


def _context(record: RunRecord) -> dict[str, Any]:
    graphs = _onnx_graphs(record)
    return {
        "record": record,
        "base": record.base,
        "calibration": record.calibration,
        "compensation": record.compensation,
        "texts": _texts(record),
        "measured": record.measured,
        "own_documents": [
            task.name for task in (record.measured.tasks if record.measured else ()) if task.source != task.dataset
        ],
        "task_mean": task_mean(record.measured.tasks) if record.measured else None,
        "quality": _quality(_texts(record)),
        "rows": _layer_rows(record),
        "positions": {row.layer.index: row.position for row in _layer_rows(record)},
        "chosen": _chosen(record),
        "lowest_loss": min((candidate.loss for candidate in record.candidates), default=math.inf),
        "made": sum(candidate.name.endswith((SWAPPED, GROWN)) for candidate in record.candidates),
        "finalists": _finalists(record),
        "lowest_corrected": min((loss for _, loss in _finalists(record)), default=math.inf),
        "corrections": record.compensation.corrections,
        "several": len(record.compensation.corrections) > 1,
        "only": _only(record),
        "heal": record.heal,
        "healed": record.heal is not None and record.heal.applied,
        "treatment": _treatment(record),
        "graphs": graphs,
        "main_graph": _main_graph(graphs),
        "cache_from_graph": _cache_from_graph(record.base.model_type),
        "onnx_files": _onnx_files(record),
        "quality_known": any(entry.quality for entry in record.artifacts),
        "calibration_kind": CALIBRATION_KIND,
        "target": record.target or f"path/to/{record.name}",
        "shell_target": shlex.quote(record.target or f"path/to/{record.name}"),
        "repeat_command": Safe(_repeat_command(record)),
        "local_texts": _local_texts(record, "calibration", "eval_text"),
        "text_options": [
            f"--{name.replace('_', '-')}" for name in ("calibration", "eval_text") if _local_texts(record, name)
        ],
        "layers_plot": Safe(LAYERS_PLOT),
        "shift_plot": Safe(SHIFT_PLOT),
        "hub": Safe(HUB),
    }


def _repeat_command(record: RunRecord) -> str:
    """The command that reproduces the run from its record."""
    model = "" if record.base.repo_id else " MODEL"
    if record.target is None:  # made by prune, not published
        return f"gradmap-hub prune{model} OUTPUT --from gradmap.json"
    return f"gradmap-hub push{model} --from gradmap.json"


def _local_texts(record: RunRecord, *uses: str) -> list[str]:
    """The names of texts that were local files; the name of a data set ends with its commit."""
    settings = record.settings or {}
    names = [str(name) for use in uses for name in settings.get(use, ())]
    return list(dict.fromkeys(name for name in names if not re.search(r"@[0-9a-f]{40}$", name)))


def _texts(record: RunRecord) -> list[TextPerplexity]:
    return record.evaluation.texts if record.evaluation else []


def _onnx_files(record: RunRecord) -> list[Artifact]:
    """The graphs and their external weight files (model.onnx_data)."""
    return [artifact for artifact in record.artifacts if ".onnx" in PurePosixPath(artifact.path).suffix]


def _onnx_graphs(record: RunRecord) -> list[Artifact]:
    return [artifact for artifact in record.artifacts if artifact.path.endswith(".onnx")]


def _main_graph(graphs: Sequence[Artifact]) -> PurePosixPath | None:
    """The full-precision graph that the snippet loads: model.onnx if there is one."""
    paths = sorted((PurePosixPath(graph.path) for graph in graphs), key=lambda path: path.name != "model.onnx")
    return paths[0] if paths else None


def _cache_from_graph(model_type: str) -> bool:
    row = ARCHITECTURES.get(model_type)
    return row is not None and row.cache_from_graph


def _chosen(record: RunRecord) -> Candidate | None:
    """The candidate set that was removed; None if the user chose the layers."""
    wanted = sorted(record.removed)
    return next((candidate for candidate in record.candidates if sorted(candidate.removed) == wanted), None)


def _finalists(record: RunRecord) -> list[tuple[Candidate, float]]:
    """The candidates for which compensation was fitted, with their loss after it."""
    if record.compensation.loss_after is None:
        return []
    return [(entry, entry.corrected) for entry in record.candidates if entry.corrected is not None]


def _only(record: RunRecord) -> SiteCompensation | None:
    """The only correction of the record, else None; records of earlier versions do not list corrections."""
    corrections = record.compensation.corrections
    return corrections[0] if len(corrections) == 1 else None


def _treatment(record: RunRecord) -> Safe:
    """What changed the kept weights, for the heading of the perplexity table; empty if nothing."""
    done = {"compensated": record.compensation.applied, "healed": record.heal is not None and record.heal.applied}
    return Safe(" + ".join(name for name, applied in done.items() if applied))


def _layer_rows(record: RunRecord) -> list[LayerRow]:
    rows: list[LayerRow] = []
    position = 0
    for layer in record.layers:
        rows.append(LayerRow(layer, str(position) if layer.kept else "-"))
        position += layer.kept
    return rows


def _quality(texts: Sequence[TextPerplexity]) -> str | None:
    """The change of perplexity, such as "38% to 95% higher"; None if not measured or not finite."""
    ratios = [text.compensated / text.original for text in texts]
    if not ratios or not all(math.isfinite(ratio) for ratio in ratios):
        return None
    low, high = min(ratios) - 1, max(ratios) - 1
    ends = [_change_size(low), _change_size(high)]
    if low >= 0 or high < 0:
        word = "higher" if low >= 0 else "lower"
        ends = ends if low >= 0 else ends[::-1]
        return f"{ends[0]} {word}" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]} {word}"
    return f"between {ends[0]} lower and {ends[1]} higher"


def _change_size(change: float) -> str:
    return f"{abs(change):.1%}" if abs(change) < 0.1 else f"{abs(change):,.0%}"


# --- filters: each is total, and none prints `None` or `nan` --------------------------------------------


class Safe(str):
    """Markdown that is printed unchanged."""

    __slots__ = ()


def escape(text: str) -> Safe:
    """Text that Markdown shows literally in a paragraph, a heading or a table cell."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~#$!{}])", r"\\\1", line)
    return Safe(re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line))  # a_b is no emphasis


def code(text: str) -> Safe:
    """Inline code. A pipe ends a table cell even within backticks, so texts with special characters become HTML."""
    line = one_line(text)
    if re.fullmatch(r"[\w./:@=+,()<>\- ]+", line) and line.isascii():
        return Safe(f"`{line}`")
    return Safe(f"<code>{escape(line)}</code>")


def codes(texts: Sequence[str]) -> Safe:
    """Inline code, separated by commas."""
    return Safe(", ".join(map(code, texts)))


def fenced(text: str, language: str = "") -> Safe:
    """A code block whose fence is longer than any run of backticks in `text`."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return Safe(f"{fence}{language}\n{line}\n{fence}")


def literal(text: str) -> Safe:
    """A Python string literal on one line."""
    return Safe(json.dumps(one_line(text), ensure_ascii=False))


def link(text: str, url: str) -> Safe:
    """A Markdown link; only the text if the URL is not http(s)."""
    if urlsplit(url).scheme not in ("http", "https"):
        return escape(text)
    return Safe(f"[{escape(text)}]({quote(one_line(url), safe=':/?#@&=+,;%~')})")


def number(value: float) -> str:
    """Four significant digits, thousands separated; for scores and perplexities."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share with one decimal, such as 41.3%."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "not finite"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign, such as -2.4."""
    return f"{100 * value:+z.1f}" if math.isfinite(value) else "not finite"


def rate(value: float) -> str:
    """A speed in tokens per second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def ratio(value: float) -> str:
    """A ratio near one, with four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def with_interval(metric: TextMetric) -> str:
    """The value of a metric and its interval, such as `41.3% (40.0% to 43.0%)`."""
    shown = percent if metric.share else number
    low, high = map(shown, metric.interval)
    return f"{shown(metric.value)} ({low} to {high})"


def loss(value: float) -> str:
    """A loss in nats per token, with four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def small(value: float) -> str:
    """A difference that should be near zero, such as 3.1e-05."""
    return "0" if value == 0 else f"{value:.2g}" if math.isfinite(value) else "not finite"


def strength(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "not finite"


def change(after: float, before: float) -> str:
    """Relative change with its sign, such as -21.1%."""
    ratio = after / before - 1 if before else math.nan
    return f"{ratio:+,.1%}".replace("-0.0%", "0.0%").replace("+0.0%", "0.0%") if math.isfinite(ratio) else "not finite"


def less_than(after: int, before: int) -> str:
    """A change, such as `21.1% fewer`."""
    share = abs(1 - after / before) if before else 0.0
    return f"{share:.1%} {'fewer' if after <= before else 'more'}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}" if unit == "GB" else f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def part_word(part: str) -> str:
    """`mlp` or `attention` as printed."""
    return {"mlp": "MLP"}.get(part, part)


def ranges(indices: Sequence[int]) -> str:
    """Layer indices with runs of three or more joined: 3, 12 to 15, 17."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(str(index) for index in run) for run in runs
    )


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _finalize(value: Any) -> str:
    """Applied to everything the template prints: escapes strings and refuses values that need a filter."""
    if isinstance(value, Safe):
        return value
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"The card template prints a {type(value).__name__}; it needs a filter.")


def _environment() -> Environment:
    installed = Path(__file__).parents[1] / "model_cards"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "model_cards"
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the output is Markdown; `_finalize` escapes
    )
    escaping = (code, codes, fenced, link, literal)
    wording = (
        change, duration, less_than, loss, number, part_word, percent, plural, points, ranges, rate, ratio, size, small,
        strength, with_interval,
    )  # fmt: skip
    environment.filters |= {function.__name__: function for function in (*escaping, *wording)}
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment
