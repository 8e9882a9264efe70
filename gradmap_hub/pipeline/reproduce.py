"""Repeats a run from its record (`--from`): the same original at the same commit, the same settings and texts.

Differences raise an error before the download; package versions that may change the last bits are reported. Records are
untrusted: a text is searched by file name only, and used only if it has the recorded sha256.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub import __version__
from gradmap_hub.config import SELF, Expected, PruneConfig, PushConfig
from gradmap_hub.data.texts import is_local_text
from gradmap_hub.errors import CalibrationError, SourceError, UsageError
from gradmap_hub.formats import quantized
from gradmap_hub.models.source import Source
from gradmap_hub.record import FILE_NAME, RunRecord, read_record

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub

# A data set is recorded with its commit; other texts were local files of the first run.
_PINNED = re.compile(r".+@[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HOW_MUCH = frozenset({"ratio", "layers", "drop"})
# Settings that determine the calibration sequences.
_DRAWING = frozenset({"samples", "seq_len", "eval_rows", "seed"})
# `TextPerplexity.kind` of texts given with --eval-text; the others are held-out sequences of the calibration texts.
_ANOTHER_SOURCE = "another source"
# Settings that records of earlier versions lack, with the values that mean the same as before.
_LATER: dict[str, Any] = {"heal_text": [], "heal_part": "auto"}
# Packages that may round differently in other versions.
_COMPUTING = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Repeat:
    """An earlier run and how to repeat it. `remarks`: reasons why the result may still differ."""

    record: RunRecord
    model: str
    revision: str | None
    prune: PruneConfig
    expected: Expected
    remarks: tuple[str, ...]


def repeat(where: str, *, model: str | None, revision: str | None, given: Mapping[str, Any], hub: Hub) -> Repeat:
    """Read a record and derive the run that repeats it.

    Args:
        where: The path of the record, a folder with gradmap.json, or a model on the Hub.
        model: Overrides the recorded original, unless None.
        revision: Overrides the recorded commit, unless None.
        given: Fields of PruneConfig that override the record's; `calibration` only locates the recorded texts.

    Raises:
        SourceError: the record is missing or lacks a setting.
        CalibrationError: a text is missing, or differs from the recorded one.
        UsageError: a value is invalid, or the original was local and `model` is None.
        RepositoryNotFound, GatedRepository, RateLimited, HubError: the record cannot be read from the Hub.
    """
    record, folder = _find(where, hub)
    settings = _settings(record, where, given)
    places = [folder, Path.cwd()]
    settings["calibration"] = _texts(
        "calibration", settings["calibration"], _calibration_sums(record), given.get("calibration"), places
    )
    if "eval_text" not in given:
        settings["eval_text"] = _texts("eval-text", settings["eval_text"], _evaluation_sums(record), None, places)
    if "heal_text" not in given:
        settings["heal_text"] = _heal_texts(record, settings["heal_text"], places)
    prune = _prune_config(settings, where)
    base = record.base
    if model is None:
        if base.repo_id is None:
            raise UsageError(f"{where} was made from a local model, {base.name}; give its path as MODEL.")
        if not _HUB_ID.fullmatch(base.repo_id):
            raise SourceError(f"{where} names an original that is not a valid Hub id.")
    same = model in (None, base.repo_id) or base.repo_id is None
    expected = Expected(
        commit=base.commit if same and revision is None else None,
        weights_sha256=base.weights_sha256 if same else None,
        rows_sha256=record.calibration.sha256 if same and not _DRAWING & set(given) else None,
    )
    return Repeat(
        record,
        model or base.repo_id or "",
        revision or (base.commit if same else None),
        prune,
        expected,
        tuple(_remarks(record)),
    )


def push_config_from(again: Repeat, given: Mapping[str, Any] | None = None) -> PushConfig:
    """The push that repeats an earlier run.

    If the recorded model was published, formats and Space are those of that push. The licence is taken from the record
    if the publisher stated it (`--license`), its name and link in any case. Target, visibility and output folder are
    never taken from a record.

    Args:
        again: The earlier run.
        given: Fields of PushConfig that override the record's; all but `model`, `revision` and `repeats`.

    Raises:
        UsageError: a value is invalid.
    """
    record, base = again.record, again.record.base
    fields: dict[str, Any] = {"prune": again.prune}
    if record.target is not None:
        formats = {artifact.format for artifact in record.artifacts}
        fields |= {
            "onnx": "onnx" in formats,
            "quantize": tuple(name for name in quantized() if name in formats),
            "space": record.space is not None,
        }
    fields |= given or {}
    if fields.get("license") is None and base.license_source == "publisher":
        fields["license"] = base.license
    fields["license_name"] = fields.get("license_name") or base.license_name
    fields["license_link"] = fields.get("license_link") or base.license_link
    return PushConfig(model=again.model, revision=again.revision, repeats=again.expected, **fields)


def find_calibration(record: RunRecord, places: Sequence[Path]) -> tuple[str, ...]:
    """The calibration texts of a record: data sets at their commits, and files found in `places` by name and sha256.

    Raises:
        SourceError: the record lacks settings or checksums.
        CalibrationError: a text is missing, or differs from the recorded one.
    """
    if record.settings is None:
        raise SourceError("The record does not contain the settings of its run.")
    names = record.settings.get("calibration")
    return _texts("calibration", names, _calibration_sums(record), None, places)


def find_evaluation(record: RunRecord, places: Sequence[Path]) -> tuple[str, ...]:
    """The --eval-text sources of a record, found like those of `find_calibration`.

    Raises:
        SourceError: the record lacks settings or checksums.
        CalibrationError: a text is missing, or differs from the recorded one.
    """
    names = (record.settings or {}).get("eval_text")
    return _texts("eval-text", names, _evaluation_sums(record), None, places)


def check_expected(source: Source, expected: Expected | None) -> None:
    """Check that the original has the recorded commit.

    Raises:
        SourceError: it has another commit.
    """
    if expected is not None and expected.commit not in (None, source.base.commit):
        raise SourceError(
            f"{source.base.name} is not the recorded original, which is commit {expected.commit} on the Hub.",
            hint="A local folder of that name hides the model on the Hub: run the command in another folder.",
        )


def _find(where: str, hub: Hub) -> tuple[RunRecord, Path]:
    """The record, and the folder in which its texts are searched."""
    path = Path(where).expanduser()
    if path.is_dir():
        return RunRecord.read(path), path
    if path.is_file():
        return read_record(path), path.parent
    if path.suffix == ".json" or where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise SourceError(
            f"The record {where} does not exist.",
            hint=f"Give --from a {FILE_NAME}, a folder with one, or a model on the Hub (owner/name).",
        )
    remote = hub.model(where, None)
    if FILE_NAME not in remote.files:
        raise SourceError(f"{where} has no {FILE_NAME}: it is not a model of gradmap-hub.")
    folder = hub.fetch(where, remote.commit, [FILE_NAME])
    return read_record(folder / FILE_NAME), folder


def _settings(record: RunRecord, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded settings, overridden by those in `given`.

    Raises:
        SourceError: settings are missing, or unknown to this version.
    """
    if record.settings is None:
        raise SourceError(
            f"{where} was written by gradmap-hub {record.gradmap_hub}, which did not record the settings of a run.",
            hint=_made_with(record),
        )
    recorded = _LATER | record.settings
    if _HOW_MUCH & set(given):
        recorded |= dict.fromkeys(_HOW_MUCH)
    known = {entry.name for entry in dataclasses.fields(PruneConfig)}
    if unknown := sorted(set(recorded) - known):
        raise SourceError(
            f"{where} was written by gradmap-hub {record.gradmap_hub}; its setting {', '.join(unknown)} is unknown to "
            f"this version, {__version__}.",
            hint="Install that version or a later one.",
        )
    settings = recorded | {name: value for name, value in given.items() if name != "calibration"}
    if missing := sorted(known - set(settings)):
        raise SourceError(
            f"{where} lacks the setting {', '.join(missing)}, which gradmap-hub {record.gradmap_hub} did not record.",
            hint=f"Give it: {' '.join('--' + name.replace('_', '-') for name in missing)}. {_made_with(record)}",
        )
    return settings


