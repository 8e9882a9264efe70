"""Every failure a user can meet: one line that says what is wrong, and nothing is changed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.models.transformers_compat import has_5

Sums = Callable[[Path], dict[str, str]]
PUSH = ("--layers", "1", "--no-onnx", "--no-space")


def said(done: Any, code: int, *words: str) -> str:
    """Assert that the command failed in one line holding `words`; returns that line."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.err
    after = done.err[done.err.index(errors[0]) :].splitlines()[1:]
    assert len(after) <= 1 and all(line.startswith("      ") for line in after), done.err
    for word in words:
        assert word in errors[0]
    return errors[0]


@pytest.fixture
def fails(world: Any, tmp_path: Path) -> Callable[..., Any]:
    """Run a command that must fail before any weight is fetched and leave folders and Hub as they were."""

    def run(
        code: int, *arguments: str | Path, words: tuple[str, ...] = (), torch: bool = False, **settings: Any
    ) -> Any:
        (tmp_path / "here").mkdir(exist_ok=True)
        before, asked = world.repositories(), len(world.hub.requests)
        done = world.cli.run(*arguments, cwd=tmp_path / "here", light=True, **settings)
        said(done, code, *words)
        assert not list((tmp_path / "here").iterdir())
        assert world.repositories() == before
        assert not world.weights_asked_for(asked)
        assert torch or not done.torch  # which costs seconds to import
        return done

    return run


def push(world: Any, *arguments: str | Path, model: str | Path = "acme/tiny") -> list[str | Path]:
    return ["push", model, "--output", "out", "--no-onnx", *world.cli.quick, *arguments]


# -- the Hub says no -------------------------------------------------------------------------------------------------


def test_repository_or_revision_that_is_not_there(world: Any, fails: Any) -> None:
    fails(1, *push(world, "--layers", "1", model="acme/nothing"), words=("no model acme/nothing",))
    fails(1, *push(world, "--layers", "1", "--revision", "v9"), words=("acme/tiny", "'v9'"))
    fails(1, *push(world, "--layers", "1", model="not a model"), words=("not a model",))
    fails(1, *push(world, "--layers", "1", model="./nowhere"), words=("no folder ./nowhere",))
    fails(1, *push(world, "--layers", "1", model="nowhere.gguf"), words=("nowhere.gguf",))


def test_gated_without_access(world: Any, fails: Any) -> None:
    world.hub.seed("acme/gated", world.base)
    world.hub.set_gated("acme/gated", "manual")
    done = fails(1, *push(world, "--layers", "1", model="acme/gated"), words=("acme/gated", "restricted"))
    assert f"{world.hub.url}/acme/gated" in done.err


def test_tokens(world: Any, fails: Any) -> None:
    reader = world.hub.add_user("rita", role="read")
    fails(1, *push(world, "--layers", "1"), token="", words=("needs a Hugging Face token",))
    for done in (
        fails(1, *push(world, "--layers", "1"), token="hf_wrong", words=("does not accept your token",)),
        fails(1, "prune", "acme/tiny", "out", "--layers", "1", token="hf_wrong", words=("does not accept your token",)),
    ):
        assert "hf_wrong" not in done.err
    fails(1, *push(world, "--layers", "1"), token=reader, words=("is read-only",))


def test_target_names(world: Any, fails: Any) -> None:
    fails(1, *push(world, "--layers", "1", "--to", "bob/tiny"), words=("without write access to bob",))
    fails(2, *push(world, "--layers", "1", "--to", "tiny"), words=("OWNER/NAME",))
    fails(2, *push(world, "--layers", "1", "--to", "ada/a..b"), words=("ada/a..b",))


def test_hub_that_does_not_answer(world: Any, fails: Any) -> None:
    fails(1, *push(world, "--layers", "1"), HF_ENDPOINT="http://127.0.0.1:9", words=("http://127.0.0.1:9",))
    fails(1, *push(world, "--layers", "1"), HF_HUB_OFFLINE="1", words=("did not answer",))


