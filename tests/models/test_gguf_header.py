"""The header of a GGUF file that somebody else wrote: read within limits, or refused in one line."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmap_hub.errors import BrokenCheckpointError, GradmapError, SourceError
from gradmap_hub.models import gguf_header
from gradmap_hub.models.gguf import convert_gguf, open_gguf
from gradmap_hub.models.gguf_header import read_gguf_header

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))
TENSOR = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 2, 0, 0)
DATA = b"\0" * 4 * 64


def header(
    *keys: bytes,
    tensors: tuple[bytes, ...] = (TENSOR,),
    version: int = 3,
    count: int | None = None,
    of: int | None = None,
) -> bytes:
    """`count` tensors and `of` keys, whatever there are."""
    counts = len(tensors) if count is None else count, len(keys) if of is None else of
    start = b"GGUF" + struct.pack("<IQQ", version, *counts)
    data = start + b"".join(keys) + b"".join(tensors)
    return data + b"\0" * (-len(data) % 32)


def test_a_whole_header(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    numbers = key("llama.list", ARRAY, array(UINT32, 2, u32(3) + u32(4)))
    words = key("tokenizer.words", ARRAY, array(STRING, 2, text("a") + text("größe")))
    yes = key("llama.yes", BOOL, b"\1")
    path.write_bytes(header(ARCHITECTURE, numbers, words, yes) + DATA)
    found = read_gguf_header(path)
    assert found.metadata == {
        "general.architecture": "llama", "llama.list": [3, 4], "tokenizer.words": ["a", "größe"], "llama.yes": True,
    }  # fmt: skip
    assert found.tensors["token_embd.weight"].shape == (2, 32)
    assert found.tensors["token_embd.weight"].start + 256 == path.stat().st_size


def test_it_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_languages(["en", "de"])
    writer.add_float64("llama.wide", 0.25)
    writer.add_int8("llama.small", -3)
    writer.add_tensor("a.weight", np.ones((3, 5), np.float32))
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("b.weight", gguf.quantize(np.ones((2, 64), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert ours.metadata == {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.start, found.bytes, found.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip": (lambda: b"PK\x03\x04" + b"x" * 200, "does not begin with GGUF"),
    "empty": (lambda: b"", "ends within its header"),
    "html": (lambda: b"<!DOCTYPE html>" * 20, "does not begin with GGUF"),
    "zeros": (lambda: b"\0" * 300, "does not begin with GGUF"),
    "version 1": (lambda: header(ARCHITECTURE, version=1), "version is 1"),
    "big-endian": (lambda: header(ARCHITECTURE, version=3 << 24), "big-endian"),
    "2^40 keys": (lambda: header(ARCHITECTURE, of=1 << 40), "number of metadata keys is 1,099,511,627,776"),
    "2^63 tensors": (lambda: header(ARCHITECTURE, count=1 << 63), "number of tensors"),
    "fewer keys than counted": (lambda: header(ARCHITECTURE, of=2), "not the name of a key|ends within|bytes"),
    "string longer than the file": (
        lambda: header(ARCHITECTURE, key("general.name", STRING, text("x", 1 << 19))), "ends within its header",
    ),
    "string of 2^60 bytes": (
        lambda: header(ARCHITECTURE, key("general.name", STRING, text("x", 1 << 60))), "at most 1,048,576",
    ),
    "array longer than the file": (
        lambda: header(ARCHITECTURE, key("llama.x", ARRAY, array(UINT32, 500_000))), "ends within its header",
    ),
    "array of 2^60": (lambda: header(ARCHITECTURE, key("llama.x", ARRAY, array(UINT32, 1 << 60))), "entries of llama"),
    "a million strings": (
        lambda: header(ARCHITECTURE, key("tokenizer.x", ARRAY, array(STRING, 10**6, b"\0" * 8 * 10**6))),
        "number of entries of tokenizer.x is 1,000,000; at most 524,288",
    ),
    "4 MB of bytes": (
        lambda: header(ARCHITECTURE, key("llama.x", ARRAY, array(0, 4 << 20, b"\0" * (4 << 20)))), "at most 524,288",
    ),
    "many long lists": (
        lambda: header(
            ARCHITECTURE, *(key(f"llama.x{n}", ARRAY, array(0, 1 << 19, b"\0" * (1 << 19))) for n in range(5))
        ),
        "more than 2,097,152 entries together",
    ),
    "longer than the limit": (
        lambda: header(ARCHITECTURE, *(key(f"a.x{n}", STRING, text("y" * (1 << 20))) for n in range(33))),
        "longer than 33,554,432 bytes",
    ),
    "deep lists": (
        lambda: header(ARCHITECTURE, key("llama.x", ARRAY, array(ARRAY, 1) * 10_000)), "llama.x is a list of lists",
    ),
    "unknown type": (lambda: header(ARCHITECTURE, key("llama.x", 77, b"\0" * 8)), "unknown type 77"),
    "unknown type in a list": (lambda: header(ARCHITECTURE, key("llama.x", ARRAY, array(77, 1))), "unknown type 77"),
    "key twice": (lambda: header(ARCHITECTURE, ARCHITECTURE), "general.architecture occurs twice"),
    "key with an escape code": (lambda: header(ARCHITECTURE, key("a\x1b[31m", BOOL, b"\0")), r"x1b\[31m' is not"),
    "not UTF-8": (lambda: header(ARCHITECTURE, key("general.name", STRING, text(b"\xff\xfe"))), "is not UTF-8"),
    "no architecture": (lambda: header(key("general.name", STRING, text("x"))), "general.architecture is missing"),
    "architecture is a number": (lambda: header(key("general.architecture", UINT32, u32(7))), "architecture is 7"),
    "architecture is a path": (
        lambda: header(key("general.architecture", STRING, text("../../etc/passwd"))), "not the name of an arch",
    ),
    "architecture with an escape code": (
        lambda: header(key("general.architecture", STRING, text("llama\x1b]0;owned\x07"))), r"'llama\\x1b\]0;owned",
    ),
    "tensor without dimensions": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IIQ", 0, 0, 0),)), "has 0 dimensions",
    ),
    "tensor of 2^20 dimensions": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IIQ", 1 << 20, 0, 0),)), "has 1048576 dimen",
    ),
    "tensor twice": (lambda: header(ARCHITECTURE, tensors=(TENSOR, TENSOR)) + DATA, "token_embd.weight occurs twice"),
    "tensor of an unknown type": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IQIQ", 1, 32, 4_000, 0),)), "unknown type 4000",
    ),
    "tensor of no whole block": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IQIQ", 1, 33, 2, 0),)), "stored as Q4_0",
    ),
    "tensor of 2^192 numbers": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IQQQIQ", 3, *[1 << 63] * 3, 0, 0),)), "beyond",
    ),
    "tensor at 2^63": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IQIQ", 1, 32, 0, 1 << 63),)), "ends beyond",
    ),
    "tensor off its place": (
        lambda: header(ARCHITECTURE, tensors=(text("a") + struct.pack("<IQIQ", 1, 8, 0, 4),)) + DATA, "ends beyond",
    ),
    "alignment 3": (lambda: header(ARCHITECTURE, key("general.alignment", UINT32, u32(3))), "not a power of two"),
    "alignment 0": (lambda: header(ARCHITECTURE, key("general.alignment", UINT32, u32(0))), "not a power of two"),
    "one part of two": (
        lambda: header(ARCHITECTURE, key("split.count", 2, struct.pack("<H", 2))), "part of a model .* into 2 files",
    ),
    "one part of a text": (lambda: header(ARCHITECTURE, key("split.count", STRING, text("two"))), "into 'two' files"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content())
    began = time.monotonic()
    with pytest.raises(BrokenCheckpointError, match=words) as caught:
        read_gguf_header(path)
    assert time.monotonic() - began < 2
    assert caught.value.message.isprintable() and len(caught.value.message) < 200
    assert "tiny.gguf" in caught.value.message and caught.value.hint


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    whole = header(ARCHITECTURE, key("general.name", STRING, text("x"))) + DATA
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenCheckpointError, match=r"tiny\.gguf"):
            read_gguf_header(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(SourceError, match="No such file"):
            read_gguf_header(path)


METHODS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("integer", lambda found: found.integer("text", 1, 9), "text is 'x'; an integer from 1 to 9 is expected"),
    ("too large", lambda found: found.integer("large", 1, 9), "large is 1000000000; an integer"),
    ("bool is no integer", lambda found: found.integer("yes", 0, 9), "yes is True"),
    ("list is no integer", lambda found: found.integer("list", 0, 9), "list is a list of 2;"),
    ("missing", lambda found: found.integer("none", 0, 9), "none is missing"),
    ("not a number", lambda found: found.number("nan", 0, 9), "nan is nan"),
    ("text", lambda found: found.text("large"), "a string is expected"),
    ("flag", lambda found: found.flag("large", False), "true or false is expected"),
    ("entries", lambda found: found.entries("list", str), "a list of str is expected"),
    ("count", lambda found: found.entries("list", int, 3), "a list of 3 is expected"),
]


@pytest.mark.parametrize(("call", "words"), [row[1:] for row in METHODS], ids=[row[0] for row in METHODS])
def test_values_of_a_wrong_type(call: Callable[[Any], Any], words: str) -> None:
    metadata = {"text": "x", "large": 10**9, "yes": True, "list": [1, 2], "nan": float("nan")}
    found = gguf_header.GgufHeader(Path("tiny.gguf"), "llama", metadata, {})
    with pytest.raises(BrokenCheckpointError, match=words):
        call(found)


def _mutations(whole: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a file with some replaced, removed or doubled."""
    place = st.integers(0, 12_000)  # the header, with metadata and the table of tensors
    change = st.tuples(
        st.sampled_from(["set", "cut", "double"]), place, st.integers(1, 16), st.binary(min_size=8, max_size=8)
    )

    def apply(changes: list[tuple[str, int, int, bytes]]) -> bytes:
        data = whole
        for kind, at, length, new in changes:
            if kind == "set":
                data = data[:at] + new[:length] + data[at + len(new[:length]) :]
            elif kind == "cut":
                data = data[:at] + data[at + length :]
            else:
                data = data[: at + length] + data[at : at + length] + data[at + length :]
        return data

    return st.lists(change, min_size=1, max_size=4).map(apply)


def _never_another_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        convert_gguf(path, path.with_suffix(""))
    except GradmapError as error:
        assert error.message.isprintable()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory, gguf_writer: Any, llama: Any) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_writer(path, "llama", llama)
    open_gguf(path)
    return path, path.read_bytes()


def _fuzz(valid: tuple[Path, bytes], examples: int) -> None:
    path, data = valid
    other = path.with_name("mutated.gguf")

    @settings(max_examples=examples, deadline=None, database=None)
    @given(_mutations(data))
    def check(mutated: bytes) -> None:
        _never_another_error(other, mutated)

    check()


def test_a_bent_file_is_refused_in_one_line(valid: tuple[Path, bytes]) -> None:
    _fuzz(valid, 50)


@pytest.mark.slow
def test_thousands_of_bent_files_are_refused_in_one_line(valid: tuple[Path, bytes]) -> None:
    _fuzz(valid, 2_000)
