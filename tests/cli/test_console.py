"""Terminals of other encodings, bytes that are no text, and the panic of a library: no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradmap_hub.cli import app

TEXT = "café 模型 🦊"
PRINTS = (
    "import sys; from gradmap_hub.cli import output\n"
    "output.escape_unknown_characters()\n"
    f"text = {TEXT!a} + sys.argv[1]\n"
    "output.emit(output.Result({'text': text}, [text]), '--json' in sys.argv)\n"
    "output.stderr.print(text); sys.stdout.write(text)"
)


def run(*arguments: str, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments], input=given, capture_output=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_the_console_lacks_are_escaped(encoding: str) -> None:
    done = run("-c", PRINTS, "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    known = [character for character in TEXT if character.encode(encoding, "ignore")]
    for output in (done.stdout, done.stderr):
        assert all(character in output.decode(encoding) for character in known)
    if encoding != "utf-8":
        assert rb"\u6a21\u578b \ud83e\udd8a" in done.stdout
    printed = run("-c", PRINTS, "", "--json", PYTHONIOENCODING=encoding).stdout.decode(encoding)
    assert json.JSONDecoder().raw_decode(printed)[0] == {"text": TEXT}


def test_half_of_a_character_can_be_printed() -> None:
    done = run("-c", PRINTS, os.fsdecode(b"\xe9"), PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and rb"\udce9" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (["-"], b"Ada caf\xe9\n", "prompt on standard input"),
        ([], b"Ada caf\xe9\n", "prompt on standard input"),
        (["caf\udce9"], b"", "prompt"),
        (["cafe", "--system", "\udce9"], b"", "system message"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused_before_a_model_is_loaded(
    arguments: list[str], given: bytes, said: str, tmp_path: Path
) -> None:
    done = run(
        "-m", "gradmap_hub", "generate", str(tmp_path / "gone"), *arguments, given=given, PYTHONIOENCODING="utf-8"
    )
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2 and lines[0] == f"error The {said} is not valid UTF-8 text.", done.stderr
    assert len(lines) == 2 and not done.stdout


def test_a_panic_of_a_library_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class PanicException(BaseException):
        pass

    raised: BaseException = PanicException("called `Option::unwrap()` on a `None` value\nnote: run with")

    def fails(**_: object) -> None:
        raise raised

    monkeypatch.setattr(app, "app", fails)
    monkeypatch.setattr(sys, "argv", ["gradmap-hub", "prune"])
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "called `Option::unwrap()`" in said and "Traceback" not in said and "note" not in said
    raised = GeneratorExit()  # of anybody else: not hidden
    with pytest.raises(GeneratorExit):
        app.main()
