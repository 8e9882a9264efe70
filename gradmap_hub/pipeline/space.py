"""Writes the Space folder of a finished run: the app, and exports of the original if the Space stores them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub import __version__
from gradmap_hub.comparison import read_comparison
from gradmap_hub.config import DEFAULT_CALIBRATION
from gradmap_hub.errors import GradmapError, SourceError, SpaceImpossible, UnsafeToPublish
from gradmap_hub.evaluation.staleness import without_stale
from gradmap_hub.formats import FORMATS, ONNX, graph_path, in_space, of_precision
from gradmap_hub.layout import COMPANION_FILES, CONFIG, legal_texts, space_folder_of, work_folder
from gradmap_hub.models.original import OriginalModel
from gradmap_hub.models.source import find_source, identity
from gradmap_hub.models.tokenizer import write_tokenizer
from gradmap_hub.models.tokenizer_trial import TOKENIZER
from gradmap_hub.pipeline.connect import connect
from gradmap_hub.pipeline.export import export_folder, export_original, held_out_rows, onnx_stage
from gradmap_hub.progress import Reporter
from gradmap_hub.record import Base, Quality, RunRecord
from gradmap_hub.space.kinds import Kind, plan_browser
from gradmap_hub.space.plan import ORIGINAL_FOLDER, SpacePlan, pairs_of, plan_of, precisions_of
from gradmap_hub.stage_cache import Stages

if TYPE_CHECKING:
    from torch import Tensor

    from gradmap_hub.data.rows import Rows
    from gradmap_hub.hub.client import Hub
    from gradmap_hub.models.source import Source
    from gradmap_hub.space.app import ModelFiles
    from gradmap_hub.space.browser import BrowserPage, PromptText


def write_space_folder(
    original: OriginalModel,
    stages: Stages,
    record: RunRecord,
    plan: SpacePlan,
    destination: Path,
    target: str | None,
    rows: Rows | None,
    fit: Tensor | None = None,
    *,
    kind: Kind = "gradio",
    page: BrowserPage | None = None,
) -> SpacePlan:
    """Write the Space of `plan` into `destination`.

    Args:
        original: The original model.
        stages: The stages of the run, which cache the exports.
        record: The record of the pruned model.
        plan: What the Space runs.
        destination: The Space folder.
        target: Repository of the pruned model; None if it is not published.
        rows: Held-out sequences on which quantised files of the original are measured. Without them, the original is
            exported in float32 only.
        fit: Other sequences on which the rounding is fitted: token ids, (sequences, tokens).
        kind: The kind of Space.
        page: What a browser Space is made from; required for that kind.

    Returns:
        The plan without the precisions in which the original could not be exported. If none is left, nothing is
        written.

    Raises:
        VerificationError: an exporter failed.
    """
    from gradmap_hub.space.app import ModelFiles, remove_unwanted, write_space
    from gradmap_hub.space.browser import remove_page
    from gradmap_hub.space.folder import set_kind

    if kind == "browser":
        assert page is not None
        plan = _without(plan, set(plan.precisions) - set(page.pairs))
    remove_unwanted(destination, plan)
    companions: dict[str, Path] = {}
    originals = _repository_files(original.source) if plan.runtime == "onnx" else {}
    if plan.stored:
        checkpoint, stored = original.checkpoint(), destination / ORIGINAL_FOLDER
        quality = _export(stages, plan, checkpoint, stored, rows, fit)
        plan = _without(plan, {name for name in _quantised(plan) if name not in quality})
        if not plan.precisions:
            return plan
        for name in plan.stored:
            files = list(stored.glob(f"{of_precision(name).file}*"))
            originals[name] = ModelFiles(sum(file.stat().st_size for file in files), quality.get(name))
        present = ["config.json", *COMPANION_FILES, *legal_texts(path.name for path in checkpoint.iterdir())]
        companions = {name: checkpoint / name for name in present if (checkpoint / name).is_file()}
        if TOKENIZER not in companions:
            write_tokenizer(original.tokenizer(), stages.folder, original.source.base.name)
            companions[TOKENIZER] = stages.folder / TOKENIZER
    from gradmap_hub.space.integrity import foreign_code

    remove_page(destination)  # of an earlier plan
    write_space(record, plan, destination, pruned_repo=target, companions=companions, originals=originals)
    set_kind(destination, kind, page, stages.reporter)
    found = foreign_code(destination)
    if found is not None:  # it was there before, and would run with the app
        raise UnsafeToPublish(f"{destination.name}/{found}", "is not part of the comparison app", hint="Remove it.")
    return plan


def _export(
    stages: Stages, plan: SpacePlan, checkpoint: Path, stored: Path, rows: Rows | None, fit: Tensor | None
) -> dict[str, Quality]:
    """Export the original in the precisions that the Space stores; returns the cost of each by precision, except of
    Optimum's graph."""
    formats = {of_precision(name).name: name for name in plan.stored}
    if formats.pop(ONNX, None):
        onnx_stage(stages, "onnx-original", "Exporting the original for the Space", checkpoint, stored)
    if not formats or rows is None:
        return {}
    work = stages.folder / "export-original"
    found = export_original(checkpoint, stored, stages, list(formats), rows, work, fit=fit)
    return {formats[name]: quality for name, quality in found.items()}


