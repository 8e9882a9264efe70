"""Prompts: the same token ids as transformers makes, for every style of chat template and place of special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.models.transformers_compat import has_5
from gradmap_hub.runtime import prompting
from gradmap_hub.runtime.prompting import (
    CLASS_TOKENS,
    TYPE_CLASSES,
    ModelError,
    TextCodec,
    read_json,
    render_chat,
    special_tokens,
)

PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER = {"role": "user", "content": "Ada said: “1 < 2 & 3”  \n"}
REPLY = {"role": "assistant", "content": "Grüße 🦊\n<b>ok</b>"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {"of": "kités", "a": [1, None]}}}],
}
ANSWER = {"role": "tool", "name": "count", "content": '{"n": 3}'}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "turns": [{"role": "system", "content": "Be brief."}, USER, REPLY, {"role": "user", "content": "Again"}],
    "tools": [USER, CALL, ANSWER],
}
# One per style: what opens and closes turns, and each construct of jinja that templates use.
TEMPLATES: dict[str, str] = {
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + "
        "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
        "{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
        "+ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + "
        "message['content'] | trim + '<|eot|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start|>assistant<|end|>\n\n' }}\n{%- endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% elif m['role'] in ('user', 'system') %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
        "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% else %}\n{{ '<|' ~ message.role ~ '|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "phi": (
        "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "names of all tokens": "{{ [bos_token, eos_token, unk_token, pad_token, sep_token, cls_token, mask_token] }}",
    "no special tokens": "{{ messages | map(attribute='content') | join('\n') }}",
    "tool calls": (
        "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls %}{% for call in m.tool_calls %}"
        "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% else %}<{{ m.role }}>{{ m.content }}"
        "{% endif %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    ),
    "tools are none": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ messages[0].content }}",
    "tojson": "{{ messages | tojson }}",
    "tojson in ascii": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson by position": "{{ messages[0] | tojson(True) }}{{ messages[0] | tojson(False, 2) }}",
    "tojson with an indent": "{{ messages | tojson(indent=4) }}{{ messages | tojson(indent='\t') }}",
    "tojson with separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
    "tojson of numbers": "{{ {'a': 1.5, 'b': none, 'c': [true, '<'], 3: 'x'} | tojson(sort_keys=false) }}",
    "generation tags": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
    ),
    "a variable inside generation": (
        "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}{{ messages[0].role }}"
    ),
    "the date": "{{ strftime_now('%d %B %Y') }}{{ messages[0].content }}",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}{{ m.content }}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "a namespace": (
        "{% set ns = namespace(last=-1, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% set ns.n = ns.n + m.content | length %}{% endfor %}"
        "{{ ns.last }} of {{ ns.n }}: {{ messages[ns.last].content }}"
    ),
    "a macro": (
        "{% macro turn(m, closed=true) %}<{{ m.role }}>{{ m.content }}{% if closed %}{{ eos_token }}{% endif %}"
        "{% endmacro %}{{ bos_token }}{% for m in messages %}{{ turn(m, not loop.last) }}{% endfor %}"
    ),
    "white space": "  {% for m in messages %}\n    {{ m.content }}  \n  {% endfor %}\n\n{# a comment #}\n  end\n",
    "undefined names": "{{ thinking }}{% if thinking is defined %}x{% endif %}{{ messages[0].content }}",
    "string methods": "{{ messages[0].content.split(':')[0].upper().replace('A', 'b') }}{{ messages[-1].get('role') }}",
    "slices and tests": "{{ messages[::-1] | map(attribute='role') | list }}{{ 3 is odd }}{{ 'a' in 'abc' }}",
    "html": "{{ '<&>' | e }}{{ messages[0].content | escape }}",
}  # fmt: skip
# What refuses a conversation must refuse it here too.
REFUSING: dict[str, str] = {
    "raise_exception": "{% if messages[0].role == 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}",
    "an attribute of Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "an error of types": "{{ messages + 1 }}",
    "no template": "{% for %}",
    "deep parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


def write(folder: Path, tokenizer: Any, saved: Mapping[str, Any], **files: Any) -> Path:
    """A model folder without weights. `saved`: tokenizer_config.json; `files`: other JSON files by stem."""
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def theirs(folder: Path, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("style", TEMPLATES)
def test_token_ids_are_those_of_transformers(style: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer, PLAIN, config={"model_type": "llama"})
    (folder / "chat_template.jinja").write_text(TEMPLATES[style], encoding="utf-8")
    codec = TextCodec.from_folder(folder)
    for name, messages in CHATS.items():
        assert codec.encode_chat(messages) == theirs(folder, messages), name


@pytest.mark.parametrize("name", REFUSING)
def test_what_a_template_refuses_is_one_line(name: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer, PLAIN, config={"model_type": "llama"})
    (folder / "chat_template.jinja").write_text(REFUSING[name], encoding="utf-8")
    with pytest.raises(ModelError, match=r"chat template failed: .") as caught:
        TextCodec.from_folder(folder).encode_chat([USER])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(Exception, match=r"."):
        theirs(folder, [USER])


def test_what_a_template_says_is_made_printable() -> None:
    with pytest.raises(ModelError) as caught:
        render_chat("{{ raise_exception('\x1b]52;c;eA==\x07' + 'a' * 9999) }}", [USER], {})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


TOKENS = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
SAVED = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None}
# tokenizer_config.json, special_tokens_map.json and config.json.
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tokenizer_config.json": (PLAIN, {}, {}),
    "special_tokens_map.json": ({"tokenizer_class": "PreTrainedTokenizerFast"}, SAVED, {}),
    "the map before the config": (PLAIN | {"bos_token": "<pad>"}, SAVED, {}),
    "the map is of no use": (PLAIN | {"bos_token": "<pad>", "added_tokens_decoder": {}}, SAVED, {}),
    "the class": ({"tokenizer_class": "LlamaTokenizer"}, {}, {}),
    "the fast class": ({"tokenizer_class": "LlamaTokenizerFast", "eos_token": None}, {}, {}),
    "the type": ({}, {}, {"model_type": "llama"}),
    "the class in config.json": ({}, {}, {"model_type": "qwen2", "tokenizer_class": "LlamaTokenizer"}),
    "another type": ({}, {}, {"model_type": "qwen2"}),
}


@pytest.mark.skipif(has_5(), reason="transformers 5 ignores some classes")
@pytest.mark.parametrize("place", PLACES)
def test_special_tokens_are_found_where_transformers_finds_them(place: str, tokenizer: Any, tmp_path: Path) -> None:
    config, saved, model = PLACES[place]
    files = {"special_tokens_map": saved} if saved else {}
    folder = write(
        tmp_path, tokenizer, {**config, "chat_template": TOKENS}, config={"model_type": "llama"} | model, **files
    )
    codec = TextCodec.from_folder(folder)
    wanted = theirs(folder, [USER])
    if place != "another type":  # its tokens are not in this vocabulary, so that transformers adds them
        assert codec.encode_chat([USER]) == wanted
    from transformers import AutoTokenizer

    there = AutoTokenizer.from_pretrained(folder).special_tokens_map
    assert codec.tokens == {name: token for name, token in there.items() if isinstance(token, str)}


@pytest.mark.skipif(has_5(), reason="transformers 5 ignores some classes")
@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_tokens_of_classes_are_those_of_transformers(name: str, tokenizer: Any, tmp_path: Path) -> None:
    import inspect

    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    fast = getattr(transformers, f"{name}Fast")
    parameters = inspect.signature(fast.__init__).parameters
    stated = {name: parameters[name].default for name in parameters if name in CLASS_TOKENS["GemmaTokenizer"]}
    assert CLASS_TOKENS[name] == {name: token for name, token in stated.items() if isinstance(token, str)}
    for model_type in (kind for kind, its in TYPE_CLASSES.items() if its == name):
        names = TOKENIZER_MAPPING_NAMES[model_type]
        assert name in {str(found).removesuffix("Fast") for found in names}


@pytest.mark.skipif(has_5(), reason="transformers 5 knows more types")
def test_every_type_with_tokens_of_its_class_is_known() -> None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from gradmap_hub.models.architectures import ARCHITECTURES

    for model_type in ARCHITECTURES:
        names = TOKENIZER_MAPPING_NAMES.get(model_type, (None, None))
        classes = {str(found).removesuffix("Fast") for found in names if found}
        known = TYPE_CLASSES.get(model_type)
        assert (known in classes) if known else (classes <= {"PreTrainedTokenizer"}), model_type


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATES["chatml"]}]


@pytest.mark.parametrize("template", [NAMED, TEMPLATES["chatml"]], ids=["named", "one"])
def test_a_template_in_the_config_is_found(template: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer, PLAIN | {"chat_template": template}, config={"model_type": "llama"})
    assert TextCodec.from_folder(folder).encode_chat([USER]) == theirs(folder, [USER])


Break = Callable[[Path], object]
# A change of a valid folder, and what the error names.
BROKEN: dict[str, tuple[Break, str]] = {
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a tokenizer that is none": (lambda at: (at / "tokenizer.json").write_text("{}"), "tokenizer.json could not"),
    "a deep config": (lambda at: (at / "tokenizer_config.json").write_text("[" * 10_000), "tokenizer_config.json"),
    "half a config": (lambda at: (at / "config.json").write_text('{"a": '), "config.json is not"),
    "a map in Latin-1": (lambda at: (at / "special_tokens_map.json").write_bytes(b'{"a": "\xe9"}'), "tokens_map"),
    "a template in Latin-1": (lambda at: (at / "chat_template.jinja").write_bytes(b"\xe9"), "chat_template.jinja"),
    "an end that is a text": (lambda at: (at / "config.json").write_text('{"eos_token_id": "2"}'), "eos_token_id"),
    "ends that are lists": (
        lambda at: (at / "generation_config.json").write_text('{"eos_token_id": [[2]]}'), "generation_config.json: eos",
    ),
    "an end that is true": (lambda at: (at / "config.json").write_text('{"eos_token_id": true}'), "eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_named(name: str, tokenizer: Any, tmp_path: Path) -> None:
    change, said = BROKEN[name]
    folder = write(tmp_path, tokenizer, PLAIN, config={"model_type": "llama"})
    change(folder)
    with pytest.raises(ModelError, match=said):
        TextCodec.from_folder(folder)


def test_fields_of_other_types_are_ignored_where_they_may_be(tokenizer: Any, tmp_path: Path) -> None:
    config = {"tokenizer_class": 5, "bos_token": [1], "eos_token": {"x": 1}, "chat_template": [1, {"name": "default"}]}
    folder = write(tmp_path, tokenizer, config, config={"model_type": ["llama"], "eos_token_id": []})
    codec = TextCodec.from_folder(folder)
    assert codec.tokens == {} and codec.chat_template is None and codec.ends == frozenset()
    assert special_tokens(tmp_path / "nowhere", {}) == {} == read_json(tmp_path / "nowhere.json")


def test_a_prompt_that_cannot_be_encoded_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    codec = TextCodec.from_folder(write(tmp_path, tokenizer, PLAIN, config={}))
    with pytest.raises(ModelError, match="not valid Unicode"):
        codec.encode_text("caf\udce9")
    with pytest.raises(ModelError, match="no tokens"):
        codec.encode_text("")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": pattern}))
    with pytest.raises(ModelError, match=r"tokenizer\.json fails on this prompt: .*retry-limit"):
        TextCodec.from_folder(tmp_path).encode_text("a" * 64 + "!")


def test_a_token_that_cannot_be_decoded_is_empty(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = TextCodec.from_folder(write(tmp_path, tokenizer, PLAIN, config={}))
    assert codec.stream()(10**6) == ""

    class PanicException(BaseException):
        pass

    class Fails:
        error: BaseException = PanicException("called unwrap()")

        def __init__(self, **_: Any) -> None:
            pass

        def step(self, *_: Any) -> str:
            raise self.error

    monkeypatch.setattr(prompting, "DecodeStream", Fails)
    assert codec.stream()(5) == ""
    Fails.error = KeyError("ours")
    with pytest.raises(KeyError):
        codec.stream()(5)
