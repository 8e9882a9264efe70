"""Users, organisations, tokens and permissions.

Tokens are valid for this local hub only, so they are stored in plain text in a file that only its owner can read.
That way ``add_user`` returns the same token after a restart.
"""

import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlencode

from .errors import InvalidName
from .names import RepoKey, check_owner
from .objects import write_atomically
from .store import RepoState, now

Role = Literal["read", "write", "fineGrained"]

#: Text files that are served without access even if the repository is gated. Case-sensitive, as on the real Hub.
UNGATED_FILES = frozenset({"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"})


_ENTITIES = ("user", "org", "model", "dataset", "space")
_READING = frozenset({"repo.content.read", "repo.access.read", "repo.write"})


@dataclass(frozen=True)
class TokenScope:
    """The permissions of a fine-grained token on one entity: a whole namespace or one repository."""

    entity_type: str
    entity_name: str
    permissions: frozenset[str]

    @staticmethod
    def parse(row: Mapping[str, Any]) -> "TokenScope":
        """Parse a scope in whoami's format: ``{"entity": {"type", "name"}, "permissions": [...]}``.

        Raises:
            ValueError: the row is not a valid scope.
        """
        entity, permissions = row.get("entity"), row.get("permissions")
        if (
            not isinstance(entity, Mapping)
            or entity.get("type") not in _ENTITIES
            or not isinstance(entity.get("name"), str)
            or not isinstance(permissions, list | tuple)
            or not all(isinstance(permission, str) for permission in permissions)
        ):
            kinds = ", ".join(_ENTITIES)
            raise ValueError(f"A scope needs an entity with a type ({kinds}) and a name, and permissions, got {row!r}")
        return TokenScope(entity["type"], entity["name"], frozenset(permissions))

    def to_json(self) -> dict[str, Any]:
        entity = {"type": self.entity_type, "name": self.entity_name}
        return {"entity": entity, "permissions": sorted(self.permissions)}

    def covers(self, namespace: str, key: RepoKey | None) -> bool:
        """Whether the scope applies to this repository, or, if ``key`` is None, to the whole namespace."""
        if self.entity_type in ("user", "org"):
            return self.entity_name == namespace
        return key is not None and (self.entity_type, self.entity_name) == (key.type, key.id)


