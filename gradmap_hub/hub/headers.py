"""Reads the header of a safetensors file on the Hub without downloading the file."""

from __future__ import annotations

import struct

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import SafetensorsParsingError


def read_dtypes(api: HfApi, repo_id: str, commit: str, name: str) -> dict[str, str]:
    """{tensor: dtype as safetensors names it, such as "BF16"}. Empty if the file is in the cache, where it is read
    anyway, or if its header is invalid, which is reported once the file is downloaded.

    Raises the client's exceptions.
    """
    if isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str):
        return {}
    try:
        found = api.parse_safetensors_file_metadata(repo_id, name, revision=commit)
    # The client checks neither the length of an answer nor the types in a header.
    except (SafetensorsParsingError, struct.error, ValueError, AttributeError, TypeError, RecursionError):
        return {}
    return {tensor: str(entry.dtype) for tensor, entry in found.tensors.items()}