def _quantised(plan: SpacePlan) -> list[str]:
    """The stored precisions that are measured on text: all but Optimum's graph."""
    return [name for name in plan.stored if of_precision(name).name != ONNX]


def browser_page(folder: Path, record: RunRecord, endpoint: str) -> BrowserPage | None:
    """What the browser Space of a model folder is made from; None if the models do not fit into a browser.

    Raises:
        SourceError: the tokenizer's files cannot be read.
    """
    from gradmap_hub.space.browser import BrowserPage

    pairs, wanted = pairs_of(record), browser_precisions(record)
    if not wanted:
        return None
    return BrowserPage(folder, prompt_text(folder), endpoint, {name: pairs[name] for name in wanted})


def local_page(folder: Path, endpoint: str) -> BrowserPage:
    """What the browser Space of a model folder is made from.

    Raises:
        SpaceImpossible: the models do not fit into a browser.
        SourceError: the record or the tokenizer's files cannot be read.
    """
    record = RunRecord.read(folder)
    page = browser_page(folder, record, endpoint)
    if page is None:
        pairs = pairs_of(record)
        problem = plan_browser(SpacePlan("space", "", tuple(pairs), pairs=pairs)).problem if pairs else "no ONNX file"
        raise SpaceImpossible(f"A page for the browser is not possible: {problem}.")
    return page


def browser_precisions(record: RunRecord) -> tuple[str, ...]:
    """The precisions of a finished run in which the files of both models fit into a browser."""
    pairs = pairs_of(record)
    return plan_browser(SpacePlan("space", "", tuple(pairs), pairs=pairs)).precisions if pairs else ()


def prompt_text(folder: Path) -> PromptText:
    """How the model of a folder is prompted.

    Raises:
        SourceError: the tokenizer's files cannot be read.
    """
    from gradmap_hub.runtime.prompting import ModelError, TextCodec, read_json
    from gradmap_hub.space.browser import PromptText

    try:
        codec = TextCodec.from_folder(folder)
        context = read_json(folder / CONFIG).get("max_position_embeddings")
    except ModelError as error:
        raise SourceError(f"{folder}: {error}") from error
    return PromptText(
        codec.chat_template, codec.tokens, tuple(sorted(codec.ends)), context if isinstance(context, int) else None
    )


def finished_space(folder: Path, record: RunRecord, precisions: Collection[str], *, app: bool = True) -> Path | None:
    """The existing Space folder of a model folder if it can be run as it is: it has the same original and all
    `precisions`, and no code except the installed app; else None. `app`: whether it must have the Gradio app."""
    from gradmap_hub.space.integrity import foreign_code

    space = space_folder_of(folder)
    try:
        facts = read_comparison(space)
    except SourceError:  # missing, incomplete, or of an earlier version
        return None
    if (facts.original.repo_id, facts.original.revision) != (record.base.repo_id, record.base.commit):
        return None
    there = {
        entry.name
        for entry in facts.precisions
        if entry.original.stored != "space" or (space / ORIGINAL_FOLDER / str(entry.file)).is_file()
    }
    complete = set(precisions) <= there and ((space / "app.py").is_file() or not app)
    return space if complete and foreign_code(space) is None else None


def remove_space(space: Path, record: RunRecord) -> bool:
    """Remove the Space folder of an earlier run of the same push, because `publish` would publish it. Returns whether
    it was removed; a folder of another run or origin is kept."""
    try:
        facts = read_comparison(space)
    except SourceError:
        return False
    same = (facts.original.repo_id, facts.original.revision, facts.pruned.repo_id) == (
        record.base.repo_id, record.base.commit, record.target,
    )  # fmt: skip
    if same:
        shutil.rmtree(space)
    return same


