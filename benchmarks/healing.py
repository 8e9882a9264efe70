"""`python -m benchmarks.healing`: the gain of healing, by budget.

The demo's model is pruned once; each budget heals a copy of the folder with `gradmap-hub heal`, on the demo's sample
texts and on text that the original writes. Measured with plain transformers on text of other sources:

- on WikiText-2, C4 and LAMBADA, perplexity divided by the original's (geometric mean);
- on chat that the original wrote with another seed, by the recipe of `self` text and at temperature 1.0, the mean
  KL(original || model) in nats per token;
- greedy answers to eight fixed prompts, and their share of repeated 4-grams.

Results are stored in OUTPUT/results.json; a second call computes only what is missing, resumes an interrupted healing,
and always writes the section "Healing" of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import DATA, model_and_samples
from gradmap_hub import prune
from gradmap_hub.cli.output import stderr
from gradmap_hub.cli.terminal import TerminalReporter
from gradmap_hub.data.rows import evaluation_rows, tokenize
from gradmap_hub.data.texts import Text, read_text
from gradmap_hub.evaluation.samples import PROMPTS, greedy_answer, prompt_ids
from gradmap_hub.evaluation.speed import Eager
from gradmap_hub.healing.self_text import SelfTextRecipe, write_self_text
from gradmap_hub.machine import hardware
from gradmap_hub.measurements import repeated_share
from gradmap_hub.models.original import end_tokens
from gradmap_hub.pipeline import demo
from gradmap_hub.record import RunRecord

ROWS, TOKENS = 32, 512
CHAT_TOKENS, CHAT_SEED = 8_000, 1_000
# Held-out chat: column of the table, key in the results, temperature at which the original writes it.
CHATS = (("chat", "own", SelfTextRecipe().temperature), ("chat, temperature 1.0", "chat", 1.0))
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- healing -->", "<!-- /healing -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.healing", description=__doc__)
    parser.add_argument(
        "--budgets", default="100k,500k", help="tokens, comma-separated; the pruned model is healed once per budget"
    )
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--model", type=Path, help="another model folder; default: the demo's")
    parser.add_argument("--output", type=Path, default=Path("build/healing"))
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    original, samples = model_and_samples(arguments.model, output)
    calibration = tuple(str(samples[sample.name]) for sample in demo.CALIBRATION)
    texts = _texts(samples)
    store = output / "results.json"
    found: dict[str, Any] = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    for name in ("original", "pruned", *arguments.budgets.split(",")):
        if name in found and all(key in found[name] for _, key, _ in CHATS):
            continue
        with TerminalReporter(stderr) as reporter:
            folder, facts = original, {}
            if name != "original":
                folder = output / "pruned"
                if not (folder / "gradmap.json").is_file():
                    prune(
                        original, folder, ratio=arguments.ratio, calibration=calibration, resume=True, reporter=reporter
                    )
            if name in found:  # measured by an earlier version
                folder, facts = output / f"healed-{name}" if "heal" in found[name] else folder, found[name]
            elif name not in ("original", "pruned"):
                folder, facts = _healed(output, name, original, calibration)
        found[name] = facts | _measure(folder, original, texts, output)
        store.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    section = f"{BEGIN}\n{_section(found, original.name)}{END}"
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{section}{after}" if rest else f"{page.rstrip()}\n\n{section}\n", encoding="utf-8")


def _healed(output: Path, budget: str, original: Path, calibration: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """A copy of the pruned folder, healed by `gradmap-hub heal`, with the seconds of the training ("heal") and of the
    command ("whole"), the tokens, and the peak resident memory of the process in bytes. An interrupted one is
    resumed."""
    folder = output / f"healed-{budget}"
    if not folder.is_dir():
        shutil.copytree(output / "pruned", folder)
    for text in calibration:
        shutil.copyfile(text, folder.parent / Path(text).name)
    started = time.monotonic()
    command = [sys.executable, "-m", "gradmap_hub", "heal", str(folder), "--tokens", budget, "--against", str(original)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"`{' '.join(command[2:])}` failed.")
    record = RunRecord.read(folder).heal
    assert record is not None
    return folder, {
        "heal": record.seconds,
        "whole": time.monotonic() - started,
        "tokens": record.tokens,
        "memory": usage.ru_maxrss * 1024,
    }


def _texts(samples: Mapping[str, Path]) -> dict[str, Text]:
    """The evaluation texts that exist on this machine, by name."""
    found = {"C4": read_text(samples[demo.ELSEWHERE.name])}
    if (DATA / "text" / "wikitext2_test.raw").is_file():
        found["WikiText-2"] = read_text(DATA / "text" / "wikitext2_test.raw")
    if (DATA / "tasks" / "lambada_openai.test.jsonl").is_file():
        found["LAMBADA"] = read_text(DATA / "tasks" / "lambada_openai.test.jsonl")
    return found


def _measure(folder: Path, original: Path, texts: Mapping[str, Text], output: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original)
    teacher = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    talks: dict[str, Text] = {}
    for _, key, temperature in CHATS:
        file = output / f"{key}.json"
        if not file.is_file():  # held out: healing draws with the seed of its run
            writer = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()
            recipe = SelfTextRecipe(seed=CHAT_SEED, temperature=temperature)
            written = write_self_text(writer, tokenizer, CHAT_TOKENS, recipe)
            file.write_text(json.dumps(written.samples), encoding="utf-8")
        talks[key] = Text(key, "\n\n".join(json.loads(file.read_text(encoding="utf-8"))), "")
    rows = {name: evaluation_rows(text, tokenizer, seq_len=TOKENS, rows=ROWS).ids for name, text in texts.items()}
    ends = end_tokens(model, tokenizer)
    answers = [greedy_answer(Eager(model), tokenizer, prompt_ids(tokenizer, prompt), ends) for prompt in PROMPTS]
    return {
        "loss": {name: _loss(model, ids) for name, ids in rows.items()},
        **{key: _divergence(teacher, model, tokenize(talk, tokenizer, TOKENS).ids) for key, talk in talks.items()},
        "repeated": sum(map(repeated_share, answers)) / len(answers),
        "answers": answers,
    }


def _loss(model: Any, ids: Tensor) -> list[float]:
    """Mean NLL of each sequence."""
    with torch.no_grad():
        return [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]


def _divergence(teacher: Any, model: Any, ids: Tensor) -> list[float]:
    """Mean KL(teacher || model) of each sequence, in nats per token."""
    found = []
    with torch.no_grad():
        for row in ids.split(1):
            wanted, reached = (each(input_ids=row).logits[0].log_softmax(dim=-1) for each in (teacher, model))
            found.append(float((wanted.exp() * (wanted - reached)).sum(dim=-1).mean()))
    return found


def _section(found: Mapping[str, Any], name: str) -> str:
    found = dict(sorted(found.items(), key=lambda item: (item[0] != "original", item[1].get("tokens", 0))))
    base = found["original"]
    texts = list(base["loss"])
    lines = [
        "## Healing",
        "",
        f"Written by `make bench-heal` (`python -m benchmarks.healing`) on {hardware()}. Perplexity over the "
        f"original's on {ROWS} sequences of {TOKENS} tokens of text that nothing was fitted to, with the 95% bootstrap "
        "interval of the geometric mean; chat: mean KL from the original, in nats per token, on conversations that it "
        "wrote with a seed of their own, as it writes text for healing and at temperature 1.0; repeated: share of "
        "repeated 4-grams in greedy answers to eight fixed prompts; memory: largest resident size of the process that "
        "heals.",
        "",
        f"| {name} | "
        + " | ".join(texts)
        + " | geometric mean | "
        + " | ".join(title for title, _, _ in CHATS)
        + " | repeated | training | memory |",
        "|---|" + "---:|" * (len(texts) + len(CHATS) + 4),
    ]
    for key, values in found.items():
        if key == "original":
            continue
        ratios = [math.exp(_mean(values["loss"][text]) - _mean(base["loss"][text])) for text in texts]
        low, high = _interval(values["loss"], base["loss"])
        middle = math.exp(_mean([math.log(ratio) for ratio in ratios]))
        took = f"{values['heal'] / 60:.0f} min" if "heal" in values else ""
        memory = f"{values['memory'] / 1e9:.1f} GB" if "memory" in values else ""
        label = f"{values['tokens']:,} tokens" if "tokens" in values else key
        lines.append(
            f"| {label} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + f" | {middle:.2f} ({low:.2f} to {high:.2f}) | "
            + " | ".join(f"{_mean(values[key]):.3f}" for _, key, _ in CHATS)
            + f" | {100 * values['repeated']:.0f}% | {took} | {memory} |"
        )
    lines += ["", f"The original repeats {100 * base['repeated']:.0f}% of its 4-grams. Answers:", ""]
    for place, prompt in enumerate(PROMPTS):
        lines += [f"**{prompt}**", ""]
        lines += [f"- {key}: {' '.join(values['answers'][place].split())}" for key, values in found.items()]
        lines.append("")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(losses: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The 95% bootstrap interval, over sequences, of the geometric mean of the ratios."""
    draw = torch.Generator().manual_seed(0)
    gaps = [torch.tensor(losses[text]) - torch.tensor(base[text]) for text in base]
    means = torch.stack(
        [
            torch.stack([gap[torch.randint(len(gap), (len(gap),), generator=draw)].mean() for gap in gaps]).mean()
            for _ in range(2000)
        ]
    )
    return float(means.quantile(0.025).exp()), float(means.quantile(0.975).exp())


if __name__ == "__main__":
    main()
