"""The folders of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradmap_hub.config import PruneConfig
from gradmap_hub.errors import OutputInUse
from gradmap_hub.layout import default_output, work_folder
from gradmap_hub.pipeline.run import exclusive


def test_two_runs_do_not_work_on_one_output(tmp_path: Path) -> None:
    output = tmp_path / "small"
    with exclusive(output):
        with pytest.raises(OutputInUse, match=r"Another run works on .*small"), exclusive(output):
            raise AssertionError
        with exclusive(tmp_path / "other"):
            pass
    with pytest.raises(KeyboardInterrupt), exclusive(output):
        raise KeyboardInterrupt
    with exclusive(output):
        pass
    assert not list(work_folder(output).iterdir())


def test_the_result_is_not_written_into_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    config = PruneConfig(ratio=0.25)
    monkeypatch.chdir(folder)
    assert default_output(".", config) == tmp_path / "mine-gradmap-25"
    assert default_output("inner", config) == Path("inner-gradmap-25")
    assert default_output("org/model", config) == Path("model-gradmap-25")
    monkeypatch.chdir(folder / "inner")
    assert default_output("..", config) == Path("mine-gradmap-25")
