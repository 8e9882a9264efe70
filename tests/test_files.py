"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gradmap_hub.files import lock, usual_mode, write_text


def test_text_is_written_over_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_text(path, "first\n")
    write_text(path, "zweite Fassung, länger\n")
    assert path.read_bytes() == "zweite Fassung, länger\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_text(path, "first\n")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "second\n")
    assert path.read_text() == "first\n" and [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    held = lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        lock(tmp_path / "lock")
    held.close()
    lock(tmp_path / "lock").close()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_a_new_file_follows_the_user(mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        assert usual_mode() == mode
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
