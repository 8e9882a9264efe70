"""Users, organisations, tokens, and who may do what.

Tokens open this rehearsal hub and nothing else, so they are kept in plain text in a file only its owner can
read: that lets ``add_user`` hand out the same token again after a restart.
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

from .errors import InvalidName
from .names import RepoKey, check_owner
from .objects import write_atomically
from .store import RepoState, now

Role = Literal["read", "write"]

#: Served to anybody even where the repository is gated. The real Hub is case sensitive here too.
UNGATED_FILES = frozenset({"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"})


@dataclass(frozen=True)
class Identity:
    """Who is asking: a user, their organisations, and what the token they show allows."""

    name: str
    internal_id: str
    orgs: tuple[str, ...]
    token_role: Role
    token_created_at: str

    def is_member(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs

    def can_write(self, namespace: str) -> bool:
        return self.token_role == "write" and self.is_member(namespace)


def can_see(identity: Identity | None, key: RepoKey, state: RepoState) -> bool:
    """Whether the repository exists as far as this caller is concerned."""
    if not state.private:
        return True
    return identity is not None and identity.is_member(key.namespace)


def can_open(identity: Identity | None, key: RepoKey, state: RepoState, path: str) -> bool:
    """Whether a caller who sees the repository may read this file of it."""
    if state.gated is False or path in UNGATED_FILES:
        return True
    return identity is not None and (identity.is_member(key.namespace) or identity.name in state.granted)


class Accounts:
    """The users and organisations of a hub, in one file."""

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

    def add_user(self, name: str, role: Role = "write", orgs: Sequence[str] = ()) -> str:
        """The token of a user, who is created, or added to further organisations, as needed.

        A user has one token for each role; asking again returns the same one.

        Raises:
            InvalidName: a name that the Hub would refuse, or that is taken by an organisation.
            ValueError: an unknown role.
        """
        if role not in get_args(Role):
            raise ValueError(f"role must be 'read' or 'write', got {role!r}")
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
            token = next((text for text, row in tokens.items() if row["user"] == name and row["role"] == role), None)
            if token is None:
                token = f"hf_local_{secrets.token_hex(20)}"
                tokens[token] = {"user": name, "role": role, "created_at": now()}
            self._write(accounts)
            return token

    def identify(self, token: str) -> Identity | None:
        accounts = self._read()
        row = accounts["tokens"].get(token)
        if row is None:
            return None
        user = accounts["users"][row["user"]]
        return Identity(row["user"], user["id"], tuple(user["orgs"]), row["role"], row["created_at"])

    def org_id(self, org: str) -> str:
        return self._read()["orgs"][org]["id"]


class UploadSigner:
    """Signs upload addresses: the client sends LFS files without its token, as it would to S3."""

    LIFETIME = 24 * 3600

    def __init__(self, root: Path) -> None:
        file = root / "upload.key"
        if not file.exists():
            write_atomically(file, secrets.token_bytes(32), root / "tmp")
        self._key = file.read_bytes()

    def sign(self, key: RepoKey, sha256: str, size: int) -> str:
        """The query string that allows one object to be stored."""
        expires = int(time.time()) + self.LIFETIME
        return f"size={size}&expires={expires}&signature={self._signature(key, sha256, size, expires)}"

    def allows(self, key: RepoKey, sha256: str, query: Mapping[str, str]) -> bool:
        try:
            size, expires = int(query["size"]), int(query["expires"])
        except (KeyError, ValueError):
            return False
        expected = self._signature(key, sha256, size, expires)
        return expires >= time.time() and hmac.compare_digest(expected.encode(), query.get("signature", "").encode())

    def _signature(self, key: RepoKey, sha256: str, size: int, expires: int) -> str:
        text = f"{key.address}\n{sha256}\n{size}\n{expires}"
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
