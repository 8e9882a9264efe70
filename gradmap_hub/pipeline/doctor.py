"""`doctor`: what is installed, what this machine can run, and whether the Hub answers. Nothing is changed.

A problem is a fault on which a command would fail; it is reported with the command or setting that fixes it. What only
some commands need, such as a token or an extra, is reported but is not a problem.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from gradmap_hub.errors import GradmapError, HubError, NotLoggedIn
from gradmap_hub.files import user_cache
from gradmap_hub.layout import free_bytes
from gradmap_hub.machine import cpu_count
from gradmap_hub.progress import Reporter
from gradmap_hub.units import reason_of

if TYPE_CHECKING:
    from gradmap_hub.hub.client import Hub

PACKAGE = "gradmap-hub"
# Extras that change what commands can do. Of `cpu` and `gpu`, one is enough.
EXTRAS = {
    "cpu": "ONNX Runtime: generate, serve, checks of exports, the Space",
    "gpu": "ONNX Runtime on CUDA, instead of cpu",
    "onnx": "ONNX export through Optimum",
    "serve": "the OpenAI-compatible server",
    "json": "answers that follow a JSON Schema",
    "space": "the comparison Space on this machine",
    "lora": "healing with LoRA",
    "eval": "lm-eval tasks and data sets",
}
_ALTERNATIVES = ("cpu", "gpu")
# Least free space of a folder, in bytes: that of the sample model with its exports.
_LEAST_FREE = 5_000_000_000


@dataclass(frozen=True)
class Extra:
    """An extra of this package. `missing`: requirements that are not met, as pip reads them."""

    name: str
    purpose: str
    missing: list[str]

    @property
    def install(self) -> str:
        return f"pip install '{PACKAGE}[{self.name}]'"


@dataclass(frozen=True)
class Device:
    """A device that torch can compute on. `memory`: bytes, None if the system does not report it."""

    name: str
    kind: str
    memory: int | None = None


@dataclass(frozen=True)
class HubState:
    """What the Hub answered. `account`: the owner of the token, None without one; `problem`: why the Hub could not be
    asked, or why it rejects the token."""

    endpoint: str
    reachable: bool
    account: str | None = None
    role: str = ""
    organizations: list[str] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Folder:
    """A folder that commands write to. `free`: bytes on its file system."""

    purpose: str
    path: str
    free: int
    writable: bool


@dataclass(frozen=True)
class Problem:
    """A fault on which a command would fail. `mend`: the command or setting that fixes it."""

    what: str
    mend: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found. `lane`: the major version of transformers, which decides where exports run."""

    gradmap_hub: str
    python: str
    system: str
    cpus: int
    memory: int
    lane: str
    export_environment: str
    packages: dict[str, str]
    extras: list[Extra]
    devices: list[Device]
    providers: list[str]
    hub: HubState
    folders: list[Folder]
    problems: list[Problem]


def doctor(reporter: Reporter, hub: Hub | None = None, *, offline: bool = False) -> Diagnosis:
    """Look at this installation, this machine and the Hub.

    Args:
        hub: By default the Hub of the environment (HF_ENDPOINT, HF_TOKEN).
        offline: Do not ask the Hub.
    """
    import psutil

    reporter.start("Looking at packages and devices")
    wanted = list(_requirements(None))
    problems = [
        Problem(f"{need} is required; {_installed(need.name) or 'none'} is installed", f"pip install '{need}'")
        for need in wanted
        if not _met(need)
    ]
    extras = [
        Extra(name, purpose, [str(need) for need in _requirements(name) if not _met(need)])
        for name, purpose in EXTRAS.items()
    ]
    packages = {need.name: found for need in wanted if (found := _installed(need.name))}
    for extra in EXTRAS:
        packages |= {need.name: found for need in _requirements(extra) if (found := _installed(need.name))}
    lane, environment = _lane(problems)
    devices = _devices(problems)
    providers = _providers(problems)
    if all(extra.missing for extra in extras if extra.name in _ALTERNATIVES):
        problems.append(
            Problem("No ONNX Runtime is installed: push, export, generate and serve need it", extras[0].install)
        )
    reporter.finish()
    reporter.start("Asking the Hub")
    state = _hub(hub, offline, problems)
    reporter.finish(state.endpoint)
    folders = list(_folders(problems))
    return Diagnosis(
        version(PACKAGE), platform.python_version(), platform.platform(), cpu_count(), psutil.virtual_memory().total,
        lane, environment, dict(sorted(packages.items())), extras, devices, providers, state, folders, problems,
    )  # fmt: skip


