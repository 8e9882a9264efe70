"""ONNX export with KV cache through Optimum, and the check of its parity with PyTorch.

The export runs in its own process, which frees its memory, captures its output and lets Ctrl-C end it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmap_hub.errors import MissingExtra, VerificationError
from gradmap_hub.exporters import environment
from gradmap_hub.exporters.processes import WorkerFailed, call, worker_environment
from gradmap_hub.files import usual_mode
from gradmap_hub.formats import FORMATS, ONNX
from gradmap_hub.models.architectures import ARCHITECTURES
from gradmap_hub.models.safetensors_files import clean_config
from gradmap_hub.models.transformers_compat import has_5
from gradmap_hub.record import Parity

MODEL = FORMATS[ONNX].file
MODEL_DATA = f"{MODEL}_data"
# The graph and the files that ONNX Runtime's loaders need beside it; tokenizer files stay at the top of the repository.
_KEPT = (MODEL, MODEL_DATA, "config.json", "generation_config.json")
PARITY_LIMIT = 1e-3
PROMPTS = (
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n",
)
GREEDY_TOKENS = 16


def unsupported(config: Mapping[str, Any]) -> str | None:
    """The reason why Optimum cannot export a model with this config.json, or None. Decided without reading weights."""
    kind = str(config.get("model_type"))
    row = ARCHITECTURES.get(kind)
    correct = None if row is None else row.optimum
    variant = "" if correct is False else _variant_reason(kind, config)
    if variant is not None:
        return f"Optimum's export of {kind!r}{variant} fails or differs from PyTorch"
    return None if correct else f"Optimum does not know model type {kind!r}"


def _variant_reason(kind: str, config: Mapping[str, Any]) -> str | None:
    """Variants whose export fails: Optimum's example past has another number of heads than transformers' cache."""
    if kind == "falcon" and config.get("new_decoder_architecture"):
        return " with the new decoder"  # repeats keys and values for all heads before caching them
    heads = config.get("num_attention_heads")
    if kind == "phi" and (config.get("num_key_value_heads") or heads) != heads:
        return " with grouped key and value heads"  # Optimum uses the number of query heads
    return None


def require() -> None:
    """Check, before any expensive work, that the export can run.

    Raises:
        MissingExtra: the extra `onnx` or a runtime is not installed.
    """
    if has_5():
        return  # exports run in a separate environment
    for module in ("optimum.exporters.onnx", "optimum.onnxruntime", "onnx"):
        if not _importable(module):
            raise MissingExtra("The ONNX export", "onnx")
    if not _importable("onnxruntime"):
        raise MissingExtra("ONNX Runtime", "cpu")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def export_onnx(source: Path, destination: Path) -> list[Path]:
    """Export the checkpoint in `source` (float32, text generation with past) into `destination`.

    Files appear in the destination only when the export is complete; files of other formats are kept.

    Raises:
        VerificationError: Optimum failed; the message contains its last line of output.
    """
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    worker = [environment.python(), "-m", "gradmap_hub.exporters.onnx_worker", str(source), str(partial)]
    try:
        done = subprocess.run(worker, capture_output=True, text=True, env=worker_environment())
    except BaseException:  # Ctrl-C: the worker has ended; remove its partial output
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if done.returncode != 0 or not (partial / MODEL).is_file():
        shutil.rmtree(partial, ignore_errors=True)
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise VerificationError(
            f"The ONNX export failed: {last}",
            hint="The pruned checkpoint is complete; --no-onnx skips the ONNX export.",
        )
    for path in partial.iterdir():
        if path.name in _KEPT:
            path.chmod(usual_mode())
        else:
            path.unlink()
    clean_config(partial / "config.json")
    # Files of other formats are kept. The graph is moved last, when the files it needs are in place.
    destination.mkdir(exist_ok=True)
    for name in reversed(_KEPT):
        (destination / name).unlink(missing_ok=True)
        if (partial / name).is_file():
            os.replace(partial / name, destination / name)
    partial.rmdir()
    return sorted(destination / name for name in (MODEL, MODEL_DATA) if (destination / name).is_file())


def check_parity(checkpoint: Path, onnx_folder: Path) -> Parity:
    """Compare the ONNX graph with PyTorch float32 on three prompts: logits without and with past, greedy tokens.

    Raises:
        VerificationError: the largest logit difference exceeds 1e-3, greedy tokens differ, or the comparison failed.
    """
    if has_5():
        try:
            found = call("parity_worker", {"checkpoint": str(checkpoint), "graph": str(onnx_folder)})
        except WorkerFailed as error:
            raise VerificationError(f"The comparison of the ONNX file with PyTorch failed: {error}") from error
        parity = Parity(**found)
    else:
        parity = measure(checkpoint, onnx_folder)
    plain, with_past, equal = (
        parity.max_logit_difference,
        parity.max_logit_difference_with_past,
        parity.greedy_tokens_equal,
    )
    if max(plain, with_past) > PARITY_LIMIT or not equal:
        raise VerificationError(
            f"The ONNX file differs from PyTorch: logits by {plain:.2g} (with past {with_past:.2g}), greedy tokens "
            f"{'equal' if equal else 'differ'}.",
            hint="It is not published. Please report the model; --no-onnx skips the ONNX export.",
        )
    return parity


def measure(checkpoint: Path, onnx_folder: Path) -> Parity:
    """The measurement of `check_parity`; requires Optimum."""
    import torch
    from transformers import AutoTokenizer

    from gradmap_hub.models.checkpoint import load_model

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    reference, _ = load_model(checkpoint)
    exported = open_graph(onnx_folder)
    plain = with_past = 0.0
    equal = True
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            mask = torch.ones_like(ids)
            plain = max(plain, _difference(exported(ids, attention_mask=mask), reference(ids, attention_mask=mask)))
            with_past = max(with_past, _with_past(exported, reference, ids))
            equal = equal and torch.equal(_greedy(exported, ids, mask), _greedy(reference, ids, mask))
    return Parity(plain, with_past, equal, GREEDY_TOKENS * len(PROMPTS))


def open_graph(onnx_folder: Path) -> Any:
    """Open the graph with Optimum and give its empty cache the graph's own shape: for some types (`gemma2`, and `phi3`
    with grouped heads) Optimum uses the number of query heads or a wrong head size, which the graph rejects."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(
        onnx_folder, file_name=MODEL, provider="CPUExecutionProvider", local_files_only=True
    )
    shape = next(entry.shape for entry in model.session.get_inputs() if entry.name.startswith("past_key_values."))
    model.num_key_value_heads, model.embed_size_per_head = shape[1::2]  # (batch, heads, tokens, head size)
    return model


def _difference(left: Any, right: Any) -> float:
    return float((left.logits.float() - right.logits.float()).abs().max())


def _with_past(exported: Any, reference: Any, ids: Any) -> float:
    """Largest logit difference after prefilling all but the last token and one step with the cache."""
    import torch

    head, tail, mask = ids[:, :-1], ids[:, -1:], torch.ones_like(ids)
    results = []
    for model in (exported, reference):
        prefill = model(head, attention_mask=mask[:, :-1], use_cache=True)
        results.append(model(tail, attention_mask=mask, past_key_values=prefill.past_key_values, use_cache=True))
    return _difference(*results)


def _greedy(model: Any, ids: Any, mask: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=GREEDY_TOKENS,
        min_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )


def file_names(folder: Path) -> Sequence[Path]:
    """The files of an Optimum export in `folder`; only the graph's path if there are none."""
    return [folder / name for name in _KEPT if (folder / name).exists()] or [folder / MODEL]
