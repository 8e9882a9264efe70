"""All routes of the app, taken from the app: a new route is under these tests from its first day."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route

from gradmap_hub.local_hub import LocalHub
from gradmap_hub.local_hub.app import build_app
from gradmap_hub.local_hub.names import RepoType
from gradmap_hub.local_hub.requestlog import RequestLog

SHA = "ab" * 32
TYPES: tuple[RepoType, ...] = ("model", "dataset", "space")
#: The values of the path parameters; a route with another parameter fails until it has one here.
VALUES = {
    "namespace": "ada", "revision": "main", "path:path": "README.md", "pull": "1", "number": "1", "branch": "new",
    "oid": SHA, "hub": "0" * 16, "hash": SHA, "kind": "models", "rest:path": "tree/main", "file:path": "a",
}  # fmt: skip


def address(route: Route, name: str) -> str:
    path = route.path
    for key, value in {**VALUES, "name": name}.items():
        path = path.replace("{" + key + "}", value)
    assert "{" not in path, f"VALUES has nothing for {route.path}"
    return path


def body(name: str) -> bytes:
    """What every route can read, with the repository where the path does not name it."""
    fields = {
        "name": name, "organization": "ada", "fromRepo": f"ada/{name}", "toRepo": "bob/mine", "content": "# Card",
        "title": "", "description": "", "pullRequest": True, "status": "closed", "private": False,
        "operation": "upload", "objects": [], "files": [], "parts": [], "oid": SHA, "size": 1, "paths": ["README.md"],
        "tag": "v1", "key": "header", "value": {"summary": "A commit"}, "flavor": "cpu-basic", "seconds": 60,
        "item": {"id": f"ada/{name}", "type": "model"},
    }  # fmt: skip
    return json.dumps(fields).encode()


class World:
    """A hub with a private repository of each type, and the tokens of its owner and of somebody else."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self.owner, self.other = hub.add_user("ada"), hub.add_user("bob")
        app = build_app(hub._hub, RequestLog(), None)  # pyright: ignore[reportPrivateUsage]
        routes = [route for route in app.routes if isinstance(route, Route)]
        self.routes = [(route, method) for route in routes for method in sorted(route.methods or ())]

    def ask(self, method: str, path: str, content: bytes = b"", token: str | None = None) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(self.hub.url.removeprefix("http://"), timeout=20)
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("routes")
    folder = root / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("# A card that is a secret")
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    with LocalHub(root / "hub", cdn_port=None, xet=True) as hub:
        for kind in TYPES:
            hub.seed("ada/secret", folder, kind, private=True)
        yield World(hub)


def test_a_private_repository_is_one_that_does_not_exist(world: World) -> None:
    """Without access every route answers about it, to the byte, as about a repository that is nowhere."""
    assert len(world.routes) > 100
    told: list[str] = []
    for route, method in world.routes:
        for token in (None, world.other):
            answers = []
            for name in ("secret", "absent"):
                status, headers, content = world.ask(method, address(route, name), body(name), token)
                headers.pop("date")
                answers.append((status, headers, content.replace(name.encode(), b"NAME")))
            if answers[0] != answers[1] or ("{namespace}" in route.path and answers[0][0] < 400):
                told.append(f"{method} {route.path}: {answers[0][0]}, not {answers[1][0]}")
    assert not told
    status, _, content = world.ask("GET", "/api/models/ada/secret", token=world.owner)
    assert status == 200 and json.loads(content)["private"] is True
