"""Finds tool calls in the text of an answer, which arrives in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gradmap_hub.runtime.tool_formats import ARGUMENTS, NAME, ToolFormat

# Longer than any text between the beginning of a call and its arguments.
_MOST_HEAD = 200


@dataclass(frozen=True)
class FoundCall:
    """A tool call in an answer; `arguments`: a JSON object, as a string."""

    name: str
    arguments: str


class CallParser:
    """Separates tool calls from the other text of one answer, which arrives in pieces.

    Text that may be part of a call is withheld until the call is complete. A call of an unknown function, or one that
    is never completed, stays text. `calls`: number of calls so far.

    Args:
        row: how the model writes calls.
        names: the functions that may be called.
        parallel: whether calls after the first one are returned.
    """

    def __init__(self, row: ToolFormat, names: Collection[str], *, parallel: bool = True) -> None:
        self._names = names
        self._parallel = parallel
        self._marks = row.marks
        self._bare = row.bare
        begin, end = row.call.split(ARGUMENTS)
        self._head: re.Pattern[str] | None = None
        if not row.is_object:
            before, after = begin.split(NAME)
            for mark in row.marks:  # it is skipped, with what surrounds calls
                before = before.removeprefix(mark)
            self._head = re.compile(rf"{re.escape(before)}([\w.-]+){re.escape(after)}")
        around = {*row.marks, *_words(row.before), *_words(row.after), *_words(end)}
        self._around = sorted(around, key=len, reverse=True)
        self._skip = re.compile("(?:" + "|".join((*map(re.escape, self._around), r"[\s\[\],;]")) + ")*")
        self._text = ""
        self._inside = False
        self._begun = False  # something other than white space has arrived
        self._tried = 0  # characters in which no object has ended
        self.calls = 0

    def add(self, piece: str) -> tuple[str, list[FoundCall]]:
        """Add a piece; return the text that is not part of a call, and the calls that became complete."""
        self._text += piece
        said: list[str] = []
        calls: list[FoundCall] = []
        while self._next(said, calls) if self._inside else self._enter(said):
            pass
        kept = calls if self._parallel else calls[: max(0, 1 - self.calls)]
        self.calls += len(kept)
        return "".join(said), kept

    def rest(self) -> str:
        """Return the withheld text; called after the last piece."""
        rest, self._text = self._text, ""
        return "" if self.calls and self._skip.fullmatch(rest) else rest

    def _enter(self, said: list[str]) -> bool:
        """Pass on the text before the first mark; return whether there is a mark."""
        text = self._text
        places = [place for mark in self._marks if (place := text.find(mark)) >= 0]
        stripped = text.lstrip()
        if self._bare and not self._begun and stripped[:1] in ("{", "["):
            places.append(len(text) - len(stripped))
        if places:
            place = min(places)
            said.append(text[:place].rstrip())
            self._text, self._inside, self._begun, self._tried = text[place:], True, True, 0
            return True
        held = max((_overlap(text, mark) for mark in self._marks), default=0)
        final = text[: len(text) - held].rstrip()  # the white space before a call is a part of it
        self._begun = self._begun or bool(final)
        said.append(final)
        self._text = text[len(final) :]
        return False

    def _next(self, said: list[str], calls: list[FoundCall]) -> bool:
        """Take a call from the beginning of the text; return False if more text is needed."""
        text = self._text
        skipped = self._skip.match(text)
        start = skipped.end() if skipped else 0
        if max((_overlap(text, mark) for mark in self._around), default=0) > len(text) - start:
            return False  # what was skipped may be the beginning of a mark
        left = text[start:]
        head = self._head.match(left) if self._head is not None else None
        if head is not None or (self._head is None and left[:1] == "{"):
            if "}" not in text[self._tried :]:
                self._tried = len(text)
                return False
            self._tried = len(text)
            begin = start if head is None else start + head.end()
            begin += len(text[begin:]) - len(text[begin:].lstrip())
            try:
                value, end = json.JSONDecoder().raw_decode(text, begin)
            except (ValueError, RecursionError):  # incomplete, or it never will be JSON
                return False
            found = _read(value) if head is None else _called(head[1], value)
            if found is None or found.name not in self._names:
                return self._leave(said, end)
            calls.append(found)
            self._text, self._tried = text[end:], 0
            return True
        if not left or any(mark.startswith(left) for mark in self._around) or self._may_be_head(left):
            return False
        # After a call, the marks and separators around it are dropped; without one, they are text.
        return self._leave(said, start + 1, shown=not (self.calls or calls))

    def _may_be_head(self, left: str) -> bool:
        return self._head is not None and len(left) < _MOST_HEAD and "{" not in left

    def _leave(self, said: list[str], count: int, *, shown: bool = True) -> bool:
        """Treat the first `count` characters as text, not as a call; if not `shown`, drop all of them but the last."""
        said.append(self._text[:count] if shown else "")
        self._text, self._inside, self._tried = self._text[count if shown else count - 1 :], False, 0
        return True


def _words(text: str) -> list[str]:
    """Split the text around calls at white space and brackets."""
    return [word for word in re.split(r"[\s\[\]{}]+", text) if word]


def _read(value: Any) -> FoundCall | None:
    """Return the call that a JSON value describes; None if it describes none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = next((value[key] for key in ("name", "tool_name", "function") if isinstance(value.get(key), str)), None)
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    return None if name is None or not given else _called(name, given[0])


def _called(name: str, arguments: Any) -> FoundCall | None:
    if isinstance(arguments, str):  # JSON within JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    arguments = {} if arguments is None else arguments
    return FoundCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of a text that is a proper prefix of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