def _made_with(record: RunRecord) -> str:
    return f"Its command: {' '.join(record.command.split())}"


def _prune_config(settings: Mapping[str, Any], where: str) -> PruneConfig:
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    try:
        return PruneConfig(**{**settings, **lists, "heal": str(settings["heal"])})  # steps were a number
    except UsageError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # a value of the wrong type
        raise SourceError(f"The settings in {where} cannot be read: {error}") from error


# -- texts -----------------------------------------------------------------------------------------------------------


def _calibration_sums(record: RunRecord) -> dict[str, list[str]]:
    return _by_name([(text.name, text.sha256) for text in record.calibration.texts])


def _evaluation_sums(record: RunRecord) -> dict[str, list[str]]:
    texts = record.evaluation.texts if record.evaluation else []
    return _by_name([(text.name, text.sha256) for text in texts if text.kind == _ANOTHER_SOURCE])


def _by_name(texts: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """{name: checksums}: texts in different folders may have the same name."""
    found: dict[str, list[str]] = {}
    for name, sha256 in texts:
        found.setdefault(name, []).append(sha256)
    return found


def _texts(
    option: str, names: Any, sums: Mapping[str, list[str]], given: Sequence[str] | None, places: Sequence[Path]
) -> tuple[str, ...]:
    """The sources of the recorded texts, in order: a data set at its commit, or the path of a file, from `given` or in
    one of `places`, with the recorded sha256."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"The settings of the record contain no list of texts ({option}).")
    sum_of = _reader()
    offered = [_offered(source, names, sums, sum_of) for source in given or ()]
    left = {name: list(values) for name, values in sums.items()}
    found: list[str] = []
    for name in names:
        if _PINNED.fullmatch(name) or name == SELF:  # the original writes that text again
            found.append(name)
            continue
        if not left.get(name):
            raise SourceError(f"The record does not contain the sha256 of its text {name}.")
        found.append(str(_locate(option, name, left[name].pop(0), [path for path in offered if path], places, sum_of)))
    return tuple(found)


def _heal_texts(record: RunRecord, names: Sequence[str], places: Sequence[Path]) -> tuple[str, ...]:
    """The recorded texts for healing: files in `places` with the recorded sha256; other texts by their names."""
    sums = _by_name([(text.name, text.sha256) for text in record.heal.texts]) if record.heal is not None else {}
    sum_of = _reader()
    return tuple(
        name if name == SELF or not sums.get(name)
        else str(_locate("heal-text", name, sums[name].pop(0), [], places, sum_of))
        for name in names
    )  # fmt: skip


def _reader() -> Callable[[Path], str]:
    from gradmap_hub.data.texts import read_text

    known: dict[Path, str] = {}

    def sum_of(path: Path) -> str:
        if path not in known:
            known[path] = read_text(path).sha256
        return known[path]

    return sum_of


def _offered(
    source: str, names: Sequence[str], sums: Mapping[str, list[str]], sum_of: Callable[[Path], str]
) -> Path | None:
    """The path of a text from the command line, or None for a recorded data set.

    Raises:
        CalibrationError: the record does not contain this text.
    """
    if not is_local_text(source):
        if any(name == source or name.startswith(f"{source}@") for name in names):
            return None
        raise CalibrationError(
            f"The record was not made with the text {source}.",
            hint="Leave out that --calibration, or leave out --from to make a different model.",
        )
    path = Path(source).expanduser()
    if sum_of(path) not in {sha256 for values in sums.values() for sha256 in values}:
        raise _changed(path, "Leave out that text, or leave out --from to make a different model.")
    return path


def _locate(
    option: str,
    name: str,
    sha256: str,
    offered: Sequence[Path],
    places: Sequence[Path],
    sum_of: Callable[[Path], str],
) -> Path:
    for path in offered:
        if sum_of(path) == sha256:
            return path
    changed: Path | None = None
    for place in places:
        path = place / Path(name).name
        if path.is_file():
            if sum_of(path) == sha256:
                return path
            changed = changed or path
    if changed is not None:
        raise _changed(
            changed,
            f"Put the recorded text (sha256 {sha256}) in its place, or give its path with --{option} FILE if the "
            "command has it.",
        )
    raise CalibrationError(
        f"The text {name} of the record is neither next to the record nor in this folder.",
        hint=f"Copy it there, or give its path with --{option} FILE if the command has it; its sha256 is {sha256}.",
    )


def _changed(path: Path, hint: str) -> CalibrationError:
    return CalibrationError(f"{path} is not the recorded text: its sha256 differs.", hint=hint)


def _remarks(record: RunRecord) -> list[str]:
    """A remark on package versions that differ from those of the first run, if any."""
    here = {"gradmap-hub": __version__}
    there = {"gradmap-hub": record.gradmap_hub}
    for name in _COMPUTING:
        if name in record.versions:
            there[name] = record.versions[name]
            try:
                here[name] = version(name)
            except PackageNotFoundError:
                here[name] = "missing"
    different = [f"{name} {there[name]} (here {here[name]})" for name in there if there[name] != here[name]]
    if not different:
        return []
    return [f"The record was made with {', '.join(different)}: the result may differ in the last bits."]
