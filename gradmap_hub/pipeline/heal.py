"""The healing stage of a run: text, the original's predictions, training."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gradmap_hub import distributed
from gradmap_hub.config import SELF
from gradmap_hub.data.texts import text_of
from gradmap_hub.errors import CalibrationError
from gradmap_hub.layout import check_disk
from gradmap_hub.models.original import open_decoder
from gradmap_hub.models.source import identity
from gradmap_hub.pipeline.run import Run
from gradmap_hub.pipeline.self_text import SelfTextFile, open_reader, self_text
from gradmap_hub.pipeline.stages import COMPENSATION_FILE, HEALED_FILE, load_overrides, save_overrides
from gradmap_hub.pruning.prune_model import Compensated
from gradmap_hub.record import HealRecord
from gradmap_hub.units import duration, ranges

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from torch import Tensor, nn

    from gradmap_hub.data.rows import CalibrationRows
    from gradmap_hub.healing.corpus import Corpus
    from gradmap_hub.healing.heal import Student, Teacher
    from gradmap_hub.healing.parts import Part
    from gradmap_hub.healing.training import Check, Recipe
    from gradmap_hub.models.decoder import Decoder
    from gradmap_hub.progress import Reporter

# The model to train and the function from its last hidden states to logits.
OpenStudent: TypeAlias = "Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]]"

_TEACHER = "teacher"
# The held-out sequences of the calibration text, as the record calls them.
_CHOSE = "calibration sequences that chose the layers"
# Held-out sequences of a text that is not a calibration text.
HELD_OUT = 8
# Share of the healing tokens that a chat model writes itself if no --heal-text is given; the rest is calibration text.
SELF_SHARE = 0.5
_PARTS = {"all": "all layers", "gaps": "the layers around the gaps", "lora": "low-rank adapters"}
# Training steps that are timed to turn a time into tokens.
_TIMED = 3


@dataclass(frozen=True)
class TimedBudget:
    """The number of sequences that fit into a time, and the measured seconds per sequence: for the original's
    predictions (`reading`) and for training."""

    sequences: int
    reading: float
    training: float


def heal(run: Run, rows: CalibrationRows, chosen: Compensated) -> HealRecord | None:
    """Distil the original into the compensated model; returns None if the run has no healing budget.

    Raises:
        CalibrationError: a text is too short to be held out.
        DiskTooSmall: the predictions of the original do not fit on the disk.
    """

    def compensated() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        from gradmap_hub.pruning.prune_model import apply_pruning

        decoder = open_float32(run, run.original.checkpoint())
        overrides = load_overrides(run.work / COMPENSATION_FILE) if chosen.compensation.applied else {}
        exact = {key: value.float() for key, value in overrides.items()}
        return apply_pruning(decoder, run.source.architecture, chosen.removed, exact), decoder.head

    return None if run.method.budget is None else heal_stage(run, rows, chosen.removed, compensated)


def heal_stage(run: Run, rows: CalibrationRows, removed: Sequence[int], open_student: OpenStudent) -> HealRecord:
    """Distil the original into the model of `open_student`, which lacks the layers `removed`. The trained weights are
    written to HEALED_FILE in the work folder, by original layer index.

    Raises:
        CalibrationError: a text is too short to be held out.
        DiskTooSmall: the predictions of the original do not fit on the disk.
    """
    budget = run.method.budget
    assert budget is not None
    kept = [layer for layer in range(run.source.layer_count) if layer not in set(removed)]
    file, work = run.work / HEALED_FILE, run.work / "healing"
    recipe = recipe_of(run)

    def student() -> tuple[Student, Part]:
        from gradmap_hub.healing.heal import Student
        from gradmap_hub.healing.parts import choose_part, free_bytes

        run.release()
        model, head = open_student()
        found = Student(model, head, run.source.architecture, run.stages.key)
        free = free_bytes(run.precision()[1])
        return found, choose_part(run.method.heal_part, kept, removed, found.weights(), free)

    sequences = budget.amount * recipe.sequences if budget.unit == "steps" else budget.amount // run.method.seq_len
    if budget.unit == "seconds":
        sequences = _timed(run, rows, student, recipe, budget.amount).sequences
    steps = max(1, round(sequences / recipe.sequences))
    corpus, own = _corpus(run, rows, steps * recipe.sequences)

    def compute() -> HealRecord:
        from gradmap_hub.healing.heal import heal_model

        file.unlink(missing_ok=True)
        teacher = distributed.main_first(lambda: _teacher(run, corpus))
        pupil, part = student()
        run.reporter.start(f"{run.stages.label}Healing, {_PARTS[part.name]}")
        run.reporter.total(corpus.tokens, unit="tokens")
        record, values = heal_model(pupil, corpus, teacher, part, recipe, work, _Told(run.reporter))
        if distributed.is_main():
            save_overrides({(kept[layer], name): value for (layer, name), value in values.items()}, file)
        return dataclasses.replace(
            record, layers=[kept[layer] for layer in record.layers], self_text=dataclasses.asdict(own) if own else None
        )

    healed = run.stages.run(
        "heal",
        "Healing",
        HealRecord,
        compute,
        inputs={
            "corpus": corpus.sha256,
            "sequences": len(corpus.order),
            "seed": run.method.seed,
            "part": run.method.heal_part,
            "recipe": recipe.identity,
        },
        files=lambda: [file],
        describe=_summary,
        together=True,
    )
    if distributed.is_main():
        shutil.rmtree(work, ignore_errors=True)  # the state of the training
    return healed


def forget_teacher(run: Run) -> None:
    """Delete the stored predictions of the original; called when no further healing of this run needs them."""
    shutil.rmtree(run.shared / _TEACHER, ignore_errors=True)


class _Told:
    """Passes the progress of the training to a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def advance(self, tokens: int) -> None:
        self._reporter.advance(tokens)

    def checked(self, check: Check) -> None:
        self._reporter.note(
            f"After {check.tokens:,} tokens: held-out divergence {check.divergence:.3f}, loss {check.loss:.3f}"
        )


