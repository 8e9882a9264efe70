"""What may be run or published from a Space folder that came from somebody else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradmap_hub.errors import UnsafeToPublish
from gradmap_hub.pipeline.plan import check_space_code, check_space_entries
from gradmap_hub.pipeline.space import finished_space
from gradmap_hub.record import Base
from gradmap_hub.space.app import STANDALONE, content_folder
from gradmap_hub.space.integrity import foreign_code, foreign_entry
from gradmap_hub.space.local import _environment
from gradmap_hub.space.zerogpu import ZERO_REQUIREMENTS


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A Space folder of the installed app."""
    folder = tmp_path / "small-space"
    (folder / "original").mkdir(parents=True)
    for path in (*content_folder().glob("*.py"), *content_folder().glob("*.css"), *STANDALONE):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(content_folder() / "requirements-onnx.txt", folder / "requirements.txt")
    for name in ("compare.json", "README.md", ".gitattributes"):
        (folder / name).write_text("{}")
    return folder


def test_the_installed_app_is_accepted(space: Path) -> None:
    assert foreign_code(space) is None
    requirements = space / "requirements.txt"
    requirements.write_text(requirements.read_text() + "# Hands out the GPU.\n" + "\n".join(ZERO_REQUIREMENTS))
    assert foreign_code(space) is None
    check_space_code(space)


def test_what_stays_beside_a_new_app(space: Path) -> None:
    assert foreign_entry(space) is None and foreign_entry(space / "missing") is None
    (space / "app.py").write_text("")  # is written anew
    (space / "notes.md").write_text("")
    assert foreign_entry(space) is None
    for name in ("numpy.py", "numpy.so"):
        (space / name).write_bytes(b"")
        assert foreign_entry(space) == name
        with pytest.raises(UnsafeToPublish, match=f"{name} is not part of the comparison app"):
            check_space_entries(space)
        (space / name).unlink()
    (space / "gradio").mkdir()
    assert foreign_entry(space) == "gradio"


def test_compare_takes_no_app_of_somebody_else(space: Path) -> None:
    """`compare FOLDER` runs the Space folder beside a model as it is only if it is the installed app."""
    base = Base("acme/base", "acme/base", commit="c" * 40)
    record: Any = SimpleNamespace(base=base)  # all that is read of it
    facts = {
        "original": {"name": base.name, "repo_id": base.repo_id, "revision": base.commit}, "pruned": {},
        "precisions": [{"name": "int8", "file": "model_int8.onnx", "original": {"stored": "hub"}}],
    }  # fmt: skip
    (space / "compare.json").write_text(json.dumps(facts))
    model = space.with_name("small")
    assert finished_space(model, record, ["int8"]) == space
    (space / "app.py").write_text((space / "app.py").read_text() + "\nimport antigravity\n")
    assert finished_space(model, record, ["int8"]) is None


def test_a_pipe_is_not_read(space: Path) -> None:
    (space / "requirements.txt").unlink()
    os.mkfifo(space / "requirements.txt")
    assert foreign_code(space) == "requirements.txt"


def changed(space: Path) -> str:
    (space / "app.py").write_text((space / "app.py").read_text() + "\nimport os\n")
    return "app.py"


def shadowing_module(space: Path) -> str:
    (space / "numpy.py").write_text("")
    return "numpy.py"


def shadowing_package(space: Path) -> str:
    (space / "gradio").mkdir()
    return "gradio"


def extension(space: Path) -> str:
    (space / "numpy.so").write_bytes(b"\0")
    return "numpy.so"


def requirement(space: Path) -> str:
    (space / "requirements.txt").write_text("gradio\nanother-package\n")
    return "requirements.txt"


def link(space: Path) -> str:
    (space / "render.py").unlink()
    (space / "render.py").symlink_to(content_folder() / "render.py")
    return "render.py"


@pytest.mark.parametrize(
    "change", [changed, shadowing_module, shadowing_package, extension, requirement, link], ids=lambda f: f.__name__
)
def test_other_code_is_named_and_not_published(space: Path, change: Callable[[Path], str]) -> None:
    name = change(space)
    assert foreign_code(space) == name
    with pytest.raises(UnsafeToPublish, match=name) as refused:
        check_space_code(space)
    assert "gradmap-hub space FOLDER" in (refused.value.hint or "")


def test_the_app_gets_the_environment_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    given = _environment()
    assert "AWS_SECRET_ACCESS_KEY" not in given
    assert given["HF_HOME"] == "/somewhere" and given["PATH"] == os.environ["PATH"]