def test_target_with_other_content_is_left_alone(world: Any, fails: Any, variant: Any) -> None:
    world.hub.seed("ada/taken", variant(without=["LICENSE"]))
    fails(1, *push(world, "--layers", "1", "--to", "ada/taken"), words=("ada/taken", "was not changed"))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("LICENSE.bin", b"x", "LICENSE.bin may run code"),
        ("LICENSE", b"hf_" + b"Zq" * 17, "LICENSE contains a possible"),
    ],
)
def test_what_would_not_be_published_is_said_before_the_work(
    world: Any, fails: Any, variant: Any, remote: bool, name: str, content: bytes, words: str
) -> None:
    folder = variant()
    (folder / name).write_bytes(content)
    if remote:
        world.hub.seed(f"acme/private-{name.lower()}", folder)
    model = f"acme/private-{name.lower()}" if remote else folder
    fails(1, *push(world, "--layers", "1", model=model), words=(words, "Nothing was uploaded"))


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "nan", "abc"])
def test_ratio(world: Any, fails: Any, ratio: str) -> None:
    fails(2, *push(world, "--ratio", ratio), words=("--ratio",))


def test_how_much(world: Any, fails: Any) -> None:
    fails(2, *push(world, "--layers", "5"), words=("5 of 5",))
    fails(2, *push(world, "--drop", "2,5"), words=("layer 5", "5 layers"))
    fails(2, *push(world, "--drop", "two"), words=("--drop",))
    fails(2, *push(world, "--layers", "1", "--ratio", "0.5"), words=("exactly one",))
    fails(2, *push(world), words=("exactly one",))
    fails(2, *push(world, "--layers", "1", "--metric", "luck"), words=("--metric",))
    fails(2, *push(world, "--layers", "1", "--no-such-option"), words=("--no-such-option",))


def test_version_and_help(world: Any) -> None:
    done = world.cli.run("--version", light=True)
    assert (done.code, done.err) == (0, "") and done.out.strip()
    bare = world.cli.run(light=True)
    assert bare.code == 2 and bare.err == "" and "Usage" in bare.out
    head = f"{sys.executable} -m gradmap_hub push --help | head -n 1"
    piped = subprocess.run(["bash", "-c", head], capture_output=True, text=True)
    assert piped.stderr == ""


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "jamba", "architectures": ["JambaForCausalLM"]}, ("'jamba'", "period")),
        ({"model_type": "bert", "architectures": ["BertModel"]}, ("'bert'", "encoder")),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, ("own code",)),
    ],
)
def test_architectures(world: Any, fails: Any, variant: Any, config: dict[str, Any], words: tuple[str, ...]) -> None:
    folder = variant(config=config)
    repo_id = f"acme/arch-{config.get('model_type', 'code')}"
    world.hub.seed(repo_id, folder)
    fails(1, *push(world, "--layers", "1", model=repo_id), words=words)
    asked = [entry.path for entry in world.hub.requests if repo_id in entry.path]
    assert any("config.json" in path for path in asked) and not any("safetensors" in path for path in asked)
    fails(1, "prune", folder, "out", "--layers", "1", *world.cli.quick, words=words)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def test_pickle_is_never_opened(world: Any, fails: Any, variant: Any) -> None:
    folder = variant(change=_pickled)
    world.hub.seed("acme/pickled", folder)
    fails(1, *push(world, "--layers", "1", model="acme/pickled"), words=("pickle",))
    fails(1, "prune", folder, "out", "--layers", "1", *world.cli.quick, words=("pickle",))
    assert not [entry for entry in world.hub.requests if "pytorch_model.bin" in entry.path]