def _summary(record: HealRecord) -> str:
    if not record.applied:
        return f"not applied: {record.reason}"
    return (
        f"layers {ranges(record.layers)}, {record.tokens:,} tokens: held-out divergence "
        f"{record.divergence_before:.3f} -> {record.divergence_after:.3f}, loss {record.loss_before:.3f} -> "
        f"{record.loss_after:.3f}"
    )


# -- text -------------------------------------------------------------------------------------------------------------


def _corpus(run: Run, rows: CalibrationRows, sequences: int, *, own: bool = True) -> tuple[Corpus, SelfTextFile | None]:
    """The sequences to train on and to hold out, and the statistics of text that the original wrote, if any.

    Training uses the texts of --heal-text in equal parts. By default it uses the calibration texts in proportion to
    their size and, for a chat model, a share SELF_SHARE of text that the original writes. `own`: whether to include
    text that the original writes."""
    from gradmap_hub.data.rows import Rows, embedding_rows, tokenize
    from gradmap_hub.healing.corpus import make_corpus

    tokenizer = run.original.tokenizer()
    names = [name for name in run.method.heal_text if own or name != SELF]
    sources: list[tuple[Rows, float]] = []
    held_out: list[Rows] = []
    written: SelfTextFile | None = None
    if not names:
        # A streamed original reads well, but writes token by token, with a pass over its files for each.
        chat = own and bool(tokenizer.chat_template) and not run.method.low_memory
        total = sum(len(text.ids) for text in rows.training)
        sources = [(text, len(text.ids) / total * (1 - SELF_SHARE * chat)) for text in rows.training]
        held_out = [Rows(_CHOSE, "", rows.selection)]
        names = [SELF] * chat
    share = 1 / len(names) if not sources else SELF_SHARE
    for name in names:
        wanted = max(2 * HELD_OUT, round(share * sequences) + HELD_OUT)
        if name == SELF:
            text, written = self_text(run, wanted * run.method.seq_len, "healing")
        else:
            text = text_of(name, run.hub)
        cut = tokenize(text, tokenizer, run.method.seq_len, embedding_rows(run.source.config))
        if len(cut.ids) < 2 * HELD_OUT:
            raise CalibrationError(
                f"The text {text.name} is too short to heal on: {cut.ids.numel():,} tokens; at least "
                f"{2 * HELD_OUT * run.method.seq_len:,} are needed, of which a part is held out.",
                hint="Give a longer text, or shorter sequences with --seq-len.",
            )
        sources.append((Rows(cut.name, cut.sha256, cut.ids[:-HELD_OUT]), share))
        held_out.append(Rows(cut.name, cut.sha256, cut.ids[-HELD_OUT:]))
    corpus = make_corpus(sources, held_out, sequences, run.method.seed)
    if corpus.repeats > 1 and own:
        run.reporter.note(
            f"The text for healing is shorter than the budget: its {corpus.ids.numel():,} tokens are used "
            f"{corpus.repeats:.1f} times."
        )
    return corpus, written


