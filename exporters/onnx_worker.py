"""The process that runs Optimum's exporter: `python -m gradmap_hub.exporters.onnx_worker SOURCE DESTINATION`."""

from __future__ import annotations

import sys
import warnings


def main(source: str, destination: str) -> None:
    warnings.filterwarnings("ignore")
    # Where another package installed scikit-learn, transformers imports it (2 s) for a heuristic not used here.
    sys.modules["sklearn"] = None  # pyright: ignore[reportArgumentType]
    from optimum.exporters.onnx import main_export

    main_export(
        source,
        output=destination,
        task="text-generation-with-past",
        device="cpu",
        dtype="fp32",
        local_files_only=True,
        # Optimum's own validation only warns; `check_parity` is the gate.
        do_validation=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
