"""Reads the account of a token and its permissions, as the Hub reports them, and checks them before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmap_hub.errors import NotAllowed

# Plans of organisations; users have PRO.
_PAID_PLANS = ("team", "enterprise", "enterprise-plus")


@dataclass(frozen=True)
class Scope:
    """Permissions of a fine-grained token for one entity. `kind`: user, org, model, dataset, space."""

    kind: str
    name: str
    permissions: frozenset[str]


@dataclass(frozen=True)
class Account:
    """The owner of a token and what the token allows.

    `organizations`: those in which the account may write; `read_only`: the others. `role`: of the token, such as read.
    `scopes`: of a fine-grained token that lists them, else None. `everywhere`: permissions in all scopes.
    `paid`: the user and the organisations that have a paid plan.
    """

    name: str
    organizations: tuple[str, ...]
    role: str
    read_only: tuple[str, ...] = ()
    scopes: tuple[Scope, ...] | None = None
    everywhere: frozenset[str] = frozenset()
    paid: frozenset[str] = frozenset()

    def covers(self, repo_id: str, repo_type: str, permission: str) -> bool:
        """Whether the scopes of the token allow `permission` (such as repo.write) in a repository. A token without
        scopes allows everything that its owner may do."""
        if self.scopes is None:
            return True
        owner = repo_id.partition("/")[0]
        places = {("user", owner), ("org", owner), (repo_type, repo_id)}
        return permission in self.everywhere or any(
            permission in scope.permissions for scope in self.scopes if (scope.kind, scope.name) in places
        )

    def covers_owner(self, owner: str, permission: str) -> bool:
        """Whether the scopes allow `permission` in a whole namespace, which creating a repository requires."""
        return self.scopes is None or any(
            permission in scope.permissions
            for scope in self.scopes
            if scope.kind in ("user", "org") and scope.name == owner
        )


def account_of(answer: Mapping[str, Any]) -> Account:
    """Parse an answer of /api/whoami-v2."""
    token = answer.get("auth", {}).get("accessToken", {})
    organizations = answer.get("orgs", [])
    read_only = tuple(entry["name"] for entry in organizations if entry.get("roleInOrg") == "read")
    writable = tuple(entry["name"] for entry in organizations if entry["name"] not in read_only)
    fine = token.get("fineGrained") or {}
    scopes = None
    if token.get("role") == "fineGrained" and "scoped" in fine:
        scopes = tuple(
            Scope(
                entry.get("entity", {}).get("type", ""),
                entry.get("entity", {}).get("name", ""),
                frozenset(entry.get("permissions", [])),
            )
            for entry in fine["scoped"]
        )
    everywhere = frozenset(fine.get("global") or [])
    paid = {entry["name"] for entry in organizations if entry.get("isEnterprise") or entry.get("plan") in _PAID_PLANS}
    if answer.get("isPro"):
        paid.add(answer["name"])
    return Account(answer["name"], writable, token.get("role", ""), read_only, scopes, everywhere, frozenset(paid))


def check_owner(repo_id: str, owner: str, account: Account) -> None:
    """Check that the account may write to the namespace `owner`.

    Raises:
        NotAllowed: it may not write there.
    """
    name = repo_id.partition("/")[2]
    if owner in account.read_only:
        raise NotAllowed(
            f"You are {account.name}, with read-only access to {owner}.",
            hint=f"Use --to {account.name}/{name}, ask {owner} for write access, or use --create-pr.",
        )
    if owner != account.name and owner not in account.organizations:
        raise NotAllowed(
            f"You are {account.name}, without write access to {owner}.",
            hint=f"Use --to {account.name}/{name}, or ask to join {owner}.",
        )


def check_scopes(
    repo_id: str, owner: str, account: Account, repo_type: str, *, exists: bool, pull_request: bool
) -> None:
    """Check that a fine-grained token covers the repository.

    Args:
        repo_id: The repository.
        owner: Its namespace.
        account: The account of the token.
        repo_type: "model" or "space".
        exists: Whether the repository exists; creating one needs access to the whole namespace.
        pull_request: Whether the files go to a pull request.

    Raises:
        NotAllowed: the token does not cover it.
    """
    if pull_request:
        covered = any(account.covers(repo_id, repo_type, what) for what in ("discussion.write", "repo.write"))
        needed = f"the permission to open pull requests in {repo_id} (discussion.write)"
    elif exists:
        covered = account.covers(repo_id, repo_type, "repo.write")
        needed = f"write access to {repo_id} (repo.write)"
    else:
        covered = account.covers_owner(owner, "repo.write")
        needed = f"write access to all repositories of {owner} (repo.write), which creating one requires"
    if not covered:
        raise NotAllowed(
            f"Your fine-grained token does not cover {repo_id}.",
            hint=f"Give it {needed}, on the token's page in your settings, or use another token.",
        )
