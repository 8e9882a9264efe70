"""The static HTML of the page. Pure functions.

All external text (names, prompts, answers) goes through `escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from compare import Comparison, Facts, Pair, Source, Stored
from generation import Generation

ARROW = "\N{RIGHTWARDS ARROW}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NONE_YET = "\N{EN DASH}"

CardState = Literal["ready", "waiting", "writing", "done", "length", "stopped", "error"]
STATE_WORDS: dict[CardState, str] = {
    "ready": "Ready",
    "waiting": "Waiting",
    "writing": "Generating",
    "done": "Done",
    "length": "Stopped at the length limit",
    "stopped": "Stopped",
    "error": "Error",
}


def count(value: int) -> str:
    """A count with three significant digits: 135M, 1.24B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def size(value: int) -> str:
    for unit, bytes_ in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= bytes_:
            return f"{value / bytes_:.3g} {unit}"
    return f"{value} B"


def without_unit(before: str, after: str) -> tuple[str, str]:
    """Drop the unit of the first size if both have the same: 539 MB, 497 MB gives "539", "497 MB"."""
    number, _, unit = before.partition(" ")
    return (number if after.endswith(f" {unit}") else before), after


def change(original: float, pruned: float) -> str:
    """The signed difference in percent; empty if `original` is 0."""
    if original == 0:
        return ""
    percent = (pruned / original - 1) * 100
    if round(percent) == 0 and percent != 0:
        return f"{percent:+z.1f}%".replace("-", MINUS)
    return f"{percent:+.0f}%".replace("-", MINUS)


def short_name(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _model(source: Source) -> str:
    """The full name, as a link if the repository is known."""
    if not source.repo_id or source.repo_id.count("/") != 1:
        return f"<b>{escape(source.name)}</b>"
    address = f"https://huggingface.co/{source.repo_id}"
    if source.revision:
        address += f"/tree/{source.revision}"
    return f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(source.name)}</a>'


def header(facts: Facts) -> str:
    return (
        f"<header class='top'><h1>{escape(facts.title)}</h1>"
        f"<p>Type a prompt. Both models answer it on the same machine with the same settings.{_healed(facts)}</p>"
        f"<p class='models'>{_model(facts.original)} <span aria-hidden='true'>{ARROW}</span>"
        f"<span class='sr'> pruned to </span> {_model(facts.pruned)}</p></header>"
    )


def _healed(facts: Facts) -> str:
    if not facts.healed:
        return ""
    return f" The pruned one was trained on {facts.healed:,} tokens to predict what the original predicts."


def _tile(label: str, before: str, after: str, difference: str, tone: str, below: str) -> str:
    return (
        f"<div class='tile'><dt>{escape(label)} <span class='change {tone}'>{escape(difference)}</span></dt>"
        f"<dd><span class='pair'><span>{escape(before)}</span> "
        f"<span class='arrow' aria-hidden='true'>{ARROW}</span><span class='sr'>to</span> "
        f"<b>{escape(after)}</b></span></dd><dd>{below}</dd></div>"
    )


def tiles(facts: Facts) -> str:
    def pair_tile(label: str, pair: Pair, text: tuple[str, str]) -> str:
        share = min(100.0, 100 * pair.pruned / pair.original) if pair.original else 100.0
        bar = f"<div class='bar' aria-hidden='true'><span style='width:{share:.1f}%'></span></div>"
        return _tile(label, *text, change(pair.original, pair.pruned), "less", bar)

    parameters, weights, layers = facts.parameters, facts.bytes, facts.layers
    parts = [
        pair_tile("Parameters", parameters, (count(parameters.original), count(parameters.pruned))),
        pair_tile("Weights", weights, without_unit(size(weights.original), size(weights.pruned))),
        pair_tile("Layers", layers, (str(layers.original), str(layers.pruned))),
    ]
    measured = next((row for row in facts.perplexity if row.original and row.pruned), None)
    if measured is not None and measured.original and measured.pruned:
        worse = measured.pruned > measured.original
        parts.append(
            _tile(
                "Perplexity",
                f"{measured.original:.1f}",
                f"{measured.pruned:.1f}",
                change(measured.original, measured.pruned),
                "worse" if worse else "less",
                f"<span class='note'>{escape(measured.text)}; lower is better</span>",
            )
        )
    return f"<dl class='tiles'>{''.join(parts)}</dl>{_layers(facts)}"


