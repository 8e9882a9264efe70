"""Writes docs/api.md from the docstrings of the public API: `python docs/make_api.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import gradmap_hub
from gradmap_hub import errors

DESTINATION = Path(__file__).with_name("api.md")
FUNCTIONS = ("prune", "heal", "inspect", "push", "publish", "export", "evaluate", "sweep", "load")
OPTIONS = ("PruneMethod", "PublishConfig")
_HEAD = """# Python API

Written from the docstrings by `python docs/make_api.py`; a test holds the two equal.

```python
from gradmap_hub import prune, heal, push, export, evaluate, sweep, load
```

`import gradmap_hub` loads nothing heavy; torch, transformers and ONNX Runtime load when a function first needs them.
Every function takes the options of the command of its name, with the same defaults. `prune_model` in
`gradmap_hub.pruning.prune_model` is the computation of `prune` alone, on a decoder in memory, without files.
"""
_SECTION = re.compile(r"^(Args|Returns|Raises|Example):$", re.M)


def text() -> str:
    """The whole page."""
    parts = [_HEAD]
    parts += [_function(name, getattr(gradmap_hub, name)) for name in FUNCTIONS]
    parts += [_options(name, getattr(gradmap_hub, name)) for name in OPTIONS]
    parts.append(_errors())
    return "\n".join(parts)


def _function(name: str, function: Any) -> str:
    summary, *sections = _SECTION.split(inspect.getdoc(function) or "")
    lines = [f"## {name}", "", "```python", _signature(name, function), "```", "", summary.strip(), ""]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = inspect.cleandoc(body.strip("\n"))
        if title == "Example":
            code = "\n".join(re.sub(r"^(>>>|\.\.\.) ?", "", line) for line in body.splitlines())
            code = code.replace("\n", "\n\n", 1)  # a blank line after the import, as the formatter wants it
            lines += ["```python", code, "```", ""]
        elif title == "Args":
            entries = re.split(r"\n(?=\w+: )", body)
            pairs = [entry.split(": ", 1) for entry in entries]
            lines += [*(f"- `{argument}`: {' '.join(words.split())}" for argument, words in pairs), ""]
        else:
            lines += [f"**{title}**: {' '.join(body.split())}", ""]
    return "\n".join(lines)


def _signature(name: str, function: Any) -> str:
    """The call, an argument a line, with annotations as they stand in the source."""
    parameters: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    returned = inspect.signature(function).return_annotation
    return f"{name}(\n" + "".join(f"    {entry},\n" for entry in parameters) + f") -> {returned}"


def _options(name: str, kind: Any) -> str:
    lines = [f"## {name}", "", (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " "), "",
             "| Field | Default | |", "|---|---|---|"]  # fmt: skip
    for entry in dataclasses.fields(kind):
        words = entry.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{entry.name}` | `{entry.default!r}` | {words} |")
    return "\n".join([*lines, ""])


def _errors() -> str:
    lines = [
        "## Errors", "",
        "All are subclasses of `gradmap_hub.GradmapError`, in `gradmap_hub.errors`: `message` says what is wrong,",
        "`hint` what to do about it.", "", "| Error | |", "|---|---|",
    ]  # fmt: skip
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.GradmapError) and kind is not errors.GradmapError:
            lines.append(f"| `{name}` | {(inspect.getdoc(kind) or '').split(chr(10) * 2)[0].replace(chr(10), ' ')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    DESTINATION.write_text(text(), encoding="utf-8")
