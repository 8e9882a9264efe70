"""Uploads large files ahead of the commit, each once, with progress; the commit then only names them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from gradmap_hub.hub import xet
from gradmap_hub.hub.client import Hub
from gradmap_hub.hub.refusals import step
from gradmap_hub.hub.transport import Watch
from gradmap_hub.progress import Reporter

# Uploaded one by one with progress. The Hub stores other files in the commit itself.
_LARGE_SUFFIXES = (".safetensors", ".onnx", ".onnx_data", ".png", ".jpg", ".webp", ".model")
_LARGE_BYTES = 1_000_000


@dataclass(frozen=True)
class Uploader:
    """Uploads the files of one commit to a repository. `kind`: "model" or "space"; `pull_request`: whether the commit
    opens a pull request."""

    hub: Hub
    reporter: Reporter
    repo_id: str
    kind: str
    pull_request: bool

    def upload(self, files: Mapping[str, Path]) -> list[CommitOperationAdd]:
        """Upload the files that the Hub stores as LFS; returns the operations that add all files to the commit.

        The Hub is asked about each file first, and again before each retry: files that it has, also from an interrupted
        run, are not sent.

        Args:
            files: {path in the repository: local file}.

        Raises:
            PublishInterrupted, NotLoggedIn, NotAllowed, PaymentRequired, TargetGone, HubConflict, RateLimited,
                HubError: see `refusals.refusal`.
        """
        additions = {name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()}
        large = [name for name, path in files.items() if _is_large(path)]
        by_xet = bool(large) and step(
            self.hub,
            "upload to",
            self.repo_id,
            lambda: xet.offered(self.hub, self.repo_id, self.kind, pull_request=self.pull_request),
            "Nothing was committed",
        )
        for name in sorted(large, key=lambda name: files[name].stat().st_size):
            self._upload_large(additions[name], by_xet)
        rest = [addition for name, addition in additions.items() if name not in large]
        self._preupload(rest, Watch(lambda _: None))
        return list(additions.values())

    def _upload_large(self, addition: CommitOperationAdd, by_xet: bool) -> None:
        size = addition.upload_info.size
        self.reporter.start(f"Uploading {addition.path_in_repo}")
        self.reporter.total(size, unit="bytes")
        watch = Watch(self.reporter.advance)
        self._preupload([addition], watch, by_xet=by_xet)
        speed = f", {size_text(round(watch.sent / max(watch.seconds, 1e-3)))}/s" if watch.sent else ""
        if watch.by_xet:
            result = f", {size_text(watch.sent)} of them sent with xet{speed}"
        elif watch.sent:
            result = speed
        elif watch.asked:
            result = ", already on the Hub" if watch.stored_before else ""
        else:
            result = ", part of the commit"
        self.reporter.finish(size_text(size) + result)

    def _preupload(self, additions: list[CommitOperationAdd], watch: Watch, *, by_xet: bool = False) -> None:
        """Send what the Hub does not have. `by_xet`: use xet for it; only with a single file."""
        if not additions:
            return

        def send() -> None:
            with ExitStack() as stack:
                new = by_xet and not xet.stored(
                    self.hub, self.repo_id, self.kind, additions[0], pull_request=self.pull_request
                )
                stack.enter_context(xet.switched(new))
                if new:
                    stack.enter_context(xet.watched(watch, self.repo_id))
                self.hub.api.preupload_lfs_files(
                    self.repo_id,
                    additions,
                    repo_type=self.kind,
                    create_pr=self.pull_request,
                    free_memory=False,
                    num_threads=1,
                )

        step(self.hub, "upload to", self.repo_id, send, "Nothing was committed", watch=watch)


def _is_large(path: Path) -> bool:
    return path.suffix in _LARGE_SUFFIXES or path.stat().st_size >= _LARGE_BYTES


def size_text(size: int) -> str:
    """Bytes as MB, or as kB below 100 kB."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
