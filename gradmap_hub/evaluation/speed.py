"""How fast a model reads a prompt and writes tokens, and the memory it takes: PyTorch eager, and ONNX files as
`generate` and `serve` step them.

For speed, backends are loaded once in one process and take turns, round by round, so that what slows the machine down
for a while slows all of them. For memory, each has a process of its own.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    from gradmap_hub.runtime import Generation

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 32, 5
PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Ratio:
    """Tokens per second of the original and of the pruned model, which took turns: medians over the rounds. `ratio`:
    median of pruned over original round by round, `spread` its lowest and highest value."""

    original: float
    pruned: float
    ratio: float
    spread: list[float]


@dataclass(frozen=True)
class Speed:
    """`prefill`: reading `prompt_tokens` at once; `decode`: then writing `new_tokens` one by one with the KV cache."""

    prefill: Ratio
    decode: Ratio
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    device: str
    dtype: str


class Backend(Protocol):
    """A loaded model that reads a prompt and then writes greedy tokens, one by one."""

    def read(self, ids: Sequence[int]) -> None: ...

    def write(self) -> int: ...

    def losses(self, ids: Sequence[int]) -> np.ndarray:
        """Negative log-likelihood in nats of each token but the first: (tokens - 1,) float64."""
        ...


class Eager:
    """transformers, with its own KV cache; `batch` equal rows at a time."""

    def __init__(self, model: Any, batch: int = 1) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._batch = batch

    @staticmethod
    def load(folder: Path, threads: int, *, batch: int = 1, dtype: str = "float32") -> Eager:
        """In `dtype`. `threads` are those of the whole process."""
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
    """One artifact, as `generate` steps it or, `batch` equal rows at a time, as `serve` does. `most`: the most tokens
    that it will write after a prompt."""

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
    """Seconds per round of reading the prompt and of writing."""

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
    """Every backend once in every round, after one that does not count: the first run of each pays for allocations.
    Every other round goes backwards, so that none always runs behind the same one.

    `within`: what each backend runs in. `done` is called after each turn, that of warming up included."""
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
    """`model` in PyTorch as it is, and within `pruned()`, which makes it the pruned model for a while."""
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
    """Of seconds per round."""
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
    """Bytes: the most that a process of its own had resident which loaded one backend, read a prompt and wrote, its
    libraries included. `backend`: PYTORCH or the path of an ONNX file in `folder`. None where the system does not tell.

    Raises:
        subprocess.CalledProcessError: the backend does not run.
    """
    numbers = [str(number) for number in (threads, batch, prompt_tokens, new_tokens)]
    command = [sys.executable, "-m", "gradmap_hub.evaluation.speed", str(folder.resolve()), backend, dtype, *numbers]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(said[-1]) if said else None


def _peak_of_this_process() -> int | None:
    """Bytes. The peak of getrusage is no use: on Linux a new process begins with that of the one that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _answer_once(folder: Path, name: str, dtype: str, threads: int, batch: int, prompt: int, new: int) -> None:
    """What `peak_memory` asks its process to do."""
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
    """Median and its 95% bootstrap interval."""
    random = np.random.default_rng(0)
    medians = np.sort(np.median(random.choice(np.asarray(values), (draws, len(values))), axis=1))
    return float(np.median(values)), float(medians[int(0.025 * draws)]), float(medians[int(0.975 * draws) - 1])


if __name__ == "__main__":
    _answer_once(Path(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
