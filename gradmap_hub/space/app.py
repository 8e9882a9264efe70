"""Writes the folder of a Space: the app from spaces/, unchanged, and the data of a run (compare.json, README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradmap_hub.comparison import COMPARE, raw_comparison
from gradmap_hub.files import write_text
from gradmap_hub.formats import graph_names, in_space, of_precision
from gradmap_hub.layout import CARD
from gradmap_hub.models.safetensors_files import clean_config
from gradmap_hub.record import Quality, RunRecord
from gradmap_hub.space.plan import ORIGINAL_FOLDER, SpacePlan, graph_of
from gradmap_hub.units import markdown, one_line

SDK_VERSION = "6.17.3"
PYTHON_VERSION = "3.11"
EXAMPLES = (
    "What is the capital of France?",
    "Explain gravity to a child in two sentences.",
    "List three uses for a paper clip.",
)
# Modules of this package that are copied into the app; they import nothing else of this package.
STANDALONE = tuple(Path(__file__).parents[1] / name for name in ("runtime/prompting.py", "models/tokenizer_worker.py"))
# Only for Spaces on ZeroGPU; zerogpu.py adds it.
ZERO_GPU_MODULE = "zero_gpu.py"
REQUIREMENTS = "requirements.txt"
_ENGINES = {"onnx": "onnx_engine.py", "transformers": "transformers_engine.py"}


@dataclass(frozen=True)
class ModelFiles:
    """One model's files in one precision. `bytes`: None if unknown; `quality`: cost of quantisation, if measured."""

    bytes: int | None = None
    quality: Quality | None = None


def content_folder() -> Path:
    """The folder spaces/ with the app's files: in the installed package, or in a source checkout."""
    installed = Path(__file__).parents[1] / "spaces"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "spaces"


def variables(record: RunRecord, pruned_repo: str, pruned_commit: str, plan: SpacePlan) -> dict[str, str]:
    """The variables of the Space, which name the models at their commits. A duplicate of the Space can set others."""
    values = {"PRUNED_MODEL": pruned_repo, "PRUNED_REVISION": pruned_commit}
    if plan.original != "space" and record.base.repo_id and record.base.commit:
        values |= {"ORIGINAL_MODEL": record.base.repo_id, "ORIGINAL_REVISION": record.base.commit}
    return values


def remove_unwanted(destination: Path, plan: SpacePlan) -> None:
    """Remove the original's exports that an earlier plan stored in the Space folder and this plan does not store."""
    original = destination / ORIGINAL_FOLDER
    if not plan.stored:
        shutil.rmtree(original, ignore_errors=True)
    for row in in_space():
        if row.precision not in plan.stored:
            for file in [file for name in graph_names(row) for file in original.glob(f"{name}*")]:
                file.unlink()


def write_space(
    record: RunRecord,
    plan: SpacePlan,
    destination: Path,
    *,
    pruned_repo: str | None,
    companions: Mapping[str, Path] | None = None,
    originals: Mapping[str, ModelFiles] | None = None,
) -> list[Path]:
    """Write app, requirements, README and compare.json into `destination`; returns the files written.

    Args:
        record: The record of the pruned model.
        plan: What the Space runs.
        destination: The Space folder.
        pruned_repo: Repository of the pruned model; None if it is not published.
        companions: Config and tokenizer files of the original, name -> path; copied next to a stored original.
        originals: The original's files, precision -> files, where known.
    """
    destination.mkdir(parents=True, exist_ok=True)
    original = destination / ORIGINAL_FOLDER
    remove_unwanted(destination, plan)
    facts = _compare(record, plan, pruned_repo, originals or {})
    compare_text(destination, facts)
    written = [destination / COMPARE, *write_app(destination, facts)]
    if plan.stored:
        original.mkdir(exist_ok=True)
        for name, path in (companions or {}).items():
            written.append(install(path, original / name))
        clean_config(original / "config.json")
    return written


