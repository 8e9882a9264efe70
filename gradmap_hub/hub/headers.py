"""Reads the header of a safetensors file on the Hub, by a request for its first 100 kB."""

from __future__ import annotations

import struct

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import SafetensorsParsingError


def read_dtypes(api: HfApi, repo_id: str, commit: str, name: str) -> dict[str, str]:
    """{tensor: safetensors' name of its dtype}; empty if the file is in the cache, where it is read anyway, or if its
    header is none, which is told precisely once the file is here.

    Raises:
        The client's exceptions.
    """
    if isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str):
        return {}
    try:
        found = api.parse_safetensors_file_metadata(repo_id, name, revision=commit)
    # The client checks neither the length of an answer nor the types in a header.
    except (SafetensorsParsingError, struct.error, ValueError, AttributeError, TypeError, RecursionError):
        return {}
    return {tensor: str(entry.dtype) for tensor, entry in found.tensors.items()}
