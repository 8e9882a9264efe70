"""Text to rows: nothing measured on what was fitted, equal shares, errors that say the numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmap_hub.data.rows import CalibrationRows, embedding_rows, evaluation_rows, split_rows, tokenize
from gradmap_hub.data.texts import Text, read_text
from gradmap_hub.errors import CalibrationError, SourceError

SEQ_LEN = 32


def rows_of(tensor: Any) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tensor.tolist()]


def draw(texts: list[Text], tokenizer: Any, **changes: Any) -> CalibrationRows:
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "samples": 32, "selection": 8, "held_out": 6, "seed": 0}
    return split_rows(texts, tokenizer, **{**settings, **changes})


@pytest.fixture(scope="module")
def texts(text_of: Callable[..., str]) -> list[Text]:
    return [Text(f"text {seed}", text_of(30_000, seed), f"hash {seed}") for seed in (1, 2, 3)]


@pytest.mark.parametrize("count", [1, 3])
def test_fit_selection_and_held_out_never_overlap(count: int, texts: list[Text], tokenizer: Any) -> None:
    rows = draw(texts[:count], tokenizer)
    fit, selection = rows_of(rows.fit), rows_of(rows.selection)
    held = [row for text in rows.held_out for row in rows_of(text.ids)]
    assert (len(fit), len(selection), len(held)) == (32, 8, 6)
    everything = fit + selection + held
    assert len(set(everything)) == len(everything)
    assert {len(row) for row in everything} == {SEQ_LEN}
    # every row really is a row of its text, in its own place
    cut = {row for text in texts[:count] for row in rows_of(tokenize(text, tokenizer, SEQ_LEN).ids)}
    assert cut.issuperset(everything)


def test_rows_begin_as_the_tokenizer_begins_a_text(texts: list[Text], tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    ids = tokenizer(texts[0].content)["input_ids"]
    begun = copy.deepcopy(tokenizer)
    begun.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    rows = tokenize(texts[0], begun, SEQ_LEN).ids
    assert rows.shape[1] == SEQ_LEN and (rows[:, 0] == 1).all()
    assert len(rows) == len(ids) // (SEQ_LEN - 1) and not (rows == 2).any()
    assert rows[:, 1:].flatten().tolist() == ids[: rows[:, 1:].numel()]


def test_all_rows_of_a_text_that_just_suffices(texts: list[Text], tokenizer: Any) -> None:
    count = len(tokenize(texts[0], tokenizer, SEQ_LEN).ids)
    rows = draw(texts[:1], tokenizer, samples=count - 10, selection=4, held_out=6)
    used = rows_of(rows.fit) + rows_of(rows.selection) + rows_of(rows.held_out[0].ids)
    assert sorted(used) == sorted(rows_of(tokenize(texts[0], tokenizer, SEQ_LEN).ids))
    with pytest.raises(CalibrationError):
        draw(texts[:1], tokenizer, samples=count - 9, selection=4, held_out=6)


def test_held_out_rows_do_not_depend_on_the_seed(texts: list[Text], tokenizer: Any) -> None:
    first, second, other = draw(texts, tokenizer), draw(texts, tokenizer), draw(texts, tokenizer, seed=1)
    assert rows_of(first.fit) == rows_of(second.fit) and rows_of(first.selection) == rows_of(second.selection)
    assert first.sha256 == second.sha256 != other.sha256
    assert rows_of(first.fit) != rows_of(other.fit) and rows_of(first.selection) != rows_of(other.selection)
    assert [rows_of(t.ids) for t in first.held_out] == [rows_of(t.ids) for t in other.held_out]


def test_each_text_gives_an_equal_share_also_of_the_first_rows(texts: list[Text], tokenizer: Any) -> None:
    rows = draw(texts, tokenizer, samples=32)
    assert [len(source.ids) for source in rows.sources] == [11, 11, 10]
    assert [len(text.ids) for text in rows.held_out] == [2, 2, 2]
    assert [source.name for source in rows.sources] == ["text 1", "text 2", "text 3"]
    own = [set(rows_of(tokenize(text, tokenizer, SEQ_LEN).ids)) for text in texts]
    origin = [next(i for i, rows in enumerate(own) if row in rows) for row in rows_of(rows.fit)]
    assert sorted(origin[:6]) == [0, 0, 1, 1, 2, 2]  # the rows that score the layers hold every text
    assert origin.count(0) == origin.count(1) == 11


def test_the_same_text_twice_is_refused(text_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    copy = tmp_path / "another name.txt"
    copy.write_bytes(text_file.read_bytes())
    with pytest.raises(CalibrationError, match="twice"):
        draw([read_text(text_file), read_text(copy)], tokenizer)


def test_too_short_names_the_numbers(text_of: Callable[..., str], tokenizer: Any) -> None:
    short = Text("leaflet.txt", text_of(2_000, 1), "x")
    have = len(tokenize(short, tokenizer, SEQ_LEN).ids) * SEQ_LEN
    with pytest.raises(CalibrationError) as caught:
        draw([short], tokenizer)
    assert "leaflet.txt" in caught.value.message
    assert f"{have:,} tokens" in caught.value.message and f"{46 * SEQ_LEN:,} needed" in caught.value.message
    assert "--samples" in (caught.value.hint or "")
    with pytest.raises(CalibrationError, match=rf"leaflet.txt .* {have:,} tokens, {100 * SEQ_LEN:,} needed"):
        evaluation_rows(short, tokenizer, seq_len=SEQ_LEN, rows=100)


def test_a_token_without_a_row_in_the_embedding_is_named(text_of: Callable[..., str], tokenizer: Any) -> None:
    wider = copy.deepcopy(tokenizer)
    wider.add_tokens(["<FIM>"], special_tokens=True)
    text = Text("fim.txt", text_of(20_000, 1).replace("the", "<FIM>"), "x")
    given: dict[str, Any] = {"seq_len": SEQ_LEN, "vocabulary": len(tokenizer)}
    for call in (
        lambda: tokenize(text, wider, **given),
        lambda: draw([text], wider, vocabulary=len(tokenizer)),
        lambda: evaluation_rows(text, wider, rows=2, **given),
    ):
        with pytest.raises(CalibrationError, match=rf"fim\.txt .*'<FIM>' with the id {len(tokenizer)}, .* rows"):
            call()
    assert len(tokenize(text, wider, SEQ_LEN, len(wider)).ids)
    assert embedding_rows({"vocab_size": 300}) == 300 and embedding_rows({}) is None


def test_a_failing_tokenizer_is_named(tokenizer: Any) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise Exception("retry-limit-in-match over")  # as the tokenizers library raises it

    with pytest.raises(SourceError, match=r"leaflet\.txt.* tokenizer\.json: retry-limit"):
        tokenize(Text("leaflet.txt", "words", "x"), fails, SEQ_LEN)


def test_rows_are_the_text_without_special_tokens(texts: list[Text], tokenizer: Any) -> None:
    rows = tokenize(texts[0], tokenizer, SEQ_LEN)
    text = tokenizer.decode(rows.ids.flatten().tolist())
    assert texts[0].content.startswith(text)
    assert 0 <= len(tokenizer(texts[0].content)["input_ids"]) - rows.ids.numel() < SEQ_LEN


def test_evaluation_rows_are_spread_over_the_text(texts: list[Text], tokenizer: Any) -> None:
    whole = rows_of(tokenize(texts[0], tokenizer, SEQ_LEN).ids)
    picked = rows_of(evaluation_rows(texts[0], tokenizer, seq_len=SEQ_LEN, rows=5).ids)
    places = [whole.index(row) for row in picked]
    assert places[0] == 0 and places == sorted(set(places)) and places[-1] >= 0.6 * len(whole)
    assert len(evaluation_rows(texts[0], tokenizer, seq_len=SEQ_LEN, rows=len(whole)).ids) == len(whole)
