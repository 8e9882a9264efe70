"""The card: a golden page, its metadata as huggingface_hub reads it, all variants, hostile names, the plots.

After an intended change of the page, write the golden file anew and read its diff:

    GRADMAP_UPDATE_GOLDEN=1 pytest tests/card/test_card.py
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult, ModelCardData
from jinja2 import UndefinedError

from gradmap_hub.card import card
from gradmap_hub.card.card import card_text, front_matter, write_card
from gradmap_hub.card.plots import corrected_layers
from gradmap_hub.measurements import (
    BeforeAfter,
    Contamination,
    FilePerplexity,
    Measured,
    MeasuredFile,
    MeasuredMetric,
    MeasuredSpeed,
    MeasuredTask,
    MeasuredText,
    Rate,
    Sample,
)
from gradmap_hub.record import (
    Artifact,
    Base,
    CalibrationRecord,
    Candidate,
    CompensationRecord,
    EvaluationRecord,
    LayerDecision,
    Parity,
    RunRecord,
    SiteCompensation,
    TextPerplexity,
    TextSource,
    Trial,
    VerificationRecord,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "card.md"
REMOVED = [3, 12, 13, 14, 15, 17, 25, 26]
SWAPPED = [3, 12, 13, 14, 15, 16, 25, 26]
KEPT = [index for index in range(30) if index not in REMOVED]
SCORES = [
    9120.4, 6240.1, 4410.8, 2110.2, 3302.5, 3150.9, 2980.3, 2890.7, 2811.0, 2702.6, 2644.1, 2590.5, 1987.3,
    1902.8, 1871.2, 1893.6, 2450.4, 2012.9, 2633.7, 2741.2, 2866.8, 2933.1, 3018.5, 3122.9, 3240.6, 2156.0,
    2188.4, 3712.3, 4480.1, 7350.6,
]  # fmt: skip
SHIFT = [
    0.0, 0.0, 0.0, 0.1, 0.09, 0.09, 0.08, 0.06, 0.05, 0.05, 0.04,
    0.24, 0.24, 0.24, 0.25, 0.22, 0.2, 0.19, 0.14, 0.22, 0.21, 0.22,
]  # fmt: skip
NASTY = (
    "a|b `c` {{ 7 * 7 }} {% x %} <script>alert(1)</script> [l](javascript:x) *s* $x$ \"'\\ "
    "---\n---\n# h\r\n| - |\ud800\x00"
)


def make_record() -> RunRecord:
    """The push of a 30-layer model, with everything a run can record."""
    reasons = {index: "removed: lowest held-out loss (block-influence)" for index in REMOVED}
    return RunRecord(
        schema_version=1,
        gradmap_hub="0.1.0",
        command="gradmap-hub push HuggingFaceTB/SmolLM2-135M-Instruct --ratio 0.25 --to acme/smollm2-gradmap-27",
        name="smollm2-135m-gradmap-27",
        base=Base(
            name="SmolLM2-135M-Instruct",
            repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision="main",
            commit="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            license="apache-2.0",
            language=["en"],
            model_type="llama",
            dtype="bfloat16",
        ),
        layers=[
            LayerDecision(index, score, index not in REMOVED, reasons.get(index, "kept"))
            for index, score in enumerate(SCORES)
        ],
        removed=REMOVED,
        ratio=0.25,
        parameters=BeforeAfter(134_515_008, 106_194_816),
        bytes=BeforeAfter(269_060_552, 212_412_032),
        metric="auto",
        schedule="oneshot",
        calibration=CalibrationRecord(
            source="Salesforce/wikitext:wikitext-2-raw-v1/train",
            samples=32,
            tokens=16_384,
            sequence_length=512,
            sha256="5e" * 32,
            scoring_rows=8,
            selection_rows=8,
            texts=[TextSource("Salesforce/wikitext:wikitext-2-raw-v1/train", "ab" * 32, 32)],
        ),
        compensation=CompensationRecord(
            applied=True,
            kind="weight",
            site=11,
            strength=0.03,
            ridge=12.5,
            loss_before=4.2513,
            loss_after=3.7402,
            reason="lowest held-out loss",
            shift_layers=KEPT,
            shift=[10 * value for value in SHIFT],
            relative_shift=SHIFT,
            trials=[
                Trial(11, "weight", 0.01, 3.9214),
                Trial(11, "weight", 0.03, 3.9127),
                Trial(18, "weight", 0.03, 3.8011, "attention"),
                Trial(18, "weight", 0.03, 3.7402),
                Trial(27, "weight", 0.03, 3.7399, "attention"),
            ],
            corrections=[
                SiteCompensation(11, "mlp", "weight", 0.03, 12.5, 4.2513, 3.9127),
                SiteCompensation(18, "attention", "weight", 0.03, 7.5, 3.9127, 3.8011),
                SiteCompensation(18, "mlp", "weight", 0.03, 9.0, 3.8011, 3.7402),
            ],
        ),
        seed=0,
        candidates=[
            Candidate("block-influence, swapped", SWAPPED, 4.2391, 3.8112),
            Candidate("block-influence", REMOVED, 4.2513, 3.7402),
            Candidate("cosine-window", list(range(12, 20)), 4.8044),
        ],
        verification=VerificationRecord(True, 3.1e-6, 64, True),
        evaluation=EvaluationRecord(
            metric="perplexity",
            before=17.62,
            after=31.44,
            uncompensated=52.9,
            data="Salesforce/wikitext:wikitext-2-raw-v1/train",
            texts=[
                TextPerplexity(
                    "Salesforce/wikitext:wikitext-2-raw-v1/train", card.CALIBRATION_KIND, 12, 6132, 512, "ab" * 32,
                    17.62, 52.9, 31.44, [1.66, 1.91],
                ),
                TextPerplexity(
                    "c4.txt", "another source", 12, 6132, 512, "cd" * 32, 38.51, 89.43, 73.712345, [1.78, 2.06]
                ),
            ],
        ),
        artifacts=[
            Artifact("model.safetensors", 212_412_032, "01" * 32, "safetensors"),
            Artifact("onnx/model.onnx", 425_901_224, "23" * 32, "onnx", Parity(9.2e-5, 5.7e-5, True, 48)),
        ],
        target="acme/smollm2-gradmap-27",
        space="acme/smollm2-gradmap-27-compare",
        dtype="bfloat16",
        versions={"torch": "2.13.0", "transformers": "4.57.6"},
        timings={"score": 61.2, "compensate": 133.0, "evaluate": 80.4},
        hardware="2 CPU cores",
        settings={
            "ratio": 0.25, "samples": 32, "seed": 0, "eval_text": ["c4.txt"],
            "calibration": [f"Salesforce/wikitext:wikitext-2-raw-v1/train@{'b' * 40}"],
        },
    )  # fmt: skip


def make_measured(name: str = "c4.txt") -> Measured:
    """What `evaluate` may have found, with every kind of text, task and file. `name`: of all that has one."""
    shared = (Contamination(2, 32, "", [name]), Contamination(None, 32, name), Contamination(0, 32), None)
    return Measured(
        "0.1.0", "a1" * 32, name, None, "b2" * 32, BeforeAfter(269_060_552, 212_412_032), "float32",
        texts=[
            MeasuredText(
                name, "cd" * 32, 32, 16_384, 512, 38.51, 73.7, [1.8, 2.0], 0.413, [0.4, 0.43], 1.21, [1.1, 1.3], entry
            )
            for entry in shared
        ],
        tasks=[
            MeasuredTask(
                name, "2.0", name, name, "validation", name, 20, 500, "ef" * 32, "acc",
                [MeasuredMetric("acc", 0.6, 0.55, [-0.2, 0.1], 91.7)],
            ),
            MeasuredTask(
                "piqa", "1.0", "baber/piqa", None, "validation", "baber/piqa", 1838, 1838, "ef" * 32, "acc_norm",
                [
                    MeasuredMetric("acc", 0.0, 0.5, [0.1, 0.9]),
                    MeasuredMetric("acc_norm", 0.5, 0.25, [-0.4, -0.1], 50.0),
                ],
            ),
            MeasuredTask(
                "wikitext", "2.0", "EleutherAI/wikitext", name, "test", name, 62, 62, "ef" * 32, "word_perplexity",
                [MeasuredMetric("word_perplexity", 61.2, 190.0)],
            ),
        ],
        files=[
            MeasuredFile(f"onnx/{name}.onnx", 425_901_224, "23" * 32, "", [FilePerplexity(name, 74.1, [1.004, 1.007])])
        ],
        speed=[
            MeasuredSpeed("original", "PyTorch", 8, Rate(1204.2, 1100.0, 1300.0), Rate(51.25, 50.0, 52.0)),
            MeasuredSpeed(
                "pruned", f"onnx/{name}.onnx", 1, Rate(640.0, 630.0, 650.0), Rate(41.0, 40.0, 42.0), 812_000_000
            ),
        ],
        samples=[Sample(name, "Paris.\n\n| is |", "")], harness="0.4.13", settings={"threads": 2}, hardware="2 cores",
    )  # fmt: skip


def one_correction(part: str) -> RunRecord:
    """The same run, had one correction been kept."""
    record = make_record()
    entry = SiteCompensation(18, part, "weight", 0.03, 12.5, 4.2513, 3.9127)
    compensation = replace(record.compensation, site=18, corrections=[entry], loss_after=3.9127)
    return replace(record, compensation=compensation)


def earlier_version(record: RunRecord) -> RunRecord:
    """The record of the time when there was one correction, not listed, and it had no say in the choice of layers."""
    return replace(
        record,
        compensation=replace(
            record.compensation, site=18, loss_after=3.9127, corrections=[],
            trials=[Trial(18, "weight", 0.03, 3.9127), Trial(18, "projection", 0.003, 4.0611)],
        ),
        candidates=[Candidate("gradient", REMOVED, 4.2513), Candidate("cosine-window", list(range(12, 20)), 4.8044)],
        settings=None,
    )  # fmt: skip


def variants() -> dict[str, RunRecord]:
    """Every branch of the page that real runs reach."""
    record = make_record()
    local = Base(name="my-model", model_type="llama")
    evaluation = record.evaluation
    assert evaluation is not None
    other_only = [text for text in evaluation.texts if text.kind != card.CALIBRATION_KIND]
    same_only = [text for text in evaluation.texts if text.kind == card.CALIBRATION_KIND]
    return {
        "full": record,
        "one correction": one_correction("mlp"),
        "one correction, attention": one_correction("attention"),
        "earlier version": earlier_version(record),
        "earlier projection": replace(
            earlier_version(record), compensation=replace(earlier_version(record).compensation, kind="projection")
        ),
        "MLPs only": replace(
            record,
            compensation=replace(
                record.compensation, corrections=[replace(c, part="mlp") for c in record.compensation.corrections]
            ),
        ),
        "one finalist": replace(
            record, candidates=[replace(record.candidates[1], loss=4.0), replace(record.candidates[2], corrected=None)]
        ),
        "not applied": replace(
            record,
            compensation=replace(
                record.compensation, corrections=[], applied=False, kind=None, site=None, strength=None, ridge=None,
                reason="no correction lowered the held-out loss", loss_after=4.26,
            ),
        ),
        "no correction": replace(record, compensation=CompensationRecord(applied=False, reason="--compensation none")),
        "applied, little known": replace(record, compensation=CompensationRecord(applied=True)),
        "projection": replace(record, compensation=replace(record.compensation, kind="projection")),
        "pruning only": replace(record, evaluation=None, verification=None, artifacts=[], target=None, space=None),
        "no texts": replace(record, evaluation=replace(evaluation, texts=[])),
        "other source only": replace(record, evaluation=replace(evaluation, texts=other_only)),
        "same source only": replace(record, evaluation=replace(evaluation, texts=same_only)),
        "better": replace(
            record, evaluation=replace(evaluation, texts=[replace(same_only[0], compensated=17.0, interval=[])])
        ),
        "no onnx": replace(record, artifacts=record.artifacts[:1]),
        "no parity": replace(record, artifacts=[replace(record.artifacts[1], parity=None)]),
        "local base": replace(record, base=local, target=None),
        "no licence": replace(record, base=replace(record.base, license=None)),
        "other licence": replace(
            record,
            base=replace(
                record.base, license="other", license_name="llama3", license_link="https://x.org/l", gated=True
            ),
        ),
        "relative licence": replace(record, base=replace(record.base, license="other", license_link="LICENSE")),
        "your choice": replace(record, candidates=[]),
        "one ranking": replace(record, candidates=record.candidates[:1]),
        "not the lowest": replace(
            record, candidates=[*record.candidates, Candidate("taylor", list(range(8)), 4.0, 3.5)]
        ),
        "other dtype": replace(record, dtype="float32"),
        "failed checks": replace(
            record, verification=VerificationRecord(False, 0.5, 64, False),
            artifacts=[replace(record.artifacts[1], parity=Parity(0.2, 0.3, False, 48))],
        ),
        "bare": replace(
            record, base=Base(name="m"), calibration=CalibrationRecord("t.txt", 4, 64, 16, ""), candidates=[],
            compensation=CompensationRecord(applied=False), verification=None, evaluation=None, artifacts=[],
            target=None, space=None, dtype="", versions={}, timings={}, hardware="", settings=None,
        ),
        "own texts": replace(record, settings={"calibration": ["a.txt", "b|`c`.jsonl"], "eval_text": ["a.txt"]}),
        "measured": replace(record, measured=make_measured()),
        "measured, text alone": replace(
            record,
            measured=replace(make_measured(), tasks=[], files=[], speed=[], samples=[], harness=None, settings={}),
        ),
        "measured, one file dropped": replace(record, measured=make_measured(), measured_note="One was dropped"),
        "stale": replace(record, measured_note="An evaluation of other weights is not shown"),
        "made again": replace(record, command="gradmap-hub push --from gradmap.json -o again"),
        "not finite": replace(
            record,
            evaluation=replace(evaluation, texts=[replace(other_only[0], compensated=float("inf"), interval=[])]),
            candidates=[replace(record.candidates[0], loss=float("nan"))],
        ),
    }  # fmt: skip


def test_golden() -> None:
    text = card_text(make_record())
    if os.environ.get("GRADMAP_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8", newline="\n")
    assert text == GOLDEN.read_text(encoding="utf-8")


def reproduction(record: RunRecord) -> str:
    """The part of the page about making it again."""
    return card_text(record).partition("## Reproduction\n")[2].partition("\n| | |")[0]


def test_how_to_make_it_again() -> None:
    record = make_record()
    text = reproduction(record)
    assert text.startswith("\n```bash\ngradmap-hub push --from gradmap.json\n```\n")
    assert record.command in text and "--revision" not in text
    assert "`c4.txt` is not published here" in text and "give the path with `--eval-text`." in text
    assert "wikitext" not in text
    own = reproduction(variants()["own texts"])
    assert "`a.txt`, <code>" in own and "are not published here: put them next to" in own
    assert "give the path with `--calibration`, `--eval-text`." in own
    assert "The command of this run" not in reproduction(variants()["made again"])
    local = reproduction(variants()["local base"])
    assert "gradmap-hub prune MODEL OUTPUT --from gradmap.json" in local and "replace `MODEL` by" in local
    # A record of before does not hold the settings: only the command is known.
    before = reproduction(variants()["earlier version"])
    assert "--from" not in before and f"--revision {record.base.commit}" in before


def test_metadata_as_the_hub_client_reads_it() -> None:
    data = ModelCard(card_text(make_record())).data
    assert isinstance(data, ModelCardData)
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.get("base_model_relation") == "finetune"
    assert data.license == "apache-2.0" and data.get("license_name") is None
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["gradmap", "pruned", "layer-pruning", "onnx", "transformers.js", "llama"]
    assert data.language == ["en"]
    assert data.model_name == "smollm2-135m-gradmap-27"
    assert data.eval_results == [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="Salesforce/wikitext",
            dataset_name="Salesforce/wikitext:wikitext-2-raw-v1/train",
            dataset_config="wikitext-2-raw-v1",
            dataset_split="train",
            metric_type="perplexity",
            metric_name="Token perplexity",
            metric_value=31.44,
        ),
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="c4-txt",
            dataset_name="c4.txt",
            metric_type="perplexity",
            metric_name="Token perplexity",
            metric_value=73.7123,
        ),
    ]


@pytest.mark.parametrize("name", variants())
def test_every_variant_reads_whole(name: str) -> None:
    text = card_text(variants()[name])
    page = without_code(text)
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|[Uu]ndefined|TODO|\{\{|\{%", page)
    assert not re.search(r"[ \t]$|\n{3}", text, flags=re.MULTILINE)
    assert not re.search(r" {2}|\( | ,| \.(?!\w)", re.sub(r"(?m)^---.*?^---$", "", page, count=1, flags=re.DOTALL))
    assert text.count("<details>") == text.count("</details>")
    ModelCard(text)
    assert_tables_whole(text)


def test_a_file_under_two_names_is_one_file() -> None:
    record = make_record()
    graph = next(entry for entry in record.artifacts if entry.path.endswith(".onnx"))
    names = ("onnx/model_int8.onnx", "onnx/model_quantized.onnx")
    files = [replace(graph, path=name, sha256="a" * 64, format="int8") for name in names]
    text = card_text(replace(record, artifacts=[*record.artifacts, *files]))
    assert "| `onnx/model_quantized.onnx`, the same file as `onnx/model_int8.onnx` |" in text
    assert '{ dtype: "q8" }' in text


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^(`{3,}).*?^\1$", "", text)


def assert_tables_whole(text: str) -> None:
    """Each run of table lines is well formed: a header, a rule, and rows of the same number of cells."""
    tables = re.findall(r"(?:^\|.*\n)+", without_code(text), flags=re.MULTILINE)
    assert tables
    for table in tables:
        lines = table.splitlines()
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(lines) >= 3 and len(cells) == 1, table
        assert re.fullmatch(r"[|:-]+", lines[1]), table
        assert all(line.endswith("|") for line in lines)
    starts = re.findall(r"(?m)^(.*)\n\|.*\n\|[|:-]+$", without_code(text))
    assert starts == [""] * len(tables), "a table needs a blank line before it"


def test_wording_follows_the_facts() -> None:
    pages = {name: card_text(record) for name, record in variants().items()}
    assert "78% to 91% higher" in pages["full"] and "21.1% fewer parameters" in pages["full"]
    assert "No compensation was applied" in pages["not applied"] and "Pruned + compensated" not in pages["not applied"]
    assert "no correction lowered the held-out loss" in pages["not applied"]
    assert "3 weight matrices corrected in closed form" in pages["full"] and "3 weight matrices were" in pages["full"]
    assert "One weight" not in pages["full"] and "from 4.2513 to 3.7402 nats per token in total" in pages["full"]
    assert "| 18 | 12 | attention | weight | 0.03 | 3.9127 | 3.8011 |" in pages["full"]
    assert "| 27 | attention | weight | 0.03 | 3.7399 |" in pages["full"]
    assert "corrected: MLP down projections and attention output projections." in pages["full"]
    assert "corrected: MLP down projections.\n" in pages["MLPs only"]
    for name, part in (("one correction", "MLP down"), ("one correction, attention", "attention output")):
        assert "one weight matrix corrected in closed form" in pages[name]
        assert f"One weight matrix was corrected: the {part} projection of layer 18 (index 12" in pages[name]
        assert "matrices were" not in pages[name]
    assert "down projection of layer 18 (index 12 here)" in pages["earlier version"]
    assert "| Reason | lowest held-out loss |" in pages["earlier version"]
    assert "After compensation" not in pages["earlier version"] and "swapping" not in pages["earlier version"]
    assert "After compensation" not in pages["no correction"] and "`block-influence`, was removed" in pages["full"]
    assert "2 from rankings, and 1 made from the best of them by adding or swapping single layers" in pages["full"]
    assert "12 to 19 | 4.8044 | - | |" in pages["full"]
    assert "lowest loss, `block-influence`, was removed" in pages["one finalist"]
    assert "The set `block-influence` was removed" in pages["not the lowest"]
    assert "stage 2 of GradMAP" in pages["projection"] and "goes beyond" not in pages["projection"]
    for words in ("was not measured", "was not compared with the model in memory"):
        assert words in pages["pruning only"]
    assert "model-index" not in pages["pruning only"] and "model-index" not in pages["no texts"]
    assert "path/to/smollm2-135m-gradmap-27" in pages["pruning only"]
    assert "52.90" in pages["no texts"] and "31.44" in pages["no texts"]
    assert "3.5% lower" in pages["better"] and "worse than" not in pages["better"]
    assert "No licence is known" in pages["no licence"] and "\nlicense:" not in pages["no licence"]
    assert "[llama3](https://x.org/l)" in pages["other licence"] and "restricted" in pages["other licence"]
    assert "base_model" not in pages["local base"] and "finetune" not in pages["local base"]
    assert "not from the Hub" in pages["local base"] and "--revision" not in pages["local base"]
    assert "does not" not in pages["full"] and "do not match" in pages["failed checks"]
    assert "not due to pruning alone" in pages["other dtype"]
    assert "was not compared" in pages["no parity"]
    measured = pages["measured"]
    assert "In c4.txt, 2 of 32 sequences (6.2%) have a 13-gram overlap with the calibration text (c4.txt)" in measured
    assert "No sequence of c4.txt has a 13-gram overlap" in measured and "was not checked: c4.txt." in measured
    assert "| 38.51 | 73.70 | 1.80 to 2.00 | 41.3% (40.0% to 43.0%) | 1.21 (1.10 to 1.30) |" in measured
    assert "| c4.txt | 20 of 500 | acc | 60.0% | 55.0% | -5.0 (-20.0 to +10.0) | 91.7% |" in measured
    assert "| piqa | 1,838 | acc | 0.0% | 50.0% | +50.0 (+10.0 to +90.0) | - |" in measured
    assert "| wikitext | 62 | word_perplexity | 61.20 | 190.00 | +210.5% | - |" in measured
    assert "| mean of 2 | | acc_norm, or acc if the task has no acc_norm | 55.0% | 40.0% | -15.0 | 72.7% |" in measured
    assert "1.0040 to 1.0070" in measured and "| 8 | 1,204 (1,100 to 1,300) | 51.2 (50.0 to 52.0) |" in measured
    assert "Safety and bias were not evaluated" in measured and "2 threads" in measured
    alone = pages["measured, text alone"]
    assert "lm-evaluation-harness" not in alone and "Tasks, safety and bias were not evaluated" in alone
    assert "One was dropped." in pages["measured, one file dropped"]
    assert "other weights is not shown." in pages["stale"] and "## Evaluation" not in pages["stale"]
    for name in ("no onnx", "pruning only"):
        assert "onnx" not in pages[name].lower(), name


def test_tensors_left_out_of_the_original_are_said() -> None:
    assert "Left out of the original" not in card_text(make_record())
    page = card_text(replace(make_record(), unused_tensors=["score.weight", "score.bias"]))
    assert "| Left out of the original | 2 tensors that a llama with its config.json does not have, such as " in page
    assert "`score.weight`" in page


def test_hostile_strings_stay_text() -> None:
    record = make_record()
    evaluation = record.evaluation
    assert evaluation is not None
    nasty = replace(
        record,
        name=NASTY,
        command=f"gradmap-hub prune '{NASTY}'\n```\n# out of the fence",
        base=replace(
            record.base, name=NASTY, repo_id=NASTY, commit=NASTY, license="other", license_name=NASTY,
            license_link=f"javascript:{NASTY}", language=[NASTY], model_type=NASTY, dtype=NASTY,
        ),
        layers=[replace(layer, reason=NASTY) for layer in record.layers],
        candidates=[replace(record.candidates[0], name=NASTY)],
        calibration=replace(
            record.calibration, source=NASTY, sha256=NASTY, texts=[TextSource(NASTY, NASTY, 3)]
        ),
        compensation=replace(
            record.compensation, reason=NASTY,
            trials=[Trial(18, NASTY, 0.1, 3.0, NASTY)],
            corrections=[replace(entry, part=NASTY, kind=NASTY) for entry in record.compensation.corrections],
        ),
        evaluation=replace(
            evaluation, data=NASTY, texts=[replace(text, name=NASTY, kind=NASTY) for text in evaluation.texts]
        ),
        artifacts=[replace(artifact, path=f"onnx/{NASTY}.onnx") for artifact in record.artifacts],
        unused_tensors=[NASTY], target=NASTY, space=NASTY, dtype=NASTY, versions={NASTY: NASTY}, hardware=NASTY,
        settings={"calibration": [NASTY], "eval_text": [NASTY]},
        measured=replace(make_measured(NASTY), samples=[Sample(NASTY, NASTY, NASTY)], harness=NASTY, hardware=NASTY),
        measured_note=NASTY,
    )  # fmt: skip
    text = card_text(nasty)
    text.encode("utf-8")
    _, header, body = re.split(r"(?m)^---\n", text, maxsplit=2)
    data = yaml.safe_load(header)
    assert data["license_name"] == card.one_line(NASTY)
    assert data["model-index"][0]["name"] == card.one_line(NASTY)
    parsed = ModelCard(text).data
    assert isinstance(parsed, ModelCardData) and len(parsed.eval_results or []) == 4 + 4
    assert_tables_whole(text)
    fences = re.findall(r"(?m)^(`{3,})", body)
    assert fences[0::2] == fences[1::2] and len(fences) == 12
    outside = without_code(body)
    assert "<script" not in outside and "](javascript" not in outside.replace("\\](javascript", "")
    assert not re.search(r"(?<!\\)\{\{", outside)
    assert re.findall(r"(?m)^# .*", outside) == ["# " + card.escape(NASTY)]
    for block in re.findall(r"(?ms)^```python\n(.*?)^```$", body):
        compile(block, "<card>", "exec")


def test_the_template_cannot_print_a_raw_value() -> None:
    environment = card._environment()
    for source in ("{{ none }}", "{{ 0.1 }}", "{{ [1] }}", "{{ true }}"):
        with pytest.raises(TypeError):
            environment.from_string(source).render()
    with pytest.raises((TypeError, UndefinedError)):
        environment.from_string("{{ missing }}").render()
    assert environment.from_string("{{ x }}").render(x="a|b") == "a\\|b"


def test_front_matter_leaves_out_what_is_unknown() -> None:
    data = front_matter(variants()["bare"])
    assert list(data) == ["library_name", "pipeline_tag", "tags"]
    assert data["tags"] == ["gradmap", "pruned", "layer-pruning"]


def test_files_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    from PIL import Image

    record = make_record()
    first = write_card(record, tmp_path / "one")
    second = write_card(record, tmp_path / "two")
    names = [path.relative_to(tmp_path / "one").as_posix() for path in first]
    assert names == ["README.md", "assets/layers.png", "assets/shift.png"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    for path in first[1:]:
        assert path.stat().st_size < 100_000
        with Image.open(path) as image:
            image.load()
            assert image.size == (1200, 520)
            assert "Software" not in image.info


def test_no_shift_no_plot(tmp_path: Path) -> None:
    written = write_card(variants()["bare"], tmp_path)
    assert [path.name for path in written] == ["README.md", "layers.png"]
    assert "shift.png" not in written[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("scores", [[0.0, 1.0], [1e-9, 1e9], [0.0, 0.0], [-2.0, -1.0]])
def test_plots_of_extreme_scores(scores: list[float], tmp_path: Path) -> None:
    layers = [LayerDecision(index, score, index == 1, "kept") for index, score in enumerate(scores)]
    compensation = CompensationRecord(applied=True, site=1, shift_layers=[1], shift=[0.0], relative_shift=[0.0])
    record = replace(make_record(), layers=layers, removed=[0], candidates=[], compensation=compensation)
    assert all(path.stat().st_size for path in write_card(record, tmp_path))


def test_the_figures_mark_every_corrected_layer() -> None:
    record = make_record()
    assert corrected_layers(record) == [11, 18]
    assert corrected_layers(earlier_version(record)) == [18]
    assert corrected_layers(variants()["not applied"]) == []


def test_a_model_too_large_for_a_browser_says_so() -> None:
    record = make_record()
    assert "too large" not in card_text(record)
    graphs = [entry for entry in record.artifacts if entry.path.startswith("onnx/")]
    large = [replace(entry, bytes=900_000_000) for entry in graphs]
    share = record.parameters.before / record.parameters.after
    text = card_text(replace(record, artifacts=large))
    words = f"in a browser: the smallest files of both have {0.9 * (1 + share):.2f} GB."
    assert words in text, [line for line in text.splitlines() if "too large" in line]