def write_app(destination: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write the app, its requirements and README.md into `destination`; returns the files written. `facts`: content of
    compare.json."""
    content, runtime = content_folder(), facts["runtime"]
    unwanted = {name for engine, name in _ENGINES.items() if engine != runtime} | {ZERO_GPU_MODULE}
    for name in unwanted:  # of an earlier plan
        (destination / name).unlink(missing_ok=True)
    written: list[Path] = []
    for path in [*sorted(content.iterdir()), *STANDALONE]:
        if path.suffix in (".py", ".css") and path.name not in unwanted:
            written.append(install(path, destination / path.name))
    written.append(install(content / f"requirements-{runtime}.txt", destination / REQUIREMENTS))
    render_readme(destination, facts, "README.md.jinja")
    return [*written, destination / CARD]


def remove_app(folder: Path) -> None:
    """Remove the app from a Space folder, except its style sheet, compare.json and README.md."""
    for path in [*content_folder().glob("*.py"), *STANDALONE, Path(REQUIREMENTS)]:
        (folder / path.name).unlink(missing_ok=True)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def compare_text(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` as compare.json."""
    write_text(folder / COMPARE, json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def install(source: Path, target: Path) -> Path:
    """Copy a file over another one. If `target` is a symbolic link, the link is replaced, not the file behind it."""
    if target.is_symlink():
        target.unlink()
    shutil.copyfile(source, target)
    return target


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _compare(
    record: RunRecord, plan: SpacePlan, pruned_repo: str | None, originals: Mapping[str, ModelFiles]
) -> dict[str, Any]:
    return {
        "schema_version": 2,
        "title": f"{_short(record.base.name)}: original and pruned",
        "runtime": plan.runtime,
        "precision": plan.precisions[0],
        "precisions": [_precision(record, plan, name, originals.get(name, ModelFiles())) for name in plan.precisions],
        "original": {"name": record.base.name, "repo_id": record.base.repo_id, "revision": record.base.commit},
        "pruned": {"name": pruned_repo or record.name, "repo_id": pruned_repo, "revision": None},
        "layers": {
            "original": record.layers_before,
            "pruned": record.layers_after,
            "removed": record.removed,
        },
        "parameters": {"original": record.parameters.before, "pruned": record.parameters.after},
        "bytes": {"original": record.bytes.before, "pruned": record.bytes.after},
        "perplexity": _perplexity(record),
        "compensation": {
            "applied": record.compensation.applied,
            # Older records allow only one compensated matrix and do not list it.
            "matrices": len(record.compensation.corrections) or int(record.compensation.applied),
        },
        "healed": _healed(record),
        "examples": list(EXAMPLES),
        "license": record.base.license,
    }


def _healed(record: RunRecord) -> dict[str, object] | None:
    """Tokens and seconds of the healing; None if the model was not healed."""
    heal = record.heal
    return {"tokens": heal.tokens, "seconds": heal.seconds} if heal is not None and heal.applied else None


def _perplexity(record: RunRecord) -> list[dict[str, object]]:
    """The perplexities that the app shows: from `evaluate`, else from the run itself."""
    if record.measured is not None:
        texts = [(text.name, text.tokens, text.original, text.pruned) for text in record.measured.texts]
    else:
        measured = record.evaluation.texts if record.evaluation else []
        texts = [(text.name, text.tokens, text.original, text.compensated) for text in measured]
    return [dict(zip(("text", "tokens", "original", "pruned"), values, strict=True)) for values in texts]


def refresh_compare(record: RunRecord, folder: Path) -> None:
    """Update the perplexities and the healing in the compare.json of `folder`, if it has one.

    Raises:
        SourceError: compare.json is invalid.
    """
    facts = folder / COMPARE
    if not facts.is_file():
        return
    content = raw_comparison(folder)
    wanted = {"perplexity": _perplexity(record), "healed": _healed(record)}
    if any(content.get(key, value) != value for key, value in wanted.items()):
        compare_text(folder, content | wanted)


def _precision(record: RunRecord, plan: SpacePlan, name: str, original: ModelFiles) -> dict[str, object]:
    """One entry of `precisions`: the file name, and for each model the location, size and cost of quantisation."""
    size, graph = graph_of(record, name) if plan.runtime == "onnx" else (None, None)
    pruned = ModelFiles(size, graph.quality if graph is not None else None)
    stored = name in plan.stored
    return {
        "name": name,
        "file": of_precision(name).file if plan.runtime == "onnx" else None,
        "original": _model_entry(original, "space" if stored else "hub", ORIGINAL_FOLDER if stored else "onnx"),
        "pruned": _model_entry(pruned, "hub", "onnx"),
    }


def _model_entry(files: ModelFiles, stored: str, path: str) -> dict[str, object]:
    quality = files.quality
    return {
        "stored": stored,
        "path": path,
        "bytes": files.bytes,
        "quality": None
        if quality is None
        else {
            "perplexity": quality.perplexity,
            "checkpoint_perplexity": quality.checkpoint_perplexity,
            "text": quality.text,
            "tokens": quality.tokens,
        },
    }


def render_readme(folder: Path, facts: Mapping[str, Any], template: str, **further: object) -> None:
    """Write README.md of a Space; see `readme_text`."""
    write_text(folder / CARD, readme_text(facts, template, **further))


def readme_text(facts: Mapping[str, Any], template: str, **further: object) -> str:
    """The README.md of a Space.

    Args:
        facts: Content of compare.json.
        template: The path of the template in `content_folder`.
        further: Further variables of the template.
    """
    environment = Environment(
        loader=FileSystemLoader(content_folder()), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    models = [name for name in (facts["pruned"]["repo_id"], facts["original"]["repo_id"]) if name]
    layers = facts["layers"]
    environment.filters["markdown"] = markdown
    return environment.get_template(template).render(
        title=one_line(facts["title"])[:90],
        # The Hub allows 60 characters.
        short_description=f"Compare {layers['original']} with {layers['pruned']} layers, live"[:60],
        license=facts["license"] and one_line(facts["license"]),
        models=[one_line(name) for name in models],
        sdk_version=SDK_VERSION,
        python_version=PYTHON_VERSION,
        name_original=facts["original"]["name"],
        name_pruned=facts["pruned"]["name"],
        layers_before=layers["original"],
        layers_after=layers["pruned"],
        healed=bool(facts.get("healed")),
        runtime=facts["runtime"],
        precisions=[entry["name"] for entry in facts["precisions"]],
        stored=[entry["name"] for entry in facts["precisions"] if entry["original"]["stored"] == "space"],
        **further,
    )
