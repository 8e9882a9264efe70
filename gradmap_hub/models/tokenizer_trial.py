"""Tries an untrusted tokenizer.json in a process with limits, before this process loads it.

A tokenizer is a program: its regular expressions may take exponential time, its normalizers may multiply a text until
the machine has no memory left, and an error in it may abort the process that loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradmap_hub.errors import SourceError
from gradmap_hub.models import tokenizer_worker
from gradmap_hub.units import reason_of

TOKENIZER = "tokenizer.json"


def try_tokenizer(folder: Path, name: str, texts: Iterable[str] = ()) -> None:
    """Load the tokenizer.json of a folder, if it has one, and encode and decode a probe and the start of each text.

    Args:
        name: What error messages call the model.
        texts: Texts that the tokenizer will encode.

    Raises:
        SourceError: it fails, or exceeds the limits of time and memory of `tokenizer_worker`.
    """
    cause = tokenizer_worker.failure(folder / TOKENIZER, texts)
    if cause is not None:
        raise unusable(name, cause)


def unusable(name: str, cause: BaseException | str) -> SourceError:
    """The error of a tokenizer that fails. `cause`: an exception, or the reason in words."""
    return SourceError(
        f"The tokenizer of {name} cannot be used: {TOKENIZER}: {reason_of(cause)}",
        hint="Replace tokenizer.json with the file of the model's own repository.",
    )


def is_failure(error: BaseException) -> bool:
    """Whether the tokenizers library raised this: a plain Exception, or a panic of its Rust code, which is not one."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def failures_named(name: str) -> Iterator[None]:
    """Inside the context, turn a failure of the tokenizers library into the error of `unusable`.

    Raises:
        SourceError: the library failed.
    """
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        raise unusable(name, error) from error