def _garbage(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.long
@pytest.mark.parametrize("damage", [pytest.param(_garbage, marks=pytest.mark.slow), _truncated])
def test_damaged_weights(world: Any, fails: Any, variant: Any, tmp_path: Path, sums: Sums, damage: Any) -> None:
    folder = variant(change=damage)
    content = sums(folder)
    fails(1, "prune", folder, "out", "--layers", "1", *world.cli.quick, words=("model.safetensors",))
    assert sums(folder) == content
    repo_id = f"acme/damaged{damage.__name__}"
    world.hub.seed(repo_id, folder)
    before, here = world.repositories(), tmp_path / "here"
    done = world.cli.run("prune", repo_id, "deep/out", "--layers", "1", *world.cli.quick, cwd=here)
    said(done, 1, "model.safetensors")
    assert not list(here.iterdir())
    assert world.repositories() == before


# -- text, folders, disk, licence ------------------------------------------------------------------------------------


def test_calibration_text_that_is_not_there(world: Any, fails: Any, tmp_path: Path) -> None:
    missing = ("--calibration", tmp_path / "missing.txt", "--layers", "1")
    fails(1, "push", "acme/tiny", "-o", "out", *missing, words=("missing.txt",))
    fails(1, "push", "acme/tiny", "-o", "out", *missing, "--dry-run", words=("missing.txt",))
    fails(1, "prune", world.base, "out", *missing, words=("missing.txt",))
    fails(1, "inspect", world.base, *missing[:2], words=("missing.txt",))


@pytest.mark.slow
@pytest.mark.long
def test_calibration_text_too_short(world: Any, fails: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The bird sings.")
    fails(
        1, "push", "acme/tiny", "-o", "out", "--layers", "1", "--calibration", short, "--no-onnx",
        words=("short.txt", "too short"), torch=True,
    )  # fmt: skip


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_folder_with_something_in_it(world: Any, tmp_path: Path, sums: Sums, resume: tuple[str, ...]) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    before, content = world.repositories(), sums(tmp_path)
    for command in (
        ["push", "acme/tiny", "-o", output, *PUSH, *world.cli.quick],
        ["prune", world.base, output, "--layers", "1", *world.cli.quick],
    ):
        said(world.cli.run(*command, *resume), 1, "not empty")
    said(world.cli.run("prune", world.base, output / "thesis.txt", "--layers", "1"), 1, "is a file")
    said(world.cli.run("prune", world.base, output / "thesis.txt" / "x", "--layers", "1", *world.cli.quick), 1)
    assert sums(tmp_path) == content and len(list(tmp_path.iterdir())) == 1
    assert world.repositories() == before


def test_disk_too_small(world: Any, fails: Any) -> None:
    small = {"TEST_FREE_BYTES": "1000000"}
    fails(1, *push(world, "--layers", "1"), words=("Not enough disk space", "0.00 GB free"), **small)
    fails(1, "prune", world.base, "out", "--layers", "1", *world.cli.quick, words=("Not enough disk space",), **small)


def test_licence_unknown(world: Any, fails: Any, variant: Any, tmp_path: Path) -> None:
    folder = variant(without=["README.md", "LICENSE"])
    world.hub.seed("acme/unlicensed", folder)
    unlicensed = push(world, "--layers", "1", model="acme/unlicensed")
    done = fails(1, *unlicensed, words=("states no licence",))
    assert "--license" in done.err
    fails(2, *unlicensed, "--license", "mine-all-mine", words=("'mine-all-mine'",))
    planned = world.cli.run(*unlicensed, "--license", "mit", "--dry-run", "--json")
    assert planned.code == 0 and planned.json["license"] == "mit"
    local = push(world, "--layers", "1", model=folder)
    fails(1, *local, words=("states no licence",))
    pushed = world.cli.run(*local, "--license", "mit", "--no-space", "--to", "ada/licensed", "--json", cwd=tmp_path)
    assert pushed.code == 0, pushed.err
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_folder_that_is_not_ours(world: Any, fails: Any, tmp_path: Path) -> None:
    for command in ("publish", "export", "space", "compare"):
        fails(1, command, world.base, words=("gradmap.json",))
        fails(1, command, tmp_path / "nothing", words=("gradmap.json",))


# -- debugging, the Hub's own command, what breaks in the middle -----------------------------------------------------


def test_debug_shows_the_traceback(world: Any) -> None:
    done = world.cli.run("--debug", "push", "acme/nothing", *PUSH)
    assert done.code == 1 and done.out == ""
    assert "Traceback" in done.err and "RepositoryNotFound" in done.err
    assert world.cli.token not in done.err
    assert done.err.splitlines()[-2].startswith("error There is no model acme/nothing")


def test_hub_command_refuses_in_one_line(world: Any, tmp_path: Path) -> None:
    port = world.hub.url.rpartition(":")[2]
    said(world.cli.run("hub", "--root", world.hub.root), 1, "Another hub is running")
    said(world.cli.run("hub", "--root", tmp_path / "other", "--port", port), 1, "cannot be started")
    said(world.cli.run("hub", "--root", tmp_path / "other", "--host", "0.0.0.0"), 1, "0.0.0.0")


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, (0, 130)), (signal.SIGTERM, (0, 130))])
def test_hub_command_says_where_it_is_and_stops(
    world: Any, tmp_path: Path, number: int, codes: tuple[int, int]
) -> None:
    process = world.cli.start("hub", "--root", tmp_path / "root")
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode in codes
    assert out == "" and "Traceback" not in err


