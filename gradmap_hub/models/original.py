"""The original model: fetched when needed, its tokenizer, and its decoder opened for computation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.models.architectures import Architecture
from gradmap_hub.models.safetensors_files import check_weights, readable
from gradmap_hub.models.source import ModelHub, Source
from gradmap_hub.models.tokenizer import load_tokenizer

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    import torch

    from gradmap_hub.models.decoder import Decoder


TRANSLATED = "readable"
"""Folder, in a run's work folder, of an original whose config was translated (`safetensors_files.readable`)."""


class OriginalModel:
    """The files of a `Source` on this machine. Each is fetched when first needed.

    Args:
        source: The resolved MODEL.
        hub: Where the files of a Hub model come from.
        work: Folder for files made to read the model: a converted GGUF file, a translated config.
    """

    def __init__(self, source: Source, hub: ModelHub, work: Path) -> None:
        self.source = source
        self._hub = hub
        self._converted = work / "original"
        self._translated = work / TRANSLATED
        self._tokenizer: Any = None

    def companions(self) -> Path:
        """A local folder with tokenizer, generation config and legal texts."""
        if self.source.gguf is not None:
            return self.checkpoint()
        if self.source.folder is not None:
            return readable(self.source.folder, self._translated)
        return readable(self._fetch(["config.json", *self.source.files.companions]), self._translated)

    def checkpoint(self) -> Path:
        """A local folder with config, safetensors weights and companions.

        Raises:
            BrokenCheckpointError: a weight file is incomplete.
        """
        if self.source.folder is not None:
            return readable(self.source.folder, self._translated)
        if self.source.gguf is not None:
            if not (self._converted / "tokenizer_config.json").is_file():
                from gradmap_hub.models.gguf import convert_gguf

                convert_gguf(self.source.gguf, self._converted)
            return self._converted
        folder = self._fetch(["config.json", *self.source.files.weights, *self.source.files.companions])
        check_weights(folder, self.source.files)
        return readable(folder, self._translated)

    def tokenizer(self, texts: Iterable[str] = ()) -> Any:
        """The tokenizer, loaded on first use, when it is also tried on the beginnings of `texts`.

        Raises:
            SourceError: it cannot be loaded, or fails on the texts.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.companions(), self.source.base.name, texts)
        return self._tokenizer

    def _fetch(self, names: Sequence[str]) -> Path:
        assert self.source.base.repo_id and self.source.base.commit
        return self._hub.fetch(self.source.base.repo_id, self.source.base.commit, names)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end a text, by the model's generation config and by its tokenizer."""
    named = model.generation_config.eos_token_id
    found = set(named) if isinstance(named, list) else {named}
    return {token for token in found | {tokenizer.eos_token_id} if token is not None}


def open_decoder(
    folder: Path, architecture: Architecture, tokens: int, *, dtype: torch.dtype, device: str, streamed: bool = False
) -> Decoder:
    """A checkpoint ready to compute on sequences of up to `tokens` tokens.

    Args:
        streamed: Leave the weights on disk and read them layer by layer; about three layers are in memory.
    """
    if streamed:
        from gradmap_hub.models.streaming import open_streamed

        return open_streamed(folder, architecture, tokens, dtype=dtype)
    from gradmap_hub.models.checkpoint import load_model
    from gradmap_hub.models.decoder import Decoder

    model, _ = load_model(folder, dtype)
    return Decoder(model.to(device), architecture, tokens)
