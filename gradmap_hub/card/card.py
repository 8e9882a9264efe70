"""Makes the model card from a RunRecord: README.md with its YAML front matter, and its plots (drawn by `plots`).

The card depends on the record alone, not on clock, network or weights: the same record gives the same bytes. Strings
from users (model, licence and text names, the command) are escaped by default: the template prints a string unescaped
only if it is marked as `Safe`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradmap_hub.card.markdown import FILTERS, Safe, code, escape, ranges
from gradmap_hub.card.plots import healing_plot, layers_plot, scored_by_gates, shift_plot
from gradmap_hub.card.results import (
    is_measured,
    measured_results,
    perplexity_result,
    task_mean,
    write_results,
)
from gradmap_hub.config import SELF
from gradmap_hub.figures import save_plot
from gradmap_hub.files import write_text
from gradmap_hub.formats import BROWSER_BYTES, FORMATS, ONNX, graph_path, in_space
from gradmap_hub.layout import CARD
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
from gradmap_hub.units import one_line

TEMPLATE = "card.md.jinja"
LAYERS_PLOT = "assets/layers.png"
SHIFT_PLOT = "assets/shift.png"
HEALING_PLOT = "assets/healing.png"
_OWN_TEXT = "text that the original wrote itself"
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
    if has_healing_plot(record):
        plots[HEALING_PLOT] = healing_plot
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
    """The YAML header of the card as plain data. Keys without a known value are left out."""
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
    if _transformers_js(record):
        tags.append("transformers.js")
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
        "healing_text": _healing_text(record),
        "calibration_text": _calibration_text(record),
        "healed_part": _healed_part(record),
        "treatment": _treatment(record),
        "graphs": graphs,
        "main_graph": _main_graph(graphs),
        "cache_from_graph": _cache_from_graph(record.base.model_type),
        "onnx_files": _onnx_files(record),
        "same_file": _same_files(record),
        "scored_by_gates": scored_by_gates(record),
        "transformers_js": _transformers_js(record),
        "too_large_for_browser": _too_large_for_browser(record),
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
        "healing_plot": Safe(HEALING_PLOT) if has_healing_plot(record) else None,
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


def _transformers_js(record: RunRecord) -> str | None:
    """The `dtype` with which transformers.js loads the int8 graph of this model, else the float32 graph; None if there
    is neither, or if its model type has not been tried (tests/exporters/test_transformers_js.py)."""
    row = ARCHITECTURES.get(record.base.model_type or "")
    paths = {graph.path for graph in _onnx_graphs(record)}
    if row is None or not row.genai:
        return None
    return next((dtype for name, dtype in (("int8", "q8"), (ONNX, "fp32")) if graph_path(FORMATS[name]) in paths), None)


def _too_large_for_browser(record: RunRecord) -> int | None:
    """Bytes of the smallest graph and of the original's, estimated by the number of parameters, if a browser cannot
    hold both; else None."""
    paths = {graph_path(row) for row in in_space()}
    sizes = {path: 0 for path in paths}
    for entry in record.artifacts:
        path = entry.path.removesuffix("_data")
        if path in sizes:
            sizes[path] += entry.bytes
    made = [size for size in sizes.values() if size]
    if not made:
        return None
    both = round(min(made) * (1 + record.parameters.before / max(record.parameters.after, 1)))
    return both if both > BROWSER_BYTES else None


def _same_files(record: RunRecord) -> dict[str, str]:
    """{path of a graph: path of an earlier graph with the same content}."""
    first: dict[str, str] = {}
    same: dict[str, str] = {}
    for graph in _onnx_graphs(record):
        if first.setdefault(graph.sha256, graph.path) != graph.path:
            same[graph.path] = first[graph.sha256]
    return same


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


def has_healing_plot(record: RunRecord) -> bool:
    """Whether the card shows the healing as a curve, which needs two checks beside the start."""
    heal = record.heal
    return heal is not None and heal.applied and sum(check.held_out is not None for check in heal.checks) > 1


def _calibration_text(record: RunRecord) -> str:
    """The calibration texts, in words."""
    names = [text.name for text in record.calibration.texts] or [record.calibration.source]
    return ", ".join(_OWN_TEXT if name == SELF else name for name in names)


def _healing_text(record: RunRecord) -> Safe:
    """What the model was healed on, in words."""
    texts = record.heal.texts if record.heal is not None else []
    names: list[str] = [code(text.name) for text in texts if text.name != SELF]
    if len(names) < len(texts):
        names.append(_OWN_TEXT)
    return Safe(" and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])))


def _healed_part(record: RunRecord) -> str:
    """The trained weights, as the subject of a sentence with its verb."""
    heal = record.heal
    if heal is None or heal.part == "lora":
        return "low-rank adapters of all layers, which are merged into the weights, were"
    if heal.part == "all":
        return "all layers were"
    return f"the layers around the gaps and the last ones ({ranges(heal.layers)}) were"


def _finalize(value: Any) -> str:
    """Applied to every value that the template prints: escapes strings and refuses types that need a filter."""
    if isinstance(value, Safe):
        return value
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"The card template prints a {type(value).__name__}; it needs a filter.")


@cache  # compiling the template takes longer than filling it in
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
    environment.filters |= {function.__name__: function for function in FILTERS}
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment
