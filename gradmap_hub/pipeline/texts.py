"""Calibration and evaluation text of a run, as token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradmap_hub.data.texts import text_of
from gradmap_hub.errors import CalibrationError
from gradmap_hub.record import (
    CalibrationRecord,
    TextSource,
)

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from torch import Tensor

    from gradmap_hub.data.rows import CalibrationRows, Rows
    from gradmap_hub.pipeline.run import Run


@dataclass(frozen=True)
class EvaluationText:
    """Rows to measure on. `contaminated`: those that share words with calibration rows; None if not looked at."""

    rows: Rows
    kind: str
    contaminated: list[int] | None = None


def calibrate(run: Run) -> tuple[CalibrationRows, list[Rows]]:
    """Tokenise and split the texts. Cheap, so it is done on every run, and before any weight is fetched."""
    from gradmap_hub.data.rows import evaluation_rows, split_rows

    config = run.method
    run.reporter.start("Reading calibration text")
    texts = [text_of(source, run.hub) for source in config.calibration]
    extra_texts = [text_of(source, run.hub) for source in config.eval_text]
    clash = {text.sha256 for text in texts} & {text.sha256 for text in extra_texts}
    if clash:
        name = next(text.name for text in extra_texts if text.sha256 in clash)
        raise CalibrationError(
            f"{name} is given both as calibration and as evaluation text.",
            hint="Rows of the calibration text are held out for evaluation anyway; leave out that --eval-text.",
        )
    tokenizer = run.original.tokenizer()
    rows = split_rows(
        texts,
        tokenizer,
        seq_len=config.seq_len,
        samples=config.samples,
        selection=config.selection_rows,
        held_out=config.eval_rows,
        seed=config.seed,
    )
    if run.expected.rows_sha256 not in (None, rows.sha256):
        raise CalibrationError(
            "The calibration rows drawn here are not those of the record: text, tokenizer or their versions differ.",
            hint="Use the texts and the versions that the record names, or leave out --from to make another model.",
        )
    extra = [evaluation_rows(text, tokenizer, seq_len=config.seq_len, rows=config.eval_rows) for text in extra_texts]
    run.reporter.finish(f"{rows.fit.numel():,} tokens from {', '.join(text.name for text in texts)}")
    return rows, extra


def _check_contamination(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> list[list[int]]:
    """Per evaluation text, its rows that share a run of words with a calibration row.

    Raises:
        CalibrationError: that is more than half of a text's rows.
    """
    from gradmap_hub.data.contamination import shared_rows

    if not extra:
        return []
    decode = run.original.tokenizer().batch_decode
    sources = {source.name: decode(source.ids.tolist()) for source in rows.sources}
    selection = decode(rows.selection.tolist())  # of the same texts; it decided between layers
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
                f"{len(shared)} of the {len(words)} rows of the evaluation text {text.name} share 13 words in a row "
                f"with rows of the calibration text {worst}.",
                hint="Measure on another text, or calibrate on another one: a model looks better on what it was "
                "fitted to.",
            )
        run.reporter.note(
            f"{len(shared)} of the {len(words)} rows of {text.name} share 13 words in a row with calibration rows "
            f"({worst}); the record names them."
        )
    return found


def export_rows(run: Run) -> tuple[Rows, Tensor]:
    """What an export is measured on (text of another source if there is some, else held-out rows of the first text),
    and what it may be fitted on."""
    rows, extra = calibrate(run)
    return (extra or rows.held_out)[0], rows.fit


def evaluation_texts(run: Run, rows: CalibrationRows, extra: Sequence[Rows]) -> list[EvaluationText]:
    """What perplexity is measured on.

    Raises:
        CalibrationError: more than half of the rows of an `extra` text share a run of words with calibration rows.
    """
    contaminated = _check_contamination(run, rows, extra)
    # The held-out rows are of the calibration texts by intention.
    held_out = [EvaluationText(text, "calibration (held out)") for text in rows.held_out]
    return held_out + [
        EvaluationText(text, "another source", shared) for text, shared in zip(extra, contaminated, strict=True)
    ]


def calibration_record(run: Run, rows: CalibrationRows) -> CalibrationRecord:
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
