"""The original model: fetched when needed, its tokenizer, and its decoder opened for computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmap_hub.layout import CONFIG, GENERATION_CONFIG
from gradmap_hub.models.architectures import Architecture
from gradmap_hub.models.config_fields import check_generation_config
from gradmap_hub.models.safetensors_files import check_weights, read_object, readable
from gradmap_hub.models.source import ModelHub, Source
from gradmap_hub.models.tokenizer import load_tokenizer
from gradmap_hub.models.tokenizer_trial import try_tokenizer

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    import torch

    from gradmap_hub.models.decoder import Decoder


TRANSLATED = "readable"
"""Folder, in a run's work folder, of an original whose config was translated (`safetensors_files.readable`)."""


class OriginalModel:
    """The files of a `Source` on this machine. Each is fetched when first needed.

    Args:
        source: The resolved MODEL.
        hub: Fetches the files of a Hub model.
        work: Folder for files derived from the model: a converted GGUF file, a translated config.
        note: Called with a line of information about the model.
    """

    def __init__(
        self, source: Source, hub: ModelHub, work: Path, note: Callable[[str], None] = lambda _line: None
    ) -> None:
        self.source = source
        self._hub = hub
        self._note = note
        self._converted = work / "original"
        self._translated = work / TRANSLATED
        self._tokenizer: Any = None
        self._companions: Path | None = None
        self._builds = source.gguf is not None  # its config.json is written by `convert_gguf`
        self._checked: Path | None = None
        # Tensors of the checkpoint that its model does not have; known once `checkpoint` was called.
        self.unused: list[str] = []

    def companions(self) -> Path:
        """A local folder with config, tokenizer, generation config and legal texts.

        Raises:
            SourceError: generation_config.json is invalid.
        """
        if self.source.gguf is not None:
            return self.checkpoint()
        if self._companions is None:
            folder = self._readable(self.source.folder or self._fetch([CONFIG, *self.source.files.companions]))
            if (folder / GENERATION_CONFIG).is_file():
                check_generation_config(read_object(folder / GENERATION_CONFIG), str(folder / GENERATION_CONFIG))
            self._companions = folder
        return self._companions

    def _described(self) -> Path:
        """`companions`, after a check that transformers can build the model. Imports torch."""
        folder = self.companions()
        if not self._builds:
            from gradmap_hub.models.skeleton import described_model

            described_model(folder, self.source.base.name)
            self._builds = True
        return folder

    def checkpoint(self) -> Path:
        """A local folder with config, safetensors weights and companions, and no other weights. The first call reads
        all weights once.

        Raises:
            SourceError: transformers cannot build the model of its config; this is found before weights are fetched.
            BrokenCheckpointError: a weight file is incomplete, or does not fit the config.
        """
        if self._checked is None:
            from gradmap_hub.models.weight_check import check_tensors

            folder, base = self._with_weights(), self.source.base
            self.unused = check_tensors(folder, self.source.architecture, base.name)
            if self.unused:
                several = "tensors" if len(self.unused) > 1 else "tensor"
                self._note(
                    f"Ignored {len(self.unused)} {several} of the checkpoint that a {base.model_type} with this "
                    f"config.json does not have, such as {self.unused[0]}."
                )
            self._checked = folder
        return self._checked

    def _with_weights(self) -> Path:
        if self.source.folder is not None:
            return self._described()
        if self.source.gguf is not None:
            if not (self._converted / "tokenizer_config.json").is_file():
                from gradmap_hub.models.gguf import convert_gguf

                convert_gguf(self.source.gguf, self._converted)
            return self._converted
        self._described()
        folder = self._fetch([CONFIG, *self.source.files.weights, *self.source.files.companions])
        check_weights(folder, self.source.files)
        return self._readable(folder)

    def _readable(self, folder: Path) -> Path:
        files = self.source.files
        return readable(folder, self._translated, {CONFIG, *files.weights, *files.companions})

    def tokenizer(self, texts: Iterable[str] = ()) -> Any:
        """The tokenizer, loaded on first use, and tried on the beginnings of `texts`.

        Raises:
            SourceError: it cannot be loaded, or fails on the texts; or transformers cannot build the model.
        """
        texts = list(texts)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._described(), self.source.base.name, texts)
        elif texts:
            try_tokenizer(self._described(), self.source.base.name, texts)
        return self._tokenizer

    def _fetch(self, names: Sequence[str]) -> Path:
        assert self.source.base.repo_id and self.source.base.commit
        return self._hub.fetch(self.source.base.repo_id, self.source.base.commit, names)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end a text, from the model's generation config and from its tokenizer."""
    named = model.generation_config.eos_token_id
    found = set(named) if isinstance(named, list) else {named}
    return {token for token in found | {tokenizer.eos_token_id} if token is not None}


def open_decoder(
    folder: Path, architecture: Architecture, tokens: int, *, dtype: torch.dtype, device: str, streamed: bool = False
) -> Decoder:
    """The decoder of the checkpoint in `folder`, for sequences of `tokens` tokens.

    Args:
        dtype: Of the computation.
        device: "cpu" or "cuda"; ignored if `streamed`.
        streamed: Leave the weights on disk and read them layer by layer; about three layers are in memory.
    """
    if streamed:
        from gradmap_hub.models.streaming import open_streamed

        return open_streamed(folder, architecture, tokens, dtype=dtype)
    from gradmap_hub.models.checkpoint import load_model
    from gradmap_hub.models.decoder import Decoder

    model, _ = load_model(folder, dtype)
    return Decoder(model.to(device), architecture, tokens)
