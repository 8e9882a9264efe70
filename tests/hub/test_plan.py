"""Before any work: what --dry-run looks at and says, and where the licence comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from gradmap_hub.config import PruneConfig, PublishConfig, PushConfig
from gradmap_hub.errors import CardInvalid, NotAllowed, SourceError, TargetExists, UsageError
from gradmap_hub.models.source import find_source
from gradmap_hub.pipeline.plan import make_plan

from .conftest import BASE, Side, tensors, write_folders

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "torch_dtype": "float32",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(tensors(0))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    return folder


@pytest.fixture
def seeded(server: Any, base: Path) -> str:
    server.seed(BASE, base)
    return BASE


def config(model: str, tmp_path: Path, **changes: Any) -> PushConfig:
    settings: dict[str, Any] = {"prune": PruneConfig(layers=1), "output": tmp_path / "out", "onnx": False}
    return PushConfig(model=model, **settings | changes)


def checks(side: Side, config: PushConfig) -> dict[str, str]:
    return {check.name: check.result for check in make_plan(config, side.hub).checks}


def test_what_is_checked(server: Any, ada: Side, seeded: str, tmp_path: Path) -> None:
    found = checks(ada, config(seeded, tmp_path))
    assert list(found) == [
        "account", "target", "space", "kind of Space", "weights", "licence", "card", "disk", "upload",
    ]  # fmt: skip
    assert found["account"] == "ada, token of role write"
    assert found["target"] == "ada/out does not exist yet; it is created private"
    assert found["space"] == "ada/out-compare does not exist yet; it is created private"
    assert found["weights"].startswith("open, 0.1 MB at commit ")
    assert found["licence"] == "apache-2.0, from the original"
    assert found["card"] == (
        "the header is valid: base_model, base_model_relation, license, language, library_name, pipeline_tag, tags"
    )
    assert " GB needed, " in found["disk"] and found["upload"] == "at most about 0.1 MB"
    assert not (tmp_path / "out").exists()
    assert {entry.method for entry in server.requests} <= {"GET", "HEAD"}


def test_gated_weights(server: Any, ada: Side, seeded: str, tmp_path: Path) -> None:
    server.set_gated(seeded, "manual")
    with pytest.raises(SourceError, match="restricted"):
        make_plan(config(seeded, tmp_path), ada.hub)
    server.grant_access(seeded, "ada")
    assert checks(ada, config(seeded, tmp_path))["weights"].startswith("gated, access granted, ")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_weights_are_refused_before_they_are_fetched(
    dtype: str, server: Any, ada: Side, base: Path, tmp_path: Path
) -> None:
    """Nothing in the repository says so but the header of its weights, which is read with one request."""
    name = "model.layers.0.mlp.up_proj.weight"
    header = json.dumps({name: {"dtype": dtype, "shape": [600_000], "data_offsets": [0, 600_000]}}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(600_000))
    server.seed("acme/fp8", base)
    before = len(server.requests)
    with pytest.raises(SourceError, match=f"quantised: model.safetensors stores {name} as {dtype}"):
        make_plan(config("acme/fp8", tmp_path), ada.hub)
    asked = [entry for entry in server.requests[before:] if "model.safetensors" in entry.path]
    assert {entry.method for entry in asked} == {"GET"}
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--acme--fp8/snapshots/*/model.safetensors"))


def test_a_header_that_is_none_is_told_with_the_file(ada: Side, server: Any, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\xff" * 100)
    server.seed("acme/broken", base)
    assert find_source("acme/broken", None, ada.hub).weight_bytes == 100


def test_targets_that_are_there(ada: Side, seeded: str, tmp_path: Path) -> None:
    from gradmap_hub.pipeline.publish import publish_folder

    publish_folder(write_folders(tmp_path / "earlier"), PublishConfig(wait_space=0), hub=ada.hub)
    again = config(seeded, tmp_path, to="ada/small")
    with pytest.raises(TargetExists) as caught:
        make_plan(again, ada.hub)
    assert "--update" in str(caught.value.hint)
    found = checks(ada, config(seeded, tmp_path, to="ada/small", update=True))
    assert found["target"] == "ada/small holds an earlier push of 8 files, private; one commit replaces it"
    assert "earlier push of 7 files" in found["space"]
    ada.api.create_repo("ada/empty", private=True)
    assert checks(ada, config(seeded, tmp_path, to="ada/empty"))["target"] == "ada/empty exists, empty and private"


def test_pull_request(ada: Side, seeded: str, tmp_path: Path) -> None:
    found = checks(ada, config(seeded, tmp_path, to=seeded, create_pr=True))
    assert found["target"] == "acme/base gets a pull request; nothing else in it changes" and found["space"] == "none"
    with pytest.raises(NotAllowed):
        make_plan(config(seeded, tmp_path, to=seeded), ada.hub)


def test_license_of_a_local_folder(ada: Side, base: Path, tmp_path: Path) -> None:
    source = find_source(str(base), None, ada.hub).base
    assert (source.license, source.license_source, source.language) == ("apache-2.0", "original", ["en"])
    assert checks(ada, config(str(base), tmp_path))["licence"] == "apache-2.0, from the original"
    with pytest.raises(UsageError, match="--license is for originals that state none"):
        make_plan(config(str(base), tmp_path, license="mit"), ada.hub)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    assert checks(ada, config(str(base), tmp_path))["licence"] == "other (own, LICENSE), from the original"
    for text in ("# no header\n", "---\nlicense: [mit\n---\n", "---\nlicense: [mit, apache-2.0]\n---\n"):
        (base / "README.md").write_text(text)
        assert checks(ada, config(str(base), tmp_path, license="mit"))["licence"] == "mit, stated with --license"


def test_license_that_only_the_hub_knows(ada: Side, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ada.hub, "check_license", asked.append)
    (base / "README.md").write_text("---\nlicense: brand-new-1.0\n---\n")
    assert checks(ada, config(str(base), tmp_path))["licence"] == "brand-new-1.0, from the original"
    assert asked == ["brand-new-1.0"]


def test_other_without_a_name(ada: Side, base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: other\n---\n")
    with pytest.raises(CardInvalid) as caught:
        make_plan(config(str(base), tmp_path), ada.hub)
    assert "--license-name" in str(caught.value.hint)
    named = config(str(base), tmp_path, license_name="own", license_link="LICENSE")
    assert checks(ada, named)["licence"] == "other (own, LICENSE), from the original"