@dataclass(frozen=True)
class Identity:
    """The caller: a user, their organisations and the permissions of their token."""

    name: str
    internal_id: str
    orgs: tuple[str, ...]
    token_role: Role
    token_created_at: str
    scopes: tuple[TokenScope, ...] = ()

    def is_member(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs

    def can_read(self, key: RepoKey) -> bool:
        """Whether the token may read this repository if it is private or gated."""
        if not self.is_member(key.namespace):
            return False
        return self.token_role != "fineGrained" or bool(self._permissions(key.namespace, key) & _READING)

    def can_write(self, key: RepoKey) -> bool:
        """Whether the token may write to this repository."""
        return self._may(key.namespace, key, "repo.write")

    def can_create(self, namespace: str, permission: str = "repo.write") -> bool:
        """Whether the token may create repositories (or collections, by ``permission``) in this namespace."""
        return self._may(namespace, None, permission)

    def can_propose(self, key: RepoKey) -> bool:
        """Whether the token may open pull requests: in any repository, or (fine-grained) where its scopes allow it."""
        if self.token_role != "fineGrained":
            return self.token_role == "write"
        return bool(self._permissions(key.namespace, key) & {"repo.write", "discussion.write"})

    def _may(self, namespace: str, key: RepoKey | None, permission: str) -> bool:
        if not self.is_member(namespace):
            return False
        if self.token_role == "fineGrained":
            return permission in self._permissions(namespace, key)
        return self.token_role == "write"

    def _permissions(self, namespace: str, key: RepoKey | None) -> frozenset[str]:
        covering = [scope.permissions for scope in self.scopes if scope.covers(namespace, key)]
        return frozenset[str]().union(*covering)


def can_see(identity: Identity | None, key: RepoKey, state: RepoState) -> bool:
    """Whether the repository is visible to this caller."""
    if not state.private:
        return True
    return identity is not None and identity.can_read(key)


def can_open(identity: Identity | None, key: RepoKey, state: RepoState, path: str, *, is_lfs: bool) -> bool:
    """Whether a caller who can see the repository may read this file. `is_lfs`: whether it is stored as LFS."""
    # A commit names LFS content by its hash alone: any LFS file could be committed under one of these names.
    if state.gated is False or (path in UNGATED_FILES and not is_lfs):
        return True
    return identity is not None and (identity.can_read(key) or identity.name in state.granted)


class Accounts:
    """The users, organisations and tokens of a hub, stored in one file."""

    def __init__(self, root: Path) -> None:
        self._file = root / "accounts.json"
        self._temporary = root / "tmp"
        self._lock = threading.Lock()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            return json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {"users": {}, "orgs": {}, "tokens": {}}

    def _write(self, accounts: Mapping[str, object]) -> None:
        write_atomically(self._file, json.dumps(accounts, indent=1).encode(), self._temporary)

    def add_user(
        self,
        name: str,
        role: Role = "write",
        orgs: Sequence[str] = (),
        scopes: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return a token of the user; create the user or extend their organisations as needed.

        A user has one token per role and set of scopes; a repeated call returns the same token.

        Raises:
            InvalidName: the Hub would refuse the name, or a user and an organisation would share it.
            ValueError: an unknown role, an invalid scope, or scopes for a token that is not fine-grained.
        """
        if role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {role!r}")
        if scopes and role != "fineGrained":
            raise ValueError(f"Only fine-grained tokens have scopes, not {role} tokens")
        parsed = [TokenScope.parse(scope).to_json() for scope in scopes]
        with self._lock:
            accounts = self._read()
            users, known_orgs, tokens = accounts["users"], accounts["orgs"], accounts["tokens"]
            if name in known_orgs:
                raise InvalidName(f"{name} is an organisation")
            for org in orgs:
                if org in users or org == name:
                    raise InvalidName(f"{org} is a user")
                known_orgs.setdefault(check_owner(org), {"id": secrets.token_hex(12)})
            user = users.setdefault(check_owner(name), {"id": secrets.token_hex(12), "orgs": []})
            user["orgs"] = sorted({*user["orgs"], *orgs})
            wanted = (name, role, parsed)
            known = {text: (row["user"], row["role"], row.get("scopes", [])) for text, row in tokens.items()}
            token = next((text for text, row in known.items() if row == wanted), None)
            if token is None:
                token = f"hf_local_{secrets.token_hex(20)}"
                tokens[token] = {"user": name, "role": role, "created_at": now(), "scopes": parsed}
            self._write(accounts)
            return token

    def identify(self, token: str) -> Identity | None:
        """The user of a token; None if the token is unknown."""
        accounts = self._read()
        row = accounts["tokens"].get(token)
        if row is None:
            return None
        user = accounts["users"][row["user"]]
        return Identity(
            name=row["user"],
            internal_id=user["id"],
            orgs=tuple(user["orgs"]),
            token_role=row["role"],
            token_created_at=row["created_at"],
            # Files written by older versions lack this key.
            scopes=tuple(TokenScope.parse(scope) for scope in row.get("scopes", [])),
        )

    def org_id(self, org: str) -> str:
        return self._read()["orgs"][org]["id"]


class Signer:
    """Signs the URLs that need no token, such as those of LFS uploads and downloads. S3 works the same way."""

    def __init__(self, root: Path) -> None:
        file = root / "upload.key"
        if not file.exists():
            write_atomically(file, secrets.token_bytes(32), root / "tmp")
        self._key = file.read_bytes()
        #: Identifies this hub, independent of its address. Cannot be used to sign.
        self.name = hashlib.sha256(b"name" + self._key).hexdigest()[:16]

    def sign(self, purpose: str, key: RepoKey, sha256: str, seconds: float, **fields: str | int) -> str:
        """Return a query string, with ``fields``, that permits ``purpose`` on one object for ``seconds``."""
        signed = {**{name: str(value) for name, value in fields.items()}, "expires": f"{time.time() + seconds:.3f}"}
        return urlencode({**signed, "signature": self._signature(purpose, key, sha256, signed)})

    def allows(self, purpose: str, key: RepoKey, sha256: str, query: Mapping[str, str]) -> bool:
        """Whether a query string has a valid signature and has not expired."""
        signed = {name: value for name, value in query.items() if name != "signature"}
        expected = self._signature(purpose, key, sha256, signed)
        if not hmac.compare_digest(expected.encode(), query.get("signature", "").encode()):
            return False
        return float(signed["expires"]) >= time.time()

    def _signature(self, purpose: str, key: RepoKey, sha256: str, fields: Mapping[str, str]) -> str:
        text = json.dumps([purpose, key.address, sha256, sorted(fields.items())])
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
