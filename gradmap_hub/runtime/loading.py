"""Loads a text model from a folder or a Hub repository."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from gradmap_hub.errors import MissingExtra, SourceError, UsageError
from gradmap_hub.machine import cpu_count
from gradmap_hub.models.architectures import dimension, head_size
from gradmap_hub.runtime.artifacts import Artifact, available_artifacts, choose_artifact
from gradmap_hub.runtime.prompting import TEXT_FILES
from gradmap_hub.runtime.text_model import TextModel

# Default limit of prompt plus output tokens, if the model's own is not lower: KV caches are allocated for all of them.
DEFAULT_CONTEXT = 4096
_GRAPH_COMPANIONS = ("_data", ".data")


def load(
    model: str | Path,
    *,
    artifact: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    revision: str | None = None,
) -> TextModel:
    """Load a model folder or a Hub repository for text generation on ONNX Runtime.

    Args:
        model: folder, or id of a Hub repository.
        artifact: "auto", an artifact name such as "int8" or "fp32", a file name or a path.
        provider: "auto" (CUDA if available), "cpu" or "cuda".
        threads: threads per step; default: all CPUs available to this process.
        context: limit of prompt plus output tokens; default: 4096. The model's own limit applies if it is lower.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        MissingExtra: ONNX Runtime, or its CUDA build, is not installed.
        SourceError: the folder or repository does not exist, or has no usable ONNX model.
        UsageError: the artifact does not exist, or a number is out of range.
        GradmapError: the provider is not usable.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtra("Text generation", "cpu")
    for name, value in (("threads", threads), ("context", context)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1; got {value}.")
    from gradmap_hub.models.tokenizer_trial import try_tokenizer
    from gradmap_hub.runtime.prompting import ModelError, TextCodec, read_json
    from gradmap_hub.runtime.session import CUDA, Session, provider_named
    from gradmap_hub.runtime.tool_formats import tool_template_of

    chosen = provider_named(provider)
    folder, found = _local(Path(model), artifact, chosen == CUDA) or _remote(
        str(model), revision, artifact, chosen == CUDA
    )
    graph = folder / found.path
    text = folder if (folder / "tokenizer.json").is_file() else graph.parent
    try_tokenizer(text, str(model))
    try:
        codec = TextCodec.from_folder(text)
        config = read_json(text / "config.json")
        tool_template = tool_template_of(codec.chat_template, read_json(text / "tokenizer_config.json"))
    except ModelError as error:
        raise SourceError(f"{model}: {error}") from error
    stated, vocabulary = dimension(config, "max_position_embeddings"), config.get("vocab_size")
    longest = DEFAULT_CONTEXT if stated is None else stated
    if not isinstance(vocabulary, int):
        vocabulary = codec.tokenizer.get_vocab_size()
    count = threads or cpu_count()
    session = Session(graph, chosen, count, head_size(config))
    name = Path(model).resolve().name if folder == Path(model) else str(model)
    return TextModel(
        name, found, session, codec, min(longest, context or DEFAULT_CONTEXT), vocabulary, count, tool_template
    )


def _local(folder: Path, wanted: str, cuda: bool) -> tuple[Path, Artifact] | None:
    if not folder.is_dir():
        return None
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for parent in (folder, folder / "onnx")
        for path in parent.glob("*.onnx*")
        if path.is_file()
    }
    return folder, choose_artifact(available_artifacts(sizes), wanted, cuda=cuda)


def _remote(repo_id: str, revision: str | None, wanted: str, cuda: bool) -> tuple[Path, Artifact]:
    """Download only the selected graph and the tokenizer files into the Hub cache."""
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise SourceError(f"There is no folder {repo_id}.", hint="Give a model folder or a Hub id, OWNER/NAME.")
    from gradmap_hub.hub.client import Hub

    hub = Hub()
    remote = hub.model(repo_id, revision)
    found = choose_artifact(available_artifacts(remote.files), wanted, cuda=cuda)
    return hub.fetch(repo_id, remote.commit, _files_of(found, remote.files)), found


def _files_of(artifact: Artifact, files: Mapping[str, int]) -> list[str]:
    parent = artifact.path.rpartition("/")[0]
    beside = [f"{parent}/{name}" if parent else name for name in TEXT_FILES]
    wanted = {artifact.path, *(artifact.path + ending for ending in _GRAPH_COMPANIONS), *TEXT_FILES, *beside}
    return sorted(wanted & set(files))
