"""The app as a program: started in a deployed folder, asked over HTTP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PROMPT = "What is the capital of France?"
JINJA_TEMPLATE = Path(__file__).resolve().parents[2] / "spaces" / "README.md.jinja"


@pytest.fixture(scope="module")
def client(running: Any) -> Any:
    from gradio_client import Client

    return Client(running.url, verbose=False)


def test_health_answers(running: Any) -> None:
    assert running.health() == {
        "status": "ok", "state": "ready", "message": "Both models are loaded.", "precision": "int8",
        "running": 0, "waiting": 0,
    }  # fmt: skip


def test_only_the_two_api_names_are_public(client: Any) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert set(endpoints["named_endpoints"]) == {"/compare", "/status"}
    assert endpoints["unnamed_endpoints"] == {}
    ready = {"state": "ready", "message": "Both models are loaded.", "precision": "int8"}
    assert client.predict(api_name="/status") == ready


def test_the_api_says_what_each_parameter_is(client: Any) -> None:
    """MCP clients read the same words."""
    endpoint = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/compare"]
    names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
    assert names == ["prompt", "max_new_tokens", "temperature", "seed", "precision"]


def test_compare_returns_both_answers(client: Any) -> None:
    answer = client.predict(PROMPT, max_new_tokens=12, api_name="/compare")
    assert set(answer) == {"original", "pruned", "speed_ratio", "precision"}
    assert answer["precision"] == "int8"
    for side in ("original", "pruned"):
        assert set(answer[side]) == {
            "text", "tokens", "seconds_per_token", "first_token_seconds", "finish_reason",
        }  # fmt: skip
        assert answer[side]["finish_reason"] in ("stop", "length")
        assert 0 <= answer[side]["tokens"] <= 12
    again = client.predict(PROMPT, max_new_tokens=12, api_name="/compare")
    assert [again[side]["text"] for side in ("original", "pruned")] == [
        answer[side]["text"] for side in ("original", "pruned")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "  "}, "Type a prompt first"),
        ({"prompt": "x" * 4001}, "4,001 characters"),
        ({"prompt": PROMPT, "max_new_tokens": 1000}, "max_new_tokens must be from 1 to 256"),
        ({"prompt": PROMPT, "precision": "int2"}, "precision must be one of: int8, float32"),
    ],
)
def test_what_cannot_be_answered_is_said_in_words(client: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        client.predict(**arguments, api_name="/compare")


def test_both_models_change_their_precision_together(client: Any, running: Any) -> None:
    answers = {}
    for precision in ("float32", "int8", "float32", ""):
        answer = client.predict(PROMPT, max_new_tokens=24, precision=precision, api_name="/compare")
        assert answer["precision"] == running.health()["precision"] == (precision or "int8")
        texts = [answer[side]["text"] for side in ("original", "pruned")]
        assert answers.setdefault(answer["precision"], texts) == texts  # what is loaded anew is the same model


def test_two_calls_at_once_are_served_in_turn(running: Any) -> None:
    from gradio_client import Client

    clients = [Client(running.url, verbose=False) for _ in range(2)]
    jobs = [
        client.submit(PROMPT, max_new_tokens=length, api_name="/compare") for client in clients for length in (200, 150)
    ]
    most = 0
    while not all(job.done() for job in jobs):
        most = max(most, running.health()["running"])
    lengths = [job.result()["original"]["tokens"] for job in jobs]
    assert most == 1 and lengths[:2] == lengths[2:] and min(lengths) > 0
    assert running.health()["running"] == 0


def test_the_page_asks_no_other_host(running: Any) -> None:
    import urllib.request

    with urllib.request.urlopen(running.url, timeout=10) as answer:
        page = answer.read().decode()
    assert "fonts.googleapis" not in page
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"https?://(?!127\.0\.0\.1)[^\"]+fonts", page)


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """The status and the text of an answer; a POST if there is a body."""
    import http.client

    address = url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"Host": address, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def test_it_takes_no_files(running: Any) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    for path in ("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/upload?upload_id=a"):
        status, text = ask(running.url, path, form, **{"Content-Type": "multipart/form-data; boundary=x"})
        assert (status, text) == (403, "This app takes no files."), path


def test_a_large_request_is_refused(running: Any) -> None:
    json_type = {"Content-Type": "application/json"}
    large = b'{"data": ["' + b"a" * 1_000_000 + b'"]}'
    assert ask(running.url, "/gradio_api/call/compare", large, **json_type)[0] == 413
    # In chunks of unknown number, as a generator is sent.
    parts = (large[start : start + 50_000] for start in range(0, len(large), 50_000))
    assert ask(running.url, "/gradio_api/call/compare", parts, **json_type)[0] == 413


def test_another_name_of_this_machine_is_not_answered(running: Any, kit: SimpleNamespace) -> None:
    port = running.url.rpartition(":")[2]
    for host, status in (
        (f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("LOCALHOST", 200), (f"[::1]:{port}", 200),
        (f"evil.example:{port}", 421), ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("", 421),
    ):  # fmt: skip
        assert ask(running.url, "/health", Host=host)[0] == status, host
    assert kit.load_module("door").Door(None)._hosts is None  # on Spaces, the proxy has checked it


@pytest.mark.slow
def test_missing_models_are_an_error_state_and_it_still_ends_cleanly(
    kit: SimpleNamespace, pair: Any, tmp_path: Path
) -> None:
    from gradio_client import Client

    app = kit.start_app(kit.deploy(tmp_path / "app", pair))
    try:
        health = app.wait_until(lambda health: health["state"] != "loading")
        assert health["state"] == "error"
        assert "PRUNED_MODEL" in health["message"]
        client = Client(app.url, verbose=False)
        assert client.predict(api_name="/status")["state"] == "error"
        with pytest.raises(Exception, match="pruned model could not be loaded"):
            client.predict(PROMPT, api_name="/compare")
    finally:
        assert kit.stop_app(app) == 0


def test_it_can_be_stopped_while_it_loads(kit: SimpleNamespace, pair: Any, tmp_path: Path) -> None:
    app = kit.start_app(kit.deploy(tmp_path / "app", pair), PRUNED_MODEL=str(pair.pruned_onnx))
    app.wait_until(lambda health: True)
    assert kit.stop_app(app) == 0
    assert "terminate called" not in app.log.read_text(encoding="utf-8")


# The following ask the loader directly, which is quicker than a program each.


def loader(kit: SimpleNamespace, folder: Path, **changes: Any) -> Any:
    loading = kit.load_module("loading")
    read_facts = kit.load_module("compare").read_facts
    (folder / "compare.json").write_text(json.dumps(kit.facts(**changes)), encoding="utf-8")
    return loading.Loader(read_facts(folder / "compare.json"), folder)


def hub_answers(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, folder: Path, error: Exception) -> str:
    """What the page says when the download of the original ends with this error."""

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(kit.load_module("loading"), "snapshot_download", refuse)
    monkeypatch.setenv("ORIGINAL_MODEL", "someone/closed")
    # The engine is imported by name, as in a Space; in the tests it is there by its path.
    kit.load_module("onnx_engine")
    subject = loader(kit, folder)
    subject.start()
    assert subject.close(20)
    assert subject.status.state == "error"
    return subject.status.message


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("GatedRepoError", 403, "gated.*HF_TOKEN"),
        ("RepositoryNotFoundError", 401, "private.*HF_TOKEN"),
        ("HfHubHTTPError", 403, "refused.*HF_TOKEN"),
        ("HfHubHTTPError", 500, "answered 500"),
    ],
)
def test_refusals_of_the_hub_name_the_token(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, code: int, words: str
) -> None:
    from huggingface_hub import errors

    response: Any = SimpleNamespace(status_code=code, headers={}, request=None)
    error = getattr(errors, kind)("no", response=response)
    assert re.search(words, hub_answers(kit, monkeypatch, tmp_path, error))


def test_no_connection_is_said(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert "cannot be reached" in hub_answers(kit, monkeypatch, tmp_path, LocalEntryNotFoundError("no"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 1}, "schema version 1"),
        ({"precision": "float16"}, "starts with the precision 'float16'"),
        ({"precisions": []}, "does not list"),
        ({"runtime": "pickle"}, "runtime"),
        ({"layers": {}}, "lacks the key"),
        ({"precisions": [{"name": "int8"}]}, "names no file for int8.*gradmap-hub space FOLDER"),
        ({"bytes": {"original": "many", "pruned": 1}}, "`original` must be an integer, 0 or more; got 'many'"),
        ({"bytes": {"original": -1, "pruned": 1}}, "`original` must be an integer, 0 or more; got -1"),
        ({"bytes": {"original": 10**400, "pruned": 1}}, "`original` must be an integer, 0 or more; got a int"),
        ({"bytes": {"original": float("inf"), "pruned": 1}}, "`original` must be an integer, 0 or more; got inf"),
        ({"title": 5}, "`title` must be a string; got 5"),
        ({"title": "\ud800"}, r"`title` must be a string; got '\\ud800'"),
        ({"title": ["\x1b[31m"]}, "`title` must be a string; got a list"),
        ({"original": {"name": "a", "repo_id": 7}}, "`repo_id` must be a string; got 7"),
        ({"pruned": None}, "cannot be read"),
        ({"license": {}}, "`license` must be a string; got a dict"),
        ({"examples": "one"}, "`examples` must be a list; got 'one'"),
        ({"examples": [1]}, "`examples` must be a string; got 1"),
        ({"perplexity": [{"text": "a", "tokens": 1, "original": 0.0}]}, "`original` must be a number above 0; got 0.0"),
        ({"perplexity": [{"text": "a", "tokens": 1, "original": float("nan")}]}, "`original` must be a number above 0"),
        ({"healed": {"tokens": "x"}}, "`tokens` must be an integer, 0 or more; got 'x'"),
        ({"healed": 3}, "cannot be read"),
        ({"compensation": {"matrices": -1}}, "`matrices` must be an integer, 0 or more"),
        (
            {"precisions": [{"name": "int8", "file": "a.onnx", "original": {"stored": "hub", "path": "../x"}}]},
            "must stay within its folder; got '../x'",
        ),
        (
            {"precisions": [{"name": "int8", "file": "../a.onnx", "original": {"stored": "hub"}}]},
            "file name without a folder; got '../a.onnx'",
        ),
    ],
)
def test_an_unusable_compare_json_is_said(
    kit: SimpleNamespace, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    compare = kit.load_module("compare")
    with pytest.raises(compare.FactsError, match=words):
        loader(kit, tmp_path, **change)


def test_a_compare_json_that_is_nested_too_deeply(kit: SimpleNamespace, tmp_path: Path) -> None:
    compare = kit.load_module("compare")
    (tmp_path / "compare.json").write_text("[" * 10_000 + "]" * 10_000, encoding="utf-8")
    with pytest.raises(compare.FactsError, match="nested too deeply"):
        compare.read_facts(tmp_path / "compare.json")


def test_answers_and_names_are_escaped(kit: SimpleNamespace, tmp_path: Path) -> None:
    render = kit.load_module("render")
    facts = loader(kit, tmp_path, title="<script>alert(1)</script>")._facts
    generation = SimpleNamespace(
        text="<b>bold</b>", seconds=[0.1], token_ids=[1], seconds_per_token=None, first_token_seconds=0.1
    )
    assert "<script>" not in render.header(facts)
    card = render.card("<i>name</i>", "Original", "done", generation)
    assert "<b>bold</b>" not in card
    hostile = kit.facts()["precisions"]
    hostile[0]["pruned"]["quality"]["text"] = "<u>text</u>"
    assert "<u>" not in render.method(loader(kit, tmp_path, precisions=hostile)._facts)
    assert "<i>name" not in card


def test_figures_read_well(kit: SimpleNamespace, tmp_path: Path) -> None:
    render = kit.load_module("render")
    assert (render.count(134_515_008), render.count(1_235_000_000)) == ("135M", "1.24B")
    assert (render.size(538_000_000), render.size(2_470_000_000)) == ("538 MB", "2.47 GB")
    assert render.change(100, 82) == "\N{MINUS SIGN}18%"
    assert render.ranges([14, 15, 16, 20]) == "14\N{EN DASH}16, 20"
    tiles = render.tiles(loader(kit, tmp_path)._facts)
    assert "1 of 3 layers removed, one weight matrix corrected, no retraining." in tiles
    assert render.precisions(loader(kit, tmp_path)._facts) == [
        ("int8 (170 \N{RIGHTWARDS ARROW} 130 kB)", "int8"),
        ("float32 (600 \N{RIGHTWARDS ARROW} 440 kB)", "float32"),
    ]
    assert "+0.4%" in render.method(loader(kit, tmp_path)._facts)
    assert "trained on" not in render.header(loader(kit, tmp_path)._facts)
    healed = loader(kit, tmp_path, healed={"tokens": 500_000, "seconds": 1290.0})._facts
    assert "The pruned one was trained on 500,000 tokens" in render.header(healed)
    assert "healed on 500,000 tokens." in render.tiles(healed) and "no retraining" not in render.tiles(healed)
    plain = render.tiles(loader(kit, tmp_path, compensation={"applied": False}, perplexity=[])._facts)
    assert "1 of 3 layers removed, no retraining." in plain


@pytest.mark.parametrize("runtime", ["onnx", "transformers"])
def test_the_card_has_the_front_matter_that_spaces_need(runtime: str) -> None:
    import jinja2
    import yaml

    from gradmap_hub.units import markdown

    environment = jinja2.Environment()
    environment.filters["markdown"] = markdown
    text = environment.from_string(JINJA_TEMPLATE.read_text(encoding="utf-8")).render(
        title='Tiny: "lighter"', short_description="Original and pruned, side by side",
        license=None if runtime == "transformers" else "apache-2.0", models=["a/b", "c/d"],
        sdk_version="6.17.3", python_version="3.11", name_original="a/b", name_pruned="c/d",
        layers_before=3, layers_after=2, runtime=runtime, precisions=["int8", "float32"], stored=["int8"],
        healed=runtime == "onnx",
    )  # fmt: skip
    front = yaml.safe_load(text.split("---")[1])
    assert front["title"] == 'Tiny: "lighter"'
    assert (front["sdk"], front["sdk_version"], front["app_file"]) == ("gradio", "6.17.3", "app.py")
    assert front["models"] == ["a/b", "c/d"]
    assert front["emoji"]
    assert ("license" in front) == (runtime == "onnx")
    assert ("HF_TOKEN" in text) == (runtime == "transformers")
    assert ("without retraining" in text) == (runtime == "transformers")


def test_events_that_are_over_are_forgotten(kit: SimpleNamespace) -> None:
    """Gradio's own dictionary keeps all of them, each with its request."""
    open_ids: dict[str, set[str]] = {"a": {"0"}, "b": {"1", "2"}}
    events = kit.load_module("app").OpenEvents(open_ids)
    for number in range(1000):
        open_ids["c"] = {str(number)}
        events[str(number)] = object()
        assert {"0", str(number)} <= events.keys() and len(events) <= events.ROOM + 1
    open_ids.clear()
    events["last"] = object()
    for number in range(events.ROOM):
        events[f"next {number}"] = object()
    assert "0" not in events
