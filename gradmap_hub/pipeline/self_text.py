"""Generates text with the original of a run, for calibration or healing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gradmap_hub.config import SELF
from gradmap_hub.data.texts import Text, read_text
from gradmap_hub.errors import CalibrationError
from gradmap_hub.files import write_text
from gradmap_hub.models.original import open_decoder
from gradmap_hub.models.source import identity

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.models.decoder import Decoder
    from gradmap_hub.pipeline.run import Run

Use: TypeAlias = Literal["calibration", "healing"]
# For each use: the stage, the file in the work folder, and an offset to the seed of the run.
_USES: dict[Use, tuple[str, str, int]] = {
    "calibration": ("calibration-text", "calibration-self.jsonl", 1),
    "healing": ("self-text", "self.jsonl", 0),
}


@dataclass(frozen=True)
class SelfTextFile:
    """Statistics of text that the original wrote: its `sha256` and `tokens`, the numbers of samples `drawn` and of
    those dropped as `repetitive`, `short` or near `duplicates`, and the `recipe` of sampling and filtering."""

    sha256: str
    tokens: int
    drawn: int
    repetitive: int
    short: int
    duplicates: int
    recipe: dict[str, Any]


def self_text(run: Run, tokens: int, use: Use) -> tuple[Text, SelfTextFile]:
    """About `tokens` tokens of text that the original writes itself (see `healing.self_text`), stored in the work
    folder. Each use has a text of its own.

    Raises:
        CalibrationError: the file has changed since it was written, or the filters drop nearly all samples.
    """
    from gradmap_hub.healing.self_text import SelfTextRecipe

    stage, name, offset = _USES[use]
    file = run.shared / name
    recipe = SelfTextRecipe(seed=run.method.seed + offset)

    def compute() -> SelfTextFile:
        from gradmap_hub.healing.self_text import Drafts, write_self_text

        decoder = open_reader(run)
        about = {"of": identity(run.source), "dtype": str(decoder.weight_dtype), "tokens": tokens}
        drafts = Drafts(file.with_name(f"{name}.drafts"), json.dumps(about | recipe.settings()))
        run.reporter.total(tokens, unit="tokens")
        found = write_self_text(decoder.model, run.original.tokenizer(), tokens, recipe, run.reporter.advance, drafts)
        write_text(file, "".join(json.dumps({"text": sample}, ensure_ascii=False) + "\n" for sample in found.samples))
        drafts.forget()
        return SelfTextFile(
            read_text(file).sha256, found.tokens, found.drawn, found.repetitive, found.short, found.duplicates,
            recipe.settings(),
        )  # fmt: skip

    written = run.independent.branch().run(
        stage,
        "Letting the original write text",
        SelfTextFile,
        compute,
        inputs={"tokens": tokens, "recipe": recipe.settings()},
        files=lambda: [file],
        describe=lambda found: (
            f"{found.tokens:,} tokens; of {found.drawn} samples dropped {found.repetitive} that "
            f"repeat themselves, {found.short} short ones, {found.duplicates} near duplicates"
        ),
    )
    text = read_text(file, name=SELF)
    if text.sha256 != written.sha256:
        raise CalibrationError(f"{file} has changed since it was written; delete it and run the command again.")
    return text, written


def open_reader(run: Run) -> Decoder:
    """The original, opened for predictions and for writing text. In bfloat16 where the machine is fast at it, even if
    the weights are stored in float32: output distributions need no more precision."""
    import torch

    from gradmap_hub.models.decoder import fast_bfloat16

    dtype = torch.bfloat16 if fast_bfloat16(run.precision()[1]) else run.precision()[0]
    if dtype == run.precision()[0]:
        return run.decoder()
    run.release()
    return open_decoder(
        run.original.checkpoint(), run.source.architecture, run.method.seq_len, dtype=dtype,
        device=run.precision()[1], streamed=run.method.low_memory,
    )  # fmt: skip
