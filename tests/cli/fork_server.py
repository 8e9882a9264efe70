"""Runs `gradmap-hub` commands in forks of one process that has imported everything already.

Importing torch and transformers costs more than most commands compute on a tiny model. A fork is still a process of its
own, with its own arguments, environment, folder and standard streams; it only skips the imports. What is read from the
environment while modules are imported (HF_ENDPOINT, HF_HOME) is that of this process.

Started as `fork_server.py SOCKET light|full`. A request is one line of JSON and three descriptors (a socket for the
reply, stdout, stderr); the reply is the pid, and at the end the exit status and whether torch was imported, each as a
line of JSON.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
from typing import Any

LIGHT = ("gradmap_hub.cli.app", "gradmap_hub.hub.client", "huggingface_hub.hf_api", "huggingface_hub.file_download")
FULL = (
    "torch",
    "numpy",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
)


def preload(kind: str) -> None:
    for name in LIGHT:
        importlib.import_module(name)
    if kind == "light":
        return
    for name in FULL:
        importlib.import_module(name)
    import gradmap_hub

    for entry in pkgutil.walk_packages(gradmap_hub.__path__, "gradmap_hub."):
        # The embedded Hub, exporters, Space and servers run in processes of their own, or not at all.
        if entry.name.split(".")[1] in ("models", "data", "pruning", "evaluation", "pipeline", "card", "space", "hub"):
            importlib.import_module(entry.name)


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    line, ancillary, _, _ = control.recvmsg(1 << 16, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    if not line:
        return None
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    while not line.endswith(b"\n"):
        line += control.recv(1 << 16)
    return json.loads(line), list(descriptors)


def answer(reply: int, value: Any) -> None:
    os.write(reply, json.dumps(value).encode() + b"\n")


def become(request: dict[str, Any], reply: int, out: int, err: int) -> None:
    """Turn this fork into the process that a shell would have started."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.set_inheritable(reply, False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["gradmap_hub", *request["arguments"]]
    patches = sys.modules.get("sitecustomize")
    if patches is not None:
        patches.apply()
    try:
        runpy.run_module("gradmap_hub", run_name="__main__", alter_sys=True)
    finally:
        answer(reply, "torch" in sys.modules)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    preload(sys.argv[2])
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the commands
    while True:
        received = receive(control)
        if received is None:
            return
        request, (reply, out, err) = received
        if os.fork() == 0:
            break
        for descriptor in (reply, out, err):
            os.close(descriptor)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        become(request, reply, out, err)
        return
    answer(reply, pid)
    _, status = os.waitpid(pid, 0)
    answer(reply, os.waitstatus_to_exitcode(status))
    os._exit(0)


if __name__ == "__main__":
    main()
