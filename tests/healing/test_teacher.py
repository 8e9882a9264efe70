"""The cache of the original's predictions: exact, resumable, and it leaves a full disk as it was."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmap_hub.errors import DiskTooSmall
from gradmap_hub.healing import teacher as module
from gradmap_hub.healing.teacher import TeacherCache

TOKENS = 40


def cache_of(world: Any, folder: Path, identity: str = "tiny", k: int = 8) -> TeacherCache:
    return TeacherCache(folder, world.corpus.ids, world.model.config.vocab_size, identity, k=k)


def test_it_holds_the_originals_distributions(world: Any, tmp_path: Path) -> None:
    cache = cache_of(world, tmp_path / "cache")
    cache.fill(world.decoder)
    places = [3, 0]
    found = cache.of(places)
    with torch.no_grad():
        wanted = world.model(input_ids=world.corpus.ids[places]).logits.log_softmax(dim=-1).flatten(0, 1)
    values, indices = wanted.topk(8, dim=-1)
    assert torch.equal(found.indices, indices)
    assert torch.allclose(found.logprobs, values, atol=4e-3)  # float16
    assert torch.allclose(found.rest, 1 - values.exp().sum(-1), atol=1e-3)
    assert cache.bytes == sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.bin"))


def test_an_interrupted_one_goes_on(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLUSH", 2)
    whole, cut = cache_of(world, tmp_path / "whole"), cache_of(world, tmp_path / "cut")
    whole.fill(world.decoder)
    seen: list[int] = []

    def stop(sequences: int) -> None:
        seen.append(sequences)
        if sum(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.fill(world.decoder, stop)
    assert cut.done == 4
    computed: list[int] = []
    again = cache_of(world, tmp_path / "cut")
    again.fill(world.decoder, computed.append)
    assert computed == [4, 1, 1, 1, 1] and again.done == len(world.corpus.ids)
    for path in (tmp_path / "whole").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert cache_of(world, tmp_path / "cut", identity="another").done == 0


def test_a_full_disk_is_said_and_nothing_is_left(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_stream: Any, _size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_allocate", full)
    with pytest.raises(DiskTooSmall, match="Not enough disk space"):
        cache_of(world, tmp_path / "cache").fill(world.decoder)
    assert not list((tmp_path / "cache").iterdir())


def test_a_large_vocabulary_has_wider_indices() -> None:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    small, large = (TeacherCache(Path("x"), ids, size, "t") for size in (1 << 16, (1 << 16) + 1))
    assert large.bytes - small.bytes == TOKENS * 64 * 2
