"""How models write tool calls: a table of the formats of model families, and the grammar of each for llguidance.

The chat template shows the tools to a model; how the model writes a call depends on its family. The format is
recognised by strings in the chat template and the special tokens.
"""

# ruff: noqa: RUF001 - DeepSeek's tokens have characters that look like others

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAME, ARGUMENTS = "NAME", "ARGUMENTS"
_CALL = '{"name": "NAME", "arguments": ARGUMENTS}'
# Limit of calls in a constrained answer: a small model would write calls for ever.
_MOST_CALLS = 8


@dataclass(frozen=True)
class ToolFormat:
    """How one family writes calls: `before`, then one or more `call` separated by `between`, then `after`.

    `shown_by`: strings that all occur in the chat template or the special tokens of such a model; `call`: contains the
    placeholders NAME and ARGUMENTS (a JSON object); `marks`: strings that calls begin with; without any, calls are the
    beginning of the answer; `id_length`: number of characters of call ids, if the family prescribes it.
    """

    name: str
    shown_by: tuple[str, ...]
    before: str
    call: str
    between: str
    after: str
    marks: tuple[str, ...]
    id_length: int | None = None

    @property
    def bare(self) -> bool:
        """Whether a call may begin an answer without any mark."""
        return not self.shown_by or self.name == "llama3"

    @property
    def is_object(self) -> bool:
        """Whether a call is one JSON object; otherwise the name stands before the arguments."""
        return f'"{NAME}"' in self.call

    @property
    def written(self) -> str:
        """All strings of the format, concatenated."""
        return "".join((*self.marks, self.before, self.call, self.between, self.after))


# The first format whose `shown_by` strings all occur is taken; the last one fits every template with tools.
FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "deepseek-v3", ("<｜tool▁calls▁begin｜>", "```json"), "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>", "\n",
        "<｜tool▁calls▁end｜>", ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ),
    ToolFormat(
        "deepseek-v3.1", ("<｜tool▁calls▁begin｜>",), "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>", "", "<｜tool▁calls▁end｜>",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ),
    ToolFormat(
        "mistral-v11", ("[TOOL_CALLS]", "[ARGS]"), "", "[TOOL_CALLS]NAME[ARGS]ARGUMENTS", "", "", ("[TOOL_CALLS]",), 9
    ),
    ToolFormat("mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS][", _CALL, ", ", "]", ("[TOOL_CALLS]",), 9),
    ToolFormat(
        "command-r7b", ("<|START_ACTION|>",), "<|START_ACTION|>[\n    ",
        '{"tool_call_id": "0", "tool_name": "NAME", "parameters": ARGUMENTS}', ",\n    ", "\n]<|END_ACTION|>",
        ("<|START_ACTION|>",),
    ),
    ToolFormat(
        "phi4", ("<|tool|>", "<|tool_call|>"), "<|tool_call|>[", _CALL, ", ", "]<|/tool_call|>", ("<|tool_call|>",)
    ),
    ToolFormat("granite", ("<|tool_call|>",), "<|tool_call|>[", _CALL, ", ", "]", ("<|tool_call|>",)),
    ToolFormat("hermes", ("<tool_call>",), "", f"<tool_call>\n{_CALL}\n</tool_call>", "\n", "", ("<tool_call>",)),
    ToolFormat("jamba", ("<tool_calls>",), "<tool_calls>[", _CALL, ", ", "]</tool_calls>", ("<tool_calls>",)),
    ToolFormat(
        "llama3", ("<|python_tag|>",), "", '{"name": "NAME", "parameters": ARGUMENTS}', "; ", "", ("<|python_tag|>",)
    ),
    ToolFormat("json", (), "", _CALL, "\n", "", ()),
)  # fmt: skip
# Unsupported formats: their arguments are not JSON, and parsing them would be a guess.
_OTHERS = {"<function=": "Qwen3-Coder's", "<arg_key>": "GLM's", "<|tool_call_start|>": "LFM2's"}
_TOOLS = re.compile(r"\btools\b")


def tool_template_of(template: str | None, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the chat template for conversations with tools, as transformers does: the one named `tool_use` in
    tokenizer_config.json, else `template`."""
    named = tokenizer_config.get("chat_template")
    if isinstance(named, list):
        named = {each.get("name"): each.get("template") for each in named if isinstance(each, Mapping)}
    found = named.get("tool_use") if isinstance(named, Mapping) else None
    return found if isinstance(found, str) else template


def format_of(template: str, special: Sequence[str]) -> ToolFormat | None:
    """Return the format of a model's calls; None if its chat template lacks tools, or the format is not supported."""
    if not _TOOLS.search(template) or any(mark in template for mark in _OTHERS):
        return None
    shown = "\n".join((template, *special))
    return next(row for row in FORMATS if all(text in shown for text in row.shown_by))


def grammar_of(
    row: ToolFormat,
    functions: Mapping[str, Mapping[str, Any]],
    special: Mapping[str, int],
    *,
    parallel: bool,
    answer: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> str:
    """Return a grammar, in llguidance's variant of Lark, of calls as a model writes them.

    Args:
        row: the format of the calls.
        functions: name to the JSON schema of the arguments, for each function that may be called.
        special: text to id of the special tokens, which a grammar names by their ids.
        parallel: whether several calls are allowed, at most 8.
        answer: the JSON schema of an answer without calls; None: the answer must have a call.
        options: llguidance's options for JSON, such as the white space.
    """
    begin, end = row.call.split(ARGUMENTS)
    between = " ".join((_terminals(row.between, special), "call")).strip()
    repeated = f"({between}){{0,{_MOST_CALLS - 1}}}" if parallel else ""
    lines = [
        "%llguidance {}",
        "start: calls" if answer is None else "start: calls | answer",
        f"calls: {_terminals(row.before, special)} call {repeated} {_terminals(row.after, special)}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(functions))),
    ]
    for number, (name, schema) in enumerate(functions.items()):
        opened = _terminals(begin.replace(NAME, name), special)
        lines.append(f"call_{number}: {opened} arguments_{number} {_terminals(end, special)}")
        lines.append(f"arguments_{number}: %json {json.dumps({**schema, 'x-guidance': dict(options)})}")
    if answer is not None:
        lines.append(f"answer: %json {json.dumps({**answer, 'x-guidance': dict(options)})}")
    return "\n".join(lines)


def _terminals(text: str, special: Mapping[str, int]) -> str:
    """Return a string as terminals of a grammar: special tokens by id, the rest quoted."""
    if not text:
        return ""
    longest = sorted((token for token in special if token), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest)) + ")", text) if longest else [text]
    return " ".join(
        f"<[{special[part]}]>" if part in special else json.dumps(part, ensure_ascii=False) for part in parts if part
    )
