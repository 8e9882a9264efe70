"""Which file is taken."""

from __future__ import annotations

import pytest

from gradmap_hub.errors import SourceError, UsageError
from gradmap_hub.machine import cpu_count
from gradmap_hub.runtime import Artifact, available_artifacts, choose_artifact
from gradmap_hub.runtime.artifacts import free_memory

SIZES = {
    "config.json": 1,
    "onnx/model.onnx": 10,
    "onnx/model.onnx_data": 4000,
    "onnx/model_int8.onnx": 2000,
    "onnx/model_int4.onnx": 1000,
    "onnx/decoder_model.onnx": 7,
}


def test_graphs_are_found_with_their_data() -> None:
    found = available_artifacts(SIZES)
    assert found == [
        Artifact("int8", "onnx/model_int8.onnx", 2000),
        Artifact("fp32", "onnx/model.onnx", 4010),
        Artifact("int4", "onnx/model_int4.onnx", 1000),
    ]
    assert available_artifacts({"model.onnx": 5}) == [Artifact("fp32", "model.onnx", 5)]


def test_files_of_earlier_versions_are_found() -> None:
    new = {"onnx/model_q4.onnx": 5, "onnx/model_quantized.onnx": 7, "onnx/model_int8.onnx": 7}
    assert [found.path for found in available_artifacts(new)] == ["onnx/model_int8.onnx", "onnx/model_q4.onnx"]
    assert choose_artifact(available_artifacts(new), "model_quantized.onnx").name == "int8"
    both = new | {"onnx/model_int4.onnx": 6}  # the file of an earlier run beside that of this one
    assert choose_artifact(available_artifacts(both), "int4").path == "onnx/model_q4.onnx"


def test_the_machine_decides() -> None:
    found = available_artifacts(SIZES)
    assert choose_artifact(found, memory=10**9).name == "int8"
    assert choose_artifact(found, memory=3000).name == "int4"
    assert choose_artifact(found, cuda=True, memory=0).name == "fp32"
    assert choose_artifact([found[1]], memory=10**9).name == "fp32"
    with pytest.raises(SourceError, match="fits"):
        choose_artifact(found, memory=100)


@pytest.mark.parametrize("wanted", ["int4", "model_int4.onnx", "onnx/model_int4.onnx", "model_q4.onnx"])
def test_the_user_decides_first(wanted: str) -> None:
    assert choose_artifact(available_artifacts(SIZES), wanted, memory=0).name == "int4"


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(UsageError, match="int8, fp32, int4"):
        choose_artifact(available_artifacts(SIZES), "fp16")
    with pytest.raises(SourceError, match="no ONNX") as caught:
        choose_artifact([])
    assert caught.value.hint and "export" in caught.value.hint


def test_the_machine_is_asked() -> None:
    assert cpu_count() >= 1
    free = free_memory()
    assert free is None or free > 0
