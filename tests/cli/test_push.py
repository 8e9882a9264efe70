"""Whole pushes: the real client, the embedded Hub, a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.models.transformers_compat import has_5

pytestmark = pytest.mark.long  # whole pushes

Sums = Callable[[Path], dict[str, str]]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
HOW_MUCH = ("--layers", "2", "--seed", "3")


@dataclasses.dataclass
class Pushed:
    """One finished push with what it asked of the Hub."""

    world: Any
    done: Any
    folder: Path
    requests: list[Any]

    @property
    def answer(self) -> dict[str, Any]:
        return self.done.json

    @property
    def kinds(self) -> dict[str, Path]:
        """What was published, with its folder. Without ONNX files a Space loads the original itself, with transformers
        4.57, which does not read one that 5 saved."""
        without = "the original is for transformers 5" in self.answer["space"].get("reason", "")
        assert without == (has_5() and not (self.folder / "onnx").exists())
        space = self.folder.with_name(f"{self.folder.name}-space")
        return {"model": self.folder} if without else {"model": self.folder, "space": space}


def push(world: Any, folder: Path, *options: str) -> Pushed:
    asked = len(world.hub.requests)
    command = ["push", "acme/tiny", *HOW_MUCH, "--output", folder, *world.cli.quick, "--json", *options]
    done = world.cli.run(*command)
    assert done.code == 0, done.err
    return Pushed(world, done, folder, world.hub.requests[asked:])


def api(world: Any) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=world.hub.url, token=world.cli.token)


def published(world: Any, kind: str, answer: dict[str, Any], cache: Path) -> Path:
    """A fresh copy of a repository at the commit that the command returned."""
    entry = answer[kind]
    return Path(
        api(world).snapshot_download(
            entry["repo_id"], repo_type=kind, revision=entry["commit"], cache_dir=cache / f"cache-{kind}"
        )
    )


@pytest.fixture(scope="module")
def plain(world: Any) -> Pushed:
    return push(world, world.root / "plain", "--no-onnx")


@pytest.fixture(scope="module")
def full(world: Any) -> Pushed:
    """With ONNX of both models, and the Space that holds the original's."""
    return push(world, world.root / "full")


@pytest.fixture(scope="module")
def quantised(world: Any) -> Pushed:
    """With 8-bit files of both models."""
    return push(world, world.root / "quantised", "--quantize", "int8")


@pytest.fixture(params=["plain", "full"])
def either(request: pytest.FixtureRequest) -> Pushed:
    return request.getfixturevalue(request.param)


def test_answer(either: Pushed) -> None:
    answer = either.answer
    further = {"model": set[str](), "space": {"kind", "stage", "state"}}
    for kind in either.kinds:
        assert set(answer[kind]) == {"repo_id", "commit", "url"} | further[kind]
        assert len(answer[kind]["commit"]) == 40
    name = either.folder.name
    assert answer["model"]["repo_id"] == f"ada/{name}"
    if "space" in either.kinds:
        assert answer["space"]["stage"] == "RUNNING" and answer["space"]["state"].startswith("running on cpu-basic")
        assert answer["space"]["repo_id"] == f"ada/{name}-compare"
        assert answer["space"]["url"] == f"{either.world.hub.url}/spaces/ada/{name}-compare"
    assert answer["folder"] == str(either.folder)
    assert len(answer["removed"]) == 2
    assert json.loads((either.folder / "gradmap.json").read_text())["compensation"]["applied"]
    assert answer["parameters"]["after"] < answer["parameters"]["before"]
    assert set(answer["perplexity"]) == {"original", "pruned", "compensated"}
    assert all(value > 1 for value in answer["perplexity"].values())


def test_what_is_published_is_the_folder(either: Pushed, tmp_path: Path, sums: Sums) -> None:
    for kind, folder in either.kinds.items():
        copy = sums(published(either.world, kind, either.answer, tmp_path))
        copy.pop(".gitattributes", None)
        assert copy == sums(folder)
        entry = either.answer[kind]
        commits = api(either.world).list_repo_commits(entry["repo_id"], repo_type=kind)
        assert commits[0].commit_id == entry["commit"]
        assert len(commits) == 2  # the Hub's own first one, and ours


