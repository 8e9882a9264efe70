"""Names of files in a model folder, its work folder and its Space folder; checks of disk space and output; hashes."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from gradmap_hub.config import PruneConfig
from gradmap_hub.errors import DiskTooSmall, OutputExists
from gradmap_hub.record import (
    FILE_NAME,
    Artifact,
    Parity,
)


def check_output(output: Path, resume: bool, mark: Path | None = None) -> None:
    """Refuse a non-empty output folder, because its other files would be published. With `resume`, a folder that an
    earlier run created is accepted; it is recognised by the folder `mark` (default: its work folder) or a record.

    Raises:
        OutputExists: the folder is refused.
    """
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file.", hint="Choose another --output.")
    if not output.exists() or not any(output.iterdir()):
        return
    ours = (mark or work_folder(output)).is_dir() or (output / FILE_NAME).is_file()
    if resume and ours:
        return
    raise OutputExists(
        f"The folder {output} is not empty; it was left unchanged.",
        hint="Add --resume to continue the run that created it, or choose another folder."
        if ours
        else "Choose another folder.",
    )


def check_disk(output: Path, needed: int) -> None:
    """Check that the file system of `output` has `needed` bytes free.

    Raises:
        DiskTooSmall: it has less.
    """
    free = free_bytes(output)
    if free < needed:
        raise DiskTooSmall(str(_existing(output)), needed, free)


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of a path, which need not exist."""
    return shutil.disk_usage(_existing(path)).free


def disk_words(needed: int, path: Path) -> str:
    return f"about {needed / 1e9:.2f} GB needed, {free_bytes(path) / 1e9:.2f} GB free"


def _existing(path: Path) -> Path:
    """The path, or its nearest existing parent."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def default_output(model: str, config: PruneConfig) -> Path:
    """NAME-gradmap-25 (PERCENT) or NAME-gradmap-8layers in the current folder, or beside the current folder if that is
    the model."""
    path, folder = Path(model), Path()
    if not path.name or path.name == "..":  # ".", "..", "/"
        path = path.resolve()
        folder = path.parent if path == Path.cwd() else folder
    name = path.stem if model.endswith(".gguf") else path.name
    if config.ratio is not None:
        how_much = f"{math.floor(config.ratio * 100 + 0.5)}"
    else:
        how_much = f"{config.layers or len(config.drop or ())}layers"
    return folder / f"{name}-gradmap-{how_much}"


def work_folder(output: Path) -> Path:
    """OUTPUT.work beside the output folder: the results of finished stages."""
    return output.with_name(output.name + ".work")


def space_folder_of(output: Path) -> Path:
    """The Space folder next to a model folder."""
    return output.with_name(output.name + "-space")


def weight_artifacts(folder: Path) -> list[Artifact]:
    return [artifact(path, folder, "safetensors") for path in sorted(folder.glob("*.safetensors"))]


def artifact(path: Path, root: Path, kind: str, parity: Parity | None = None) -> Artifact:
    return Artifact(path.relative_to(root).as_posix(), path.stat().st_size, sha256_of(path), kind, parity)


CARD = "README.md"


# Folder of evaluation results that the Hub reads.
RESULTS_FOLDER = ".eval_results"


CONFIG = "config.json"


TOKENIZER_CONFIG = "tokenizer_config.json"


CHAT_TEMPLATE = "chat_template.jinja"


WEIGHTS = "model.safetensors"


WEIGHTS_INDEX = "model.safetensors.index.json"


# Copied byte for byte from the original, because saving a tokenizer again changes it.
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    CHAT_TEMPLATE,
    "chat_template.json",
    "tekken.json",
)


# Folder of further chat templates, such as one for tools, each a .jinja file.
TEMPLATES_FOLDER = "additional_chat_templates"
GENERATION_CONFIG = "generation_config.json"

COMPANION_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)


def legal_texts(names: Iterable[str]) -> list[str]:
    """LICENSE and NOTICE files among `names`."""
    return [name for name in names if _is_legal_text(name)]


def is_companion(name: str) -> bool:
    """Whether a file of the original is copied into the result: a tokenizer file, chat template, generation config or
    legal text."""
    folder, _, file = name.rpartition("/")
    return (
        name in COMPANION_FILES
        or _is_legal_text(name)
        or (folder == TEMPLATES_FOLDER and file.endswith(".jinja") and file != ".jinja")
    )


def extra_templates(folder: Path) -> list[str]:
    """The paths of the further chat templates of a model folder, relative to it. A link to another folder is not
    followed, because its files are not checked like those of the model."""
    if (folder / TEMPLATES_FOLDER).is_symlink():
        return []
    return [f"{TEMPLATES_FOLDER}/{path.name}" for path in sorted((folder / TEMPLATES_FOLDER).glob("?*.jinja"))]


def _is_legal_text(name: str) -> bool:
    return "/" not in name and name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))


def folder_sizes(folder: Path) -> dict[str, int]:
    """{relative path: bytes} of all files below `folder`."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def weights_sha256(paths: Iterable[Path]) -> str:
    """One hex sha256 over the contents of weight files, independent of their names and order."""
    return hashlib.sha256("\n".join(sorted(map(sha256_of, paths))).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
