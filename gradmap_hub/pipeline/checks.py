"""What is looked at before any work: the account, the targets, the licence, the disk. Nothing is fetched or written.

`Checks` collects the answers in the order of the questions; the plans of `push` and `publish` are built with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import DiskTooSmall, LicenseUnknown, UsageError
from gradmap_hub.hub.target import Terms, model_mark, space_mark
from gradmap_hub.layout import disk_words, free_bytes
from gradmap_hub.record import Base
from gradmap_hub.space.plan import SpacePlan

if TYPE_CHECKING:
    from gradmap_hub.hub.accounts import Account
    from gradmap_hub.hub.publisher import Publisher


@dataclass(frozen=True)
class Targets:
    """Where model and Space go, and what the user allows there.

    `space` is None if there will be no Space; `space_reason` then says why, where one was asked for.
    """

    target: str
    space_target: str
    space: SpacePlan | None
    public: bool = False
    update: bool = False
    create_pr: bool = False
    space_reason: str = ""

    @staticmethod
    def of(target: str, space: SpacePlan | None, config: PublishConfig) -> Targets:
        """The targets of a push to `target`; a Space that can run in no precision is left out with its reason."""
        reason = space.reason if space is not None and not space.precisions else ""
        kept = None if reason else space
        return Targets(target, f"{target}-compare", kept, config.public, config.update, config.create_pr, reason)

    def with_space(self, space: SpacePlan) -> Targets:
        """The same, once it is known what the Space really has."""
        reason = "" if space.precisions else space.reason
        return replace(self, space=None if reason else space, space_reason=reason)

    def terms(self, base_name: str, repo_type: str) -> Terms:
        mark = (model_mark if repo_type == "model" else space_mark)(base_name, self.target)
        return Terms(self.public, self.update, mark)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before any work, and what was found."""

    name: str
    result: str


class Checks:
    """Asks the questions that `push` and `publish` share, cheapest first; each raises if it must not go on."""

    def __init__(self, config: PublishConfig, publisher: Publisher) -> None:
        """
        Raises:
            UsageError: --create-pr together with an option that it excludes.
            NotLoggedIn: there is no token.
        """
        check_pull_request(config)
        self._config = config
        self._publisher = publisher
        self._found: list[Check] = []
        self.account: Account = publisher.hub.account()
        self.add("account", f"{self.account.name}, token of role {self.account.role or 'unknown'}")

    def add(self, name: str, result: str) -> None:
        self._found.append(Check(name, result))

    @property
    def found(self) -> tuple[Check, ...]:
        return tuple(self._found)

    def licensed(self, base: Base) -> Base:
        """The base with the licence that will be stated, see `state_license`.

        Raises:
            LicenseUnknown, UsageError
        """
        base = state_license(base, self._config, self._publisher)
        if self._config.public and base.gated:
            raise UsageError(f"{base.name} is gated: what is made from it stays private. Leave out --public.")
        return base

    def targets(self, targets: Targets, base_name: str, *, resuming: tuple[bool, bool]) -> None:
        """Refuse targets that cannot be ours. `resuming`: whether the model and the Space may exist already, because an
        earlier run of the same push put them there.

        Raises:
            GradmapError: see `Guard.check_target`, and `check_collection`.
        """
        guard = self._publisher.guard
        terms = targets.terms(base_name, "model")
        model = guard.check_target(
            targets.target, self.account, "model", terms, resuming=resuming[0], pull_request=targets.create_pr
        )
        space = "none"
        if targets.space is not None:
            terms = targets.terms(base_name, "space")
            space = guard.check_target(targets.space_target, self.account, "space", terms, resuming=resuming[1])
        self.add("target", model)
        self.add("space", space)
        if self._config.collection is not None:
            from gradmap_hub.hub.collections import check_collection

            self.add("collection", check_collection(self._publisher.hub, self._config.collection, self.account))

    def room(self, place: Path, needed: int, upload: int) -> None:
        """Raises DiskTooSmall: fewer than `needed` bytes are free at `place`. `upload`: bytes, at most."""
        free = free_bytes(place)
        if free < needed:
            raise DiskTooSmall(str(place), needed, free)
        self.add("disk", disk_words(needed, place))
        self.add("upload", f"at most about {upload / 1e6:,.1f} MB")


def check_pull_request(config: PublishConfig) -> None:
    """Raises UsageError: --create-pr together with what it excludes, or without saying to whom."""
    if not config.create_pr:
        return
    if config.to is None:
        raise UsageError("--create-pr needs --to OWNER/NAME: the repository that gets the pull request.")
    own = ((config.public, "--public"), (config.update, "--update"), (config.collection is not None, "--collection"))
    for given, option in own:
        if given:
            raise UsageError(f"--create-pr only proposes; leave out {option}, which is for a repository of your own.")


def state_license(base: Base, config: PublishConfig, publisher: Publisher) -> Base:
    """The base with the licence that will be stated: its own, or the one given for an original that states none.

    Raises:
        LicenseUnknown: there is neither.
        UsageError: both, and they differ; or an id that the Hub does not know.
    """
    from gradmap_hub.hub.card_check import is_known_license

    license_id = config.license
    if base.license is None and license_id is None:
        raise LicenseUnknown(
            f"{base.name} states no licence, so nothing can be published from it.",
            hint="If you know its licence, state it with --license (an id such as apache-2.0, or other).",
        )
    if base.license_source == "publisher" and license_id is not None:  # stated before, and now anew
        base = replace(base, license=None, license_name=None, license_link=None)
    if base.license is not None and license_id not in (None, base.license):
        raise UsageError(
            f"{base.name} states its licence, {base.license}; --license is for originals that state none. Leave it out."
        )
    if base.license is None:
        base = replace(base, license=license_id, license_source="publisher")
    stated = base.license or ""
    if stated == "other":
        name, link = base.license_name or config.license_name, base.license_link or config.license_link
        base = replace(base, license_name=name, license_link=link)
    if not is_known_license(stated):
        publisher.hub.check_license(stated)  # the Hub may know more than the list here
    return base


def license_words(base: Base) -> str:
    named = f" ({base.license_name}, {base.license_link})" if base.license == "other" else ""
    origin = "from the original" if base.license_source == "original" else "stated with --license"
    return f"{base.license}{named}, {origin}"
