"""Spaces: variables, secrets, runtime, and the owner's control over the runtime."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from starlette.responses import Response
from starlette.routing import Route

from ..context import Call, Hub, answer
from ..errors import HubError
from ..metadata import read_card, space_runtime
from ..names import RepoKey
from ..plan import SPACE_HARDWARE, check_plan
from ..routing import RouteMaker
from ..spacebuild import SpaceBuild
from ..store import RepoState, SpaceSettings, Variable, now


def routes(hub: Hub) -> list[Route]:
    make = RouteMaker(hub, "space")
    address = "/api/spaces/{namespace}/{name}"
    return [
        make.route("space-variables", f"{address}/variables", get_variables),
        make.route("space-variables", f"{address}/variables", set_variable, "POST"),
        make.route("space-variables", f"{address}/variables", delete_variable, "DELETE"),
        make.route("space-secrets", f"{address}/secrets", get_secrets),
        make.route("space-secrets", f"{address}/secrets", set_secret, "POST"),
        make.route("space-secrets", f"{address}/secrets", delete_secret, "DELETE"),
        make.route("space-runtime", f"{address}/runtime", runtime),
        make.route("space-restart", f"{address}/restart", restart, "POST"),
        make.route("space-pause", f"{address}/pause", pause, "POST"),
        make.route("space-hardware", f"{address}/hardware", request_hardware, "POST"),
        make.route("space-sleeptime", f"{address}/sleeptime", set_sleep_time, "POST"),
    ]


def get_variables(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    return _variables(call.hub.store.state(key).variables)


def set_variable(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    name, variable = _named_variable(call)

    def change(state: RepoState) -> RepoState:
        if name in state.secrets:
            raise HubError(400, f"A secret named {name} already exists")
        return replace(state, variables={**state.variables, name: variable})

    return _variables(call.hub.store.update(key, change).variables)


def delete_variable(call: Call) -> Response:
    key, name = _deletion(call)

    def change(state: RepoState) -> RepoState:
        return replace(state, variables={other: row for other, row in state.variables.items() if other != name})

    return _variables(call.hub.store.update(key, change).variables)


def get_secrets(call: Call) -> Response:
    """The names of the secrets; their values are never returned."""
    key = call.key()
    call.writable(key)
    return answer({name: _row(name, secret) for name, secret in call.hub.store.state(key).secrets.items()})


def set_secret(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    name, secret = _named_variable(call)

    def change(state: RepoState) -> RepoState:
        if name in state.variables:
            raise HubError(400, f"A variable named {name} already exists")
        # Nothing runs the Space, so the value is not needed and could only leak.
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
    call.visible(key)
    found = _runtime(call, key)
    # The response shows the current stage; the build advances afterwards.
    _change_build(call, key, SpaceBuild.polled)
    return found


def restart(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    rebuild = call.http.query_params.get("factory", "").lower() in ("1", "true")
    _change_build(call, key, lambda build: build.restarted(rebuild))
    return _runtime(call, key)


def pause(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    _change_build(call, key, lambda build: replace(build, paused=True))
    return _runtime(call, key)


def request_hardware(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    payload = call.json()
    flavor, sleep_time = payload.get("flavor"), payload.get("sleepTimeSeconds")
    if flavor not in SPACE_HARDWARE:
        raise HubError(400, f"flavor must be one of {', '.join(SPACE_HARDWARE)}")
    settings = replace(_settings(call, key), hardware=flavor)
    if sleep_time is not None:
        settings = replace(settings, sleep_time=_seconds(sleep_time))
    check_plan(call.hub, key, settings)
    call.hub.store.update(key, lambda state: replace(state, space=settings))
    _change_build(call, key, lambda build: build.restarted(rebuild=False))
    return _runtime(call, key)


def set_sleep_time(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    settings = replace(_settings(call, key), sleep_time=_seconds(call.json().get("seconds")))
    call.hub.store.update(key, lambda state: replace(state, space=settings))
    return _runtime(call, key)


def _runtime(call: Call, key: RepoKey) -> Response:
    _settings(call, key)
    state = call.hub.store.state(key)
    files = call.hub.store.files(key, state.branches["main"])
    return answer(space_runtime(state, read_card(call.hub.store.objects(key), files), files))


def _change_build(call: Call, key: RepoKey, change: Callable[[SpaceBuild], SpaceBuild]) -> None:
    def changed(state: RepoState) -> RepoState:
        return replace(state, build=change(state.build.of(state.branches["main"])))

    # Repeated polling must not cause repeated writes.
    state = call.hub.store.state(key)
    if changed(state) != state:
        call.hub.store.update(key, changed)


def _settings(call: Call, key: RepoKey) -> SpaceSettings:
    settings = call.hub.store.state(key).space
    if settings is None:
        raise HubError(400, f"{key.id} has no Space settings")
    return settings


def _seconds(value: object) -> int:
    # -1 means never.
    if not isinstance(value, int) or value < -1:
        raise HubError(400, "The sleep time must be a number of seconds")
    return value


def _variables(variables: Mapping[str, Variable]) -> Response:
    return answer({name: {**_row(name, variable), "value": variable.value} for name, variable in variables.items()})


def _row(name: str, variable: Variable) -> dict[str, str]:
    """The fields that variables and secrets have in common."""
    row = {"key": name, "updatedAt": variable.updated_at}
    return {**row, "description": variable.description} if variable.description else row


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
