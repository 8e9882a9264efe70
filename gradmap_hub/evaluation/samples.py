"""The greedy answers of both models to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmap_hub.evaluation.measurement import ORIGINAL, PRUNED, Context, Step
from gradmap_hub.evaluation.speed import Backend, Eager
from gradmap_hub.measurements import Sample
from gradmap_hub.models.original import end_tokens
from gradmap_hub.runtime.chat import chat_text

# Instructions of the kinds that users of a small chat model give: facts, an explanation, lists, advice, prose.
PROMPTS = (
    "What is the capital of France?",
    "Explain gravity to a child in two sentences.",
    "Give me three tips for sleeping better.",
    "Write a short poem about the sea.",
    "What is the difference between a virus and a bacterium?",
    "Write an email that asks a colleague to move a meeting to Thursday.",
    "How do I boil an egg?",
    "Name three renewable sources of energy and one advantage of each.",
)
TOKENS = 96


@dataclass(frozen=True)
class Answers:
    texts: list[str]


def steps(context: Context) -> list[Step[Answers]]:
    prompts = [prompt_ids(context.tokenizer, prompt) for prompt in context.prompts]  # now, because a template may fail
    return [_answers(context, which, prompts) for which in (ORIGINAL, PRUNED)]


def _answers(context: Context, which: str, prompts: Sequence[list[int]]) -> Step[Answers]:
    def compute() -> Answers:
        model: Any = context.models.decoder(which).model
        backend, ends = Eager(model), end_tokens(model, context.tokenizer)
        context.reporter.total(len(prompts))
        texts: list[str] = []
        for ids in prompts:
            texts.append(greedy_answer(backend, context.tokenizer, ids, ends))
            context.reporter.advance()
        return Answers(texts)

    return Step(
        f"{which}-samples",
        f"{which.capitalize()} answers {len(context.prompts)} prompts",
        Answers,
        compute,
        weights=(which,),
        inputs={"prompts": list(context.prompts), "tokens": TOKENS},
        loads=which,
    )


def result(context: Context, found: Mapping[str, Any]) -> list[Sample]:
    answers = [found[f"{which}-samples"].texts for which in (ORIGINAL, PRUNED)]
    return [Sample(*texts) for texts in zip(context.prompts, *answers, strict=True)]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt, rendered with the chat template if the tokenizer has one.

    Raises:
        PromptError: the template fails.
    """
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    text = chat_text(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy_answer(backend: Backend, tokenizer: Any, ids: Sequence[int], ends: set[int]) -> str:
    """The greedy answer of a model to a prompt, at most TOKENS tokens long, without special tokens.

    Args:
        ids: Token ids of the prompt.
        ends: Token ids that end an answer.
    """
    backend.read(ids)
    answer: list[int] = []
    while len(answer) < TOKENS and (token := backend.write()) not in ends:
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()
