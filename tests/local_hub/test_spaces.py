"""The life of a Space: built, started, paused, and what it may cost."""

from collections.abc import Callable

import pytest
import requests
from huggingface_hub import HfApi, SpaceHardware
from huggingface_hub.errors import HfHubHTTPError

from gradmap_hub.local_hub import LocalHub


@pytest.fixture
def app(ada: HfApi) -> str:
    ada.create_repo("ada/app", repo_type="space", space_sdk="gradio", space_hardware=SpaceHardware.ZERO_A10G)
    push(ada, "pass")
    return "ada/app"


def push(api: HfApi, source: str) -> None:
    api.upload_file(path_or_fileobj=source.encode(), path_in_repo="app.py", repo_id="ada/app", repo_type="space")


def stages(api: HfApi, count: int) -> list[str]:
    return [str(api.get_space_runtime("ada/app").stage) for _ in range(count)]


def status_of(error: HfHubHTTPError) -> int:
    assert error.response is not None
    return error.response.status_code


def test_build(hub: LocalHub, ada: HfApi, app: str) -> None:
    first = ada.get_space_runtime(app)
    assert first.stage == "BUILDING" and first.hardware is None and first.requested_hardware == "zero-a10g"
    assert stages(ada, 3) == ["APP_STARTING", "RUNNING", "RUNNING"]
    assert ada.get_space_runtime(app).hardware == "zero-a10g"
    info = ada.space_info(app)
    assert info.runtime is not None and info.runtime.stage == "RUNNING"
    # Another commit, another build. Looking at the Space as a whole is not asking for its runtime.
    push(ada, "pass  # again")
    for _ in range(3):
        info = ada.space_info(app)
        assert info.runtime is not None and info.runtime.stage == "BUILDING"
    hub.set_space_build(app, polls=5)
    assert stages(ada, 7) == ["BUILDING"] * 3 + ["APP_STARTING"] * 2 + ["RUNNING"] * 2
    hub.set_space_build(app, polls=0)
    assert stages(ada, 1) == ["RUNNING"]
    with pytest.raises(ValueError, match="negative"):
        hub.set_space_build(app, polls=-1)


def test_failed_build(hub: LocalHub, ada: HfApi, app: str) -> None:
    hub.set_space_build(app, error="No matching distribution found for torch==9")
    assert stages(ada, 3) == ["BUILDING", "BUILDING", "BUILD_ERROR"]
    runtime = ada.get_space_runtime(app)
    assert runtime.raw["errorMessage"] == "No matching distribution found for torch==9" and runtime.hardware is None
    assert ada.restart_space(app).stage == "BUILDING"
    hub.set_space_build(app, polls=1)
    assert stages(ada, 2) == ["BUILDING", "RUNNING"]


def test_survives_a_restart_of_the_hub(hub: LocalHub, ada: HfApi, app: str) -> None:
    assert stages(ada, 2) == ["BUILDING", "APP_STARTING"]
    hub.stop()
    hub.start()
    again = HfApi(endpoint=hub.url, token=ada.token)
    assert stages(again, 1) == ["RUNNING"]


def test_pause_and_restart(ada: HfApi, bob: HfApi, app: str) -> None:
    stages(ada, 2)
    assert ada.pause_space(app).stage == "PAUSED"
    assert stages(ada, 2) == ["PAUSED", "PAUSED"]
    assert ada.restart_space(app).stage == "APP_STARTING"
    assert stages(ada, 2) == ["APP_STARTING", "RUNNING"]
    assert ada.restart_space(app, factory_reboot=True).stage == "BUILDING"
    for action in (bob.pause_space, bob.restart_space):
        with pytest.raises(HfHubHTTPError) as refused:
            action(app)
        assert status_of(refused.value) == 403


def test_hardware(ada: HfApi, app: str) -> None:
    stages(ada, 3)
    changed = ada.request_space_hardware(app, SpaceHardware.T4_SMALL, sleep_time=600)
    assert changed.requested_hardware == "t4-small" and changed.sleep_time == 600 and changed.stage == "APP_STARTING"
    assert ada.set_space_sleep_time(app, 900).sleep_time == 900
    with pytest.raises(HfHubHTTPError, match="flavor must be one of"):
        ada.request_space_hardware(app, "abacus")  # pyright: ignore[reportArgumentType]
    with pytest.raises(HfHubHTTPError, match="hardware must be one of"):
        ada.create_repo("ada/b", repo_type="space", space_sdk="gradio", space_hardware="abacus")  # pyright: ignore


def test_static_space_runs(ada: HfApi) -> None:
    ada.create_repo("ada/app", repo_type="space", space_sdk="static")
    assert stages(ada, 1) == ["NO_APP_FILE"]
    ada.upload_file(path_or_fileobj=b"<p>", path_in_repo="index.html", repo_id="ada/app", repo_type="space")
    assert stages(ada, 1) == ["RUNNING"]


def test_free_account(start_hub: Callable[..., LocalHub]) -> None:
    hub = start_hub(paid_plan=False)
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada", orgs=["acme"]))

    def create(name: str, **settings: object) -> int:
        try:
            api.create_repo(name, repo_type="space", **settings)  # pyright: ignore[reportArgumentType]
        except HfHubHTTPError as error:
            return status_of(error)
        return 200

    zero = {"space_sdk": "gradio", "space_hardware": "zero-a10g"}
    assert create("ada/plain", space_sdk="gradio") == 402
    assert create("ada/basic", space_sdk="gradio", space_hardware="cpu-basic") == 402
    assert create("ada/docker", space_sdk="docker", space_hardware="zero-a10g") == 402
    assert [create(f"ada/{name}", **zero) for name in "abc"] == [200, 200, 402]
    # Each account has its own two.
    assert create("acme/a", **zero) == 200
    with pytest.raises(HfHubHTTPError) as refused:
        api.request_space_hardware("ada/a", SpaceHardware.CPU_BASIC)
    assert status_of(refused.value) == 402
    api.request_space_hardware("ada/a", SpaceHardware.ZERO_A10G)
    api.delete_repo("ada/b", repo_type="space")
    assert create("ada/c", **zero) == 200