def test_repositories_are_private_and_nothing_was_sent_twice(either: Pushed) -> None:
    for kind in either.kinds:
        assert api(either.world).repo_info(either.answer[kind]["repo_id"], repo_type=kind).private
    uploads = [entry.path for entry in either.requests if entry.method == "PUT"]
    assert len(uploads) == len(set(uploads)) > 0
    assert len([entry for entry in either.requests if "/commit/" in entry.path]) == len(either.kinds)
    assert not [entry for entry in either.requests if entry.status >= 500]


def test_nothing_private_is_published_or_shown(either: Pushed) -> None:
    token = either.world.cli.token
    assert token not in either.done.out + either.done.err
    assert not [entry for entry in either.world.hub.requests if token in entry.path + entry.query]
    secret = [token, str(either.world.root), os.path.expanduser("~/"), sys.prefix, str(Path(__file__).parents[2])]
    if len(socket.gethostname()) > 7:
        secret.append(socket.gethostname())
    for folder in either.kinds.values():
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert not [word for word in secret if word.encode() in content], path


def test_command_in_the_record_has_no_folders(either: Pushed) -> None:
    command = json.loads((either.folder / "gradmap.json").read_text())["command"]
    assert "text.txt" in command and "/text.txt" not in command


def test_original_is_carried_over(either: Pushed, sums: Sums) -> None:
    original, result = sums(either.world.base), sums(either.folder)
    # What transformers 5 saves: a config that is translated, so that 4.57 reads it too, and no map.
    other = {"special_tokens_map.json"} if has_5() else set[str]()
    for name in {*TOKENIZER, "generation_config.json", "LICENSE"} - other - {"tokenizer_config.json"}:
        assert result[name] == original[name], name
    base = either.world.base
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (base, either.folder))
    template = (base / "chat_template.jinja").read_bytes().decode()
    assert after["chat_template"] == template  # transformers.js reads it there alone
    assert has_5() or after == before | {"chat_template": template}
    assert "license: apache-2.0" in (either.folder / "README.md").read_text()
    assert not [name for name in result if name.endswith((".bin", ".py", ".partial", ".log"))]


def test_same_seed_same_bytes(plain: Pushed, full: Pushed, sums: Sums) -> None:
    for name in ("model.safetensors", "config.json"):
        assert sums(plain.folder)[name] == sums(full.folder)[name]


