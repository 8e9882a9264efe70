"""Calibration and evaluation text: a local file or a data set on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gradmap_hub.config import SELF, PruneMethod
from gradmap_hub.errors import CalibrationError

_TEXT_SUFFIXES = (".txt", ".jsonl", ".utf8", ".raw", ".md")
# Enough for thousands of sequences; a larger text is truncated.
MAX_CHARACTERS = 24_000_000


def is_local_text(source: str) -> bool:
    """Whether a calibration or evaluation source is a local file rather than a data set on the Hub."""
    path = Path(source).expanduser()
    return path.exists() or source.startswith((".", "/", "~")) or path.suffix in _TEXT_SUFFIXES


def check_texts(config: PruneMethod) -> None:
    """Raises CalibrationError: a text file of the run does not exist."""
    check_text_files(name for name in (*config.calibration, *config.eval_text, *config.heal_text) if name != SELF)


def check_text_files(sources: Iterable[str]) -> None:
    """Raises CalibrationError: a text file does not exist."""
    for source in sources:
        if is_local_text(source) and not Path(source).expanduser().is_file():
            raise CalibrationError(
                f"No such text file: {source}", hint="Give a .txt or .jsonl file, or a Hub dataset as owner/name."
            )


@dataclass(frozen=True)
class Text:
    """A text with its name; `sha256` of its content."""

    name: str
    content: str
    sha256: str


def read_text(path: Path, name: str | None = None) -> Text:
    """Read a .jsonl (key `text`), .parquet (column `text`) or plain UTF-8 text file, up to MAX_CHARACTERS.

    Raises:
        CalibrationError: the file is missing, empty, not text, or lacks the key.
    """
    try:
        if path.suffix == ".parquet":
            content = _read_parquet(path)
        elif path.suffix in (".jsonl", ".json"):
            content = _read_jsonl(path)
        else:
            content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(
            f"No such text file: {path}", hint="Give a .txt or .jsonl file, or a Hub dataset as owner/name."
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise CalibrationError(f"{path} is not a UTF-8 text file: {error}") from error
    content = content[:MAX_CHARACTERS]
    if not content.strip():
        raise CalibrationError(f"{path} contains no text.")
    return Text(name or path.name, content, hashlib.sha256(content.encode()).hexdigest())


class DatasetHub(Protocol):
    """The part of the Hub client that is used here; `gradmap_hub.hub.client.Hub` implements it."""

    def fetch_dataset_text(self, source: str) -> tuple[list[Path], str]: ...


def text_of(source: str, hub: DatasetHub) -> Text:
    """The text of a local file, or of the first file of a data set on the Hub, which is more than enough."""
    if is_local_text(source):
        return read_text(Path(source).expanduser())
    paths, name = hub.fetch_dataset_text(source)
    return read_text(paths[0], name)


def _read_jsonl(path: Path) -> str:
    texts: list[str] = []
    # Not splitlines(): it also splits at U+2028 and other characters that JSON strings may contain.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise CalibrationError(f"{path} line {number} is not a JSON object with the key `text`.") from None
        texts.append(text.encode("utf-8", "replace").decode("utf-8"))  # a lone surrogate (\\ud800) cannot be encoded
    return "\n\n".join(texts)


def _read_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        column = parquet.read_table(path, columns=["text"]).column("text")
    except (KeyError, ValueError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path.name} has no readable column `text`: {error}") from error
    return "".join(str(value) if str(value).endswith("\n") else f"{value}\n" for value in column.to_pylist() if value)
