"""Checks before any work: account, targets, licence, disk space. They fetch no weights and write nothing.

`Checks` collects the results in order, for the plans of `push` and `publish`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import DiskTooSmall, LicenseUnknown, SpaceImpossible, UsageError
from gradmap_hub.hub.target import Terms, model_mark, space_mark
from gradmap_hub.layout import disk_words, free_bytes
from gradmap_hub.record import Base
from gradmap_hub.space.kinds import Kinds, choose_kinds
from gradmap_hub.space.plan import SpacePlan

if TYPE_CHECKING:
    from gradmap_hub.hub.accounts import Account
    from gradmap_hub.hub.publisher import Publisher


@dataclass(frozen=True)
class Targets:
    """The repositories of model and Space, and what the user allows for them.

    `space` is None if no Space is published; `space_reason` then says why, if one was requested. `wanted`: the kind of
    Space that the user asks for, or auto; `paid`: whether the owner of the target has a paid plan.
    """

    target: str
    space_target: str
    space: SpacePlan | None
    public: bool = False
    update: bool = False
    create_pr: bool = False
    space_reason: str = ""
    wanted: str = "auto"
    paid: bool = False

    @staticmethod
    def of(target: str, space: SpacePlan | None, config: PublishConfig, account: Account) -> Targets:
        """The targets of a push to `target`; without the Space if no kind of it can be made.

        Raises:
            SpaceImpossible: the user asks for a certain kind that cannot be made.
        """
        found = Targets(
            target, f"{target}-compare", None, config.public, config.update, config.create_pr,
            wanted=str(config.space), paid=target.partition("/")[0] in account.paid,
        )  # fmt: skip
        found = found if space is None else found.with_space(space)
        if found.space_reason and found.wanted != "auto":
            reason = found.space_reason.removeprefix("no Space: ")
            raise SpaceImpossible(
                f"--space {found.wanted} is not possible: {reason}.", hint="Use --space auto or --space none."
            )
        return found

    def with_space(self, space: SpacePlan) -> Targets:
        """The same targets with a new plan of the Space."""
        kinds = choose_kinds(self.wanted, space, paid=self.paid, owner=self.owner)
        return replace(self, space=space if kinds.order else None, space_reason="" if kinds.order else kinds.reason)

    @property
    def owner(self) -> str:
        return self.target.partition("/")[0]

    @property
    def kinds(self) -> Kinds:
        """The kinds of Space to try; none without a Space."""
        if self.space is None:
            return Kinds((), self.space_reason)
        return choose_kinds(self.wanted, self.space, paid=self.paid, owner=self.owner)

    def terms(self, base_name: str, repo_type: str) -> Terms:
        """What the user allows for the model or the Space of `base_name`. `repo_type`: "model" or "space"."""
        mark = (model_mark if repo_type == "model" else space_mark)(base_name, self.target)
        return Terms(self.public, self.update, mark)


@dataclass(frozen=True)
class Check:
    """A check before any work, and its result."""

    name: str
    result: str


class Checks:
    """The checks that `push` and `publish` share. Each adds its result, or raises if the command must not continue."""

    def __init__(self, config: PublishConfig, publisher: Publisher) -> None:
        """Check the options and the account.

        Raises:
            UsageError: --create-pr without --to, or with an option that it excludes.
            NotLoggedIn: the token is missing or invalid.
        """
        check_pull_request(config)
        self._config = config
        self._publisher = publisher
        self._found: list[Check] = []
        self.account: Account = publisher.hub.account()
        self.add("account", f"{self.account.name}, token of role {self.account.role or 'unknown'}")

    def add(self, name: str, result: str) -> None:
        """Add the result of a check."""
        self._found.append(Check(name, result))

    @property
    def found(self) -> tuple[Check, ...]:
        """All results so far."""
        return tuple(self._found)

    def licensed(self, base: Base) -> Base:
        """`base` with the licence that the card states, see `state_license`.

        Raises:
            LicenseUnknown: the original states no licence, and none was given.
            UsageError: the given licence is invalid or differs from the original's; or --public with a gated original.
        """
        base = state_license(base, self._config, self._publisher)
        if self._config.public and base.gated:
            raise UsageError(f"{base.name} is gated: models made from it must stay private. Leave out --public.")
        return base

    def targets(self, targets: Targets, base_name: str, *, resuming: tuple[bool, bool]) -> None:
        """Check that the targets may be written to.

        Args:
            targets: The repositories.
            base_name: The name of the original.
            resuming: Whether the model, and the Space, may exist already from an earlier run of the same push.

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
        if targets.space is not None:
            self.add("kind of Space", targets.kinds.reason)
        if self._config.collection is not None:
            from gradmap_hub.hub.collections import check_collection

            self.add("collection", check_collection(self._publisher.hub, self._config.collection, self.account))

    def room(self, place: Path, needed: int, upload: int) -> None:
        """Check the disk space at `place`.

        Args:
            place: A path on the file system, which need not exist.
            needed: Bytes needed.
            upload: Upper bound of the bytes to upload; only reported.

        Raises:
            DiskTooSmall: fewer than `needed` bytes are free.
        """
        free = free_bytes(place)
        if free < needed:
            raise DiskTooSmall(str(place), needed, free)
        self.add("disk", disk_words(needed, place))
        self.add("upload", f"at most about {upload / 1e6:,.1f} MB")


def check_pull_request(config: PublishConfig) -> None:
    """Check the options of a pull request.

    Raises:
        UsageError: --create-pr without --to, or with an option that it excludes.
    """
    if not config.create_pr:
        return
    if config.to is None:
        raise UsageError("--create-pr needs --to OWNER/NAME: the repository that gets the pull request.")
    own = ((config.public, "--public"), (config.update, "--update"), (config.collection is not None, "--collection"))
    for given, option in own:
        if given:
            raise UsageError(
                f"--create-pr only opens a pull request; leave out {option}, which needs your own repository."
            )


def state_license(base: Base, config: PublishConfig, publisher: Publisher) -> Base:
    """`base` with the licence that the card states: its own, or --license if the original states none.

    Raises:
        LicenseUnknown: neither is known.
        UsageError: both are known and differ, or the Hub does not accept the given id.
    """
    from gradmap_hub.hub.card_check import is_known_license

    license_id = config.license
    if base.license is None and license_id is None:
        raise LicenseUnknown(
            f"{base.name} states no licence, so models made from it cannot be published.",
            hint="If you know its licence, state it with --license (an id such as apache-2.0, or other).",
        )
    if (
        base.license_source == "publisher" and license_id is not None
    ):  # stated by an earlier command, and again by this one
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
        publisher.hub.check_license(stated)  # the list of the Hub may be longer than ours
    return base


def license_description(base: Base) -> str:
    """The licence with its name, link and source, as a check result."""
    named = f" ({base.license_name}, {base.license_link})" if base.license == "other" else ""
    origin = "from the original" if base.license_source == "original" else "stated with --license"
    return f"{base.license}{named}, {origin}"
