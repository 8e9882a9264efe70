"""Loads the tokenizer of a model folder with transformers, and writes it as tokenizer.json, which the runtime reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gradmap_hub.errors import SourceError
from gradmap_hub.files import InvalidJson, read_json
from gradmap_hub.layout import CHAT_TEMPLATE, TOKENIZER_CONFIG
from gradmap_hub.models.tokenizer_trial import TOKENIZER, is_failure, try_tokenizer
from gradmap_hub.units import reason_of

# Arguments of transformers' tokenizers that name a file, and the file names in a model folder.
_FILES = {
    "tokenizer_file": (TOKENIZER,),
    "vocab_file": ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    "merges_file": ("merges.txt",),
}
# JSON files of objects, apart from tokenizer.json, that transformers reads.
_OBJECTS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Vocabularies that transformers converts with the help of other packages.
_VOCABULARIES = ("tokenizer.model", "spiece.model")


def load_tokenizer(folder: Path, name: str, texts: Iterable[str] = ()) -> Any:
    """The tokenizer of a model folder. Its tokenizer.json is first tried in a separate process.

    Args:
        name: What error messages call the model.
        texts: Texts that it will encode; their beginnings are tried too.

    Raises:
        SourceError: it cannot be loaded, fails on the texts, or cannot be written as tokenizer.json.
    """
    configs = {file: _object(folder / file, name) for file in _OBJECTS}
    for file in _OBJECTS[:2]:  # the third file maps tokens to ids
        _check_fields(configs[file], file, name)
    try_tokenizer(folder, name, texts)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **_own_files(folder, configs[TOKENIZER_CONFIG])
        )
    # transformers does not validate these files and may raise any error; the tokenizers library panics.
    except BaseException as error:
        if not isinstance(error, Exception) and not is_failure(error):
            raise
        raise _not_loaded(folder, name, error) from error
    if not (folder / TOKENIZER).is_file():
        _fast(tokenizer, name)  # before anything expensive: exports need it
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path, name: str) -> None:
    """Write tokenizer.json into a folder, unless it has one: the runtime reads no other form. `name`: what error
    messages call the model.

    Raises:
        SourceError: the tokenizer cannot be written as tokenizer.json.
    """
    if not (folder / TOKENIZER).is_file():
        _fast(tokenizer, name).save(str(folder / TOKENIZER))


def repeat_template(folder: Path) -> None:
    """Write the template of chat_template.jinja into tokenizer_config.json too, unless it has one: transformers.js
    reads no other file. transformers reads either and prefers the first."""
    template, config = folder / CHAT_TEMPLATE, folder / TOKENIZER_CONFIG
    if not template.is_file() or not config.is_file():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    if not values.get("chat_template"):
        values["chat_template"] = template.read_bytes().decode("utf-8")
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fast(tokenizer: Any, name: str) -> Any:
    """The `tokenizers.Tokenizer` inside a tokenizer of transformers, or converted from it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return convert_slow_tokenizer(tokenizer)
    except Exception as error:  # ValueError for an unknown class; converters may raise anything on their files
        raise SourceError(
            f"The tokenizer of {name} ({type(tokenizer).__name__}) cannot be written as {TOKENIZER}, which exports "
            f"need: {reason_of(error)}"
        ) from error


def _object(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a tokenizer; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except InvalidJson as error:
        raise SourceError(
            f"The tokenizer of {name} cannot be loaded: {path.name} is not valid JSON: {reason_of(error)}"
        ) from error
    if not isinstance(content, dict):
        raise SourceError(f"The tokenizer of {name} cannot be loaded: {path.name} is not a JSON object.")
    return content


def _check_fields(config: Mapping[str, Any], file: str, name: str) -> None:
    """Raises SourceError: a field on which transformers relies has another type."""
    for field, value in config.items():
        if field in _SPECIAL_TOKENS:
            text = value.get("content") if isinstance(value, dict) else value
            good, wanted = isinstance(text, str), "a string, or an object with a string `content`"
        elif field == "tokenizer_class":
            good, wanted = isinstance(value, str), "a string"
        elif field == "chat_template":
            good, wanted = isinstance(value, (str, list, dict)), "a string or a list of named templates"
        else:
            continue
        if not good and value is not None:
            raise SourceError(
                f"The tokenizer of {name} cannot be loaded: {file}: {field} is {reason_of(json.dumps(value))}; "
                f"it must be {wanted}."
            )


def _not_loaded(folder: Path, name: str, error: BaseException) -> SourceError:
    """The error of a tokenizer that transformers does not load."""
    start = f"The tokenizer of {name} cannot be loaded: "
    if not any((folder / file).is_file() for files in _FILES.values() for file in files):
        return SourceError(f"{start}there is no {TOKENIZER} and no vocabulary.")
    hint = _packages_hint(folder)
    if hint is not None:
        return SourceError(f"{start}it needs packages that are not installed.", hint=hint)
    hint = None
    if not (folder / TOKENIZER).is_file():
        hint = f"Load it with another version of transformers and add the {TOKENIZER} that its save_pretrained writes."
    # The message of an unexpected error says little without its type.
    known = isinstance(error, (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError))
    named = "" if known or is_failure(error) else f"{type(error).__name__}: "
    return SourceError(f"{start}{named}{reason_of(error)}", hint=hint)


def _own_files(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Arguments for the files that tokenizer_config.json names: those of this folder. transformers 4.57 would read them
    wherever they are, so that a repository could have any file of this machine read and published."""
    own: dict[str, str] = {}
    for argument, names in _FILES.items():
        if isinstance(config.get(argument), str):
            found = next((file for file in names if (folder / file).is_file()), names[0])
            own[argument] = str(folder / found)
    return own


def _packages_hint(folder: Path) -> str | None:
    """The hint to install the packages that transformers needs to read a folder's vocabulary; None if none is
    missing."""
    vocabulary = next((folder / name for name in _VOCABULARIES if (folder / name).is_file()), None)
    if (folder / TOKENIZER).is_file() or vocabulary is None:
        return None
    with vocabulary.open("rb") as stream:
        # A SentencePiece model is a protocol buffer that begins with field 1; a file of tiktoken has lines of base64.
        needed = ("sentencepiece", "protobuf") if stream.read(1) == b"\n" else ("tiktoken",)
    missing = [package for package in needed if not _installed(package)]
    if not missing:
        return None
    return f"{vocabulary.name} is read with packages that are not installed: pip install {' '.join(missing)}"


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
