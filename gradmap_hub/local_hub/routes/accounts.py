"""whoami; create, move, delete and configure repositories; validate cards."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..auth import Identity
from ..cards import SPACE_SDKS, validate_card
from ..context import Call, Hub, answer
from ..errors import Forbidden, HubError, InvalidName, RepoExists
from ..names import PLURALS, RepoKey, RepoType, parse_repo_id, repo_key
from ..plan import SPACE_HARDWARE, check_plan
from ..routing import RouteMaker
from ..store import RepoState, SpaceSettings, Variable, now


def routes(hub: Hub) -> list[Route]:
    make = RouteMaker(hub)
    found = [
        make.route("whoami", "/api/whoami-v2", whoami),
        make.route("repo-create", "/api/repos/create", create_repo, "POST"),
        make.route("repo-delete", "/api/repos/delete", delete_repo, "DELETE"),
        make.route("repo-move", "/api/repos/move", move_repo, "POST"),
        make.route("validate-yaml", "/api/validate-yaml", validate_yaml, "POST"),
    ]
    for repo_type, plural in PLURALS.items():
        make = RouteMaker(hub, repo_type)
        address = f"/api/{plural}/{{namespace}}/{{name}}"
        found += [
            make.route("repo-settings", f"{address}/settings", update_settings, "PUT"),
            make.route("auth-check", f"{address}/auth-check", auth_check),
        ]
    return found


def whoami(call: Call) -> Response:
    user = call.user()
    return answer(
        {
            "type": "user",
            "id": user.internal_id,
            "name": user.name,
            "fullname": user.name,
            "email": f"{user.name}@users.noreply.localhost",
            "emailVerified": True,
            "canPay": call.hub.plan_of(user.name) == "pro",
            "isPro": call.hub.plan_of(user.name) == "pro",
            "avatarUrl": "",
            "orgs": [
                {
                    "type": "org",
                    "id": call.hub.accounts.org_id(org),
                    "name": org,
                    "fullname": org,
                    "isEnterprise": call.hub.plan_of(org) in ("pro", "team"),
                    "canPay": False,
                    "avatarUrl": "",
                    "roleInOrg": "write",
                }
                for org in user.orgs
            ],
            "auth": {"type": "access_token", "accessToken": _token(user)},
        }
    )


def _token(user: Identity) -> dict[str, Any]:
    token: dict[str, Any] = {
        "displayName": "local",
        "role": user.token_role,
        "createdAt": user.token_created_at,
    }
    if user.token_role == "fineGrained":
        scoped = [scope.to_json() for scope in user.scopes]
        token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
    return token


def create_repo(call: Call) -> Response:
    user = call.user()
    payload = call.json()
    key = _named_repo(call, payload)
    if not user.can_create(key.namespace):
        raise Forbidden
    url = f"{call.base_url}/{key.address}"
    store = call.hub.store
    # Checked before the plan: an existing Space must give 409, not 402.
    if store.exists(key):
        raise _exists(key, url)
    space = _space_settings(payload) if key.type == "space" else None
    if space is not None:
        check_plan(call.hub, key, space)
    try:
        state = store.create(key, user.name, _is_private(payload), space)
    except RepoExists:
        raise _exists(key, url) from None
    variables = _variables(payload.get("variables"))
    # The values of secrets are not stored: nothing here uses them.
    secrets = {name: replace(item, value="") for name, item in _variables(payload.get("secrets")).items()}
    if variables or secrets:
        state = store.update(key, lambda old: replace(old, variables=variables, secrets=secrets))
    return answer({"url": url, "name": key.id, "id": state.internal_id})


def delete_repo(call: Call) -> Response:
    call.user()
    key = _named_repo(call, call.json())
    call.writable(key)
    call.hub.store.delete(key)
    return PlainTextResponse("OK")


def move_repo(call: Call) -> Response:
    payload = call.json()
    ids, repo_type = (payload.get("fromRepo"), payload.get("toRepo")), _repo_type(payload.get("type"))
    if not all(isinstance(repo_id, str) for repo_id in ids):
        raise HubError(400, "fromRepo and toRepo must be strings")
    key, new = (parse_repo_id(str(repo_id), repo_type) for repo_id in ids)
    user = call.writable(key)
    if not user.can_create(new.namespace):
        raise Forbidden
    call.hub.store.move(key, new)
    return PlainTextResponse("OK")


def update_settings(call: Call) -> Response:
    key = call.key()
    call.writable(key)
    payload = call.json()
    changes: dict[str, Any] = {}
    if "gated" in payload:
        # 0 equals False, but would be stored as a mode.
        if payload["gated"] is not False and payload["gated"] not in ("auto", "manual"):
            raise HubError(400, "gated must be 'auto', 'manual' or false")
        changes["gated"] = payload["gated"]
    if "private" in payload or "visibility" in payload:
        changes["private"] = _is_private(payload)

    def change(state: RepoState) -> RepoState:
        return replace(state, **changes)

    state = call.hub.store.update(key, change)
    return answer({"private": state.private, "gated": state.gated})


def auth_check(call: Call) -> Response:
    key = call.key()
    call.readable(key)
    return PlainTextResponse("OK")


def validate_yaml(call: Call) -> Response:
    payload = call.json()
    content = payload.get("content")
    if not isinstance(content, str):
        raise HubError(400, "content must be a string")
    found = validate_card(content, _repo_type(payload.get("repoType")))
    body = {
        "errors": [{"message": text} for text in found.errors],
        "warnings": [{"message": text} for text in found.warnings],
    }
    if found.errors:
        raise HubError(400, "Invalid metadata in README.md", body=body)
    return answer(body)


def _named_repo(call: Call, payload: Mapping[str, Any]) -> RepoKey:
    name, owner = payload.get("name"), payload.get("organization") or call.user().name
    if not isinstance(name, str) or not isinstance(owner, str):
        raise HubError(400, "name and organization must be strings")
    return repo_key(owner, name, _repo_type(payload.get("type")))


def _repo_type(value: object) -> RepoType:
    # For models, clients omit the type or send null.
    if value in (None, "model"):
        return "model"
    if value == "dataset":
        return "dataset"
    if value == "space":
        return "space"
    raise InvalidName(f"Unknown repository type {value!r}")


def _is_private(payload: Mapping[str, Any]) -> bool:
    if "visibility" in payload:  # huggingface_hub 1.x
        return payload["visibility"] != "public"
    private: object = payload.get("private")
    if private is not None and not isinstance(private, bool):
        raise HubError(400, "private must be true or false")
    return bool(private)


def _space_settings(payload: Mapping[str, Any]) -> SpaceSettings:
    if payload.get("sdk") not in SPACE_SDKS:
        raise HubError(400, f"sdk must be one of {', '.join(SPACE_SDKS)}")
    if payload.get("hardware") not in (None, *SPACE_HARDWARE):
        raise HubError(400, f"hardware must be one of {', '.join(SPACE_HARDWARE)}")
    storage, sleep_time = payload.get("storageTier"), payload.get("sleepTimeSeconds")
    if not isinstance(storage, str | None) or not isinstance(sleep_time, int | None):
        raise HubError(400, "storageTier must be a string and sleepTimeSeconds a number")
    return SpaceSettings(
        sdk=payload["sdk"],
        hardware=payload.get("hardware"),
        storage=storage,
        sleep_time=sleep_time,
    )


def _variables(rows: object) -> dict[str, Variable]:
    found: dict[str, Variable] = {}
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not isinstance(row.get("value"), str):
            raise HubError(400, "variables and secrets must be objects with a key and a value")
        if not isinstance(row.get("description"), str | None):
            raise HubError(400, "The description of a variable must be a string")
        found[row["key"]] = Variable(row["value"], row.get("description"), now())
    return found


def _exists(key: RepoKey, url: str) -> HubError:
    # With exist_ok, the client reads the URL from the error.
    return HubError(409, f"You already created this {key.type} repo: {key.id}", body={"url": url})
