"""Uploads with xet, which sends only the chunks that the Hub does not have: decides when to use it, reports progress.

The client up to 0.36 asks the Hub for each file whether it offers xet. Later versions use xet whenever it is installed,
and fail at a Hub without it. Therefore this module asks the Hub, for all versions alike, and switches the client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.lfs import post_lfs_batch_info
from huggingface_hub.utils import (
    build_hf_headers,  # pyright: ignore[reportPrivateImportUsage]
    get_session,  # pyright: ignore[reportPrivateImportUsage]
    hf_raise_for_status,  # pyright: ignore[reportPrivateImportUsage]
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from gradmap_hub.errors import NotAllowed
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.transport import Watch

# The client's own progress display of an upload, by its names in different versions.
_DISPLAYS = ("XetUploadProgressReporter", "XetProgressReporter")


def offered(hub: Hub, repo_id: str, repo_type: str, *, pull_request: bool) -> bool:
    """Whether the Hub grants a xet upload and the client supports it. One request, without retries and with
    the client's exceptions: for use within `attempt`."""
    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    answer = get_session().get(
        f"{hub.endpoint}/api/{repo_type}s/{repo_id}/xet-write-token/{None if pull_request else 'main'}",
        params={"create_pr": "1"} if pull_request else None,
        headers=build_hf_headers(token=hub.token or False),
    )
    if (
        answer.status_code == 404 and "X-Error-Code" not in answer.headers
    ):  # this Hub has no xet; with the header, the repository is missing
        return False
    hf_raise_for_status(answer)
    return True


def stored(hub: Hub, repo_id: str, repo_type: str, addition: CommitOperationAdd, *, pull_request: bool) -> bool:
    """Whether the Hub has the whole file, so that xet need not look for its chunks. For use within `attempt`, like
    `offered`."""
    answers, _, _ = post_lfs_batch_info(
        [addition.upload_info],
        token=None,
        repo_type=repo_type,
        repo_id=repo_id,
        revision=None if pull_request else "main",
        endpoint=hub.endpoint,
        headers=build_hf_headers(token=hub.token or False),
        transfers=["basic", "multipart"],
    )
    return len(answers) == 1 and "actions" not in answers[0]


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Within this context, the client uses xet only if `on`; if the user sets HF_HUB_DISABLE_XET, never."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or not on
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def watched(watch: Watch, repo_id: str) -> Iterator[None]:
    """Count the bytes of a xet upload.

    Raises:
        NotAllowed: the storage rejects the token that the Hub granted.
    """
    started = time.monotonic()
    watch.by_xet = watch.asked = True
    try:
        with _displayed(watch):
            yield
    except PermissionError as error:
        if not type(error).__module__.startswith("hf_xet"):  # a file that may not be read
            raise
        raise NotAllowed(
            f"The Hub's storage rejects your token for {repo_id}. Nothing was committed.",
            hint="Run the same command again; if it fails again, set HF_HUB_DISABLE_XET=1.",
        ) from error
    finally:
        watch.seconds += time.monotonic() - started


@contextmanager
def _displayed(watch: Watch) -> Iterator[None]:
    """Replace the client's own display, which is the only one that receives the progress of a xet upload. If the client
    has none by these names, progress is shown only when a file is finished."""
    from huggingface_hub.utils import _xet_progress_reporting as reporting

    class Display:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.done = self.sent = 0

        def update_progress(self, total_update: Any, item_updates: Any) -> None:  # hf_xet requires these names
            done, sent = total_update.total_bytes_completed, total_update.total_transfer_bytes_completed
            watch.told(done - self.done)
            watch.sent += sent - self.sent
            self.done, self.sent = done, sent

        def close(self, *args: Any) -> None: ...

    with ExitStack() as stack:
        for name in _DISPLAYS:
            if hasattr(reporting, name):
                stack.callback(setattr, reporting, name, getattr(reporting, name))
                setattr(reporting, name, Display)
        if are_progress_bars_disabled():  # otherwise the client uses no display
            stack.callback(disable_progress_bars)
            enable_progress_bars()
        yield
