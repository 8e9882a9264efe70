"""Tokenizers of somebody else: tried with limits before they are loaded, and written in the form the runtime reads."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.errors import SourceError
from gradmap_hub.hub.target import is_ours
from gradmap_hub.layout import TEMPLATES_FOLDER, extra_templates, folder_sizes, is_companion
from gradmap_hub.models import tokenizer_worker
from gradmap_hub.models.checkpoint import copy_companions
from gradmap_hub.models.safetensors_files import choose_files, readable
from gradmap_hub.models.tokenizer import load_tokenizer, write_tokenizer
from gradmap_hub.models.tokenizer_trial import failures_named, try_tokenizer
from gradmap_hub.models.tokenizer_worker import PROBE
from gradmap_hub.models.transformers_compat import has_5

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="session")
def good(tokenizer: Any) -> dict[str, Any]:
    """The content of a valid tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def with_(**fields: Any) -> Change:
    return lambda content: {**content, **fields}


def with_model(**fields: Any) -> Change:
    return lambda content: {**content, "model": {**content["model"], **fields}}


def replace(pattern: dict[str, str], by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": by}


def split(regex: str) -> Change:
    return with_(pre_tokenizer={"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})


def template(single: list[Any], special: dict[str, Any]) -> Change:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return with_(
        post_processor={"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    )


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "<x>", "type_id": 0}}
# A change of a valid tokenizer.json, and what the error says.
BAD: dict[str, tuple[Change, str]] = {
    "a regular expression that backtracks": (split("(a+)+$"), "retry-limit"),
    "a normalizer that backtracks": (with_(normalizer=replace({"Regex": "(.|.)*x$"}, "")), "retry-limit"),
    "a normalizer that lengthens": (with_(normalizer=replace({"String": "a"}, "a" * 1000)), "normalizer makes"),
    "a normalizer that fills the memory": (
        with_(normalizer={"type": "Sequence", "normalizers": [replace({"Regex": "."}, "." * 100)] * 5}), "of memory",
    ),
    "a decoder that lengthens": (with_(decoder=replace({"String": "a"}, "a" * 100_000)), "decoder makes"),
    "a template that repeats the text": (template([TEXT] * 1000, {}), "tokens per byte"),
    "a template with an unknown token": (template([BOS, TEXT], {}), "no entry found"),
    "a character map that is none": (
        with_(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "precompiled_charsmap",
    ),
    "a character map with lengths beyond it": (
        with_(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAA"}), "of memory",
    ),
    "merges of unknown tokens": (with_model(merges=[["zz", "qq"]]), "out of vocabulary"),
    "no merges": (lambda content: {**content, "model": {"type": "BPE", "vocab": {"a": 0}}}, "merges"),
    "no unknown token": (with_(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}), "UNK"),
    "an unknown token beyond the vocabulary": (
        with_(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}), "UnkIdNotInVocabulary",
    ),
    "an empty model": (
        lambda content: {**with_model(vocab={}, merges=[])(content), "added_tokens": []}, "every text has no tokens",
    ),
    "a list": (lambda _: [1], "expected struct"),
    "null": (lambda _: None, "expected struct"),
}  # fmt: skip
# As above, as text.
BROKEN: dict[str, str] = {
    "lists 10,000 deep": '{"model":' + "[" * 10_000 + "]" * 10_000 + "}",
    "objects 10,000 deep": '{"model":{"type":"BPE","x":' + '{"a":' * 10_000 + "1" + "}" * 10_002,
    "half a file": '{"version": "1.0", "model": {"ty',
    "no text": "\0\0\0\0",
    "empty": "",
}


def refused(folder: Path) -> SourceError:
    """The error, which names the file in one short line."""
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        load_tokenizer(folder, "org/name")
    message = caught.value.message
    assert "org/name" in message and len(message) < 300 and "\n" not in message
    assert time.monotonic() - began < 10
    return caught.value


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_that_cannot_be_used_is_refused(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    change, said = BAD[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(copy.deepcopy(good))))
    error = refused(tmp_path)
    assert f"tokenizer.json: {said}" in error.message or said in error.message.partition("tokenizer.json: ")[2]


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(BROKEN[name])
    assert "tokenizer.json: " in refused(tmp_path).message


def test_the_worker_is_ended_at_its_time_and_what_it_says_is_told(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(tokenizer_worker, "__file__", str(worker))
    limits = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 2))\n"
    for code, said in (
        (f"{limits}while True: pass", "seconds"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crash"),
        ("import os, sys; sys.stderr.write('first\\nthe last words\\n'); sys.stderr.flush(); os.abort()", "last words"),
        ("print('[')", "status 0"),
        ("raise MemoryError", "memory"),
    ):
        worker.write_text(code)
        assert said in refused(tmp_path).message, code


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit all of them")
def test_the_worker_has_limits(tmp_path: Path) -> None:
    import subprocess

    code = (
        f"import runpy; limit = runpy.run_path({tokenizer_worker.__file__!r})['limit']; limit()\n"
        "import resource as r; print([r.getrlimit(w)[0] for w in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_CORE)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == [tokenizer_worker.SECONDS, tokenizer_worker.MEMORY, 0], done.stderr


def test_the_texts_are_tried_too(good: dict[str, Any], tmp_path: Path) -> None:
    folder_with(tmp_path, {"tokenizer.json": json.dumps(split("(?:(b+)+)+c")(good))})
    assert load_tokenizer(tmp_path, "org/name", ["short"]).backend_tokenizer is not None
    with pytest.raises(SourceError, match=r"tokenizer\.json: .*retry-limit"):
        load_tokenizer(tmp_path, "org/name", ["short", "b" * 200 + "\ud800"])


def test_a_good_tokenizer_stays_as_it_is(good: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}  # Llama's class would put <s> before each text
    folder_with(tmp_path, {"tokenizer.json": json.dumps(good)}, config)
    try_tokenizer(tmp_path, "org/name", ["\ud800 half a character", ""])
    loaded = load_tokenizer(tmp_path, "org/name")
    assert [loaded(text)["input_ids"] for text in PROBE] == [tokenizer(text)["input_ids"] for text in PROBE]


def test_a_panic_while_a_text_is_encoded_is_named() -> None:
    class PanicException(BaseException):
        pass

    for error in (PanicException("called `unwrap()`\nmore"), Exception("tokenizers says so")):
        with pytest.raises(SourceError, match=r"tokenizer\.json: (called|tokenizers says)"), failures_named("org/name"):
            raise error
    for ours in (KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(ours)), failures_named("org/name"):
            raise ours


def vocabulary_files(good: dict[str, Any]) -> dict[str, str]:
    """The same tokenizer as GPT-2 stores it."""
    merges = "\n".join(" ".join(pair) for pair in good["model"]["merges"])
    return {"vocab.json": json.dumps(good["model"]["vocab"]), "merges.txt": f"#version: 0.2\n{merges}\n"}


def folder_with(folder: Path, files: dict[str, str | bytes], config: Any = None, model_type: str = "llama") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}


@pytest.mark.parametrize(
    ("config", "model_type"), [(GPT2, "gpt2"), (None, "granite")], ids=["as transformers' class", "slow class only"]
)
def test_a_vocabulary_is_written_as_tokenizer_json(
    config: Any, model_type: str, good: dict[str, Any], text_of: Callable[..., str], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    original = folder_with(tmp_path / "original", {**vocabulary_files(good)}, config, model_type)
    result = tmp_path / "result"
    result.mkdir()
    if has_5() and config is None:  # it knows the class of no type by default
        assert "save_pretrained" in str(refused(original).hint)
        return
    loaded = load_tokenizer(original, "org/name")
    write_tokenizer(loaded, result, "org/name")
    text = text_of(500, 3)
    ids = loaded(text)["input_ids"]
    assert Tokenizer.from_file(str(result / "tokenizer.json")).encode(text).ids == ids and len(ids) > 100
    before = (result / "tokenizer.json").read_bytes()
    write_tokenizer(object(), result, "org/name")  # what there is stays
    assert (result / "tokenizer.json").read_bytes() == before


TIKTOKEN = b"\n".join(base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"


@pytest.mark.parametrize(
    ("content", "missing", "command"),
    [
        (SENTENCEPIECE, ("sentencepiece", "protobuf"), "pip install sentencepiece protobuf"),
        (SENTENCEPIECE, ("sentencepiece",), "pip install sentencepiece"),
        (TIKTOKEN, ("tiktoken",), "pip install tiktoken"),
    ],
)
def test_missing_packages_are_named(
    content: bytes, missing: tuple[str, ...], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from gradmap_hub.models import tokenizer as module

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("Couldn't instantiate the backend tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setattr(module, "_installed", lambda package: package not in missing)
    folder = folder_with(tmp_path, {"tokenizer.model": content}, {"tokenizer_class": "LlamaTokenizer"})
    error = refused(folder)
    assert "packages that are not installed" in error.message and (error.hint or "").endswith(f": {command}")


# Files beside a valid tokenizer.json, and what the error says.
FIELDS: dict[str, tuple[dict[str, str], str]] = {
    "a class that is a number": ({"tokenizer_config.json": '{"tokenizer_class": 5}'}, "tokenizer_class is 5"),
    "an unknown class": ({"tokenizer_config.json": '{"tokenizer_class": "Nope"}'}, "Nope"),
    "a token that is a list": ({"tokenizer_config.json": '{"bos_token": [1]}'}, "bos_token is [1]"),
    "a token without content": ({"special_tokens_map.json": '{"eos_token": {"x": "</s>"}}'}, "special_tokens_map.json"),
    "a template that is a number": ({"tokenizer_config.json": '{"chat_template": 1}'}, "chat_template is 1"),
    "tokens by names that are no ids": (
        {"tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "a"}}}'}, "invalid literal",
    ),
    "a deep map": ({"special_tokens_map.json": "[" * 20_000}, "_map.json is not valid JSON: it is nested"),
    "a list as map": ({"special_tokens_map.json": "[]"}, "special_tokens_map.json is not a JSON object"),
    "half a map": ({"added_tokens.json": "{"}, "added_tokens.json is not valid JSON"),
    "no UTF-8": ({"tokenizer_config.json": "\udcff"}, "tokenizer_config.json is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_field_is_named(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    if has_5() and name == "an unknown class":
        pytest.skip("transformers 5 takes tokenizer.json for any class")
    files, said = FIELDS[name]
    folder = folder_with(tmp_path, {"tokenizer.json": json.dumps(good)})
    for file, content in files.items():
        (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert said in refused(folder).message


@pytest.mark.parametrize("files", [{}, {"tekken.json": "{}"}], ids=["none", "tekken only"])
def test_no_tokenizer_at_all_is_said(files: dict[str, Any], tmp_path: Path) -> None:
    assert "no tokenizer.json" in refused(folder_with(tmp_path, files)).message


def test_a_class_without_a_fast_form_is_refused_before_anything_expensive(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"vocab.txt": "a\nb\n"}, {"tokenizer_class": "BertJapaneseTokenizer"})
    assert "tokenizer" in refused(folder).message


def test_further_templates_and_tekken_are_files_of_the_model(tmp_path: Path) -> None:
    names = [f"{TEMPLATES_FOLDER}/{name}.jinja" for name in ("rag", "tool_use")]
    others = [f"{TEMPLATES_FOLDER}/notes.txt", f"{TEMPLATES_FOLDER}/deep/a.jinja", "other/a.jinja", "a.jinja"]
    assert all(map(is_companion, [*names, "tekken.json"])) and not any(map(is_companion, others))
    files = choose_files(dict.fromkeys(["model.safetensors", "tekken.json", *names, *others], 1), tmp_path.joinpath)
    assert set(files.companions) == {"tekken.json", *names}
    assert all(is_ours(name, "model") for name in ["tekken.json", *names])
    source = tmp_path / "source"
    for name in [*names, *others]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    assert extra_templates(source) == names
    (tmp_path / "result").mkdir()
    copy_companions(source, tmp_path / "result", names)
    assert sorted(folder_sizes(tmp_path / "result")) == names
    # transformers 5 wrote the config, so that a translated folder stands in for it.
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32", "rope_parameters": {}}))
    (source / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": ["<x>"]}))
    stand_in = readable(source, tmp_path / "readable")
    assert stand_in != source and extra_templates(stand_in) == names
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / TEMPLATES_FOLDER).symlink_to(source / TEMPLATES_FOLDER)
    assert extra_templates(tmp_path / "linked") == []


def test_files_outside_of_the_folder_are_not_read(good: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    other = folder_with(
        tmp_path / "other", {"tokenizer.json": json.dumps({**good, "normalizer": {"type": "Lowercase"}})}
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "tokenizer_file": str(other / "tokenizer.json")}
    folder = folder_with(tmp_path / "own", {"tokenizer.json": json.dumps(good)}, config)
    assert load_tokenizer(folder, "org/name")("AB")["input_ids"] == tokenizer("AB")["input_ids"]
    shutil.rmtree(other)
    assert load_tokenizer(folder, "org/name")("AB")["input_ids"] == tokenizer("AB")["input_ids"]


@pytest.mark.long
def test_a_result_has_a_tokenizer_json_where_its_original_has_none(
    good: dict[str, Any], folder_of: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """Without one, nobody could export, serve or try what `push` publishes (transformers.js#93)."""
    from tokenizers import Tokenizer

    from gradmap_hub.config import PruneConfig
    from gradmap_hub.pipeline.prune import prune

    size = max(good["model"]["vocab"].values()) + 1
    original = folder_of(tmp_path / "original", "llama", vocab_size=size)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (original / name).unlink(missing_ok=True)
    for name, content in {**vocabulary_files(good), "tokenizer_config.json": json.dumps(GPT2)}.items():
        (original / name).write_text(content)
    config = PruneConfig(
        drop=(1,), calibration=(str(text_file),), samples=4, seq_len=16, eval_rows=2, compensation="none"
    )
    prune(str(original), tmp_path / "small", config)
    ids = load_tokenizer(original, "org/name")("Ada carried")["input_ids"]
    assert Tokenizer.from_file(str(tmp_path / "small" / "tokenizer.json")).encode("Ada carried").ids == ids
