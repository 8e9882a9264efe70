"""Whatever one repository contains, the lists of all repositories answer, and soon."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from gradmap_hub.local_hub import LocalHub
from gradmap_hub.local_hub.cards import parse_front_matter, validate_card


def tensors(header: bytes | Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def shaped(*sizes: Any) -> bytes:
    return tensors({"weight": {"dtype": "F32", "shape": sizes, "data_offsets": [0, 4]}})


def card(lines: str) -> bytes:
    return f"---\n{lines}\n---\n# A card\n".encode()


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "cut short": b"\x05\x00",
    "longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "deep": tensors(b"[" * 200_000 + b"]" * 200_000),
    "deep in a tensor": tensors(b'{"a":{"dtype":"F32","shape":' + b"[" * 900 + b"]" * 900 + b"}}"),
    "Infinity": tensors(b'{"a":{"dtype":"F32","shape":[Infinity]}}'),
    "a number beyond floats": tensors(b'{"a":{"dtype":"F32","shape":[1e999]}}'),
    "digits without end": tensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
    "a large product": shaped(*[2**62] * 60),
    "many dimensions": shaped(*[10**18] * 200_000),
    "negative": shaped(-1),
    "a float": shaped(1.5),
    "true": shaped(True),
    "text": shaped("8"),
    "a dtype that is a list": tensors({"a": {"dtype": ["F32"], "shape": [1]}}),
    "half a surrogate pair": tensors(b'{"a":{"dtype":"\\ud800","shape":[1]}}'),
    "a list": tensors([1]),
    "not UTF-8": tensors(b'{"\xff": 1}'),
    "huge": tensors(b"[" + b"1," * 6_000_000 + b"1]"),
}
CARDS: dict[str, bytes] = {
    "megabytes": card("\n".join(f"- {{name: {number}, value: [1, 2, 3]}}" for number in range(100_000))),
    "line breaks without end": b"---\n" + b"\n" * 1_000_000,
    "deep": card("a: " + "[" * 5000 + "]" * 5000),
    "half a surrogate pair": card('license: "\\uD800"\ntags: ["\\uDFFF"]'),
    "Infinity": card("model-index: .inf"),
    "a date beyond the calendar": card("a: 2024-13-41"),
    "an integer of nothing": card("a: !!int ''"),
    "a truth of nothing": card("a: !!bool maybe"),
    "a time of nothing": card("a: !!timestamp noon"),
    "expanding": card("a: &a [x, x]\n" + "\n".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]"
                                                    for n in range(24))),
    "lists where texts belong": card("sdk: [gradio]\napp_file: {a: b}\nlibrary_name: [x]\npipeline_tag: {}\ntags: 5"),
}  # fmt: skip
CONFIGS: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep in a name": b'{"architectures": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a number beyond floats": b'{"architectures": [1e999], "model_type": 1e999}',
    "Infinity": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "limit": Infinity}',
    "half a surrogate pair": b'{"model_type": "\\ud800"}',
    "huge": b'{"model_type": "' + b"x" * 12_000_000 + b'"}',
}
CASES = {
    f"{name}: {case}": (name, content)
    for name, cases in (("model.safetensors", HEADERS), ("README.md", CARDS), ("config.json", CONFIGS))
    for case, content in cases.items()
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with LocalHub(tmp_path_factory.mktemp("hostile") / "hub", cdn_port=None) as running:
        yield running


@pytest.mark.parametrize("case", CASES)
def test_lists_and_pages_go_on(hub: LocalHub, tmp_path: Path, case: str) -> None:
    name, content = CASES[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "app.py").write_text("")
    began = time.process_time()
    for kind, plural in (("model", "models"), ("space", "spaces")):
        hub.seed("eve/hostile", tmp_path, kind)  # pyright: ignore[reportArgumentType]
        rows = requests.get(f"{hub.url}/api/{plural}?full=true")
        assert rows.status_code == 200 and [row["id"] for row in rows.json()] == ["eve/hostile"], rows.text[:300]
        prefix = "" if kind == "model" else "spaces/"
        paths = (f"api/{plural}/eve/hostile", f"{prefix}eve/hostile", f"{prefix}eve/hostile/blob/main/{name}")
        for path in (*paths, *(["api/spaces/eve/hostile/runtime"] if kind == "space" else [])):
            assert requests.get(f"{hub.url}/{path}").status_code == 200, path
    assert time.process_time() - began < 8  # seconds of the processor; without limits a minute and more


def test_what_is_sound_is_still_read(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(shaped(3, 4))
    (tmp_path / "config.json").write_bytes(CONFIGS["Infinity"])
    (tmp_path / "README.md").write_bytes(card("license: mit\ndate: 2024-01-01"))
    hub.seed("eve/sound", tmp_path)
    row = requests.get(f"{hub.url}/api/models/eve/sound").json()
    assert row["safetensors"] == {"parameters": {"F32": 12}, "total": 12}
    assert row["config"] == {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert row["cardData"] == {"license": "mit", "date": "2024-01-01"} and "license:mit" in row["tags"]


@pytest.mark.parametrize("case", CARDS)
def test_hostile_cards_are_refused_in_one_line(case: str) -> None:
    found = validate_card(CARDS[case].decode(), "model")
    if case == "line breaks without end":  # no last line: all of it is text
        assert found.warnings and not found.errors
        return
    assert found.errors and len(found.errors[0]) < 5000


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("---\na: 1\n---\n", {"a": 1}),
        ("---\na: 1\n---", {"a": 1}),
        ("\n  ---\r\na: 1\r\nb: 2\r\n---\r\ntext", {"a": 1, "b": 2}),
        ("---\n\n---\n", None),
        ("---\n---\n", None),
        ("---\na: 1\n----\nb: 2\n---\n", ValueError),
        ("---\na: 1\n", None),
        ("# Title\n---\na: 1\n---\n", None),
    ],
)
def test_front_matter(text: str, data: Any) -> None:
    if data is ValueError:
        with pytest.raises(ValueError):
            parse_front_matter(text)
    else:
        assert parse_front_matter(text) == data
