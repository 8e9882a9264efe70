"""RunRecord + the app in spaces/ -> a folder that is a Hugging Face Space.

The app is copied as it stands; what differs between models is data: compare.json, README.md and the Space variables.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradmap_hub.record import RunRecord

SDK_VERSION = "6.17.3"
PYTHON_VERSION = "3.11"
ORIGINAL_FOLDER = "original"
EXAMPLES = (
    "What is the capital of France?",
    "Explain gravity to a child in two sentences.",
    "List three uses for a paper clip.",
)
# Licences that let anyone pass the weights on. Anything else, and anything gated or private, is never republished.
REDISTRIBUTABLE = frozenset(
    {
        "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-4.0", "cc-by-sa-4.0",
        "cc0-1.0", "isc", "mit", "openmdw-1.0", "unlicense", "wtfpl", "zlib",
    }
)  # fmt: skip
# The app's one module that is ours as well: standalone, and copied beside the others.
_PROMPTING = Path(__file__).parent / "prompting.py"
# Only in Spaces on ZeroGPU; zerogpu.py puts it there.
ZERO_GPU_MODULE = "zero_gpu.py"
_ENGINES = {"onnx": "onnx_engine.py", "transformers": "transformers_engine.py"}

OriginalSource = Literal["hub", "space", "transformers"]


@dataclass(frozen=True)
class SpacePlan:
    """How the Space gets the original: `hub` its own ONNX, `space` an export stored with the Space, `transformers`
    both models from their repositories without ONNX. `reason` in words."""

    original: OriginalSource
    reason: str

    @property
    def runtime(self) -> Literal["onnx", "transformers"]:
        return "transformers" if self.original == "transformers" else "onnx"


def plan_space(
    *, license: str | None, gated: bool, private: bool, has_onnx: bool, has_repository: bool, onnx: bool
) -> SpacePlan:
    """Decide where the Space's original comes from; both models always run in the same runtime and precision."""
    if not onnx:
        return SpacePlan("transformers", "no ONNX files were asked for, so the Space runs both with transformers")
    if has_onnx and has_repository:
        return SpacePlan("hub", "the original's repository ships onnx/model.onnx")
    if gated or private or license not in REDISTRIBUTABLE:
        cause = "gated" if gated else "private" if private else f"under a licence ({license}) that may forbid it"
        return SpacePlan(
            "transformers",
            f"the original is {cause}, so it is not exported again and stored with the Space; "
            "the Space loads both from their own repositories with transformers",
        )
    return SpacePlan("space", "the original has no ONNX, so it is exported too and stored with the Space")


def content_folder() -> Path:
    """Where the app's files are: beside this package when installed, in the checkout otherwise."""
    installed = Path(__file__).parent / "spaces"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "spaces"


def variables(record: RunRecord, pruned_repo: str, pruned_commit: str, plan: SpacePlan) -> dict[str, str]:
    """Space variables: with these alone a duplicate of the Space works for another model."""
    values = {"PRUNED_MODEL": pruned_repo, "PRUNED_REVISION": pruned_commit}
    if plan.original != "space" and record.base.repo_id and record.base.commit:
        values |= {"ORIGINAL_MODEL": record.base.repo_id, "ORIGINAL_REVISION": record.base.commit}
    return values


