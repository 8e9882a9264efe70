"""The settings of commands on a finished folder: frozen, validated on construction, each with its help text."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from gradmap_hub.budget import parse_budget
from gradmap_hub.config import DEFAULT_EVALUATION, HEAL_PARTS, PruneMethod, help_of, option
from gradmap_hub.errors import UsageError


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure on a pruned model and its original.

    Raises:
        UsageError: a value outside its range, no text, or `tasks_from` or `limit` without `tasks`.
    """

    against: str | None = option(None, "The original: a Hub id or a folder. Default: the recorded one.")
    text: tuple[str, ...] = option(
        (DEFAULT_EVALUATION,),
        "Text to measure perplexity and agreement on; repeatable. A .txt or .jsonl file (key `text`), or a Hub dataset "
        "as owner/name[:config[/split]].",
    )
    tasks: tuple[str, ...] = option(
        (), "Tasks of lm-evaluation-harness, comma-separated; `paper`: the seven tasks of the paper."
    )
    tasks_from: Path | None = option(
        None,
        "Folder with the documents of the tasks as NAME.SPLIT.jsonl, in the harness' field names; none are downloaded.",
    )
    limit: int | None = option(None, "Use only the first N documents of each task.")
    seq_len: int = option(512, "Tokens per sequence.")
    rows: int = option(32, "Maximum number of sequences of each text, spread evenly over it.")
    speed: bool = option(True, "Measure tokens per second.")

    def __post_init__(self) -> None:
        for name, least in (("limit", 2), ("seq_len", 16), ("rows", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
        if not self.text:
            raise UsageError("--text needs at least one text.")
        if self.tasks_from is not None and not self.tasks:
            raise UsageError("--tasks-from needs --tasks.")
        if self.limit is not None and not self.tasks:
            raise UsageError("--limit is for tasks; name them with --tasks, or limit the text with --rows.")


@dataclass(frozen=True)
class HealConfig:
    """How to heal a finished folder.

    Raises:
        UsageError: a value outside its range, or not exactly one of `tokens` and `time`.
    """

    tokens: str | None = option(None, "Number of tokens to train on, such as 500k, 10M or 500000.")
    time: str | None = option(None, "Approximate duration of the training: 90s, 30m, 2h.")
    text: tuple[str, ...] = option((), help_of(PruneMethod, "heal_text"))
    part: str = option("auto", help_of(PruneMethod, "heal_part"))
    against: str | None = option(None, "The original: a Hub id or a folder. Default: the recorded one.")

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.time is None):
            raise UsageError("Give exactly one of --tokens and --time.")
        wanted = "tokens" if self.tokens is not None else "seconds"
        try:
            budget = parse_budget(self.budget)
        except UsageError:
            budget = None
        if budget is None or budget.unit != wanted:
            if self.tokens is not None:
                raise UsageError(f"--tokens takes a number such as 500k or 10M; got {self.tokens!r}.")
            raise UsageError(f"--time takes a duration such as 90s, 30m or 2h; got {self.time!r}.")
        if self.part not in HEAL_PARTS:
            raise UsageError(f"--part must be one of {', '.join(HEAL_PARTS)}; got {self.part!r}.")

    @property
    def budget(self) -> str:
        """The budget in the form that `PruneMethod.heal` takes."""
        if self.tokens is None:
            return str(self.time)
        return f"{Decimal(self.tokens) / 1000}k" if self.tokens.isascii() and self.tokens.isdigit() else self.tokens
