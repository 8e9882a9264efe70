"""Runs Python modules in forks of a process that has imported everything already.

Importing torch and transformers costs more than most commands compute on a tiny model. A fork is still a process of its
own, with its own arguments, environment, folder and standard streams; it only skips the imports. Of what modules read
from the environment while they are imported, HF_ENDPOINT and HF_HOME are replaced by the fork's; all else (such as
HF_HUB_OFFLINE) is that of the first process.

A request is one line of JSON with the three standard streams as descriptors; the answer is the exit status, and whether
torch was imported, as one line of JSON. Linux only.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_LIGHT = ("gradmap_hub.cli.app", "gradmap_hub.hub.client", "huggingface_hub.hf_api", "huggingface_hub.file_download")
_TORCH = (
    "torch",
    "numpy",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
)
_COMMANDS = ("models", "data", "pruning", "evaluation", "pipeline", "card", "space", "hub")
# As the command line imports them by itself; what a command imports before torch; what it needs to the end; and what a
# process that exports a model does.
PRELOADED = {
    "light": _LIGHT,
    "full": (*_LIGHT, *_TORCH, *(f"gradmap_hub.{name}.*" for name in _COMMANDS)),
    # Not onnxruntime: its import starts a thread, which a fork would be without.
    "export": (*_TORCH, "onnx", "onnx_ir", "optimum.exporters.onnx.model_configs"),
}

# What the first process has in the environment in place of the forks' own: strings that occur nowhere else.
PLACEHOLDERS = {"HF_ENDPOINT": "http://hub-of-the-fork.invalid", "HF_HOME": "/home-of-the-fork/hf"}

# A stand-in for the interpreter, `STAND_IN -m MODULE`: what starts a process by an interpreter's path starts a fork.
_STAND_IN = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
request = {{"module": sys.argv[2], "arguments": sys.argv[3:], "environment": dict(os.environ), "folder": os.getcwd()}}
line = json.dumps(request).encode() + b"\\n"
server.sendall(line[socket.send_fds(server, [line], [0, 1, 2]):])
code = json.loads(server.makefile("rb").readline())["code"]
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Forks:
    """A process of one kind (see PRELOADED), started when this is made, importing when first asked, and its forks."""

    def __init__(self, kind: str, environment: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self._path = str(self._folder / "socket")
        self.python = self._folder / "python"
        self.python.write_text(_STAND_IN.format(python=sys.executable, path=self._path))
        self.python.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._path)
            listener.listen(16)
            command = [sys.executable, __file__, str(listener.fileno()), kind]
            self._server = subprocess.Popen(
                command, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )

    def run(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
    ) -> tuple[int, str, str, bool, int, float]:
        """Exit status, stdout, stderr, whether torch was imported, the largest memory in bytes of it or a child, and
        the seconds of the processor that it and its children took.

        Raises:
            TimeoutError: it did not end in time; it is killed.
        """
        request = {
            "module": module, "arguments": list(arguments), "environment": dict(environment), "folder": str(folder),
        }  # fmt: skip
        line = json.dumps(request).encode() + b"\n"
        with (
            socket.socket(socket.AF_UNIX) as server,
            open(os.devnull, "rb") as nothing,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            server.settimeout(timeout)
            server.connect(self._path)
            streams = [nothing.fileno(), out.fileno(), err.fileno()]
            server.sendall(line[socket.send_fds(server, [line], streams) :])
            with server.makefile("rb") as lines:
                answer = json.loads(lines.readline())
            texts = [file.seek(0) or file.read().decode() for file in (out, err)]
        return answer["code"], texts[0], texts[1], answer["torch"], answer["bytes"], answer["seconds"]

    def stop(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=20)
        shutil.rmtree(self._folder)


# -- the process that forks ------------------------------------------------------------------------------------------


def _serve(listener: socket.socket, kind: str) -> None:
    """Returns when stdin is closed."""
    preloaded = False
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        with contextlib.suppress(ChildProcessError):  # those that waited for earlier forks
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            return
        client, _ = listener.accept()
        if not preloaded:
            _preload(PRELOADED[kind])
            if kind == "full":
                use_for_exports(os.environ.get("TEST_EXPORTS"))
            preloaded = True
        if os.fork() == 0:
            break
        client.close()
    listener.close()
    request, streams = _receive(client)
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        client.close()
        _become(request, streams, tell)
    os.close(tell)
    _wait(pid, client, told)


def _preload(names: Sequence[str]) -> None:
    if "torch" in names:
        from transformers.utils import import_utils

        # For a heuristic of assisted generation, transformers would spend half of this on scikit-learn.
        import_utils._sklearn_available = False  # pyright: ignore[reportPrivateUsage]
    for name in names:
        package = name.removesuffix(".*")
        module = importlib.import_module(package)
        if package != name:
            for entry in pkgutil.iter_modules(module.__path__, f"{package}."):
                importlib.import_module(entry.name)
    gc.collect()
    gc.freeze()


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    line, ancillary, _, _ = client.recvmsg(1 << 16, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    while not line.endswith(b"\n"):
        line += client.recv(1 << 16)
    return json.loads(line), list(descriptors)


def _become(request: dict[str, Any], streams: Sequence[int], tell: int) -> NoReturn:
    """Turn this fork into the process that was asked for. It ends as the interpreter does, but for the freeing of every
    module: that would copy all pages that it shares with the first process."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for name, placeholder in PLACEHOLDERS.items():
        if os.environ.get(name) == placeholder:
            _replace(placeholder, request["environment"][name])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [request["module"], *request["arguments"]]
    patches = sys.modules.get("sitecustomize")
    if hasattr(patches, "apply"):
        patches.apply()
    status: object = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    os.write(tell, b"torch" if "torch" in sys.modules else b"-")
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - waits for those that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _replace(placeholder: str, value: str) -> None:
    """Put `value` in place of `placeholder` in every constant of the modules that read the environment, and in the
    client that huggingface_hub makes while it is imported."""
    packages = ("huggingface_hub", "transformers", "accelerate", "gradmap_hub")
    holders: list[Any] = [module for name, module in sys.modules.items() if name.partition(".")[0] in packages]
    if "huggingface_hub.hf_api" in sys.modules:
        holders.append(sys.modules["huggingface_hub.hf_api"].api)
    for holder in holders:
        for key, found in list(vars(holder).items()):
            if isinstance(found, str) and placeholder in found:
                setattr(holder, key, found.replace(placeholder, value))


def _wait(pid: int, client: socket.socket, told: int) -> NoReturn:
    """Tell the client how the fork ended; kill it if the client ends first."""
    process = os.pidfd_open(pid)
    ready, _, _ = select.select([process, client], [], [])
    if process not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    os.set_blocking(told, False)
    words = b""
    with contextlib.suppress(BlockingIOError):
        words = os.read(told, 16)
    code = os.waitstatus_to_exitcode(status)
    seconds = used.ru_utime + used.ru_stime
    answer = {"code": code, "torch": words == b"torch", "bytes": used.ru_maxrss * 1024, "seconds": seconds}
    with contextlib.suppress(OSError):
        client.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def use_for_exports(python: str | None) -> None:
    """Have the exporters start their processes with `python`, a stand-in; None: as a user's are."""
    if python is not None:
        from types import SimpleNamespace

        from gradmap_hub.exporters import onnx, processes

        for module in (onnx, processes):  # not the function itself, which has tests of its own
            module.environment = SimpleNamespace(python=lambda: python)  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