def test_loads_with_plain_transformers(plain: Pushed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy = published(plain.world, "model", plain.answer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(copy)
    inputs = AutoTokenizer.from_pretrained(copy)("The old house", return_tensors="pt", return_token_type_ids=False)
    assert model.config.num_hidden_layers == 3
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_onnx_loads_both_ways_and_says_the_same(full: Pushed) -> None:
    pytest.importorskip("optimum.onnxruntime", reason="beside transformers 5 it is in another environment")
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(full.folder)(
        "The small bird", return_tensors="pt", return_token_type_ids=False
    )
    greedy = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = AutoModelForCausalLM.from_pretrained(full.folder).generate(**inputs, **greedy).tolist()
    for folder, options in ((full.folder, {"subfolder": "onnx"}), (full.folder / "onnx", {})):
        exported = ORTModelForCausalLM.from_pretrained(folder, file_name="model.onnx", **options)
        assert exported.generate(**inputs, **greedy).tolist() == expected


def test_the_card_runs_the_graph_alone(full: Pushed, capsys: pytest.CaptureFixture[str]) -> None:
    """What the card says to do with ONNX Runtime and nothing else, word for word but for the download."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", (full.folder / "README.md").read_text())
    [code] = [block for block in blocks if "import onnxruntime\n" in block]
    fetched = f'snapshot_download("{full.answer["model"]["repo_id"]}")'
    assert fetched in code
    exec(code.replace(fetched, repr(str(full.folder))), {})
    tokenizer = AutoTokenizer.from_pretrained(full.folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
    greedy = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    [ids] = AutoModelForCausalLM.from_pretrained(full.folder).generate(**inputs, **greedy).tolist()
    assert capsys.readouterr().out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_space_matches_the_runtime(plain: Pushed, full: Pushed) -> None:
    for one, runtime in ((plain, "transformers"), (full, "onnx")):
        space = one.kinds.get("space")
        if space is None:
            continue
        assert json.loads((space / "compare.json").read_text())["runtime"] == runtime
        assert (space / "original" / "model.onnx").is_file() == (runtime == "onnx")
        assert {path.name for path in space.glob("*_engine.py")} == {f"{runtime}_engine.py"}
        variables = api(one.world).get_space_variables(one.answer["space"]["repo_id"])
        assert variables["PRUNED_REVISION"].value == one.answer["model"]["commit"]


ASK_ENGINE = """
import json, sys
from pathlib import Path
from compare import read_facts
from generation import Settings, begin
from onnx_engine import load

precisions = {entry.name: entry for entry in read_facts(Path("compare.json")).precisions}
for name in ("int8", "float32"):
    for folder, path in (("original", ""), (sys.argv[1], "onnx")):
        answer = begin(load(Path(folder), path, precisions[name]), "The small bird", Settings(max_new_tokens=8))
        while answer.finish_reason is None:
            answer.advance()
        print(json.dumps([name, folder == "original", answer.token_ids]))
"""


@pytest.mark.slow
def test_the_original_is_quantised_as_the_pruned_model_is(quantised: Pushed, tmp_path: Path, sums: Sums) -> None:
    """The Space offers int8 and float32, holds the original's of both, knows what they cost, and runs them."""
    space = quantised.folder.with_name(f"{quantised.folder.name}-space")
    assert sums(published(quantised.world, "space", quantised.answer, tmp_path)).items() >= sums(space).items()
    facts = json.loads((space / "compare.json").read_text())
    assert facts["precision"] == "int8"
    assert [entry["name"] for entry in facts["precisions"]] == ["int8", "float32"]
    record = json.loads((quantised.folder / "gradmap.json").read_text())
    graph = next(entry for entry in record["artifacts"] if entry["path"] == "onnx/model_int8.onnx")
    int8, float32 = facts["precisions"]
    for side, perplexity in (("original", None), ("pruned", graph["quality"]["perplexity"])):
        quality = int8[side]["quality"]
        assert quality["perplexity"] == pytest.approx(quality["checkpoint_perplexity"], rel=0.02)
        assert quality["perplexity"] != quality["checkpoint_perplexity"] and perplexity in (None, quality["perplexity"])
        assert int8[side]["bytes"] < float32[side]["bytes"] / 2 and float32[side]["quality"] is None
    assert int8["original"]["bytes"] == (space / "original" / "model_int8.onnx").stat().st_size
    assert sorted(path.name for path in (space / "original").glob("*onnx*")) == ["model.onnx", "model_int8.onnx"]
    assert not (space / "original" / "genai_config.json").exists()
    done = subprocess.run(
        [sys.executable, "-c", ASK_ENGINE, quantised.folder], cwd=space, capture_output=True, text=True, timeout=60
    )
    assert len(done.stdout.splitlines()) == 4, done.stderr


@pytest.mark.slow  # the Spaces of the fixtures run as well
@pytest.mark.parametrize(("which", "precision"), [("full", "float32"), ("quantised", "int8")])
def test_compare_runs_the_space_as_published(which: str, precision: str, request: pytest.FixtureRequest) -> None:
    """Without a Hub and without another export."""
    import urllib.request

    pushed: Pushed = request.getfixturevalue(which)
    process = pushed.world.cli.start("compare", pushed.folder, "-q", token="", HF_HUB_OFFLINE="1")
    try:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/health", timeout=20) as answer:
            assert json.load(answer)["precision"] == precision
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.skipif(has_5(), reason="no Space: it has transformers 4.57, and this original is for 5")
def test_a_space_of_another_original_holds_what_may_be_held(
    world: Any, full: Pushed, tmp_path: Path, sums: Sums
) -> None:
    """`space --against` a gated repository: what it says holds, not what the record says."""
    folder = tmp_path / "small"
    shutil.copytree(full.folder, folder)
    world.hub.seed("acme/closed", world.base)
    world.hub.set_gated("acme/closed", "manual")
    world.hub.grant_access("acme/closed", "ada")
    done = world.cli.run("space", folder, "--against", "acme/closed", "--json")
    assert done.code == 0, done.err
    assert not [name for name in sums(Path(done.json["space_folder"])) if "onnx" in name and "engine" not in name]


@pytest.mark.slow
def test_a_space_without_the_text_has_float32_alone(quantised: Pushed, world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(quantised.folder, folder)
    for text, expected in (("missing.txt", ["float32"]), (world.text, ["int8", "float32"])):
        done = world.cli.run("space", folder, "--text", text, "--json")
        assert done.code == 0, done.err
        facts = json.loads((Path(done.json["space_folder"]) / "compare.json").read_text())
        assert [entry["name"] for entry in facts["precisions"]] == expected, done.err
        assert ("gets no quantised files" in done.err) == (expected == ["float32"])


def test_dry_run(world: Any, plain: Pushed, tmp_path: Path) -> None:
    command = ["push", "acme/tiny", "--ratio", "0.4", "--output", "new", *world.cli.quick, "--dry-run"]
    before, asked = world.repositories(), len(world.hub.requests)
    shown = world.cli.run(*command, cwd=tmp_path)
    parsed = world.cli.run(*command, "--json", cwd=tmp_path)
    assert (shown.code, parsed.code, shown.err, parsed.err) == (0, 0, "", "")
    assert "5 -> 3" in shown.out and "ada/new" in shown.out and "Nothing was" in shown.out
    plan = parsed.json
    assert plan["layers"] == {"before": 5, "after": 3} and plan["target"] == "ada/new"
    assert plan["visibility"] == "private" and plan["license"] == "apache-2.0"
    assert not list(tmp_path.iterdir()) and world.repositories() == before
    assert not world.weights_asked_for(asked)


def test_gated_original_is_not_stored_in_the_space(world: Any, tmp_path: Path) -> None:
    world.hub.seed("acme/gated", world.base)
    world.hub.set_gated("acme/gated", "manual")
    world.hub.grant_access("acme/gated", "ada")
    command = ["push", "acme/gated", *HOW_MUCH, "--output", "new", "--dry-run"]
    plan = world.cli.run(*command, "--json", cwd=tmp_path).json
    assert plan["gated"] and plan["visibility"] == "private"
    assert "gated" in plan["space_original"] and "transformers" in plan["space_original"]
    refused = world.cli.run(*command, "--public", cwd=tmp_path)
    assert refused.code == 2 and "gated" in refused.err


def stopped_and_resumed(world: Any, name: str, line: str, number: signal.Signals) -> tuple[Any, Any, Path]:
    """Prune, stopped by a signal once `line` is done, and the same command again with --resume."""
    folder = world.root / name
    command = ["prune", "acme/tiny", folder, *HOW_MUCH, *world.cli.quick]
    stopped = world.cli.run_until(line, number, *command)
    resumed = world.cli.run(*command, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert [entry for entry in resumed.err.splitlines() if line in entry and entry.endswith("(on disk)")]
    return stopped, resumed, folder


@pytest.fixture(scope="module")
def killed(world: Any) -> tuple[Any, Any, Path]:
    return stopped_and_resumed(world, "killed", "Scoring layers", signal.SIGKILL)


def test_killed_run_goes_on(killed: tuple[Any, Any, Path], plain: Pushed, sums: Sums) -> None:
    stopped, resumed, folder = killed
    assert stopped.code == -signal.SIGKILL
    assert resumed.json["removed"] == plain.answer["removed"]
    assert sums(folder)["model.safetensors"] == sums(plain.folder)["model.safetensors"]


@pytest.mark.slow
def test_interrupted_run_goes_on(world: Any, plain: Pushed, sums: Sums) -> None:
    """Ctrl-C while the correction is fitted."""
    stopped, _, folder = stopped_and_resumed(world, "interrupted", "Measuring the original", signal.SIGINT)
    assert stopped.code == 130 and "Traceback" not in stopped.err
    assert stopped.err.splitlines()[-2] == "error Interrupted." and "--resume" in stopped.err
    assert sums(folder)["model.safetensors"] == sums(plain.folder)["model.safetensors"]


def test_publish_after_prune(world: Any, plain: Pushed, killed: Any, tmp_path: Path, sums: Sums) -> None:
    folder = killed[2]
    (folder / "onnx.partial").mkdir()
    (folder / "onnx.partial" / "model.onnx").write_text("what a killed export left")
    first = world.cli.run("publish", folder, "--to", "club/pruned", "--json")
    assert first.code == 0, first.err
    built = sums(folder)
    copy = sums(published(world, "model", first.json, tmp_path))
    copy.pop(".gitattributes", None)
    assert copy == built and "onnx.partial/model.onnx" not in copy
    assert set(first.json["space"]) == {"reason"}
    asked = len(world.hub.requests)
    again = world.cli.run("publish", folder, "--to", "club/pruned", "--json")
    assert again.code == 0 and again.json == first.json
    assert not [entry for entry in world.hub.requests[asked:] if entry.method == "PUT" or "/commit/" in entry.path]
    # Another model's repository is not overwritten.
    refused = world.cli.run("publish", folder, "--to", plain.answer["model"]["repo_id"])
    assert refused.code == 1 and "was not changed" in refused.err
    assert sums(folder) == built


def test_what_is_not_asked_for_again_is_not_published(world: Any, full: Pushed, tmp_path: Path, sums: Sums) -> None:
    """The same run without ONNX this time: neither its ONNX files nor those of the original go along."""
    for ending in ("", "-space", ".work"):
        shutil.copytree(f"{full.folder}{ending}", tmp_path / f"less{ending}")
    less = push(world, tmp_path / "less", "--no-onnx", "--resume")
    for kind in less.kinds:
        copy = sums(published(world, kind, less.answer, tmp_path))
        assert "README.md" in copy and not [name for name in copy if "onnx" in name]


def test_sigterm_leaves_no_child(world: Any, plain: Pushed) -> None:
    import psutil

    folder = world.root / "terminated"
    shutil.copytree(plain.folder, folder)
    process = world.cli.start("export", folder)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while not (children := parent.children(recursive=True)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=15)[1]
    assert not (folder / "onnx").exists()


def test_second_push_sends_nothing_and_public_flips_both(plain: Pushed) -> None:
    """The last test of `plain`: it makes it public."""
    again = push(plain.world, plain.folder, "--no-onnx", "--resume", "--public")
    sent = [entry for entry in again.requests if entry.method == "PUT" and not entry.path.endswith("/settings")]
    assert sent == [] and not [entry for entry in again.requests if "/commit/" in entry.path]
    for kind in plain.kinds:
        assert again.answer[kind] == plain.answer[kind]
        assert not api(plain.world).repo_info(plain.answer[kind]["repo_id"], repo_type=kind).private


@pytest.mark.parametrize(
    ("terminal", "variables", "wanted"),
    [
        (True, {"DISPLAY": ":0"}, True),
        (True, {"WAYLAND_DISPLAY": "wayland-0"}, True),
        (True, {}, sys.platform in ("darwin", "win32")),  # over ssh: a text browser would take the terminal
        (False, {"DISPLAY": ":0"}, False),
    ],
)
def test_a_browser_is_opened_where_it_would_be_seen(
    terminal: bool, variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradmap_hub.space.local import at_a_screen

    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert at_a_screen() is wanted