def ranges(indices: Sequence[int]) -> str:
    """Indices as ranges: 14, 15, 16, 20 become "14-16, 20"."""
    groups: list[list[int]] = []
    for index in sorted(set(indices)):
        if groups and index == groups[-1][-1] + 1:
            groups[-1].append(index)
        else:
            groups.append([index])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}\N{EN DASH}{group[-1]}" for group in groups)


def _layers(facts: Facts) -> str:
    """The removed layers, as a sentence and as a strip with gaps."""
    removed = set(facts.removed)
    number = len(removed) or facts.layers.original - facts.layers.pruned
    count = facts.compensated
    compensation = f", {'one weight matrix' if count == 1 else f'{count} weight matrices'} corrected" if count else ""
    training = f"healed on {facts.healed:,} tokens" if facts.healed else "no retraining"
    where = f" <span class='which'>Removed: {ranges(facts.removed)}.</span>" if removed else ""
    strip = "".join(
        f"<i class='{'gone' if index in removed else 'kept'}'></i>" for index in range(facts.layers.original)
    )
    return (
        f"<div class='layers'><p>{number} of {facts.layers.original} layers removed{compensation}, "
        f"{training}.{where}</p><div class='strip' aria-hidden='true'>{strip}</div></div>"
    )


def notice(message: str, kind: Literal["error", "info"] = "error") -> str:
    return f"<p class='notice {kind}'>{escape(message)}</p>" if message else ""


def loading(message: str) -> str:
    return f"<p class='notice info loading'><span class='dot' aria-hidden='true'></span>{escape(message)}</p>"


def state_of(generation: Generation) -> CardState:
    reasons: dict[str, CardState] = {"stop": "done", "length": "length", "stopped": "stopped"}
    if generation.finish_reason is None:
        return "writing" if generation.seconds else "waiting"
    return reasons[generation.finish_reason]


def _speed(generation: Generation) -> str:
    seconds = generation.seconds_per_token
    return f"{1 / seconds:.1f} tok/s" if seconds else NONE_YET


def _first(generation: Generation) -> str:
    seconds = generation.first_token_seconds
    if seconds is None:
        return NONE_YET
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def card(title: str, tag: str, state: CardState, generation: Generation | None = None, numbers: bool = True) -> str:
    """One answer. `numbers` is False during a blind vote: the speed would reveal the model."""
    if generation is not None and generation.text.strip():
        caret = "<span class='caret' aria-hidden='true'></span>" if state == "writing" else ""
        answer = f"<div class='answer'>{escape(generation.text.strip())}{caret}</div>"
    else:
        words = "The answer appears here."
        if state in ("waiting", "writing"):
            words = "Reading the prompt\N{HORIZONTAL ELLIPSIS}"
        elif state in ("done", "length"):
            words = "The answer is empty."
        elif state in ("stopped", "error"):
            words = "No answer."
        answer = f"<div class='answer none'>{words}</div>"
    values = (NONE_YET,) * 3
    if generation is not None and numbers:
        values = (_speed(generation), _first(generation), str(len(generation.token_ids)))
    figures = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>"
        for name, value in zip(("Speed", "First token", "Tokens"), values, strict=True)
    )
    pill = f"<span class='tag {tag.lower()}'>{tag}</span>" if tag else ""
    return (
        f"<section class='card {state}' aria-label='Answer: {escape(title)}'>"
        f"<header><h2>{escape(title)}</h2>{pill}<span class='state'>{STATE_WORDS[state]}</span></header>"
        f"{answer}<dl class='figures'>{figures}</dl></section>"
    )


def verdict(comparison: Comparison, precision: str) -> str:
    ratio = comparison.speed_ratio
    label = f"<span class='label'>This run, {escape(precision)}</span>"
    if ratio is None:
        return f"<p class='verdict'>{label} The answers are too short to compare the speed.</p>"
    return (
        f"<p class='verdict'>{label} The pruned model wrote "
        f"<b>{ratio:.2f}{TIMES}</b> as many tokens per second as the original "
        f"<span class='basis'>(median over {comparison.shared_steps} shared steps)</span>.</p>"
    )


def spoken(message: str, running: bool = False) -> str:
    """The status of the run for screen readers. During a run, style.css shows Stop instead of Compare."""
    return f"<p class='{'running' if running else 'resting'}'>{escape(message)}</p>"


