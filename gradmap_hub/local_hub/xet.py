"""The Xet formats: xorbs (compressed chunks of files) and shards (which chunks make up which file).

Specification: https://huggingface.co/docs/xet. A file is reassembled when its shard arrives and is then stored like
any LFS object. The SHA-256 in the shard verifies it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import HubError

_RECORD = 48
_BOOKEND = b"\xff" * 32
_VERIFIED, _HAS_SHA256 = 1 << 31, 1 << 30
_PIECE_HEAD = 8
#: Limits with some margin: the client sends chunks of at most 128 kB and xorbs of at most 64 MB.
_PIECE_LIMIT = 1 << 20
XORB_LIMIT = 80 << 20


class BadXet(HubError):
    """An invalid shard or xorb, or one that refers to a missing xorb."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


@dataclass(frozen=True)
class Segment:
    """Chunks ``start`` to ``end`` (exclusive) of a xorb: ``size`` bytes of a file."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class XetFile:
    sha256: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


def hash_text(raw: bytes) -> str:
    """The text form of a Xet hash: four little-endian 64-bit words in hex."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def read_shard(body: bytes) -> list[XetFile]:
    """The files that a shard describes.

    Raises:
        BadXet: the shard is invalid.
    """
    records = [body[start : start + _RECORD] for start in range(0, len(body), _RECORD)]
    position, files = 1, list[XetFile]()

    def take(count: int) -> list[bytes]:
        nonlocal position
        found = records[position : position + count]
        position += count
        if len(found) < count or any(len(record) < _RECORD for record in found):
            raise BadXet("The shard is truncated")
        return found

    if not body.startswith(b"HFRepoMetaData\0"):
        raise BadXet("This is not a shard")
    while True:
        [head] = take(1)
        if head[:32] == _BOOKEND:
            return files
        flags, count = struct.unpack_from("<II", head, 32)
        segments: list[Segment] = []
        for record in take(count):
            size, start, end = struct.unpack_from("<III", record, 36)
            segments.append(Segment(hash_text(record[:32]), start, end, size))
        take(count if flags & _VERIFIED else 0)
        if not flags & _HAS_SHA256:
            raise BadXet("The shard lacks the SHA-256 of a file")
        files.append(XetFile(hash_text(take(1)[0][:32]), tuple(segments)))


def read_pieces(xorb: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The decompressed chunks ``start`` to ``end`` (exclusive) of a stored xorb.

    Raises:
        BadXet: the xorb is corrupt or has fewer chunks.
    """
    with xorb.open("rb") as stream:
        number = 0
        while end is None or number < end:
            head = stream.read(_PIECE_HEAD)
            if not head and end is None:
                return
            if len(head) < _PIECE_HEAD or head[0] != 0:
                raise BadXet("The xorb is corrupt or has fewer chunks than the shard says")
            packed, size = int.from_bytes(head[1:4], "little"), int.from_bytes(head[5:8], "little")
            content = stream.read(packed)
            if len(content) < packed or size > _PIECE_LIMIT:
                raise BadXet("The xorb is corrupt")
            if number >= start:
                yield _unpacked(content, head[4], size)
            number += 1


def _unpacked(content: bytes, scheme: int, size: int) -> bytes:
    """Decompress one chunk. ``scheme``: 0 is uncompressed, 1 an LZ4 frame, 2 an LZ4 frame of the bytes grouped by their
    position modulo four."""
    if scheme == 0:
        return content
    if scheme not in (1, 2):
        raise BadXet(f"Unknown compression scheme {scheme}")
    import pyarrow

    try:
        plain = pyarrow.Codec("lz4").decompress(content, size, asbytes=True)
    except (OSError, pyarrow.ArrowException):
        raise BadXet("The xorb is corrupt") from None
    if scheme == 1:
        return plain
    sorted_bytes, start = bytearray(size), 0
    for place in range(4):
        group = sorted_bytes[place::4]
        sorted_bytes[place::4] = plain[start : start + len(group)]
        start += len(group)
    return bytes(sorted_bytes)
