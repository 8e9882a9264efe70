"""The engines, the chat template and the comparison, on a tiny real model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def generation(kit: SimpleNamespace) -> Any:
    return kit.load_module("generation")


@pytest.fixture(scope="module")
def prompting(kit: SimpleNamespace) -> Any:
    return kit.load_module("prompting")


@pytest.fixture(scope="module")
def model(kit: SimpleNamespace, tiny: Any) -> Any:
    return kit.load_model("onnx", tiny.original_onnx)


def written(generation: Any, model: Any, prompt: str = PROMPT, **settings: Any) -> Any:
    answer = generation.begin(model, prompt, generation.Settings(**settings))
    while answer.finish_reason is None:
        answer.advance()
    return answer


def reference(folder: Path, prompt_ids: list[int], length: int) -> list[int]:
    """What transformers writes, without the token that ends it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    answer = output[0, len(prompt_ids) :].tolist()
    return answer[:-1] if answer[-1] == model.config.eos_token_id else answer


@pytest.mark.parametrize("prompt", [PROMPT, "Explain gravity to a child.", "a"])
def test_greedy_tokens_are_those_of_transformers(generation: Any, model: Any, tiny: Any, prompt: str) -> None:
    answer = written(generation, model, prompt, max_new_tokens=48)
    assert answer.token_ids == reference(tiny.original, model.text.encode(prompt), 48)
    assert len(answer.seconds) >= len(answer.token_ids)


def test_the_transformers_engine_writes_the_same(kit: SimpleNamespace, generation: Any, model: Any, tiny: Any) -> None:
    other = kit.load_model("transformers", tiny.original)
    expected = written(generation, model, max_new_tokens=24)
    answer = written(generation, other, max_new_tokens=24)
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)