def _requirements(extra: str | None) -> Iterator[Requirement]:
    """The requirements of this package on this machine; with `extra`, only those that the extra adds."""
    for line in requires(PACKAGE) or ():
        need = Requirement(line)
        plain = need.marker is None or need.marker.evaluate({"extra": ""})
        if plain if extra is None else not plain and need.marker is not None and need.marker.evaluate({"extra": extra}):
            need.marker = None
            yield need


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _met(need: Requirement) -> bool:
    found = _installed(need.name)
    return found is not None and need.specifier.contains(found, prereleases=True)


def _lane(problems: list[Problem]) -> tuple[str, str]:
    """The major version of transformers, and the Python interpreter for exports, or why there is none yet."""
    if _installed("transformers") is None:
        return "", ""
    from gradmap_hub.exporters import environment
    from gradmap_hub.models.transformers_compat import has_5

    try:
        return "5" if has_5() else "4", environment.python()
    except GradmapError:
        return "5", "made by the first ONNX export"
    except OSError as error:
        problems.append(Problem(f"The export environment cannot be located: {reason_of(error)}", "set XDG_CACHE_HOME"))
        return "5", ""


def _devices(problems: list[Problem]) -> list[Device]:
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(Problem(f"torch cannot be imported: {reason_of(error)}", "pip install --force-reinstall torch"))
        return []
    found = [Device(platform.processor() or platform.machine(), "cpu")]
    if torch.cuda.is_available():
        for place in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(place)
            found.append(Device(card.name, f"cuda:{place}", card.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("Apple GPU", "mps"))
    return found


def _providers(problems: list[Problem]) -> list[str]:
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            return []
        problems.append(
            Problem(f"ONNX Runtime cannot be imported: {reason_of(error)}", f"pip install '{PACKAGE}[cpu]'")
        )
        return []
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        problems.append(
            Problem(
                "onnxruntime and onnxruntime-gpu are both installed; which one is imported depends on the order of "
                "installation",
                "pip uninstall onnxruntime onnxruntime-gpu, then install one of the extras cpu and gpu",
            )
        )
    return list(onnxruntime.get_available_providers())


def _hub(hub: Hub | None, offline: bool, problems: list[Problem]) -> HubState:
    from gradmap_hub.hub.client import Hub

    try:
        hub = hub or Hub()
    except GradmapError as error:
        problems.append(Problem(error.message, error.hint or ""))
        return HubState("", False, problem=error.message)
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return HubState(hub.endpoint, False, problem="not asked: offline")
    try:
        hub.check_answers()
    except HubError as error:
        problems.append(Problem(error.message, error.hint or "check the network, HF_ENDPOINT and proxy settings"))
        return HubState(hub.endpoint, False, problem=error.message)
    try:
        account = hub.account()
    except NotLoggedIn as error:
        if hub.token:
            problems.append(Problem(error.message, error.hint or "hf auth login"))
        return HubState(hub.endpoint, True, problem="" if hub.token is None else error.message)
    except HubError as error:
        problems.append(Problem(error.message, error.hint or ""))
        return HubState(hub.endpoint, True, problem=error.message)
    return HubState(hub.endpoint, True, account.name, account.role, list(account.organizations))


def _folders(problems: list[Problem]) -> Iterator[Folder]:
    home = Path(os.environ.get("HF_HOME") or user_cache().with_name("huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    places = {
        "results": Path.cwd(),
        "downloads (HF_HUB_CACHE)": hub,
        "environment of exports, samples": user_cache(),
        "temporary files": Path(tempfile.gettempdir()),
    }
    for purpose, path in places.items():
        existing = path.absolute()
        while not existing.exists():
            existing = existing.parent
        found = Folder(purpose, str(path), free_bytes(path), os.access(existing, os.W_OK))
        if not found.writable:
            problems.append(
                Problem(f"{path} ({purpose}) cannot be written to", "choose another folder, or change its permissions")
            )
        elif found.free < _LEAST_FREE and purpose != "temporary files":
            problems.append(
                Problem(
                    f"{path} ({purpose}) has {found.free / 1e9:.1f} GB free",
                    "free some space, or choose another folder",
                )
            )
        yield found
