"""Space variables, secrets and runtime."""

from dataclasses import replace

from starlette.responses import Response
from starlette.routing import Route

from ..context import Call, Hub, answer, endpoint
from ..errors import HubError
from ..metadata import read_card, space_runtime
from ..names import RepoKey
from ..store import RepoState, Variable, now


def routes(hub: Hub) -> list[Route]:
    address = "/api/spaces/{namespace}/{name}"
    return [
        Route(f"{address}/variables", endpoint(hub, get_variables, "space"), methods=["GET"]),
        Route(f"{address}/variables", endpoint(hub, set_variable, "space"), methods=["POST"]),
        Route(f"{address}/variables", endpoint(hub, delete_variable, "space"), methods=["DELETE"]),
        Route(f"{address}/secrets", endpoint(hub, set_secret, "space"), methods=["POST"]),
        Route(f"{address}/secrets", endpoint(hub, delete_secret, "space"), methods=["DELETE"]),
        Route(f"{address}/runtime", endpoint(hub, runtime, "space")),
    ]


def get_variables(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    return _variables(call.hub.store.state(key))


def set_variable(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    name, variable = _named_variable(call)

    def change(state: RepoState) -> RepoState:
        if name in state.secrets:
            raise HubError(400, f"A secret is called {name} already")
        return replace(state, variables={**state.variables, name: variable})

    return _variables(call.hub.store.update(key, change))


def delete_variable(call: Call) -> Response:
    key, name = _deletion(call)

    def change(state: RepoState) -> RepoState:
        return replace(state, variables={other: row for other, row in state.variables.items() if other != name})

    return _variables(call.hub.store.update(key, change))


def set_secret(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    name, secret = _named_variable(call)

    def change(state: RepoState) -> RepoState:
        if name in state.variables:
            raise HubError(400, f"A variable is called {name} already")
        # Nothing here runs the Space, so the value would only be something to leak.
        return replace(state, secrets={**state.secrets, name: replace(secret, value="")})

    call.hub.store.update(key, change)
    return answer({})


def delete_secret(call: Call) -> Response:
    key, name = _deletion(call)

    def change(state: RepoState) -> RepoState:
        return replace(state, secrets={other: row for other, row in state.secrets.items() if other != name})

    call.hub.store.update(key, change)
    return answer({})


def runtime(call: Call) -> Response:
    key = call.key()
    state = call.visible(key)
    if state.space is None:
        raise HubError(400, f"{key.id} has no Space settings")
    files = call.hub.store.files(key, state.branches["main"])
    return answer(space_runtime(state.space, read_card(call.hub.store.objects(key), files), files))


def _variables(state: RepoState) -> Response:
    rows: dict[str, dict[str, str]] = {}
    for name, variable in state.variables.items():
        rows[name] = {"key": name, "value": variable.value, "updatedAt": variable.updated_at}
        if variable.description:
            rows[name]["description"] = variable.description
    return answer(rows)


def _named_variable(call: Call) -> tuple[str, Variable]:
    payload = call.json()
    name, value, description = payload.get("key"), payload.get("value"), payload.get("description")
    if not isinstance(name, str) or not name.replace("_", "a").isalnum() or not name.isascii() or name[0].isdigit():
        raise HubError(400, "key must be the name of an environment variable")
    if not isinstance(value, str) or not isinstance(description, str | None):
        raise HubError(400, "value and description must be strings")
    return name, Variable(value, description, now())


def _deletion(call: Call) -> tuple[RepoKey, str]:
    key = call.key()
    call.writable(key)
    name = call.json().get("key")
    if not isinstance(name, str):
        raise HubError(400, "key must be a string")
    return key, name
