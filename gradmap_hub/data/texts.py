"""Calibration and evaluation text: a local file or a data set on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from gradmap_hub.config import SELF, PruneMethod
from gradmap_hub.errors import CalibrationError

_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".utf8", ".raw", ".md")
# Enough for thousands of sequences; a larger text is truncated.
MAX_CHARACTERS = 24_000_000
# Characters of one JSON value, which is read at once: a text of MAX_CHARACTERS and its escapes.
_MOST_JSON = 8 * MAX_CHARACTERS
# Rows of a .parquet file that are read at once.
_BATCH = 4096
# Tables: it is not known which column holds the text.
_TABLES = (".csv", ".tsv")
# The first bytes of binary files, which are refused whatever their name.
_SIGNATURES = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "ZIP", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PAR1\x15": "Parquet", b"ARROW1\0\0": "Arrow", b"%PDF-": "PDF", b"SQLite format 3\0": "SQLite",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_GIVE = "Give a .txt or .jsonl file, or a Hub dataset as owner/name."


def is_local_text(source: str) -> bool:
    """Whether a calibration or evaluation source is a local file rather than a data set on the Hub: it exists, starts
    with `.`, `/` or `~`, or has the suffix of a text file."""
    path = Path(source).expanduser()
    return path.exists() or source.startswith((".", "/", "~")) or path.suffix.lower() in _TEXT_SUFFIXES


def check_texts(config: PruneMethod) -> None:
    """Check that the text files of a run exist.

    Raises:
        CalibrationError: one of them does not.
    """
    check_text_files(name for name in (*config.calibration, *config.eval_text, *config.heal_text) if name != SELF)


def check_text_files(sources: Iterable[str]) -> None:
    """Check that those of `sources` that are local files exist.

    Raises:
        CalibrationError: one of them does not.
    """
    for source in sources:
        if is_local_text(source) and not Path(source).expanduser().is_file():
            raise CalibrationError(f"No such text file: {source}", hint=_GIVE)


@dataclass(frozen=True)
class Text:
    """A text with its name and the `sha256` of its content."""

    name: str
    content: str
    sha256: str


def read_text(path: Path, name: str | None = None) -> Text:
    """Read up to MAX_CHARACTERS of a text file in UTF-8, with or without a byte order mark.

    A .jsonl file has an object with the key `text` in each line, a .json file the same or a list of such objects, and a
    .parquet file a column `text`. Rows without a text (null) are left out. Any other file is plain text. `name`: of the
    text; None: that of the file.

    Raises:
        CalibrationError: the file is missing, empty or not text, or the `text` of a row is missing or not a string.
    """
    kind = path.suffix.lower()
    if not path.exists():
        raise CalibrationError(f"No such text file: {path}", hint=_GIVE)
    if not path.is_file():
        raise CalibrationError(f"{path} is not a UTF-8 text file: it is a folder or a device.", hint=_GIVE)
    if kind in _TABLES:
        raise CalibrationError(
            f"{path} is a table, not a text.", hint="Convert it to .jsonl, with the text of each row under `text`."
        )
    try:
        content = _read_parquet(path) if kind == ".parquet" else _read_encoded(path, kind)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not a UTF-8 text file: {error}", hint="Save it as UTF-8.") from error
    if not content.strip():
        raise CalibrationError(f"{path} contains no text.")
    return Text(name or path.name, content, hashlib.sha256(content.encode()).hexdigest())


class DatasetHub(Protocol):
    """The part of the Hub client that is used here; `gradmap_hub.hub.client.Hub` implements it."""

    def fetch_dataset_text(self, source: str) -> tuple[list[Path], str]: ...


def text_of(source: str, hub: DatasetHub) -> Text:
    """The text of a local file, or of the first text file of a data set on the Hub; further files are not read.

    Raises:
        CalibrationError: there is no such file or data set, or it cannot be read (see `read_text`).
    """
    if is_local_text(source):
        return read_text(Path(source).expanduser())
    paths, name = hub.fetch_dataset_text(source)
    return read_text(paths[0], name)


def _read_encoded(path: Path, kind: str) -> str:
    with path.open("rb") as stream:
        head = stream.read(16)
    known = next((what for signature, what in _SIGNATURES.items() if head.startswith(signature)), None)
    if known is not None:
        raise CalibrationError(
            f"{path} is not a UTF-8 text file: it is {known}.", hint="Decompress or convert it to UTF-8 text."
        )
    with path.open(encoding="utf-8-sig") as stream:
        if kind == ".json" and _first_character(stream) == "[":
            return _joined(path, _list_rows(path, stream))
        if kind in (".jsonl", ".json"):
            return _joined(path, _line_rows(path, stream))
        content = stream.read(MAX_CHARACTERS)
    if "\0" in content:
        raise CalibrationError(f"{path} is not a UTF-8 text file: it contains the byte 0.", hint=_GIVE)
    return content


def _first_character(stream: TextIO) -> str:
    """The first character that is not white space; the stream is rewound."""
    first = stream.read(4096).lstrip()[:1]
    stream.seek(0)
    return first


def _line_rows(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    """(Name for error messages, JSON value) of each line that is not blank. A stream, unlike splitlines(), does not end
    a line at U+2028 and other characters that JSON strings may contain."""
    number = 0
    while line := stream.readline(_MOST_JSON):
        number += 1
        if line.strip():
            yield f"line {number}", _parsed(path, f"line {number}", line)


def _list_rows(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    content = stream.read(_MOST_JSON + 1)
    if len(content) > _MOST_JSON:
        raise CalibrationError(
            f"{path} is too large for one JSON list.", hint="Write a .jsonl file, with an object in each line."
        )
    for number, row in enumerate(_parsed(path, "it", content), start=1):
        yield f"entry {number}", row


def _parsed(path: Path, place: str, content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        what = "a list of objects" if place == "it" else "a JSON object"
        raise CalibrationError(f"{path}: {place} is not {what} with the key `text`: {error}.") from None


def _joined(path: Path, rows: Iterable[tuple[str, Any]]) -> str:
    """The texts of rows with an empty line between them, up to MAX_CHARACTERS."""
    texts: list[str] = []
    size = 0
    for place, row in rows:
        if not isinstance(row, dict) or "text" not in row:
            raise CalibrationError(f"{path}: {place} is not a JSON object with the key `text`.")
        text = row["text"]
        if text is None:
            continue
        if not isinstance(text, str):
            raise CalibrationError(
                f"{path}: `text` in {place} is {_JSON_NAMES.get(type(text), 'a number')}; it must be a string."
            )
        texts.append(text.encode("utf-8", "replace").decode("utf-8"))  # a lone surrogate (\\ud800) cannot be encoded
        size += len(text) + 2
        if size > MAX_CHARACTERS:
            break
    return "\n\n".join(texts)[:MAX_CHARACTERS]


_JSON_NAMES = {dict: "an object", list: "a list", bool: "true or false"}


def _read_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet as parquet

    texts: list[str] = []
    size = 0
    try:
        with parquet.ParquetFile(path) as file:
            kind = file.schema_arrow.field("text").type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise CalibrationError(f"{path.name}: the column `text` holds {kind}; it must hold strings.")
            for batch in file.iter_batches(batch_size=_BATCH, columns=["text"]):
                rows = [value for value in batch.column(0).to_pylist() if value]
                texts += [value if value.endswith("\n") else f"{value}\n" for value in rows]
                size += sum(map(len, rows))
                if size > MAX_CHARACTERS:
                    break
    # pyarrow's own errors are ArrowException, and OSError for a file that is cut or damaged.
    except (KeyError, ValueError, OSError, pyarrow.ArrowException) as error:
        first = str(error).strip().splitlines()[:1]
        raise CalibrationError(f"{path.name} has no readable column `text`: {''.join(first)}") from error
    return "".join(texts)[:MAX_CHARACTERS]
