"""Healing: after compensation, distil the original into the pruned model.

Stage 2 solves for one linear at a time; healing trains the weights of the layers jointly, on the budget of tokens that
the user sets. The paper (GradMAP, arXiv 2602.14649) has no such step. The state with the lowest divergence from the
original on held-out sequences is kept, and only if it is clearly lower than before training (see
`pruning.compensation.lowers`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmap_hub.budget import TOP_K
from gradmap_hub.data.rows import sha256_of_ids
from gradmap_hub.healing.corpus import Corpus
from gradmap_hub.healing.parts import Part, start_training, trained_values
from gradmap_hub.healing.sharding import put
from gradmap_hub.healing.teacher import TeacherCache
from gradmap_hub.healing.training import HeldOut, NotFinite, Recipe, Trainer, Watcher, memory_kept
from gradmap_hub.models.architectures import Architecture
from gradmap_hub.pruning.compensation import lowers
from gradmap_hub.record import HealCheck, HealRecord, TextSource


@dataclass(frozen=True)
class Student:
    """The pruned model to train, with float32 weights. `head`: maps its last hidden states to logits. `identity`:
    distinguishes it from other students; a state on disk of another student is not resumed."""

    model: nn.Module
    head: Callable[[Tensor], Tensor]
    architecture: Architecture
    identity: str

    def weights(self) -> dict[str, int]:
        """Number of parameters: "all" decoder layers together, and the "rest" of the model."""
        layers = sum(p.numel() for p in self.model.get_submodule(self.architecture.layers).parameters())
        return {"all": layers, "rest": sum(p.numel() for p in self.model.parameters()) - layers}


@dataclass(frozen=True)
class Teacher:
    """The original's predictions on disk: for the sequences to train on and for the held-out ones."""

    train: TeacherCache
    held_out: TeacherCache

    @staticmethod
    def of(corpus: Corpus, folder: Path, vocabulary: int, identity: str, *, k: int = TOP_K) -> Teacher:
        """The caches of `corpus` in `folder`, which `TeacherCache.fill` computes.

        Args:
            vocabulary: Number of logits of the original.
            identity: Identifies the original and the dtype of its computation.
            k: Most likely tokens stored per position.
        """
        watched = torch.cat([rows.ids for rows in corpus.held_out])
        return Teacher(
            TeacherCache(folder / "train", corpus.ids, vocabulary, identity, k=k),
            TeacherCache(folder / "held-out", watched, vocabulary, identity, k=k),
        )

    @property
    def parts(self) -> tuple[TeacherCache, TeacherCache]:
        return self.train, self.held_out


def heal_model(
    student: Student,
    corpus: Corpus,
    teacher: Teacher,
    part: Part,
    recipe: Recipe,
    folder: Path,
    watcher: Watcher | None = None,
) -> tuple[HealRecord, dict[tuple[int, str], Tensor]]:
    """Train `student` on `corpus`, resuming from a state in `folder` if there is one. The same inputs give the same
    bytes on the same machine.

    Args:
        teacher: The original's predictions for `corpus`, computed.
        part: The weights to train.
        recipe: The hyperparameters.
        folder: Folder of the training states.
        watcher: Receives the progress.

    Returns:
        The record, and the trained weights, (index in the student, name within the layer) -> value, float32. The
        weights are empty if the divergence on the held-out sequences did not clearly fall (see `lowers`).

    Raises:
        MissingExtra: the part is "lora" and peft is not installed.
        GradmapError: a training state cannot be written.
    """
    start_training(student.model, student.architecture, part)
    key = hashlib.sha256(
        repr(
            (student.identity, corpus.sha256, sha256_of_ids(torch.tensor(corpus.order)), part, recipe.identity)
        ).encode()
    ).hexdigest()
    trainer = Trainer(student.model, student.head, corpus, *teacher.parts, recipe, folder, key)
    before = trainer.held_out()
    stopped = ""
    try:
        with memory_kept():
            trainer.run(watcher)
    except NotFinite as error:
        stopped = f"; stopped at step {error.step}, where the loss is NaN or infinite"
    after = _best(trainer, before)
    helps = lowers(before.divergences, after.divergences)
    kept = after if helps else before
    progress = trainer.progress
    record = HealRecord(
        applied=helps,
        steps=progress.step,
        rate=recipe.rate,
        loss_before=float(before.losses.mean()),
        loss_after=float(kept.losses.mean()),
        reason=("lowest held-out divergence" if helps else "it did not clearly lower the held-out divergence")
        + stopped,
        layers=part.layers if helps else [],
        checks=[
            HealCheck(
                round(check.tokens / corpus.ids.shape[1] / recipe.sequences),
                check.trained,
                check.loss,
                check.tokens,
                check.divergence,
            )
            for check in progress.checks
        ],
        part=part.name,
        tokens=progress.step * recipe.sequences * corpus.ids.shape[1],
        repeats=round(corpus.repeats, 3),
        seconds=round(progress.seconds, 1),
        divergence_before=float(before.divergences.mean()),
        divergence_after=float(kept.divergences.mean()),
        texts=[TextSource(rows.name, rows.sha256, len(rows.ids)) for rows in corpus.sources],
        held_out=[TextSource(rows.name, rows.sha256, len(rows.ids)) for rows in corpus.held_out],
    )
    return record, trained_values(student.model, student.architecture, part) if helps else {}


def _best(trainer: Trainer, before: HeldOut) -> HeldOut:
    """Load the best state into the model and measure it; returns `before` if there is none."""
    best = trainer.best()
    if not best:
        return before
    with torch.no_grad():
        for name, parameter in zip(trainer.names, trainer.trained, strict=True):
            put(parameter, best[name])
    return trainer.held_out()
