"""The kinds of comparison Space, and which one an account may have.

gradio  the Gradio app on a CPU of Hugging Face. Since July 2026 it needs a paid plan.
browser a static page on which both models run in the visitor's browser. Free for everybody.
zero    the Gradio app on ZeroGPU. A free account older than 30 days may have two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmap_hub.formats import BROWSER_BYTES
from gradmap_hub.space.plan import SpacePlan
from gradmap_hub.units import size

Kind = Literal["gradio", "browser", "zero"]


@dataclass(frozen=True)
class BrowserPlan:
    """The precisions in which both models fit into a browser, best first; `problem`: why there is none, else empty."""

    precisions: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Kinds:
    """The kinds of Space to try, in order, and the reason; no kinds if no Space can be made."""

    order: tuple[Kind, ...]
    reason: str


def plan_browser(space: SpacePlan) -> BrowserPlan:
    """The precisions of a planned Space that fit into a browser: int8 and int4, or float32 if neither does."""
    if space.runtime == "transformers" or not space.precisions:
        cause = space.reason.removeprefix("no Space: ").partition("; the Space runs")[0].partition(", so the Space")[0]
        return BrowserPlan((), f"a browser needs ONNX files of both models: {cause}")
    totals = {name: space.pairs[name].before + space.pairs[name].after for name in space.precisions}
    fitting = [name for name, total in totals.items() if total <= BROWSER_BYTES]
    quantised = tuple(name for name in fitting if name != "float32")
    if quantised:
        return BrowserPlan(quantised)
    if fitting:
        return BrowserPlan(("float32",))
    smallest = min(totals, key=lambda name: totals[name])
    advice = "" if "int4" in totals else "; --quantize int8,int4 makes smaller files"
    have = f"both models have {size(totals[smallest])} in {smallest}"
    return BrowserPlan((), f"{have}, and a browser can hold {size(BROWSER_BYTES)}{advice}")


def choose_kinds(wanted: str, space: SpacePlan, *, paid: bool, owner: str) -> Kinds:
    """Choose the kinds of Space to try.

    Args:
        wanted: A kind, or "auto".
        space: What the Gradio app would run.
        paid: Whether `owner` has a paid plan.
        owner: The user or organisation of the Space.
    """
    browser = plan_browser(space)
    if wanted == "browser":
        if browser.precisions:
            return Kinds(("browser",), f"browser, as asked for: {_fits(browser, space)}")
        return Kinds((), f"no Space: {browser.problem}")
    if not space.precisions:
        return Kinds((), space.reason)
    if wanted in ("gradio", "zero"):
        return Kinds((wanted,), f"{wanted}, as asked for")
    instead: tuple[Kind, ...] = ("browser", "zero") if browser.precisions else ("zero",)
    if paid:
        return Kinds(("gradio", *instead), f"gradio: {owner} has a paid plan")
    no_plan = f"{owner} has no paid plan, which a Gradio Space on a CPU requires"
    if browser.precisions:
        return Kinds(instead, f"browser: {no_plan}; {_fits(browser, space)}")
    return Kinds(instead, f"zero: {no_plan}, and {browser.problem}")


def _fits(browser: BrowserPlan, space: SpacePlan) -> str:
    first = browser.precisions[0]
    words = f"both models have {size(space.pairs[first].before + space.pairs[first].after)} in {first}"
    return words if first != "float32" else f"{words}; --quantize int8 makes a quarter of that"
