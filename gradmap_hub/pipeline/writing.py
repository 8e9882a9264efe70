"""Writes the pruned checkpoint, reads it back and compares the logits."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmap_hub.layout import COMPANION_FILES, extra_templates, legal_texts
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.pipeline.stages import new_values
from gradmap_hub.record import (
    CompensationRecord,
    HealRecord,
    VerificationRecord,
)
from gradmap_hub.units import size

if TYPE_CHECKING:  # torch is only imported once there is something to compute
    from gradmap_hub.pipeline.run import Run


@dataclass(frozen=True)
class WrittenModel:
    """A written checkpoint. `parameters`, `bytes`: numbers of parameters and sizes of the weight files of the original
    and the result; `dtype`: of the stored weights."""

    verification: VerificationRecord
    parameters: BeforeAfter
    bytes: BeforeAfter
    dtype: str


def write(
    run: Run, removed: Sequence[int], compensation: CompensationRecord, healed: HealRecord | None
) -> WrittenModel:
    """Write the checkpoint without the removed layers and with the compensated and healed weights, and verify it.

    Raises:
        VerificationError: the checkpoint that is read back differs from the model in memory.
    """

    def compute() -> WrittenModel:
        from gradmap_hub.models import checkpoint
        from gradmap_hub.models.tokenizer import repeat_template, write_tokenizer
        from gradmap_hub.pruning.removal import storage_dtype

        source = run.original.checkpoint()
        dtype = storage_dtype(run.method.dtype, run.source.base.dtype)
        overrides = new_values(run, compensation, healed)
        from_source = _write_streamed if run.method.low_memory else _write_from_memory
        verification, parameters = from_source(run, removed, overrides, dtype)
        names = legal_texts(path.name for path in source.iterdir())
        checkpoint.copy_companions(source, run.output, [*COMPANION_FILES, *extra_templates(source), *names])
        write_tokenizer(run.original.tokenizer(), run.output, run.source.base.name)
        repeat_template(run.output)
        return WrittenModel(
            verification,
            parameters,
            BeforeAfter(checkpoint.checkpoint_bytes(source), checkpoint.checkpoint_bytes(run.output)),
            str(dtype).removeprefix("torch."),
        )

    return run.stages.run(
        "write",
        "Writing and verifying the checkpoint",
        WrittenModel,
        compute,
        inputs={"dtype": run.method.dtype},
        files=lambda: [run.output / "config.json", *sorted(run.output.glob("*.safetensors"))],
        describe=lambda written: f"{size(written.bytes.before)} -> {size(written.bytes.after)}, logits read back equal",
    )


def _write_from_memory(
    run: Run, removed: Sequence[int], overrides: Mapping[tuple[int, str], Any], dtype: Any
) -> tuple[VerificationRecord, BeforeAfter]:
    from gradmap_hub.models import checkpoint
    from gradmap_hub.pruning.prune_model import apply_pruning
    from gradmap_hub.pruning.removal import parameter_count
    from gradmap_hub.pruning.verification import logits_of, probe_ids, verify

    decoder = run.decoder()
    before = parameter_count(decoder.model)
    model = apply_pruning(decoder, run.source.architecture, removed, dict(overrides))
    after = parameter_count(model)
    checkpoint.save_checkpoint(model, run.output, dtype)
    checkpoint.cast_parameters(model, _float32())
    expected = logits_of(model.cpu(), probe_ids(model.config))
    run.release()
    del decoder, model
    gc.collect()
    reloaded, report = checkpoint.load_model(run.output)
    return verify(reloaded, report, run.output, expected), BeforeAfter(before, after)


def _write_streamed(
    run: Run, removed: Sequence[int], overrides: Mapping[tuple[int, str], Any], dtype: Any
) -> tuple[VerificationRecord, BeforeAfter]:
    """Like `_write_from_memory`, but layer by layer from file to file, with both models streamed for the comparison."""
    from gradmap_hub.models.streaming import key_report, open_streamed, pruned_logits
    from gradmap_hub.pruning.removal import parameter_count
    from gradmap_hub.pruning.verification import probe_ids, verify
    from gradmap_hub.pruning.writing import write_pruned

    source, architecture = run.original.checkpoint(), run.source.architecture
    after = write_pruned(source, run.output, architecture, removed, overrides, dtype)
    written = open_streamed(run.output, architecture, run.method.seq_len, dtype=_float32())
    probe = probe_ids(written.model.config)
    run.release()
    # Round to the stored dtype, so that both models compute with the same numbers in the same precision.
    original = open_streamed(source, architecture, probe.shape[1], dtype=_float32(), rounding=dtype)
    before = parameter_count(original.model)
    for (layer, name), value in overrides.items():
        original.put(layer, {name: value})
    expected = pruned_logits(original, [layer for layer in range(original.count) if layer not in set(removed)], probe)
    with written.whole_model() as model:
        record = verify(model, key_report(run.output), run.output, expected)
    return record, BeforeAfter(before, after)


def _float32() -> Any:
    import torch

    return torch.float32