def write_space(
    record: RunRecord,
    plan: SpacePlan,
    destination: Path,
    *,
    pruned_repo: str | None,
    companions: Mapping[str, Path] | None = None,
) -> list[Path]:
    """Write app, requirements, README and compare.json into `destination`, and `companions` (tokenizer files of the
    original) beside an original that is stored there. Returns what it wrote."""
    destination.mkdir(parents=True, exist_ok=True)
    content = content_folder()
    unwanted = {name for runtime, name in _ENGINES.items() if runtime != plan.runtime} | {ZERO_GPU_MODULE}
    for name in unwanted:  # an earlier plan's
        (destination / name).unlink(missing_ok=True)
    if plan.original != "space":
        shutil.rmtree(destination / ORIGINAL_FOLDER, ignore_errors=True)
    written: list[Path] = []
    for path in [*sorted(content.iterdir()), _PROMPTING]:
        if path.suffix in (".py", ".css") and path.name not in unwanted:
            written.append(Path(shutil.copyfile(path, destination / path.name)))
    requirements = destination / "requirements.txt"
    shutil.copyfile(content / f"requirements-{plan.runtime}.txt", requirements)
    facts = destination / "compare.json"
    facts.write_text(
        json.dumps(_compare(record, plan, pruned_repo), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    readme = destination / "README.md"
    readme.write_text(_readme(record, plan, pruned_repo, content), encoding="utf-8")
    written += [requirements, facts, readme]
    if plan.original == "space":
        original = destination / ORIGINAL_FOLDER
        original.mkdir(exist_ok=True)
        for name, path in (companions or {}).items():
            written.append(Path(shutil.copyfile(path, original / name)))
    return written


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _compare(record: RunRecord, plan: SpacePlan, pruned_repo: str | None) -> dict[str, object]:
    stored = "space" if plan.original == "space" else "hub"
    return {
        "schema_version": 1,
        "title": f"{_short(record.base.name)}: original and pruned",
        "runtime": plan.runtime,
        "precision": "float32",
        "original": {
            "name": record.base.name,
            "repo_id": record.base.repo_id,
            "revision": record.base.commit,
            "stored": stored,
            "path": ORIGINAL_FOLDER if stored == "space" else "onnx",
        },
        "pruned": {
            "name": pruned_repo or record.name,
            "repo_id": pruned_repo,
            "revision": None,
            "path": "onnx",
        },
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
            # Records from before several corrections were possible list none.
            "matrices": len(record.compensation.corrections) or int(record.compensation.applied),
        },
        "examples": list(EXAMPLES),
        "license": record.base.license,
    }


def _perplexity(record: RunRecord) -> list[dict[str, object]]:
    """What the app shows: what `evaluate` measured, or else what the run itself did."""
    if record.measured is not None:
        texts = [(text.name, text.tokens, text.original, text.pruned) for text in record.measured.texts]
    else:
        measured = record.evaluation.texts if record.evaluation else []
        texts = [(text.name, text.tokens, text.original, text.compensated) for text in measured]
    return [dict(zip(("text", "tokens", "original", "pruned"), values, strict=True)) for values in texts]


def refresh_compare(record: RunRecord, folder: Path) -> None:
    """Give the app in `folder`, if there is one, the perplexities of this record."""
    facts = folder / "compare.json"
    if not facts.is_file():
        return
    content = json.loads(facts.read_text(encoding="utf-8"))
    wanted = _perplexity(record)
    if isinstance(content, dict) and content.get("perplexity", wanted) != wanted:
        text = json.dumps(content | {"perplexity": wanted}, indent=2, ensure_ascii=False, allow_nan=False)
        facts.write_text(text + "\n", encoding="utf-8")


def _readme(record: RunRecord, plan: SpacePlan, pruned_repo: str | None, content: Path) -> str:
    environment = Environment(
        loader=FileSystemLoader(content), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    models: Sequence[str] = [name for name in (pruned_repo, record.base.repo_id) if name]
    return environment.get_template("README.md.jinja").render(
        title=f"{_short(record.base.name)}: original and pruned"[:90],
        # The Hub refuses more than 60 characters.
        short_description=f"Compare {record.layers_before} with {record.layers_after} layers, live"[:60],
        license=record.base.license,
        models=models,
        sdk_version=SDK_VERSION,
        python_version=PYTHON_VERSION,
        name_original=record.base.name,
        name_pruned=pruned_repo or record.name,
        layers_before=record.layers_before,
        layers_after=record.layers_after,
        runtime=plan.runtime,
    )
