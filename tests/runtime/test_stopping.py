"""Stop strings, whatever pieces the text comes in."""

from __future__ import annotations

import itertools

import pytest

from gradmap_hub.runtime.stopping import StopText

TEXT = "one\n\nHuman: twoHuHuman: three"


def read(text: str, stop: list[str], sizes: list[int]) -> tuple[str, bool, list[str]]:
    stopping, at, finals = StopText(stop), 0, []
    for size in itertools.cycle(sizes):
        if at >= len(text) or stopping.met:
            break
        finals.append(stopping.add(text[at : at + size]))
        at += size
    finals.append(stopping.rest())
    return "".join(finals), stopping.met, finals


@pytest.mark.parametrize("sizes", [[1], [2], [3], [5, 1], [7, 2, 1], [100]])
@pytest.mark.parametrize(
    "stop", [[], ["Human:"], ["\n\nHuman:", "two"], ["HuHuman:"], ["absent"], ["e\n\n", "Human:"], [TEXT], [TEXT + "x"]]
)
def test_the_text_ends_before_the_first_stop_string(stop: list[str], sizes: list[int]) -> None:
    text, met, _ = read(TEXT, stop, sizes)
    places = [TEXT.find(entry) for entry in stop if entry in TEXT]
    assert met == bool(places)
    # Pieces of one character: the string that is complete first; bigger ones may complete two at once.
    if places and sizes != [1]:
        assert text in {TEXT[:place] for place in places}
    elif places:
        first = min((TEXT.find(entry) + len(entry), TEXT.find(entry)) for entry in stop if entry in TEXT)
        assert text == TEXT[: first[1]]
    else:
        assert text == TEXT


def test_only_what_might_be_a_beginning_is_held_back() -> None:
    stopping = StopText(["STOP"])
    assert stopping.add("go S") == "go "
    assert stopping.add("T") == ""
    assert stopping.add("ART") == "START"
    assert stopping.add("ST") == "" and stopping.rest() == "ST"
    assert StopText([""]).add("all") == "all"
