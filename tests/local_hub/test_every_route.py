"""All routes of the app, taken from the app: a new route is under these tests from its first day."""

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings, strategies
from starlette.routing import Route

from gradmap_hub.local_hub import LocalHub
from gradmap_hub.local_hub.app import build_app
from gradmap_hub.local_hub.names import RepoType, repo_key
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


def _without_type(path: str) -> str:
    return re.sub("(models|datasets|spaces)/?", "", path)


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

    def __init__(self, hub: LocalHub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.owner, self.other = hub.add_user("ada"), hub.add_user("bob")
        app = build_app(hub._hub, RequestLog(), None)  # pyright: ignore[reportPrivateUsage]
        routes = [route for route in app.routes if isinstance(route, Route)]
        self.routes = [(route, method) for route in routes for method in sorted(route.methods or ())]
        # Most routes exist once per type of repository, with one handler.
        handlers = {(_without_type(route.path), method): route for route, method in self.routes}
        self.handlers = [(route, method) for (_, method), route in handlers.items()]

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
        yield World(hub, folder)


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


NESTED: Any = "end"
for _ in range(800):
    NESTED = [NESTED]
NASTY: list[Any] = [
    None, True, -1, 2**80, 10**400, 1e308, "", "\ud800", "a\udfff/b", "\x00", "x" * 5000, [], {}, [None], NESTED,
    {"path": "\ud800", "size": "x"}, [{"path": "a\\b", "size": 1}], {"summary": "\ud800"}, {"\ud800": 1},
]  # fmt: skip
#: As they stand in an address.
SEGMENTS = [
    "%00", "a%00b", "%0d%0a", "%ff", "%ed%a0%80", "..%2f..%2fx", "%252f", "9" * 5000, "%e2%80%ae", "%C2%B2", "a" * 9000,
    "refs%2fpr%2f1", "%5b", "-", "ab" * 32, "%0bx%1b%5b31m",
]  # fmt: skip
QUERIES = ["", *(f"limit={text}&cursor={text}&p={text}&size={text}&expand={text}" for text in SEGMENTS[:10])]
FIELDS = sorted(json.loads(body("")))


def check_nasty(world: World, route: Route, method: str, values: dict[str, str], content: bytes, query: str) -> None:
    """Some answer arrives, and it is not that the Hub failed."""
    for kind in TYPES:
        if not world.hub._hub.store.exists(repo_key("ada", "secret", kind)):  # pyright: ignore[reportPrivateUsage]
            world.hub.seed("ada/secret", world.folder, kind, private=True)
    path = route.path
    for name, value in {**VALUES, "name": "secret", **values}.items():
        path = path.replace("{" + name + "}", value)
    status, _, answer = world.ask(method, f"{path}?{query}", content, world.owner)
    assert status < 500, (method, path[:200], content[:200], answer[:500])


@pytest.mark.parametrize("number", range(len(NASTY)))
def test_no_body_makes_the_hub_fail(world: World, number: int) -> None:
    """All fields at once, then all but those that name things."""
    for route, method in world.handlers:
        if method in ("GET", "HEAD"):
            continue
        for kept in ((), ("name", "organization", "key", "operation", "pullRequest", "type")):
            fields = json.loads(body("secret"))
            fields = {name: value if name in kept else NASTY[number] for name, value in fields.items()}
            check_nasty(world, route, method, {}, json.dumps(fields).encode(), "")


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b'{"size": ' + b"9" * 5000 + b"}", b'{"size": NaN, "value": 1e999}',
     b'"\xed\xa0\x80"', b"\x00" * 50, b'{"key": "file", "value": {"path": "a", "content": "\\udcff"}}'],
)  # fmt: skip
def test_what_is_not_json_is_refused(world: World, content: bytes) -> None:
    for route, method in world.handlers:
        if method not in ("GET", "HEAD"):
            check_nasty(world, route, method, {}, content, "")


@pytest.mark.parametrize("segment", SEGMENTS)
def test_no_address_makes_the_hub_fail(world: World, segment: str) -> None:
    for route, method in world.handlers:
        for name in [name for name in (*VALUES, "name") if "{" + name + "}" in route.path]:
            check_nasty(world, route, method, {name: segment}, b"{}", "")


@pytest.mark.parametrize("query", QUERIES)
def test_no_query_makes_the_hub_fail(world: World, query: str) -> None:
    for route, method in world.handlers:
        check_nasty(world, route, method, {}, b"", query)


def drawn(draw: Any) -> Any:
    text = strategies.text(strategies.characters(), max_size=8)
    leaf = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | text
    tree = strategies.recursive(leaf, lambda inner: strategies.lists(inner) | strategies.dictionaries(text, inner))
    return draw(tree | strategies.sampled_from(NASTY))


@strategies.composite
def requests_of(draw: Any) -> tuple[int, dict[str, Any], dict[str, str], str]:
    changed = {name: drawn(draw) for name in draw(strategies.sets(strategies.sampled_from(FIELDS), max_size=4))}
    segments = strategies.sampled_from(SEGMENTS) | strategies.text(max_size=8).map(lambda text: quote(text, safe=""))
    names = strategies.sampled_from(sorted([*VALUES, "name"]))
    values = draw(strategies.dictionaries(names, segments.filter(bool), max_size=1))
    return draw(strategies.integers(0, 10_000)), changed, values, draw(strategies.sampled_from(QUERIES))


@pytest.mark.parametrize("examples", [50, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_request_makes_the_hub_fail(world: World, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None)
    @given(requests_of())
    def check(asked: tuple[int, dict[str, Any], dict[str, str], str]) -> None:
        number, changed, values, query = asked
        route, method = world.handlers[number % len(world.handlers)]
        fields = {**json.loads(body("secret")), **changed}
        check_nasty(world, route, method, values, json.dumps(fields).encode(), query)

    check()