def _repository_files(source: Source) -> dict[str, ModelFiles]:
    """The ONNX files in the original's repository, by precision."""
    from gradmap_hub.space.app import ModelFiles

    sizes = source.sizes
    return {
        row.precision: ModelFiles(sizes[graph_path(row)] + sizes.get(f"{graph_path(row)}_data", 0))
        for row in in_space()
        if graph_path(row) in sizes
    }


def _without(plan: SpacePlan, names: set[str]) -> SpacePlan:
    """The plan without the precisions `names`."""
    left = tuple(name for name in plan.precisions if name not in names)
    if left == plan.precisions:
        return plan
    stored = tuple(name for name in plan.stored if name not in names)
    reason = plan.reason if left else f"no Space: the original could not be exported to {', '.join(sorted(names))}"
    pairs = {name: pair for name, pair in plan.pairs.items() if name in left}
    return SpacePlan("space" if stored else "hub", reason, left, stored, pairs)


def terms_of(record: RunRecord, source: Source) -> Base:
    """The terms that decide whether a Space may store the original: of the recorded and the present terms, the
    stricter."""
    recorded, found = record.base, source.base
    if found.repo_id is None:  # a local copy has no terms of its own
        return recorded
    return dataclasses.replace(
        found,
        license=found.license or recorded.license,
        gated=found.gated or recorded.gated,
        private=found.private or recorded.private,
    )


def build_space(
    folder: Path,
    against: str | None = None,
    *,
    local: bool = False,
    kind: Kind = "gradio",
    text: str = DEFAULT_CALIBRATION,
    reporter: Reporter | None = None,
    hub: Hub | None = None,
) -> Path:
    """Write the comparison app of a pruned folder, exporting what is missing; returns the app's folder.

    Args:
        folder: A folder made by prune or push.
        against: The original: a Hub id or a folder. Default: the recorded one.
        local: Write an app for this machine only, into the work folder, from which nothing is published. It may hold
            an export of any original, even one that must not be redistributed. If the Space folder next to `folder`
            has everything, it is returned instead. By default, write that Space folder.
        kind: The kind of Space. `compare --in browser` serves its page from a Space folder of any kind.
        text: Text on which the perplexity of the original's quantised files is measured. If it cannot be read, the app
            has no quantised files.

    Raises:
        GradmapError: the original is unknown, or cannot be read or exported, or the models are too large for a Space.
    """
    hub, reporter = connect(hub, reporter)
    record = without_stale(RunRecord.read(folder), folder)
    model = against or record.base.repo_id
    if model is None:
        raise SourceError(
            f"{folder} was made from a local model, {record.base.name}.", hint="Give its path with --against."
        )
    names = tuple(precisions_of(record))
    if local and against is None and names:
        wanted = browser_precisions(record) if kind == "browser" else names
        if (written := finished_space(folder, record, wanted, app=kind != "browser")) is not None:
            return written
    source = find_source(model, record.base.commit if against is None else None, hub)
    if not (folder / graph_path(FORMATS[ONNX])).is_file():
        record = export_folder(folder, [ONNX], reporter=reporter)
        names = tuple(precisions_of(record))
    original = OriginalModel(source, hub, work_folder(folder), reporter.note)
    identified = {"version": __version__, "what": "space", "base": identity(source)}
    stages = Stages(work_folder(folder), reporter, identified)
    plan = (
        SpacePlan("space", "for this machine only", names, names, pairs_of(record))
        if local
        else plan_of(record, terms_of(record, source))
    )
    if not plan.precisions:
        raise SpaceImpossible(f"{plan.reason[:1].upper()}{plan.reason[1:]}.")
    rows = None
    if _quantised(plan):
        try:
            rows = held_out_rows(folder, text, hub)
        except GradmapError as error:
            reporter.note(
                f"The Space gets no quantised files of the original, because the text cannot be read: {error.message}"
            )
    destination = work_folder(folder) / "compare" if local else space_folder_of(folder)
    page = local_page(folder, hub.endpoint) if kind == "browser" else None
    if page is not None:
        plan = _without(plan, set(plan.precisions) - set(page.pairs))
    made = write_space_folder(
        original, stages, record, plan, destination, record.target, rows, kind="gradio" if local else kind, page=page
    )
    if not made.precisions:
        raise SpaceImpossible(f"{made.reason[:1].upper()}{made.reason[1:]}.", hint="Give a text file with --text.")
    return destination