@pytest.mark.parametrize("engine", ["onnx", "transformers"])
def test_a_tokenizer_that_cannot_be_used_is_one_line(
    engine: str, kit: SimpleNamespace, tiny: Any, tmp_path: Path, prompting: Any
) -> None:
    """A pattern that backtracks without end panics in the tokenizers library, and a panic is no Exception."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.original_onnx if engine == "onnx" else tiny.original, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+(?=\\x00never)"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(prompting.ModelError, match=r"^its tokenizer cannot be used: [^\n]+$"):
        kit.load_model(engine, folder)


def test_a_panic_while_transformers_loads_is_one_line(
    kit: SimpleNamespace, tiny: Any, prompting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):  # as pyo3 names it; it cannot be imported
        pass

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("called `Result::unwrap()`\non an `Err` value")

    engine = kit.load_module("transformers_engine")
    monkeypatch.setattr(engine.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(prompting.ModelError, match=r"transformers could not load it: called [^\n]+$"):
        kit.load_model("transformers", tiny.original)


def test_the_prompt_is_tokenised_as_transformers_does(model: Any, tiny: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.original)
    messages = [{"role": "user", "content": PROMPT}]
    assert model.text.encode(PROMPT) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_finish_reasons(generation: Any, model: Any) -> None:
    limited = written(generation, model, max_new_tokens=5)
    assert (limited.finish_reason, len(limited.token_ids)) == ("length", 5)

    # The third token of the greedy answer made the end: the answer stops before its first occurrence.
    end = limited.token_ids[2]
    codec = type(model.text)(model.text.tokenizer, model.text.chat_template, model.text.tokens, frozenset({end}))
    ending = SimpleNamespace(text=codec, context_length=None, start=model.start)
    ended = written(generation, ending, max_new_tokens=5)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == limited.token_ids[: limited.token_ids.index(end)]

    halted = generation.begin(model, PROMPT, generation.Settings())
    halted.advance()
    halted.stop()
    halted.advance()
    assert (halted.finish_reason, len(halted.token_ids)) == ("stopped", 1)


def test_an_answer_ends_where_the_context_does(generation: Any, prompting: Any, model: Any) -> None:
    room = len(model.text.encode(PROMPT)) + 3
    small = SimpleNamespace(text=model.text, context_length=room, start=model.start)
    assert len(written(generation, small, max_new_tokens=50).token_ids) == 3
    with pytest.raises(prompting.ModelError, match="tokens long"):
        generation.begin(small, PROMPT * 10, generation.Settings())


def test_sampling_is_reproducible_by_seed(generation: Any, model: Any) -> None:
    def sample(seed: int) -> list[int]:
        answer = written(generation, model, max_new_tokens=24, temperature=1.5, top_p=0.9, seed=seed)
        return answer.token_ids

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in (1, 2, 3)}) > 1


def test_top_p_keeps_the_smallest_sufficient_set(generation: Any) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    random = np.random.default_rng(0)

    def drawn(top_p: float) -> set[int]:
        settings = generation.Settings(temperature=1.0, top_p=top_p)
        return {generation.choose(logits, settings, random) for _ in range(300)}

    assert drawn(0.4) == {0}
    assert drawn(0.7) == {0, 1}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_text_comes_whole_when_a_character_takes_several_tokens(model: Any) -> None:
    text = "Seine \N{EURO SIGN} \N{LATIN SMALL LETTER E WITH ACUTE}"
    next_piece = model.text.stream()
    pieces = [next_piece(token) for token in model.text.tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in pieces


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for x in range(10000000000) %}{% endfor %}",
    ],
)
def test_the_chat_template_stays_in_its_sandbox(prompting: Any, template: str) -> None:
    with pytest.raises(prompting.ModelError, match="chat template"):
        prompting.render_chat(template, [{"role": "user", "content": PROMPT}], {})


def test_the_chat_template_has_what_templates_use(prompting: Any) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {% if not loop.first %}{% break %}{% endif %}\n"
        "    {% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    text = prompting.render_chat(template, [{"role": "user", "content": "<é>"}], {"bos_token": "<s>"})
    assert text == '<s>{"role": "user", "content": "<é>"}4'


def test_a_model_without_a_template_gets_the_bare_prompt(prompting: Any, tiny: Any, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tiny.original / name).read_bytes())
    codec = prompting.TextCodec.from_folder(tmp_path)
    assert codec.chat_template is None
    assert codec.tokenizer.decode(codec.encode(PROMPT)) == PROMPT
    assert codec.ends == {2}


def test_several_end_tokens_are_known(prompting: Any, tiny: Any, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tiny.original / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}', encoding="utf-8")
    assert prompting.TextCodec.from_folder(tmp_path).ends == {2, 7}


@pytest.mark.parametrize(
    ("precision", "words"),
    [("float32", r"model\.onnx is missing"), ("int8", r"model_int8\.onnx is missing")],
)
def test_missing_files_are_named(
    kit: SimpleNamespace, prompting: Any, tmp_path: Path, precision: str, words: str
) -> None:
    with pytest.raises(prompting.ModelError, match=words):
        kit.load_model("onnx", tmp_path, precision)


def test_eight_bits_say_nearly_the_same(kit: SimpleNamespace, pair: Any) -> None:
    exact, rounded = (kit.load_model("onnx", pair.original_onnx, name) for name in ("float32", "int8"))
    ids = exact.text.encode(PROMPT)
    expected, found = (model.start().step(ids) for model in (exact, rounded))
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert 0 < error < 0.2  # 0.07: weights as wide as these magnify the rounding


def test_the_graphs_of_genai_run_as_well(kit: SimpleNamespace, generation: Any, tiny: Any, tmp_path: Path) -> None:
    """int8 and int4 are made on them: no position_ids, one attention node per layer, the head size left open."""
    from gradmap_hub.exporters import genai

    graph = genai.build(tiny.original, tmp_path / "graph")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_bytes((tiny.original / name).read_bytes())
    graph.replace(tmp_path / "model.onnx")
    for data in graph.parent.glob(f"{graph.name}*"):
        data.replace(tmp_path / data.name)
    model = kit.load_model("onnx", tmp_path)
    assert "position_ids" not in model.plain_inputs
    answer = written(generation, model, max_new_tokens=48)
    assert answer.token_ids == reference(tiny.original, model.text.encode(PROMPT), 48)


@pytest.mark.parametrize(
    ("quota", "count"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8), ("1600000 100000", 8)]
)
def test_no_more_threads_than_the_container_has_time_for(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, count: int
) -> None:
    engine = kit.load_module("onnx_engine")
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(engine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda _: set(range(8)))
    assert engine.cpu_count() == count


def test_a_finished_answer_holds_no_model(kit: SimpleNamespace, generation: Any, tiny: Any) -> None:
    """Pages keep answers while a vote is open; the models must be able to go."""
    import gc
    import weakref

    model = kit.load_model("onnx", tiny.original_onnx)
    answer = written(generation, model, max_new_tokens=4)
    stopped = generation.begin(model, PROMPT, generation.Settings())
    stopped.stop()
    gone = weakref.ref(model.session)
    del model
    gc.collect()
    assert gone() is None and len(answer.token_ids) == 4


def test_the_models_take_turns_and_the_ratio_counts_shared_steps(
    kit: SimpleNamespace, generation: Any, model: Any, tiny: Any
) -> None:
    compare = kit.load_module("compare")
    pruned = kit.load_model("onnx", tiny.pruned_onnx)
    comparison = compare.start_comparison(compare.Models(model, pruned), PROMPT, generation.Settings(max_new_tokens=8))
    for _ in compare.run(comparison, lambda: False):
        difference = len(comparison.original.seconds) - len(comparison.pruned.seconds)
        ended = comparison.original.finish_reason or comparison.pruned.finish_reason
        assert difference == 0 or ended

    # The first step is left out, and one that the machine took for something else decides nothing.
    comparison.original.seconds = [9.0, 0.2, 0.2, 5.0, 0.2, 0.2, 0.2, 0.2]
    comparison.pruned.seconds = [9.0] + [0.1] * 5
    assert comparison.shared_steps == 5
    assert comparison.speed_ratio == pytest.approx(2.0)
    comparison.pruned.seconds = [9.0, 0.1]
    assert comparison.speed_ratio is None


def test_spaces_is_no_package() -> None:
    # As a package it would hide PyPI's `spaces`, which Gradio imports by that name.
    assert not (Path(__file__).resolve().parents[2] / "spaces" / "__init__.py").exists()