def test_secrets_are_named_but_never_shown(hub: LocalHub, ada: HfApi, bob: HfApi, app: str) -> None:
    ada.add_space_secret(app, "HF_TOKEN", "hush-hush", description="To read the model")
    url = f"{hub.url}/api/spaces/{app}/secrets"
    shown = requests.get(url, headers={"authorization": f"Bearer {ada.token}"})
    assert shown.json()["HF_TOKEN"]["description"] == "To read the model" and "hush" not in shown.text
    assert requests.get(url, headers={"authorization": f"Bearer {bob.token}"}).status_code == 403
    assert not any(b"hush" in file.read_bytes() for file in hub.root.rglob("*") if file.is_file())


def test_move(hub: LocalHub, ada: HfApi, app: str) -> None:
    head = ada.space_info(app).sha
    ada.add_space_variable(app, "A", "1")
    ada.move_repo(app, "acme/renamed", repo_type="space")
    assert not ada.repo_exists(app, repo_type="space")
    assert ada.space_info("acme/renamed").sha == head and ada.get_space_variables("acme/renamed")["A"].value == "1"
    ada.create_repo("ada/app", repo_type="space", space_sdk="static")
    for target, status in (("ada/app", 409), ("bob/app", 403)):
        with pytest.raises(HfHubHTTPError) as refused:
            ada.move_repo("acme/renamed", target, repo_type="space")
        assert status_of(refused.value) == status
    assert ada.space_info("acme/renamed").sha == head


def test_the_words_of_a_free_account(start_hub: Callable[..., LocalHub]) -> None:
    hub = start_hub(plans={"ada": "free", "eve": "young", "pat": "pro", "acme": "team"})
    zero = {"space_sdk": "gradio", "space_hardware": "zero-a10g"}
    words = (
        "Static Spaces are free for everyone, but hosting Gradio and Docker Spaces on free cpu-basic requires a PRO "
        "subscription. Subscribe at https://huggingface.co/pro"
    )
    for name, target, allowed in (
        ("ada", "ada", {"static", "zero"}), ("eve", "eve", {"static"}), ("pat", "pat", {"static", "zero", "gradio"}),
        ("ada", "acme", {"static", "zero", "gradio"}),
    ):  # fmt: skip
        api = HfApi(endpoint=hub.url, token=hub.add_user(name, orgs=["acme"]))
        me = api.whoami()
        assert (me["isPro"], me["orgs"][0]["isEnterprise"]) == (name == "pat", True)
        for kind, settings in (
            ("gradio", {"space_sdk": "gradio"}),
            ("static", {"space_sdk": "static"}),
            ("zero", zero),
        ):
            try:
                api.create_repo(f"{target}/{name}-{kind}", repo_type="space", **settings)  # pyright: ignore
                made = True
            except HfHubHTTPError as error:
                made = False
                assert status_of(error) == 402 and (kind == "zero" or words in str(error))
            assert made == (kind in allowed), (name, target, kind)


def test_the_site_of_a_static_space(hub: LocalHub, ada: HfApi) -> None:
    import httpx

    card = (
        b"---\nsdk: static\ncustom_headers:\n  cross-origin-embedder-policy: require-corp\n"
        b"  cross-origin-opener-policy: same-origin\n---\n"
    )
    ada.create_repo("ada/app", repo_type="space", space_sdk="static")
    for name, content in (
        ("README.md", card),
        ("index.html", b"<p>Hello"),
        ("js/a.mjs", b"1"),
        ("big.wasm", b"\0" * 9),
    ):
        ada.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="ada/app", repo_type="space")
    url = hub.static_url("ada/app")
    with httpx.Client(follow_redirects=True) as client:
        page = client.get(url.rstrip("/"))
        assert page.status_code == 200 and page.text == "<p>Hello" and page.headers["content-type"] == "text/html"
        assert page.headers["cross-origin-embedder-policy"] == "require-corp"
        assert "content-security-policy" not in page.headers
        assert client.get(url + "js/a.mjs").headers["content-type"] == "text/javascript"
        assert client.get(url + "big.wasm").headers["content-type"] == "application/wasm"
        assert client.get(url + "missing.js").status_code == 404
        assert client.get(url, headers={"authorization": f"Bearer {ada.token}"}).status_code == 400  # another origin
        # Not where the API is, and not for pages of other sites.
        assert client.get(url.replace(str(hub.cdn_url), hub.url)).status_code == 404
        address = f"{hub.url}/spaces/ada/app/resolve/main/index.html"
        for origin, answer in ((str(hub.cdn_url), str(hub.cdn_url)), ("https://evil.example", None)):
            found = client.get(address, headers={"origin": origin})
            assert found.headers.get("access-control-allow-origin") == answer
        hub.set_private("ada/app", True, "space")
        assert client.get(url).status_code == 404
        ada.create_repo("ada/other", repo_type="space", space_sdk="gradio")
        assert client.get(hub.static_url("ada/other")).status_code == 404
    with pytest.raises((HfHubHTTPError, ValueError), match="custom_headers"):
        bad = card.replace(b"cross-origin-opener-policy", b"set-cookie")
        ada.upload_file(path_or_fileobj=bad, path_in_repo="README.md", repo_id="ada/app", repo_type="space")
