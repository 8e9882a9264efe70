"""Prefill and decode speed and peak memory of a model: PyTorch eager, and ONNX files as run by `generate` and `serve`.

For speed, all backends are loaded in one process and take turns, round by round: a slow phase of the machine affects
all of them. For memory, each backend has its own process.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gradmap_hub.errors import MemoryNotMeasured

if TYPE_CHECKING:
    from gradmap_hub.runtime import Generation

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 32, 5
PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Ratio:
    """Tokens per second of the original and of the pruned model, which took turns: medians over the rounds. `ratio`:
    median over the rounds of pruned / original; `spread`: its lowest and highest value."""

    original: float
    pruned: float
    ratio: float
    spread: list[float]


@dataclass(frozen=True)
class Speed:
    """Speeds of both models. `prefill`: `prompt_tokens` in one pass; `decode`: then `new_tokens` one by one with the KV
    cache."""

    prefill: Ratio
    decode: Ratio
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    device: str
    dtype: str


class Backend(Protocol):
    """A loaded model. `read` prefills a prompt; each `write` decodes one greedy token and returns it."""

    def read(self, ids: Sequence[int]) -> None: ...

    def write(self) -> int: ...

    def losses(self, ids: Sequence[int]) -> np.ndarray:
        """Negative log-likelihood in nats of each token but the first: (tokens - 1,) float64."""
        ...


class Eager:
    """transformers with its own KV cache, on `batch` equal sequences."""

    def __init__(self, model: Any, batch: int = 1) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._batch = batch

    @staticmethod
    def load(folder: Path, threads: int, *, batch: int = 1, dtype: str = "float32") -> Eager:
        """Load a checkpoint. `threads`: set for the whole process; `dtype`: name of a torch dtype."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        return Eager(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval(), batch)

    def _run(self, ids: Sequence[int], past: Any) -> None:
        rows = self._torch.tensor([list(ids)] * self._batch, device=self._model.device)
        with self._torch.inference_mode():
            done = self._model(rows, past_key_values=past, use_cache=True, logits_to_keep=1)
        self._past, self._next = done.past_key_values, int(done.logits[0, -1].argmax())

    def read(self, ids: Sequence[int]) -> None:
        self._run(ids, None)

    def write(self) -> int:
        token = self._next
        self._run([token], self._past)
        return token

    def losses(self, ids: Sequence[int]) -> np.ndarray:
        torch = self._torch
        row = torch.tensor([list(ids)], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(row).logits[0, :-1].double()
            return torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").cpu().numpy()


class OnnxRuntime:
    """One ONNX file, run as `generate` does, or with `batch` > 1 equal sequences as `serve` does. `most`: the maximum
    number of tokens written after a prompt."""

    def __init__(self, folder: Path, artifact: str, threads: int, most: int, batch: int = 1) -> None:
        from gradmap_hub import runtime

        self._model = runtime.load(folder, artifact=artifact, threads=threads)
        self._most = most
        self._together = self._model.batch(batch) if batch > 1 else None
        self._answers: list[Generation] = []
        self._rows = batch

    def read(self, ids: Sequence[int]) -> None:
        for answer in self._answers:
            answer.close()
        start = self._model.start if self._together is None else self._together.start
        self._answers = [start(ids, max_tokens=self._most + 1, ignore_end=True) for _ in range(self._rows)]
        while self._answers[0].reading:
            self._step()

    def write(self) -> int:
        token = self._answers[0].token_ids[-1]
        self._step()
        return token

    def _step(self) -> None:
        if self._together is None:
            self._answers[0].advance()
            return
        for said in self._together.step(self._answers):
            if isinstance(said, Exception):
                raise said

    def losses(self, ids: Sequence[int]) -> np.ndarray:
        return self._model.losses(ids)


@dataclass
class Timed:
    """Seconds per round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def take_turns(
    backends: Sequence[Backend],
    prompt: Sequence[int],
    *,
    rounds: int = ROUNDS,
    new_tokens: int = NEW_TOKENS,
    within: Sequence[Callable[[], AbstractContextManager[None]]] | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Timed]:
    """Run every backend once per round, after a warm-up. Every other round runs in reverse, so that no backend always
    follows the same one.

    Args:
        within: Context manager of each backend, entered for each of its turns.
        done: Called after each turn, warm-up included.
    """
    settings = within or [nullcontext] * len(backends)
    for backend, setting in zip(backends, settings, strict=True):
        with setting():
            backend.read(prompt)
            backend.write()
        done()
    found = [Timed() for _ in backends]
    for number in range(rounds):
        turns = list(zip(backends, settings, found, strict=True))
        for backend, setting, times in turns if number % 2 == 0 else reversed(turns):
            with setting():
                times.prefill.append(_seconds(lambda backend=backend: backend.read(prompt)))
                times.decode.append(_seconds(lambda backend=backend: [backend.write() for _ in range(new_tokens)]))
            done()
    return found


def against_original(
    model: Any,
    pruned: Callable[[], AbstractContextManager[None]],
    prompt: Sequence[int],
    *,
    rounds: int = ROUNDS,
    new_tokens: int = NEW_TOKENS,
    done: Callable[[], None] = lambda: None,
) -> Speed:
    """Speed of `model` in PyTorch, unchanged and inside the context `pruned()`, which makes it the pruned model.

    Args:
        prompt: Token ids.
        new_tokens: Tokens decoded after the prompt.
        done: Called after each turn, warm-up included.
    """
    import torch

    backend, parameter = Eager(model), next(model.parameters())
    before, after = take_turns(
        [backend] * 2, prompt, rounds=rounds, new_tokens=new_tokens, within=[nullcontext, pruned], done=done
    )
    return Speed(
        _ratio(len(prompt), before.prefill, after.prefill),
        _ratio(new_tokens, before.decode, after.decode),
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=parameter.device.type,
        dtype=str(parameter.dtype).removeprefix("torch."),
    )


def _ratio(tokens: int, original: Sequence[float], pruned: Sequence[float]) -> Ratio:
    """The ratio of two series of seconds per round."""
    quotients = [before / after for before, after in zip(original, pruned, strict=True)]
    return Ratio(
        tokens / statistics.median(original),
        tokens / statistics.median(pruned),
        statistics.median(quotients),
        [min(quotients), max(quotients)],
    )


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_memory(
    folder: Path,
    backend: str,
    threads: int,
    *,
    batch: int = 1,
    dtype: str = "float32",
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> int | None:
    """Peak resident bytes of a separate process that loads one backend, prefills and decodes; libraries are included.
    None where the system does not report it (only Linux does).

    Args:
        backend: PYTORCH or the path of an ONNX file in `folder`.
        batch: Number of equal sequences.
        dtype: Name of the torch dtype for PYTORCH.

    Raises:
        MemoryNotMeasured: the process failed or was killed.
    """
    numbers = [str(number) for number in (threads, batch, prompt_tokens, new_tokens)]
    command = [sys.executable, "-m", "gradmap_hub.evaluation.speed", str(folder.resolve()), backend, dtype, *numbers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise MemoryNotMeasured(backend, lines[-1] if lines and done.returncode > 0 else _exit_text(done.returncode))
    said = done.stdout.split()
    return int(said[-1]) if said else None


def _exit_text(code: int) -> str:
    if code > 0:
        return f"its process exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process was killed by signal {-code}"


def _peak_of_this_process() -> int | None:
    """Peak resident bytes. Not from getrusage: on Linux a new process inherits the peak of its parent there."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _answer_once(folder: Path, name: str, dtype: str, threads: int, batch: int, prompt: int, new: int) -> None:
    """The process of `peak_memory`: prints its peak resident bytes."""
    backend: Backend = (
        Eager.load(folder, threads, batch=batch, dtype=dtype)
        if name == PYTORCH
        else OnnxRuntime(folder, name, threads, new, batch)
    )
    backend.read([5 + index % 64 for index in range(prompt)])
    for _ in range(new):
        backend.write()
    if (peak := _peak_of_this_process()) is not None:
        print(peak)


def median_interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median and the ends of its 95% bootstrap interval."""
    random = np.random.default_rng(0)
    medians = np.sort(np.median(random.choice(np.asarray(values), (draws, len(values))), axis=1))
    return float(np.median(values)), float(medians[int(0.025 * draws)]), float(medians[int(0.975 * draws) - 1])


if __name__ == "__main__":
    # Where another package installed scikit-learn, transformers imports it (2 s) for a heuristic not used here.
    sys.modules["sklearn"] = None  # pyright: ignore[reportArgumentType]
    _answer_once(Path(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
