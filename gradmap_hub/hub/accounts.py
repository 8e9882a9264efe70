"""Who publishes, and what a token of theirs allows: judged from what the Hub says of it, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmap_hub.errors import NotAllowed


@dataclass(frozen=True)
class Scope:
    """What a fine-grained token allows in one place. `kind`: user, org, model, dataset, space."""

    kind: str
    name: str
    permissions: frozenset[str]


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and what it allows. `organizations` are those whose member may write; `read_only` the
    others. `scopes` is None unless the token is fine-grained and says what it covers."""

    name: str
    organizations: tuple[str, ...]
    role: str
    read_only: tuple[str, ...] = ()
    scopes: tuple[Scope, ...] | None = None
    everywhere: frozenset[str] = frozenset()

    def covers(self, repo_id: str, repo_type: str, permission: str) -> bool:
        """Whether the token's own scopes allow `permission` (such as repo.write) in a repository. A token that is not
        fine-grained allows what its owner may."""
        if self.scopes is None:
            return True
        owner = repo_id.partition("/")[0]
        places = {("user", owner), ("org", owner), (repo_type, repo_id)}
        return permission in self.everywhere or any(
            permission in scope.permissions for scope in self.scopes if (scope.kind, scope.name) in places
        )

    def covers_owner(self, owner: str, permission: str) -> bool:
        """Whether the scopes cover all of a namespace, as it takes to create a repository there."""
        return self.scopes is None or any(
            permission in scope.permissions
            for scope in self.scopes
            if scope.kind in ("user", "org") and scope.name == owner
        )


def account_of(answer: Mapping[str, Any]) -> Account:
    """What /api/whoami-v2 says."""
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
    return Account(answer["name"], writable, token.get("role", ""), read_only, scopes, everywhere)


def check_owner(repo_id: str, owner: str, account: Account) -> None:
    """Raises NotAllowed: the namespace is one that this account may not write to."""
    name = repo_id.partition("/")[2]
    if owner in account.read_only:
        raise NotAllowed(
            f"You are {account.name} and may only read in {owner}.",
            hint=f"Use --to {account.name}/{name}, ask {owner} for the right to write, or propose with --create-pr.",
        )
    if owner != account.name and owner not in account.organizations:
        raise NotAllowed(
            f"You are {account.name} and may not write to {owner}.",
            hint=f"Use --to {account.name}/{name}, or ask for membership of {owner}.",
        )


def check_scopes(
    repo_id: str, owner: str, account: Account, repo_type: str, *, exists: bool, pull_request: bool
) -> None:
    """Raises NotAllowed: a fine-grained token that does not cover this."""
    if pull_request:
        covered = any(account.covers(repo_id, repo_type, what) for what in ("discussion.write", "repo.write"))
        needed = f"the permission to open pull requests in {repo_id} (discussion.write)"
    elif exists:
        covered = account.covers(repo_id, repo_type, "repo.write")
        needed = f"write access to {repo_id} (repo.write)"
    else:
        covered = account.covers_owner(owner, "repo.write")
        needed = f"write access to all repositories of {owner} (repo.write), as it takes to create one"
    if not covered:
        raise NotAllowed(
            f"Your fine-grained token does not cover {repo_id}.",
            hint=f"Give it {needed}, on the token's page in your settings, or use another token.",
        )