# -- teacher and student ----------------------------------------------------------------------------------------------


def recipe_of(run: Run) -> Recipe:
    """The training recipe: learning rate, sequences per step, and bfloat16 autocast if this machine is fast at it."""
    from gradmap_hub.healing.training import RATE, TOKENS_PER_STEP, Recipe
    from gradmap_hub.models.decoder import fast_bfloat16

    sequences = max(1, TOKENS_PER_STEP // run.method.seq_len)
    # By the machine alone: a record has --compute resolved, so that a repeated run could not tell "auto" from float32.
    return Recipe(RATE, sequences, sequences, autocast=fast_bfloat16(run.precision()[1]))


def _teacher(run: Run, corpus: Corpus) -> Teacher:
    """The original's predictions for the corpus; missing ones are computed and stored."""
    from gradmap_hub.healing.heal import Teacher

    tokens = run.method.seq_len
    run.reporter.start(f"{run.stages.label}Reading the original's predictions")
    decoder = open_reader(run)
    about = f"{identity(run.source)} {decoder.weight_dtype}"
    teacher = Teacher.of(corpus, run.shared / _TEACHER, decoder.vocabulary, about)
    check_disk(run.work, sum(cache.bytes for cache in teacher.parts if not cache.done))
    run.reporter.total(sum(len(cache.ids) for cache in teacher.parts) * tokens, unit="tokens")
    for cache in teacher.parts:
        cache.fill(decoder, lambda sequences: run.reporter.advance(sequences * tokens))
    run.reporter.finish(f"{corpus.ids.numel():,} tokens")
    return teacher


def open_float32(run: Run, folder: Path) -> Decoder:
    """Open a checkpoint in memory with float32 weights, whatever its stored dtype."""
    import torch

    return open_decoder(
        folder, run.source.architecture, run.method.seq_len, dtype=torch.float32, device=run.precision()[1]
    )


def _timed(
    run: Run, rows: CalibrationRows, student: Callable[[], tuple[Student, Part]], recipe: Recipe, seconds: int
) -> TimedBudget:
    """How many sequences fit into `seconds`, measured on a few: the original predicts them, and the student trains on
    them. The trained weights are discarded."""

    def compute() -> TimedBudget:
        from gradmap_hub.healing.heal import heal_model

        corpus, _ = _corpus(run, rows, _TIMED * recipe.sequences, own=False)
        started = time.monotonic()
        teacher = distributed.main_first(lambda: _teacher(run, corpus))
        read = sum(len(cache.ids) for cache in teacher.parts)
        reading = (time.monotonic() - started) / read
        pupil, part = student()
        record, _ = heal_model(pupil, corpus, teacher, part, recipe, run.work / "healing" / "timed", None)
        training = record.seconds / len(corpus.order)
        return TimedBudget(int(seconds / (reading + training)), reading, training)

    return run.stages.branch().run(
        "heal-time",
        "Timing the healing",
        TimedBudget,
        compute,
        inputs={"seconds": seconds, "part": run.method.heal_part, "recipe": recipe.identity},
        describe=lambda found: f"{found.sequences * run.method.seq_len:,} tokens fit into {duration(seconds)}",
        together=True,
    )
