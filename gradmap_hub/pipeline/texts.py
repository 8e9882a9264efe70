"""Reads the calibration and evaluation texts of a run as token sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmap_hub.config import SELF
from gradmap_hub.data.texts import Text, text_of
from gradmap_hub.errors import CalibrationError
from gradmap_hub.record import (
    CalibrationRecord,
    TextSource,
)

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from torch import Tensor

    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.pipeline.run import Run

# Extra sequences that the original writes, because the shares of the texts are rounded.
_SPARE = 3


@dataclass(frozen=True)
class EvaluationText:
    """Sequences to measure on. `contaminated`: indices of those with a 13-gram overlap with calibration sequences; None
    if not checked."""

    rows: Rows
    kind: str
    contaminated: list[int] | None = None


def calibrate(run: Run) -> tuple[CalibrationRows, list[Rows]]:
    """Tokenise and split the texts. This is cheap, so every run repeats it, before the weights are fetched. Only the
    text `self` needs the weights; it is written once and stored.

    Returns:
        The calibration sequences, and those of each --eval-text.

    Raises:
        CalibrationError: a text is missing, too short or given twice, or differs from that of the run to repeat.
    """
    from gradmap_hub.data.rows import embedding_rows, evaluation_rows, split_rows

    config = run.method
    run.reporter.start("Reading calibration text")
    texts = [_calibration_text(run, source) for source in config.calibration]
    extra_texts = [text_of(source, run.hub) for source in config.eval_text]
    clash = {text.sha256 for text in texts} & {text.sha256 for text in extra_texts}
    if clash:
        name = next(text.name for text in extra_texts if text.sha256 in clash)
        raise CalibrationError(
            f"{name} is both a calibration and an evaluation text.",
            hint="Sequences of the calibration text are held out for evaluation anyway; leave out that --eval-text.",
        )
    tokenizer = run.original.tokenizer(text.content for text in [*texts, *extra_texts])
    vocabulary = embedding_rows(run.source.config)
    rows = split_rows(
        texts,
        tokenizer,
        seq_len=config.seq_len,
        samples=config.samples,
        selection=config.selection_rows,
        held_out=config.eval_rows,
        seed=config.seed,
        vocabulary=vocabulary,
    )
    if run.expected.rows_sha256 not in (None, rows.sha256):
        raise CalibrationError(
            "The calibration sequences differ from the recorded ones: another text, tokenizer or package version"
            f"{', or a text that the original wrote on another machine' if SELF in config.calibration else ''}.",
            hint="Use the recorded texts and versions, or make a different model, without --from.",
        )
    extra = [
        evaluation_rows(text, tokenizer, seq_len=config.seq_len, rows=config.eval_rows, vocabulary=vocabulary)
        for text in extra_texts
    ]
    run.reporter.finish(f"{rows.fit.numel():,} tokens from {', '.join(text.name for text in texts)}")
    return rows, extra


def _calibration_text(run: Run, source: str) -> Text:
    if source != SELF:
        return text_of(source, run.hub)
    from gradmap_hub.pipeline.self_text import self_text

    config = run.method
    needed = math.ceil((config.samples + config.selection_rows + config.eval_rows) / len(config.calibration))
    text = self_text(run, (needed + _SPARE) * config.seq_len, "calibration")[0]
    run.reporter.start("Reading calibration text")
    return text


def _check_contamination(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> list[list[int]]:
    """Per evaluation text, the indices of its sequences with a 13-gram overlap with a calibration sequence.

    Raises:
        CalibrationError: more than half of the sequences of a text have one.
    """
    from gradmap_hub.data.contamination import shared_rows

    if not extra:
        return []
    decode = run.original.tokenizer().batch_decode
    sources = {source.name: decode(source.ids.tolist()) for source in rows.sources}
    selection = decode(rows.selection.tolist())  # from the same texts; used to choose the layers
    found: list[list[int]] = []
    for text in extra:
        words = decode(text.ids.tolist())
        shared = shared_rows(words, (row for group in (*sources.values(), selection) for row in group))
        found.append(shared)
        if not shared:
            continue
        hits = {name: len(shared_rows(words, group)) for name, group in sources.items()}
        worst = max(hits, key=lambda name: hits[name])
        if 2 * len(shared) > len(words):
            raise CalibrationError(
                f"{len(shared)} of the {len(words)} sequences of the evaluation text {text.name} have a 13-gram "
                f"overlap with the calibration text {worst}.",
                hint="Use another evaluation or calibration text: a model is too good on text that it was fitted to.",
            )
        run.reporter.note(
            f"{len(shared)} of the {len(words)} sequences of {text.name} have a 13-gram overlap with calibration text "
            f"({worst}); the record lists them."
        )
    return found


def export_rows(run: Run) -> tuple[Rows, Tensor]:
    """Sequences for exports: those to measure on, from the first --eval-text if any, else held out from the first
    calibration text; and token ids to fit on, (sequences, tokens)."""
    rows, extra = calibrate(run)
    return (extra or rows.held_out)[0], rows.fit


def evaluation_texts(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> list[EvaluationText]:
    """The texts on which perplexity is measured: held-out calibration sequences, and `extra`.

    Raises:
        CalibrationError: more than half of the sequences of an `extra` text overlap with calibration sequences.
    """
    contaminated = _check_contamination(run, rows, extra)
    # Held-out sequences come from the calibration texts by design, so their overlap is not checked.
    held_out = [EvaluationText(text, "calibration (held out)") for text in rows.held_out]
    return held_out + [
        EvaluationText(text, "another source", shared) for text, shared in zip(extra, contaminated, strict=True)
    ]


def calibration_record(run: Run, rows: CalibrationRows) -> CalibrationRecord:
    """The description of the calibration sequences in the record."""
    return CalibrationRecord(
        source=", ".join(source.name for source in rows.sources),
        samples=len(rows.fit),
        tokens=rows.fit.numel(),
        sequence_length=run.method.seq_len,
        sha256=rows.sha256,
        scoring_rows=run.method.scoring_rows,
        selection_rows=len(rows.selection),
        texts=[TextSource(source.name, source.sha256, len(source.ids)) for source in rows.sources],
    )
