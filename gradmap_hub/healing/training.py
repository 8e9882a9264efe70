"""The training loop: AdamW on the divergence from the teacher, resumable, on accelerate.

Each step trains on `Recipe.sequences` sequences of the corpus, divided among the processes. Weights and AdamW moments
are float32; with `Recipe.autocast`, forward and backward passes run in bfloat16. The state on disk (weights, moments,
position) is replaced atomically, so that a killed run resumes from the last state; the position alone determines the
order of the data and the learning rate.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradmap_hub.errors import GradmapError
from gradmap_hub.healing.corpus import Corpus
from gradmap_hub.healing.objective import divergence
from gradmap_hub.healing.sharding import put, shard_like, whole
from gradmap_hub.healing.teacher import TeacherCache

# Peak learning rate of AdamW, and tokens of a step.
RATE = 3e-4
TOKENS_PER_STEP = 1024
BETAS = (0.9, 0.95)
# Norm to which gradients are clipped.
CLIP = 1.0
# Share of the steps that warm the learning rate up; over the rest it decays along a cosine to almost 0.
WARM_UP = 0.1
# Checks of the held-out loss during training. The best state is kept.
CHECKS = 8
# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
STATE, BEST = "state.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run.

    Attributes:
        rate: Peak learning rate.
        sequences: Sequences per optimizer step, over all processes.
        micro: Sequences per forward and backward pass of a process; gradients accumulate over the step.
        autocast: Run the passes in bfloat16.
        save_every: Seconds between states on disk.
    """

    rate: float
    sequences: int
    micro: int
    autocast: bool
    save_every: float = 150.0

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that affect the result."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


@dataclass(frozen=True)
class Check:
    """Measurements on the held-out sequences after `tokens` training tokens: mean NLL (`loss`) and mean
    KL(original || student) (`divergence`). `trained`: mean training objective since the last check. All in nats per
    token."""

    tokens: int
    loss: float
    divergence: float
    trained: float


class Watcher(Protocol):
    """Receives the progress of a training run: `advance` the tokens of each step (of a resumed run, first those already
    trained on), `checked` each check on the held-out sequences."""

    def advance(self, tokens: int) -> None: ...
    def checked(self, check: Check) -> None: ...


@dataclass(frozen=True)
class HeldOut:
    """NLL and KL(original || student) of each held-out sequence, in nats per token: (n,) each."""

    losses: Tensor
    divergences: Tensor


@dataclass
class Progress:
    """The progress of a run, stored with every state. `since`: sum of the objective over the `since_steps` steps since
    the last check. `best`: lowest held-out divergence, at step `best_step`. `seconds`: training time over all
    resumptions."""

    step: int = 0
    since: float = 0.0
    since_steps: int = 0
    best: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)