def question() -> str:
    """The open vote. While it is shown, style.css shows the vote buttons."""
    return "<p class='voting'>Which answer is better?</p>"


def vote_result(choice: Literal["original", "pruned", "tie"]) -> str:
    words = {
        "original": "You preferred the <b>original</b>.",
        "pruned": "You preferred the <b>pruned</b> model.",
        "tie": "You found them <b>equal</b>.",
    }
    return f"<p class='verdict vote'><span class='label'>Your vote</span> {words[choice]}</p>"


def precisions(facts: Facts) -> list[tuple[str, str]]:
    """The choices of the precision setting: (label, name)."""

    def words(name: str, original: int | None, pruned: int | None) -> str:
        if original is None or pruned is None:
            return name
        before, after = without_unit(size(original), size(pruned))
        return f"{name} ({before} {ARROW} {after})"

    return [(words(entry.name, entry.original.bytes, entry.pruned.bytes), entry.name) for entry in facts.precisions]


def _costs(facts: Facts) -> str:
    """The table of size and perplexity cost of each precision."""

    def cost(stored: Stored) -> str:
        if stored.cost is None:
            return NONE_YET
        return f"{(stored.cost.perplexity / stored.cost.checkpoint - 1) * 100:+z.1f}%".replace("-", MINUS)

    def weight(stored: Stored) -> str:
        return NONE_YET if stored.bytes is None else size(stored.bytes)

    rows = "".join(
        f"<tr><th scope='row'>{escape(entry.name)}</th>"
        + "".join(f"<td>{value(side)}</td>" for value in (weight, cost) for side in (entry.original, entry.pruned))
        + "</tr>"
        for entry in facts.precisions
    )
    measured = next(
        (
            f" Measured on {stored.cost.tokens:,} tokens of {escape(stored.cost.text)}, against float32."
            for entry in facts.precisions
            for stored in (entry.pruned, entry.original)
            if stored.cost is not None
        ),
        "",
    )
    return (
        "<div class='scroll' tabindex='0' role='region' aria-label='Precisions'><table><thead><tr>"
        "<th scope='col'>Precision</th><th scope='col'>Original</th><th scope='col'>Pruned</th>"
        "<th scope='col'>Perplexity, original</th><th scope='col'>Perplexity, pruned</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        f"<p>The change in perplexity is the cost of quantization.{measured}</p>"
    )


def method(facts: Facts) -> str:
    def figure(value: float | None) -> str:
        return NONE_YET if value is None else f"{value:.2f}"

    rows = "".join(
        f"<tr><th scope='row'>{escape(row.text)}</th><td>{row.tokens:,}</td><td>{figure(row.original)}</td>"
        f"<td>{figure(row.pruned)}</td>"
        f"<td>{change(row.original, row.pruned) if row.original and row.pruned else NONE_YET}</td></tr>"
        for row in facts.perplexity
    )
    table = (
        "<div class='scroll' tabindex='0' role='region' aria-label='Perplexity per text'><table>"
        "<thead><tr><th scope='col'>Perplexity on</th><th scope='col'>Tokens</th>"
        "<th scope='col'>Original</th><th scope='col'>Pruned</th><th scope='col'>Change</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        if rows
        else "<p>No perplexity was measured when this page was made.</p>"
    )
    runtime = "ONNX Runtime on the CPU" if facts.runtime == "onnx" else "transformers"
    one = f"in {escape(facts.precision)}, for both models"
    precision = one if len(facts.precisions) == 1 else "always both models in the same precision"
    licence = f"<p>Licence of the original: {escape(facts.license)}.</p>" if facts.license else ""
    return (
        f"<div class='method'>{table}"
        "<p>Perplexity, parameters and weights were measured when this page was made. Lower perplexity is "
        "better. It measures how well a model predicts a text, not how useful its answers are.</p>"
        f"{_costs(facts) if len(facts.precisions) > 1 else ''}"
        f"<p>The models run here, in {runtime}, {precision}. They "
        "take turns, one token each, and each step is timed separately, so neither slows the other down. "
        "The ratio is the median over the steps that both took, without the first, which processes the prompt. "
        "One prompt on a shared machine is not a benchmark.</p>"
        "<p>With temperature 0, each model always picks its top-1 token. No repetition penalty is applied. "
        f"Each model uses its own chat template, if it has one.</p>{licence}</div>"
    )
