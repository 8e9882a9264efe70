"""The main job, whole and real: one demo, and what its result must be for somebody who has only transformers, Optimum
or huggingface_hub. `make test` runs it on less text, `make test-all` also as a user does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

PROMPTS = ("The capital of France is", "Once upon a time there was a", "A list of three fruits: ")


# The whole push, on a sixteenth of the demo's text. It heals on a sample alone: what the original writes itself takes a
# minute, however little it is.
LESS_TEXT = ("--samples", "8", "--seq-len", "64", "--eval-rows", "6", "--heal-text")
ON_LESS_TEXT = """
import json, sys
from pathlib import Path
from gradmap_hub.pipeline.demo import run_demo
from gradmap_hub.progress import SilentReporter

run_demo(
    Path(sys.argv[1]), ratio=0.25, heal=sys.argv[2], onnx=True, space=True, resume=False, quiet=False,
    reporter=SilentReporter(), finished=lambda done: print(json.dumps(done.json())), extra=tuple(sys.argv[3:]),
)
"""


@pytest.fixture(scope="module", params=["less text", pytest.param("as a user", marks=pytest.mark.slow)])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("demo") / "out"
    command = {
        "less text": ["-c", ON_LESS_TEXT, str(output), "1k", *LESS_TEXT, str(output / "samples" / "wikipedia.txt")],
        "as a user": ["-m", "gradmap_hub", "demo", "--output", str(output), "--json"],
    }[request.param]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "output": output}


def test_layers_and_perplexity(demo: dict[str, Any]) -> None:
    assert demo["layers"] == {"before": 30, "after": 22}
    assert len(demo["removed"]) == 8
    assert demo["parameters"]["after"] < demo["parameters"]["before"]
    near = [text for text in demo["texts"] if text["kind"] == "calibration (held out)"]
    away = [text for text in demo["texts"] if text["kind"] == "another source"]
    assert near[0]["name"] == "wikipedia.txt" and away[0]["name"] == "c4.txt"
    for text in near:
        assert text["original"] < text["compensated"] <= 0.85 * text["pruned"], text
    for text in away:
        assert text["original"] < text["compensated"] <= text["pruned"], text
    assert demo["perplexity"]["compensated"] == near[0]["compensated"]


def test_perplexity_equals_plain_transformers(demo: dict[str, Any]) -> None:
    """The number on the card against a loop that shares no code with ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo["folder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo["folder"])
    text = (demo["output"] / "samples" / "stories.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    measured = next(entry for entry in demo["texts"] if entry["name"] == "stories.txt")
    length = measured["sequence_length"]
    whole = len(ids) // length
    losses = []
    for row in range(whole - measured["rows"], whole):
        block = torch.tensor([ids[row * length : (row + 1) * length]])
        with torch.no_grad():
            losses.append(float(model(block, labels=block).loss))
    expected = torch.tensor(losses, dtype=torch.float64).mean().exp()
    # Ours reads all sequences at once; processors differ in the last digits of float32 sums.
    assert measured["compensated"] == pytest.approx(float(expected), rel=1e-4)


def test_plain_transformers_and_onnx_runtime_agree(demo: dict[str, Any]) -> None:
    pytest.importorskip("optimum.onnxruntime", reason="beside transformers 5 it is in another environment")
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(demo["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert reference.config.num_hidden_layers == 22
    asked = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    with torch.no_grad():
        wanted = [reference(**inputs).logits for inputs in asked]
    greedy = [reference.generate(**inputs, max_new_tokens=12, do_sample=False) for inputs in asked]
    exported = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
    for inputs, logits, tokens in zip(asked, wanted, greedy, strict=True):
        assert float((exported(**inputs).logits - logits).abs().max()) <= 1e-3
        assert torch.equal(exported.generate(**inputs, max_new_tokens=12, do_sample=False), tokens)


def test_tied_embedding_is_stored_once(demo: dict[str, Any]) -> None:
    weights = Path(demo["folder"]) / "model.safetensors"
    graph = Path(demo["folder"]) / "onnx" / "model.onnx"
    assert graph.stat().st_size < 1.02 * weights.stat().st_size


@pytest.mark.slow  # of tiny models, tests/cli/test_push.py does it
def test_what_the_hub_holds_is_what_was_built(demo: dict[str, Any], tmp_path: Path) -> None:
    """Start the same Hub again on its folder, download both repositories with the plain client, compare."""
    for kind, folder in (("model", Path(demo["folder"])), ("space", Path(demo["space_folder"]))):
        repository = demo[kind]
        script = (
            "import sys; from huggingface_hub import snapshot_download as get; "
            f"print(get({repository['repo_id']!r}, repo_type={kind!r}, revision={repository['commit']!r}))"
        )
        snapshot = Path(_against_hub(demo["output"] / "hub", script, tmp_path))
        files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        published = {path.relative_to(snapshot) for path in snapshot.rglob("*") if path.is_file()}
        assert published - files <= {Path(".gitattributes")}
        for name in files:
            assert _sha256(snapshot / name) == _sha256(folder / name), name


def test_space_answered_and_original_ran_in_the_same_runtime(demo: dict[str, Any]) -> None:
    assert demo["answers"]["original"]["tokens"] > 0 and demo["answers"]["pruned"]["tokens"] > 0
    assert "Paris" in demo["answers"]["original"]["text"]
    assert (Path(demo["space_folder"]) / "original" / "model.onnx").is_file()


def test_card_says_what_was_measured(demo: dict[str, Any]) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(demo["folder"]) / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    results = {result.dataset_name: result.metric_value for result in card.data.eval_results or []}
    assert results == {text["name"]: pytest.approx(text["compensated"], abs=1e-4) for text in demo["texts"]}


def test_nothing_of_this_machine_is_published(demo: dict[str, Any]) -> None:
    import socket

    paths = ("hf_local_", str(demo["output"]), str(Path.home()))
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    for root in (Path(demo["folder"]), Path(demo["space_folder"])):
        for path in root.rglob("*"):
            if path.suffix in (".json", ".md", ".txt", ".py", ".jinja"):
                text = path.read_text(encoding="utf-8")
                assert not any(secret in text for secret in paths), path
                # A short host name may well be a token of the vocabulary.
                assert "tokenizer" in path.name or not host.search(text), path


def test_no_process_is_left(demo: dict[str, Any]) -> None:
    me = os.getpid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != me:
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            assert str(demo["output"]) not in line, line


def _against_hub(root: Path, script: str, tmp_path: Path) -> str:
    """Run `script` in a fresh process against the embedded Hub on `root`; returns its last line."""
    with subprocess.Popen(
        [sys.executable, "-m", "gradmap_hub", "hub", "--root", str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as hub:
        try:
            assert hub.stdout is not None and hub.stderr is not None
            url = hub.stdout.readline().strip()
            token = hub.stderr.readline().strip().rpartition("HF_TOKEN=")[2].split()[0]
            environment = {
                **os.environ,
                "HF_ENDPOINT": url,
                "HF_TOKEN": token,
                "HF_HOME": str(tmp_path / "hf"),
                "NO_PROXY": "127.0.0.1,localhost",
            }
            done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip().splitlines()[-1]
        finally:
            hub.terminate()
            hub.wait(timeout=20)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_answer_has_the_recorded_keys(demo: dict[str, Any]) -> None:
    """Those of push, without the collection that only tests/cli/test_contract.py asks for, and the demo's own."""
    contract = json.loads((Path(__file__).parents[1] / "golden" / "contract.json").read_text(encoding="utf-8"))
    pushed = {place for place in contract["shapes"]["answer of push"] if place.isidentifier()}
    # The fixture adds two keys.
    assert set(demo) - {"output", "stderr"} == pushed - {"collection"} | set(contract["demo"])