class Distilled(nn.Module):
    """The student with its objective, so that wrappers (DDP, FSDP) see one forward pass that ends in a loss."""

    def __init__(self, student: Any, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.student = student
        self._head = head

    def forward(self, ids: Tensor, teacher: Any, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """KL(teacher || student) and NLL of `labels` (None without) at every position, in nats: (sequences * tokens,).

        Args:
            ids: (sequences, tokens) int64.
            teacher: The `TopK` of all positions; `labels`: (sequences * tokens,). See `objective.divergence`.
        """
        hidden = self.student.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return divergence(hidden.flatten(0, 1), self._head, teacher, labels)


def rate_at(step: int, steps: int) -> float:
    """Learning rate of a step (from 0) as a share of its peak: linear warm-up, then a cosine to almost 0."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


class Trainer:
    """Trains the parameters of `student` that require a gradient, in place.

    Args:
        head: Maps the student's last hidden states (positions, d) to logits (positions, vocabulary).
        corpus: The training sequences and their order.
        teacher: The original's distributions for `corpus.ids`.
        watched: The held-out sequences with the original's distributions.
        recipe: The hyperparameters.
        folder: Folder of the states on disk.
        key: Identifies everything that the run depends on; a state with another key is ignored.
    """

    def __init__(
        self,
        student: nn.Module,
        head: Callable[[Tensor], Tensor],
        corpus: Corpus,
        teacher: TeacherCache,
        watched: TeacherCache,
        recipe: Recipe,
        folder: Path,
        key: str,
    ) -> None:
        from accelerate import Accelerator

        self.corpus, self.teacher, self.watched, self.recipe = corpus, teacher, watched, recipe
        self.folder, self.key = folder, key
        # Each pass sets its precision by autocast: that of an Accelerator is global to the process.
        on_cpu = next(student.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(cpu=True) if on_cpu and torch.cuda.is_available() else Accelerator()
        student.eval()  # no dropout: the original's predictions have none
        model = Distilled(student, head)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        # Weight decay would pull the weights away from the original, towards zero.
        optimizer = torch.optim.AdamW(trained, lr=0.0, betas=BETAS, weight_decay=0.0, fused=_fused(trained))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Read after `prepare`: FSDP replaces the parameters by shards.
        prepared: Any = self.accelerator.unwrap_model(self.model)
        named = [(name, value) for name, value in prepared.student.named_parameters() if value.requires_grad]
        self.names, self.trained = [name for name, _ in named], [value for _, value in named]
        self.steps = len(corpus.order) // recipe.sequences
        self.progress = Progress()

    def run(self, watcher: Watcher | None = None) -> None:
        """Train on the whole corpus, resuming from the state on disk if there is one.

        Raises:
            NotFinite: the loss is NaN or infinite; `best` returns the best earlier state.
            GradmapError: the state cannot be written.
        """
        self._resume()
        progress, tokens_of = self.progress, self.corpus.ids.shape[1]
        if watcher is not None and progress.step:
            watcher.advance(progress.step * self.recipe.sequences * tokens_of)
        check_after = {round(self.steps * check / CHECKS) for check in range(1, CHECKS + 1)}
        saved = started = time.monotonic()
        before = progress.seconds
        while progress.step < self.steps:
            places = self._places(progress.step)
            loss = self._step(places, rate_at(progress.step, self.steps))
            progress.step += 1
            if not math.isfinite(loss):
                raise NotFinite(progress.step)
            progress.since += loss
            progress.since_steps += 1
            progress.seconds = before + time.monotonic() - started
            if watcher is not None:
                watcher.advance(len(places) * tokens_of)
            if progress.step in check_after:
                self._check()
                if watcher is not None:
                    watcher.checked(progress.checks[-1])
            if time.monotonic() - saved > self.recipe.save_every:
                self._save()
                saved = time.monotonic()

    def _places(self, step: int) -> list[int]:
        start = step * self.recipe.sequences
        return self.corpus.order[start : start + self.recipe.sequences]

    def _step(self, places: Sequence[int], rate: float) -> float:
        """One optimizer step; returns the mean divergence in nats per token."""
        mine = places[self.accelerator.process_index :: self.accelerator.num_processes]
        tokens = self.corpus.ids.shape[1] * len(places)
        total = torch.zeros((), device=self.accelerator.device)
        groups = [mine[start : start + self.recipe.micro] for start in range(0, len(mine), self.recipe.micro)]
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            with self._autocast(), _no_sync(self.accelerator, self.model, not last):
                values, _ = self.model(*self._batch(self.corpus.ids, self.teacher, group))
                # DDP averages the gradients over the processes, and each has only its share of the tokens.
                self.accelerator.backward(values.sum() * (self.accelerator.num_processes / tokens))
            total += values.detach().sum()
        self.accelerator.clip_grad_norm_(self.trained, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        reduced: Any = self.accelerator.reduce(total, "sum")
        return float(reduced) / tokens

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.recipe.autocast)

    def _batch(self, ids: Tensor, teacher: TeacherCache, places: Sequence[int]) -> tuple[Tensor, Any]:
        device = self.accelerator.device
        return ids[list(places)].to(device), teacher.of(places).to(device)

    def held_out(self) -> HeldOut:
        """Measure the student on the held-out sequences."""
        ids = self.watched.ids
        losses: list[float] = []
        divergences: list[float] = []
        with torch.no_grad(), self._autocast():
            for place in range(len(ids)):
                batch, teacher = self._batch(ids, self.watched, [place])
                labels = torch.cat([batch[0, 1:], batch[0, :1]])  # the last position has none and is dropped
                values, nll = self.model(batch, teacher, labels)
                assert nll is not None
                losses.append(float(nll[:-1].mean()))
                divergences.append(float(values.mean()))
        return HeldOut(torch.tensor(losses), torch.tensor(divergences))

    def _check(self) -> None:
        found = self.held_out()
        loss, value = float(found.losses.mean()), float(found.divergences.mean())
        if not math.isfinite(loss + value):
            raise NotFinite(self.progress.step)
        trained = self.progress.since / max(1, self.progress.since_steps)
        tokens = self.progress.step * self.recipe.sequences * self.corpus.ids.shape[1]
        self.progress.checks.append(Check(tokens, loss, value, trained))
        self.progress.since, self.progress.since_steps = 0.0, 0
        if value < self.progress.best:
            self.progress.best, self.progress.best_step = value, self.progress.step
            if self.progress.step < self.steps:  # the values of the last step stay in the model, see `best`
                self._write(BEST, self._values())

    def best(self) -> dict[str, Tensor]:
        """The trained values with the lowest held-out divergence, by parameter name; empty if there was no check."""
        if self.progress.best_step == 0:
            return {}
        if self.progress.best_step == self.progress.step == self.steps:
            return {name: value.clone() for name, value in self._values().items()}
        from safetensors.torch import load_file

        self.accelerator.wait_for_everyone()
        return load_file(self.folder / BEST)

    # -- the state on disk --------------------------------------------------------------------------------------------

    def _values(self) -> dict[str, Tensor]:
        """The trained values on the CPU, by parameter name. Values that are already there are not copied."""
        return {name: whole(parameter.detach()).cpu() for name, parameter in zip(self.names, self.trained, strict=True)}

    def _save(self) -> None:
        values = {f"weight/{name}": value for name, value in self._values().items()}
        for place, moments in self.optimizer.state_dict()["state"].items():
            values |= {f"{key}/{place}": whole(torch.as_tensor(value)).cpu() for key, value in moments.items()}
        self._write(STATE, values, {"key": self.key, "progress": json.dumps(asdict(self.progress))})

    def _write(self, name: str, values: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.partial"
        try:
            save_file(dict(values), partial, metadata)
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise GradmapError(
                f"The training state of the healing cannot be written to {self.folder}: {error}",
                hint="If the disk is full, free some space. Then run the same command again (push and prune: with "
                "--resume); it resumes from the last state.",
            ) from error
        os.replace(partial, self.folder / name)

    def _resume(self) -> None:
        """Load the state on disk, if it has this run's key."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / STATE, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("key") != self.key:
                    return
                values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        except (FileNotFoundError, SafetensorError):
            return
        read = json.loads(metadata["progress"])
        self.progress = Progress(**(read | {"checks": [Check(**check) for check in read["checks"]]}))
        with torch.no_grad():
            for name, parameter in zip(self.names, self.trained, strict=True):
                put(parameter, values.pop(f"weight/{name}"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in values.items():
            key, _, place = name.partition("/")
            state.setdefault(int(place), {})[key] = shard_like(self.trained[int(place)], value)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


class NotFinite(GradmapError):
    """The loss at `step` is NaN or infinite; `Trainer.best` returns the best earlier state."""

    def __init__(self, step: int) -> None:
        super().__init__(f"The training loss of the healing is NaN or infinite at step {step}.")
        self.step = step


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside this context, glibc keeps freed blocks of up to 1 GiB for reuse. By default it would unmap every freed
    activation and page-fault it back in on the next allocation. No effect with other C libraries."""
    try:
        system: Any = ctypes.CDLL(None)
        system.mallopt(_MMAP_THRESHOLD, 1 << 30)
        system.mallopt(_TRIM_THRESHOLD, 1 << 30)
    except (OSError, AttributeError, TypeError):  # not glibc
        yield
        return
    try:
        yield
    finally:
        system.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the largest that glibc's dynamic threshold reaches
        system.mallopt(_TRIM_THRESHOLD, 1 << 26)
        system.malloc_trim(0)


def _fused(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether AdamW can run as one kernel."""
    return all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)


@contextmanager
def _no_sync(accelerator: Any, model: nn.Module, without: bool) -> Iterator[None]:
    """Skip the all-reduce of gradients over the processes, if `without`."""
    if not without:
        yield
        return
    with accelerator.no_sync(model):
        yield
