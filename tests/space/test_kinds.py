"""Which kind of Space is tried, and why."""

from __future__ import annotations

import pytest

from gradmap_hub.config import PublishConfig
from gradmap_hub.errors import UsageError
from gradmap_hub.measurements import BeforeAfter
from gradmap_hub.record import Base
from gradmap_hub.space.kinds import choose_kinds, plan_browser
from gradmap_hub.space.plan import SpacePlan, plan_space

MB = 1_000_000
OPEN = Base("acme/base", "acme/base", "main", "c" * 40, "apache-2.0")


def planned(base: Base = OPEN, **pairs: tuple[int, int]) -> SpacePlan:
    """A plan with the megabytes of both models by precision."""
    sizes = {name: BeforeAfter(before * MB, after * MB) for name, (before, after) in pairs.items()}
    return plan_space(base, list(sizes), sizes.get("float32", BeforeAfter(10**9, 10**9)), sizes)


SMALL = planned(float32=(540, 425), int8=(147, 117))
LARGE = planned(float32=(4400, 3300), int8=(1200, 900))
GATED = planned(Base("acme/base", "acme/base", "main", "c" * 40, "llama3", gated="manual"), int8=(147, 117))


@pytest.mark.parametrize(
    ("wanted", "plan", "paid", "order", "words"),
    [
        ("auto", SMALL, True, ("gradio", "browser", "zero"), "gradio: ada has a paid plan"),
        ("auto", SMALL, False, ("browser", "zero"), "both models have 264.0 MB in int8"),
        ("auto", LARGE, False, ("zero",), "both models have 2.10 GB in int8, and a browser can hold 1.50 GB"),
        ("auto", LARGE, True, ("gradio", "zero"), "paid plan"),
        ("auto", GATED, False, ("zero",), "a browser needs ONNX files of both models: the original is gated"),
        ("gradio", SMALL, False, ("gradio",), "as asked for"),
        ("zero", SMALL, True, ("zero",), "as asked for"),
        ("browser", SMALL, True, ("browser",), "264.0 MB in int8"),
        ("browser", LARGE, True, (), "no Space: both models have 2.10 GB"),
        ("browser", GATED, True, (), "no Space: a browser needs ONNX files"),
    ],
)
def test_kinds(wanted: str, plan: SpacePlan, paid: bool, order: tuple[str, ...], words: str) -> None:
    kinds = choose_kinds(wanted, plan, paid=paid, owner="ada")
    assert kinds.order == order and words in kinds.reason


def test_a_browser_gets_small_files_only() -> None:
    assert plan_browser(SMALL).precisions == ("int8",)
    assert plan_browser(planned(float32=(540, 425))).precisions == ("float32",)  # nothing smaller
    both = plan_browser(planned(float32=(4400, 3300), int8=(1200, 900), int4=(650, 480)))
    assert both.precisions == ("int4",)
    assert "--quantize int8,int4" in plan_browser(planned(float32=(4400, 3300))).problem
    assert "--quantize int8" in choose_kinds("browser", planned(float32=(540, 425)), paid=True, owner="ada").reason


def test_earlier_values_of_the_option() -> None:
    assert PublishConfig(space=True).space == PublishConfig().space == "auto"
    assert PublishConfig(space=False).space == "none"
    with pytest.raises(UsageError, match="--space takes auto, gradio, browser, zero, none; got 'docker'"):
        PublishConfig(space="docker")