@pytest.mark.slow  # tests/hub/test_after.py refuses one too
@pytest.mark.skipif(has_5(), reason="no Space: it has transformers 4.57, and this original is for 5")
def test_space_refused_keeps_the_model(start_world: Any, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    poor = start_world(paid_plan=False)
    api = HfApi(endpoint=poor.hub.url, token=poor.cli.token)
    for name in ("ada/one", "ada/two"):  # all that a free account may have
        api.create_repo(name, repo_type="space", space_sdk="gradio", space_hardware="zero-a10g")  # type: ignore
    done = poor.cli.run(*push(poor, "--layers", "2", "--space", "gradio", "--json"), cwd=tmp_path)
    assert done.code == 0, done.err
    answer = done.json
    assert set(answer["space"]) == {"reason"} and "402" in answer["space"]["reason"]
    assert "--space browser" in answer["space"]["reason"] and "--no-space" in answer["space"]["reason"]
    assert set(poor.repositories()) == {"models/acme/tiny", "models/ada/out", "spaces/ada/one", "spaces/ada/two"}
    assert (tmp_path / "out-space" / "app.py").is_file()
    assert answer["model"]["commit"] in str(poor.repositories()["models/ada/out"])


@pytest.fixture
def large(variant: Any) -> Path:
    """The same model with 60 MB of embeddings, for an upload that takes a moment."""

    def grow(folder: Path) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(1)
        config = LlamaConfig.from_pretrained(folder, vocab_size=240_000, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder)

    return variant(change=grow)


def _upload_begun(root: Path, process: subprocess.Popen[str]) -> bool:
    """Whether some but not all of a large object has arrived."""
    while process.poll() is None:
        try:
            if any(path.stat().st_size > 1_000_000 for path in (root / "tmp").iterdir()):
                return True
        except FileNotFoundError:
            pass
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_hub_gone_in_mid_upload(world: Any, large: Path, tmp_path: Path, sums: Sums) -> None:
    from gradmap_hub.local_hub import LocalHub

    root = tmp_path / "hub"
    seeded = LocalHub(root)
    seeded.seed("acme/large", large)
    token = seeded.add_user("ada")
    hub = world.cli.start("hub", "--root", root)
    restarted = None
    try:
        url = hub.stdout.readline().strip()
        command = ["push", "acme/large", *PUSH, "--output", tmp_path / "out", *world.cli.quick]
        process = world.cli.start(*command, token=token, HF_ENDPOINT=url, TEST_SHORT_SLEEPS="1")
        assert _upload_begun(root, process)
        os.kill(hub.pid, signal.SIGKILL)
        hub.wait()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in err
        assert err.splitlines()[-2].startswith("error The upload to ada/out"), err
        built = sums(tmp_path / "out")
        restarted = world.cli.start("hub", "--root", root, "--port", url.rpartition(":")[2])
        assert restarted.stdout.readline().strip() == url
        done = world.cli.run(*command, "--resume", "--json", token=token, HF_ENDPOINT=url)
        assert done.code == 0, done.err
        assert "Writing and verifying the checkpoint" in done.err and "on disk" in done.err
        assert sums(tmp_path / "out") == built
        from huggingface_hub import HfApi

        copy = HfApi(endpoint=url, token=token).snapshot_download(
            "ada/out", revision=done.json["model"]["commit"], cache_dir=tmp_path / "cache"
        )
        assert sums(Path(copy)) == built | {".gitattributes": sums(Path(copy))[".gitattributes"]}
    finally:
        for child in (hub, restarted):
            if child is not None and child.poll() is None:
                child.terminate()
            if child is not None:
                child.communicate(timeout=20)
