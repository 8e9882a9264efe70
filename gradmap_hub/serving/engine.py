"""What the server needs of a model; `gradmap_hub.runtime.TextModel` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from gradmap_hub.runtime import Sampling, Scoring, TokenScore
    from gradmap_hub.runtime.constraints import Constraint, Wanted
    from gradmap_hub.runtime.tool_formats import ToolFormat


class Answer(Protocol):
    """Interface of a `gradmap_hub.runtime.Generation`; used by the decode thread only."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled"] | None: ...
    @property
    def tokens_per_second(self) -> float | None: ...
    @property
    def cached_tokens(self) -> int: ...
    def take_scores(self) -> Sequence[TokenScore]: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class Batch(Protocol):
    """Interface of a `gradmap_hub.runtime.batch.Batch`."""

    def start(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling = ...,
        stop: Sequence[str] = (),
        scoring: Scoring | None = None,
        echo: str = "",
        ignore_end: bool = False,
        min_tokens: int = 0,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] | None = None,
    ) -> Any: ...
    @property
    def prefix_bytes(self) -> int: ...
    def step(self, answers: Sequence[Any]) -> list[str | Exception]:
        """Run one step of each `Answer`; return the text that became final, or the exception, for each."""
        ...


class Engine(Protocol):
    """Interface of a `gradmap_hub.runtime.TextModel`, as far as the server uses it."""

    @property
    def name(self) -> str: ...
    @property
    def artifact(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def vocabulary(self) -> int: ...
    def encode(self, text: str, *, special: bool = True) -> list[int]: ...
    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]: ...
    @property
    def tool_format(self) -> ToolFormat | None: ...
    @property
    def call_tokens(self) -> Mapping[int, str]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def is_special(self, token: int) -> bool: ...
    def constrain(self, wanted: Wanted) -> Constraint: ...
    @property
    def cache_bytes(self) -> int: ...
    def batch(self, rows: int, *, prefix_cache: int | None = None, in_turn: bool = False) -> Batch: ...
