"""Fetches the libraries of the browser Space: ONNX Runtime Web, and Hugging Face's tokenizers and Jinja for JavaScript.

They come from the npm registry, pinned by the sha512 of each package and the sha256 of each file, and stay in the
user's cache. The Space holds copies, so that its page loads no program from another host.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from gradmap_hub.errors import BrowserRuntimeMissing
from gradmap_hub.files import user_cache
from gradmap_hub.layout import sha256_of
from gradmap_hub.progress import Reporter, SilentReporter

# Folder of the libraries in a Space.
VENDOR = "vendor"
REGISTRY = "https://registry.npmjs.org"
_TIMEOUT = 60
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Library:
    """A file of an npm package. `path`: in the package; `name`: in the Space."""

    path: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A package of the npm registry. `integrity`: sha512 of its archive in base64, as in a package-lock.json."""

    name: str
    version: str
    license: str
    integrity: str
    files: tuple[Library, ...]

    @property
    def archive(self) -> str:
        """The path of its archive in the registry."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web", "1.30.0", "MIT",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        (
            Library("dist/ort.wasm.bundle.min.mjs", "ort.wasm.mjs", 73_054,
                    "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90"),
            Library("dist/ort-wasm-simd-threaded.wasm", "ort.wasm.wasm", 14_239_897,
                    "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"),
            Library("dist/ort.webgpu.bundle.min.mjs", "ort.webgpu.mjs", 117_732,
                    "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2"),
            Library("dist/ort-wasm-simd-threaded.asyncify.wasm", "ort.webgpu.wasm", 26_781_914,
                    "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da"),
        ),
    ),
    Package(
        "@huggingface/tokenizers", "0.2.0", "Apache-2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        (
            Library("dist/tokenizers.min.mjs", "tokenizers.mjs", 36_601,
                    "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a"),
            Library("LICENSE", "LICENSE-tokenizers.txt", 11_357,
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"),
        ),
    ),
    Package(
        "@huggingface/jinja", "0.5.11", "MIT",
        "YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
        (
            Library("dist/index.js", "jinja.js", 114_817,
                    "c8871915dfa68f976c11540c33fc9341c0810ebe29adb7027b8d51f2a8044936"),
            Library("LICENSE", "LICENSE-jinja.txt", 1_069,
                    "d6e7b19451c1b3d1d66353bb4b1274138953b3bfd9ae60c56e77b1f548796982"),
        ),
    ),
)  # fmt: skip
LIBRARIES = {library.name: library for package in PACKAGES for library in package.files}
# The WebAssembly file of ONNX Runtime for each backend; the page shows its size before the download.
RUNTIMES = {"wasm": LIBRARIES["ort.wasm.wasm"], "webgpu": LIBRARIES["ort.webgpu.wasm"]}


def registry() -> str:
    """The URL of the npm registry: npm's own setting, else the public one."""
    setting = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")  # noqa: SIM112 - npm's
    return (setting or REGISTRY).rstrip("/")


def cache_folder() -> Path:
    """Where the libraries are kept; its name depends on their content."""
    pins = "".join(sorted(library.name + library.sha256 for library in LIBRARIES.values()))
    return user_cache() / f"browser-{hashlib.sha256(pins.encode()).hexdigest()[:16]}"


def is_library(path: Path) -> bool:
    """Whether a file has the name and the content of one of the libraries."""
    library = LIBRARIES.get(path.name)
    return library is not None and path.stat().st_size == library.bytes and sha256_of(path) == library.sha256


def fetched() -> bool:
    """Whether all libraries are in the cache, by name and size."""
    folder = cache_folder()
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == library.bytes
        for name, library in LIBRARIES.items()
    )


def fetch(reporter: Reporter | None = None) -> Path:
    """Download missing libraries into the cache; returns their folder.

    Raises:
        BrowserRuntimeMissing: the registry cannot be reached, or returned something else.
    """
    reporter, folder = reporter or SilentReporter(), cache_folder()
    if fetched() and all(is_library(folder / name) for name in LIBRARIES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    reporter.start("Fetching ONNX Runtime Web for the browser Space (first time only)")
    for package in PACKAGES:
        if all((folder / library.name).is_file() and is_library(folder / library.name) for library in package.files):
            continue
        archive = _download(package, reporter)
        for library in package.files:
            _extract(archive, package, library, folder / library.name)
    reporter.finish(f"{sum(library.bytes for library in LIBRARIES.values()) / 1e6:.0f} MB, sha512 checked")
    return folder


def copy_to(space: Path, reporter: Reporter | None = None) -> list[Path]:
    """Copy the libraries into a Space folder; returns the files.

    Raises:
        BrowserRuntimeMissing: see `fetch`.
    """
    source, target = fetch(reporter), space / VENDOR
    target.mkdir(exist_ok=True)
    for name in LIBRARIES:
        (target / name).unlink(missing_ok=True)
        shutil.copyfile(source / name, target / name)
    return [target / name for name in LIBRARIES]


def _download(package: Package, reporter: Reporter) -> bytes:
    address = f"{registry()}/{package.archive}"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            if size:
                reporter.total(size, unit="bytes")
            content = io.BytesIO()
            while block := answer.read(_BLOCK):
                content.write(block)
                reporter.advance(len(block))
    except (OSError, ValueError) as error:  # URLError is an OSError; a registry without a scheme is a ValueError
        reason = getattr(error, "reason", None) or error
        raise _missing(package, f"{_shown(address)} cannot be fetched ({reason})") from error
    found = base64.b64encode(hashlib.sha512(content.getvalue()).digest()).decode()
    if found != package.integrity:
        raise _missing(package, f"{_shown(address)} is not the expected package: its sha512 differs")
    return content.getvalue()


def _shown(address: str) -> str:
    """The address without the user name and password of a private registry."""
    scheme, sign, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + sign + host.rpartition("@")[2] + slash + path


def _extract(archive: bytes, package: Package, library: Library, target: Path) -> None:
    """Write one file of the archive; complete or not at all."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as content:
        member = content.extractfile(f"package/{library.path}")
        assert member is not None, f"{package.name} {package.version} has no {library.path}"
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_bytes(member.read())
    partial.replace(target)


def _missing(package: Package, problem: str) -> BrowserRuntimeMissing:
    return BrowserRuntimeMissing(
        f"The browser Space needs {package.name} {package.version}: {problem}.",
        hint="Set npm_config_registry to a mirror of the npm registry, or choose another kind of Space: --space gradio "
        "or --space none.",
    )
