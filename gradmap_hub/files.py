"""Reads untrusted JSON, and writes files atomically."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Largest JSON file that is read, in bytes. The largest known index of weights has 9 MB; parsed JSON takes about ten
# times its size in memory.
MOST_BYTES = 64 << 20
# Deepest nesting of lists and objects. The files of models have at most ten levels; many libraries copy JSON by
# recursion.
MOST_LEVELS = 64
# Most digits of an integer. A number of bytes or tokens has at most 20; arithmetic on longer ones takes quadratic time.
_MOST_DIGITS = 40


class InvalidJson(ValueError):
    """JSON that cannot be read. The message is the reason, without the file name."""


def read_json(path: Path, most_bytes: int = MOST_BYTES, *, finite: bool = False) -> Any:
    """The value of an untrusted JSON file; `finite` refuses NaN and Infinity.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidJson: it is not a regular file (a pipe might never end), larger than `most_bytes`, or not valid JSON.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InvalidJson("it is not a regular file")
    if status.st_size > most_bytes:
        raise InvalidJson(f"it has {status.st_size:,} bytes, and at most {most_bytes:,} are read")
    return parse_json(path.read_bytes(), finite=finite)


def parse_json(content: bytes, *, finite: bool = False) -> Any:
    """The value of JSON in UTF-8. NaN and Infinity are accepted, because libraries write them, unless `finite`.

    Raises:
        InvalidJson: it is not JSON, is nested deeper than MOST_LEVELS, or has an integer of more than 40 digits or a
            string that UTF-8 cannot encode (a lone surrogate).
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            parse_int=_integer,
            parse_float=_finite if finite else float,
            parse_constant=_refuse if finite else float,
        )
    except RecursionError:
        raise InvalidJson(f"it is nested too deeply, more than {MOST_LEVELS} levels") from None
    except UnicodeDecodeError:
        raise InvalidJson("it is not UTF-8") from None
    except InvalidJson:
        raise
    except ValueError as error:
        raise InvalidJson(str(error)) from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise InvalidJson(f"it is nested too deeply, more than {MOST_LEVELS} levels")


def shown(value: Any) -> str:
    """A JSON value for an error message: ASCII on one line, at most 60 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(name: str) -> Any:
    raise InvalidJson(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise InvalidJson(f"{digits[:20]} is too large for a float")
    return number


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise InvalidJson(f"an integer in it has {len(digits):,} digits")
    return int(digits)


def _inside(value: Any) -> Iterator[Any]:
    """The lists, objects and keys directly inside a value; a string has none, and is checked for lone surrogates."""
    if isinstance(value, str):
        # A lone surrogate: half of an escaped pair.
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidJson(f"the string {shown(value)} in it is not Unicode")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if isinstance(inner, (str, dict, list)):
                yield inner
    elif isinstance(value, list):
        yield from (inner for inner in value if isinstance(inner, (str, dict, list)))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with line feeds atomically: to PATH.partial, which is then renamed to `path`.

    Raises:
        OSError: the text could not be written, such as on a full disk; an earlier file is unchanged.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def user_cache() -> Path:
    """The cache folder of this package, for samples, environments and libraries: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradmap-hub"


def lock(path: Path) -> IO[bytes]:
    """Hold a file lock until the returned file is closed or the process dies.

    Raises:
        BlockingIOError: another process, or this one, holds it.
    """
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # Windows: a second holder is not detected
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # a file system without locks
        pass
    return file


def usual_mode() -> int:
    """The mode of a new file under this user's umask, for files that a library creates with mode 0600."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
