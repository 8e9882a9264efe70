"""Tasks of lm-evaluation-harness: the numbers are the log-likelihoods', and those of its own command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from gradmap_hub.errors import CalibrationError, SourceError, UsageError
from gradmap_hub.evaluation import tasks as harness
from gradmap_hub.evaluation.tasks import TASKS, TaskResult


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, folder_of: Callable[..., Path]) -> Path:
    return folder_of(tmp_path_factory.mktemp("harness") / "llama")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def results(model: Any, tokenizer: Any, task_documents: Path) -> dict[str, TaskResult]:
    """All tasks, and what was told on the way."""
    told: list[int] = []
    found = harness.run_tasks(
        model, tokenizer, list(TASKS), documents=task_documents, started=told.append, advanced=lambda n: told.append(-n)
    )
    assert sum(told) == 0 and max(told) > 50, told  # as many sequences were read as announced
    return found


def loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """One sequence at a time, without the harness."""
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(chances[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def documents_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / TASKS[name].file).read_text().splitlines()]


def test_each_task_has_a_result_per_document(results: dict[str, TaskResult]) -> None:
    assert list(results) == list(TASKS)
    for name, result in results.items():
        assert result.documents == result.total == 6 and result.split == TASKS[name].split
        assert TASKS[name].main in [metric.name for metric in result.metrics]
        for metric in result.metrics:
            if metric.name in harness.ACCURACIES:
                assert len(metric.per_document) == 6 and set(metric.per_document) <= {0.0, 1.0}
                assert metric.value == pytest.approx(sum(metric.per_document) / 6)
    both = {name for name, result in results.items() if len([m for m in result.metrics if m.per_document]) == 2}
    assert both == {"piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa"}
    assert (results["arc_challenge"].dataset, results["arc_challenge"].config) == ("allenai/ai2_arc", "ARC-Challenge")
    assert (results["boolq"].dataset, results["boolq"].config) == ("aps/super_glue", "boolq")
    assert results["arc_easy"].sha256 != results["arc_challenge"].sha256


def test_accuracies_are_those_of_the_log_likelihoods(
    results: dict[str, TaskResult], model: Any, tokenizer: Any, task_documents: Path
) -> None:
    for number, document in enumerate(documents_of(task_documents, "openbookqa")):
        texts, gold = document["choices"]["text"], "ABCD".index(document["answerKey"])
        sums = [loglikelihood(model, tokenizer, document["question_stem"], f" {text}") for text in texts]
        normed = [value / len(text) for value, text in zip(sums, texts, strict=True)]
        for name, scores in (("acc", sums), ("acc_norm", normed)):
            right = float(scores.index(max(scores)) == gold)
            assert results["openbookqa"].metric(name).per_document[number] == right
    for number, document in enumerate(documents_of(task_documents, "boolq")):
        context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
        scores = [loglikelihood(model, tokenizer, context, answer) for answer in (" no", " yes")]
        right = float(scores.index(max(scores)) == document["label"])
        assert results["boolq"].metric("acc").per_document[number] == right


def test_bits_per_byte_of_wikitext_are_the_perplexity_of_the_decoder(
    results: dict[str, TaskResult], model: Any, tokenizer: Any, task_documents: Path, decoder_of: Callable[..., Any]
) -> None:
    """A page shorter than the window is predicted whole, behind the start token: our rows, with that token in front.
    bits per byte = mean NLL x predicted tokens / (ln 2 x bytes)."""
    nats, size = 0.0, 0
    for document in documents_of(task_documents, "wikitext"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(document["page"])["input_ids"]]])
        assert ids.shape[1] < model.config.max_position_embeddings
        nats += decoder_of(model, ids.shape[1]).losses(ids)[0] * (ids.shape[1] - 1)
        size += len(document["page"].encode())
    assert results["wikitext"].metric("bits_per_byte").value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_the_first_documents_only_and_the_same_twice(
    results: dict[str, TaskResult], model: Any, tokenizer: Any, task_documents: Path
) -> None:
    environment, padding = dict(os.environ), tokenizer.pad_token
    first, again = (
        harness.run_tasks(model, tokenizer, ["arc_easy"], documents=task_documents, limit=4)["arc_easy"]
        for _ in range(2)
    )
    assert first == again and (first.documents, first.total) == (4, 6)
    assert first.metric("acc").per_document == results["arc_easy"].metric("acc").per_document[:4]
    assert first.sha256 != results["arc_easy"].sha256
    assert dict(os.environ) == environment and tokenizer.pad_token == padding


NAMES = ["boolq", "arc_easy"]


def assert_rows(results: dict[str, TaskResult], name: str, samples: list[dict[str, Any]]) -> None:
    rows = sorted(samples, key=lambda row: row["doc_id"])
    for metric in results[name].metrics:
        assert metric.per_document == [float(row[metric.name]) for row in rows]


def test_rows_are_those_of_the_harness_left_to_itself(
    results: dict[str, TaskResult], checkpoint: Path, task_documents: Path, tmp_path: Path
) -> None:
    """It loads the checkpoint and its tokenizer, and is given nothing but the definitions."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    harness.write_definitions(tmp_path, NAMES, task_documents)
    found: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32"},
        tasks=list(NAMES),
        device="cpu",
        batch_size=8,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    for name in NAMES:
        assert_rows(results, name, found["samples"][name])


@pytest.mark.slow  # the command reads the definitions of all its tasks first
def test_rows_are_those_of_the_command_line(
    results: dict[str, TaskResult], checkpoint: Path, task_documents: Path, tmp_path: Path
) -> None:
    (tmp_path / "definitions").mkdir()
    harness.write_definitions(tmp_path / "definitions", NAMES, task_documents)
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf",
            "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", ",".join(NAMES),
            "--include_path", str(tmp_path / "definitions"), "--device", "cpu", "--batch_size", "8",
            "--log_samples", "--output_path", str(tmp_path / "out"),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NAMES:
        (log,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        assert_rows(results, name, [json.loads(line) for line in log.read_text().splitlines()])


def test_names() -> None:
    assert harness.chosen(["paper", "boolq", "wikitext"]) == (*harness.PAPER, "wikitext")
    with pytest.raises(UsageError, match=r"Unknown task 'mmlu'.*boolq"):
        harness.chosen(["boolq", "mmlu"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a b"}\n', "holds 1 documents"),
        ('{"text": "a b"}\n{"txt": "a"}\n', "line 2 has no 'text'"),
        ("[]\nnonsense\n", "line 1 is not a JSON object"),
        ('{"text": "a b"}\nnonsense\n', "line 2 is not a JSON object"),
    ],
)
def test_documents_that_cannot_be_used(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"does not contain lambada_openai\.test\.jsonl"):
        harness.check(["lambada_openai"], tmp_path)
    (tmp_path / "lambada_openai.test.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=said):
        harness.check(["lambada_openai"], tmp_path)


def test_documents_that_cannot_be_fetched(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(**_: Any) -> None:
        raise ConnectionError("no route to the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError, match=r"documents of piqa cannot be loaded: no route to the Hub$"):
        harness.run_tasks(model, tokenizer, ["piqa"])
