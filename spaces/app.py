"""The comparison Space: one prompt, an original model and its pruned version, side by side."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if os.environ.get("SPACES_ZERO_GPU"):  # before anything imports torch
    import zero_gpu  # noqa: F401

import gradio as gr
import render
from compare import Comparison, Facts, FactsError, read_facts, run, start_comparison
from door import LOOPBACK, Door
from generation import Generation, Settings
from gradio.events import api
from gradio.themes import Base
from jobs import Job, Jobs
from loading import Loader, Status
from prompting import ModelError
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

FOLDER = Path(__file__).resolve().parent
LONGEST_PROMPT = 4000
MOST_TOKENS = 256
# Seconds that the API waits for models that are still loading.
LOADING_LIMIT = 300
SECONDS_BETWEEN_LOOKS = 0.2
# Page updates take CPU time from the models.
SECONDS_BETWEEN_UPDATES = 0.15
# Everything that runs the models shares this queue, one run at a time.
LANE = "models"
# Limit of waiting visitors and API calls; further ones are asked to try again later.
MOST_WAITING = 20
# Gradio keeps the state of this many sessions, each with a copy of the page configuration.
MOST_SESSIONS = 256

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
THEME = Base(
    primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"]
).set(
    body_background_fill="#fafbfc",
    body_background_fill_dark="#0d1319",
    body_text_color="#1c2733",
    body_text_color_dark="#e8edf2",
    body_text_color_subdued="#52606f",
    body_text_color_subdued_dark="#a6b2be",
    block_background_fill="#ffffff",
    block_background_fill_dark="#182028",
    block_border_color="#dbe1e7",
    block_border_color_dark="#333f4b",
    block_border_width="1px",
    block_radius="12px",
    block_label_text_color="#52606f",
    block_label_text_color_dark="#a6b2be",
    block_info_text_color="#52606f",
    block_info_text_color_dark="#a6b2be",
    button_large_radius="9px",
    # White on teal 700 and near-black on teal 300: both have a contrast well above 4.5.
    button_primary_background_fill="#0f766e",
    button_primary_background_fill_hover="#0b5c56",
    button_primary_background_fill_dark="#4fd1c0",
    button_primary_background_fill_hover_dark="#7fe0d3",
    button_primary_text_color="#ffffff",
    button_primary_text_color_dark="#06201d",
    input_placeholder_color="#66727f",
    input_placeholder_color_dark="#98a4b0",
)

Side = Literal["original", "pruned"]
SIDES: tuple[Side, Side] = ("original", "pruned")


def problem_with(prompt: str) -> str:
    """Why a prompt is invalid; empty if it is valid."""
    if not prompt.strip():
        return "Type a prompt first."
    if len(prompt) > LONGEST_PROMPT:
        return f"The prompt has {len(prompt):,} characters; the limit is {LONGEST_PROMPT:,}."
    return ""


class Page:
    """The events of the page and the API. `facts` is None if compare.json is unusable."""

    def __init__(self, facts: Facts | None, loader: Loader, jobs: Jobs) -> None:
        self.facts = facts
        self.loader = loader
        self.jobs = jobs

    # Cards

    def _card(self, side: Side, state: render.CardState, generation: Generation | None = None) -> str:
        source = getattr(self.facts, side) if self.facts else None
        name = render.short_name(source.name) if source else side.capitalize()
        return render.card(name, side.capitalize() if source else "", state, generation)

    def _cards(self, comparison: Comparison, order: tuple[Side, Side], blind: bool) -> tuple[str, str]:
        def one(position: int) -> str:
            generation: Generation = getattr(comparison, order[position])
            state = render.state_of(generation)
            if blind:
                return render.card(f"Model {'AB'[position]}", "", state, generation, numbers=False)
            return self._card(order[position], state, generation)

        return one(0), one(1)

    def _empty_cards(self, state: render.CardState, blind: bool = False) -> tuple[str, str]:
        if blind:
            return render.card("Model A", "", state), render.card("Model B", "", state)
        return self._card("original", state), self._card("pruned", state)

    def empty_cards(self) -> tuple[str, str]:
        return self._empty_cards("error" if self.loader.status.state == "error" else "ready")

    # Events

    def tick(self) -> tuple[Any, ...]:
        """Update banner, button and timer once a second while the models load."""
        status = self.loader.status
        banner = {"loading": render.loading, "error": render.notice}.get(status.state)
        # Another precision may still load.
        ready = status.state == "ready" or (status.state == "error" and len(self.loader.precisions) > 1)
        label = "Loading" if status.state == "loading" else "Compare"
        return (
            banner(status.message) if banner else "",
            gr.update(interactive=ready, value=label),
            gr.Timer(active=status.state == "loading"),
        )

    def submit(
        self,
        prompt: str,
        length: float,
        temperature: float,
        top_p: float,
        seed: float | None,
        blind: bool,
        precision: str,
        request: gr.Request,
    ) -> dict[str, Any]:
        """Handle Compare: show the problem, or store the job for `write` and show Stop."""
        status = self.loader.status
        problem = problem_with(prompt)
        if not problem and status.state == "error" and precision in ("", self.loader.precision):
            problem = status.message
        elif not problem and self.jobs.counts()[1] >= MOST_WAITING:
            problem = "Too many visitors are waiting. Try again in a minute."
        if problem:
            return {"notice": render.notice(problem)}
        settings = Settings(
            max_new_tokens=min(MOST_TOKENS, max(1, int(length))),
            temperature=max(0.0, float(temperature)),
            top_p=min(1.0, max(0.01, float(top_p))),
            seed=abs(int(seed or 0)),
        )
        job = Job(prompt, settings, precision or self.loader.first, blind)
        if not self.jobs.add(str(request.session_hash), job):
            return {}
        left, right = self._empty_cards("waiting", blind)
        return {
            "notice": "",
            "stop": gr.update(interactive=True, value="Stop"),
            "left": left,
            "right": right,
            "verdict": "",
            "spoken": render.spoken("Waiting for the models.", running=True),
            "round": None,
        }

    def write(self, request: gr.Request) -> Iterator[dict[str, Any]]:
        """Stream both answers of the job that `submit` stored."""
        session = str(request.session_hash)
        job = self.jobs.take(session)
        if job is None:
            yield {}
            return
        order: tuple[Side, Side] = ("original", "pruned")
        if job.blind and random.random() < 0.5:
            order = ("pruned", "original")
        try:
            for message in self._load(job):
                yield {"banner": render.loading(message)}
            if job.stop.is_set():
                yield {"banner": "", **self._halted()}
                return
            # Keep no reference to the models here: the next run may need to free them for another precision.
            comparison = start_comparison(self.loader.models(), job.prompt, job.settings)
            yield {"banner": "", "spoken": render.spoken("Both models are generating.", running=True)}
            shown = time.monotonic()
            for _ in run(comparison, job.stop.is_set):
                if time.monotonic() - shown >= SECONDS_BETWEEN_UPDATES:
                    left, right = self._cards(comparison, order, job.blind)
                    yield {"left": left, "right": right}
                    shown = time.monotonic()
            # A stopped run has no complete answers to vote on, so the names are shown.
            vote = job.blind and not job.stop.is_set()
            left, right = self._cards(comparison, order, vote)
            spoken = "Stopped." if job.stop.is_set() else "Both answers are finished."
            yield {
                "left": left,
                "right": right,
                "verdict": render.question() if vote else render.verdict(comparison, job.precision),
                "round": (comparison, order, job.precision) if vote else None,
                "spoken": render.spoken(spoken + (" Vote for A or B." if vote else "")),
            }
        except ModelError as error:
            yield self._failed(str(error), job.blind)
        except Exception as error:  # the page must not wait forever
            print(f"The run failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            yield self._failed(f"The run failed: {type(error).__name__}: {error}", job.blind)
        finally:
            self.jobs.remove(session, job)

    def _load(self, job: Job) -> Iterator[str]:
        """Load the job's precision; yield the loading message until loading ends or fails."""
        while not self.loader.request(job.precision) and not job.stop.is_set():
            yield self.loader.status.message
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _halted(self) -> dict[str, Any]:
        """The page after a run was stopped before it started."""
        left, right = self._empty_cards("stopped")
        return {"left": left, "right": right, "spoken": render.spoken("Stopped.")}

    def _failed(self, message: str, blind: bool) -> dict[str, Any]:
        left, right = self._empty_cards("error", blind)
        return {
            "banner": "",
            "left": left,
            "right": right,
            "notice": render.notice(message),
            "spoken": render.spoken("The run failed."),
        }

    def halt(self, request: gr.Request) -> dict[str, Any]:
        if self.jobs.stop(str(request.session_hash)):
            return {"stop": gr.update(value="Stopping", interactive=False)}
        return self._halted()  # the job was still waiting, so `write` sends no update

    def vote(self, choice: str, round_: tuple[Comparison, tuple[Side, Side], str] | None) -> dict[str, Any]:
        """Show which model wrote which answer, after the vote."""
        if round_ is None:
            return {}
        comparison, order, precision = round_
        preferred = "tie" if choice == "Tie" else order["AB".index(choice)]
        left, right = self._cards(comparison, order, blind=False)
        return {
            "left": left,
            "right": right,
            "verdict": render.vote_result(preferred) + render.verdict(comparison, precision),
            "spoken": render.spoken(f"A was the {order[0]}, B the {order[1]}."),
            "round": None,
        }

    def leave(self, request: gr.Request) -> None:
        self.jobs.leave(str(request.session_hash))

    # The API. MCP clients see these names and docstrings.

    def status(self) -> dict[str, str]:
        """Whether the models are loaded: state (loading, ready or error), message and precision."""
        status: Status = self.loader.status
        return {"state": status.state, "message": status.message, "precision": self.loader.precision}

    def compare(
        self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0, precision: str = ""
    ) -> dict[str, Any]:
        """Answer one prompt with the original and the pruned model and time both. Waits until the models are loaded.

        Args:
            prompt: The prompt for both models, at most 4,000 characters.
            max_new_tokens: The maximum number of tokens per answer, 1 to 256.
            temperature: 0 means greedy decoding.
            seed: The same seed gives the same answer.
            precision: The precision of both models, such as float32 or int8; empty for the default.
        """
        precision = precision or self.loader.first
        problem = problem_with(prompt)
        if not 1 <= max_new_tokens <= MOST_TOKENS:
            problem = problem or f"max_new_tokens must be from 1 to {MOST_TOKENS}."
        if temperature < 0 or seed < 0:
            problem = problem or "temperature and seed must not be negative."
        if self.loader.precisions and precision not in self.loader.precisions:
            problem = problem or f"precision must be one of: {', '.join(self.loader.precisions)}."
        if problem:
            raise gr.Error(problem, print_exception=False)
        job = Job(prompt, Settings(int(max_new_tokens), float(temperature), seed=int(seed)), precision)
        job.started = True
        key = f"api-{uuid4()}"
        self.jobs.add(key, job)
        try:
            began = time.monotonic()
            for _ in self._load(job):
                if time.monotonic() - began > LOADING_LIMIT:
                    raise ModelError(f"The models are still loading after {LOADING_LIMIT} s. Try again later.")
            comparison = start_comparison(self.loader.models(), prompt, job.settings)
            for _ in run(comparison, job.stop.is_set):
                pass
        except ModelError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            self.jobs.remove(key, job)

        def answer(generation: Generation) -> dict[str, Any]:
            return {
                "text": generation.text,
                "tokens": len(generation.token_ids),
                "seconds_per_token": generation.seconds_per_token,
                "first_token_seconds": generation.first_token_seconds,
                "finish_reason": generation.finish_reason,
            }

        answers = {side: answer(getattr(comparison, side)) for side in SIDES}
        return answers | {"speed_ratio": comparison.speed_ratio, "precision": precision}


def live(role: str, label: str) -> str:
    """JavaScript that makes an element a live region. Its wrapper, which stays in the page, gets the role."""
    urgency = "assertive" if role == "alert" else "polite"
    attributes = {"role": role, "aria-live": urgency, "aria-label": label}
    return "".join(
        f"element.setAttribute({json.dumps(name)}, {json.dumps(value)});" for name, value in attributes.items()
    )


def move_focus(target: str) -> str:
    """JavaScript that moves the focus from a hidden button to its replacement."""
    return (
        "() => { if (document.activeElement === document.body) "
        f"document.getElementById({json.dumps(target)})?.focus({{preventScroll: true}}); }}"
    )


def build(facts: Facts | None, page: Page) -> gr.Blocks:
    title = facts.title if facts else "Original and pruned"
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        if facts:
            gr.HTML(render.header(facts), js_on_load=None)
            gr.HTML(render.tiles(facts), js_on_load=None)
        else:
            gr.HTML(f"<header class='top'><h1>{title}</h1></header>", js_on_load=None)
        banner = gr.HTML("", elem_id="banner", js_on_load=live("status", "Loading"))
        with gr.Column(elem_classes="composer"):
            prompt = gr.Textbox(
                label="Prompt",
                lines=3,
                max_lines=10,
                placeholder="Ask both models a question",
                elem_id="prompt",
            )
            with gr.Row(elem_classes="actions"):
                with gr.Column(elem_classes="hint-column", min_width=0):
                    gr.HTML("<p class='hint'>Or press Shift + Enter.</p>", js_on_load=None)
                go = gr.Button(
                    "Loading", variant="primary", interactive=False, elem_id="go", elem_classes="main-button"
                )
                # style.css shows and hides it: Gradio's `visible` can lose the second of two quick changes,
                # which would leave the wrong button after a short answer.
                stop = gr.Button("Stop", elem_id="stop", elem_classes="main-button")
        notice = gr.HTML("", elem_id="notice", js_on_load=live("alert", "Problem"))
        if facts and facts.examples:
            with gr.Row(elem_classes="chips"):
                for example in facts.examples[:3]:
                    chip = gr.Button(example, size="sm")
                    # Runs in the browser only, so it works while the models load.
                    chip.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
        left_card, right_card = page.empty_cards()
        with gr.Row(elem_classes="cards"):
            # One column each: bare HTML in a row does not stack on a phone.
            with gr.Column(min_width=320):
                left = gr.HTML(left_card, elem_id="left", js_on_load=None)
            with gr.Column(min_width=320):
                right = gr.HTML(right_card, elem_id="right", js_on_load=None)
        verdict = gr.HTML("", elem_id="verdict", js_on_load=None)
        with gr.Row(elem_classes="votes", elem_id="votes"):
            vote_buttons = {name: gr.Button(name) for name in ("A is better", "Tie", "B is better")}
        spoken = gr.HTML("", elem_id="spoken", elem_classes="sr", js_on_load=live("status", "Progress"))
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                length = gr.Slider(1, MOST_TOKENS, value=96, step=1, label="Maximum tokens per answer")
                temperature = gr.Slider(
                    0, 2, value=0, step=0.05, label="Temperature", info="0 always picks the top-1 token."
                )
            with gr.Row():
                top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p", info="Only used if temperature > 0.")
                seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", info="Same seed, same answer.")
            choices = render.precisions(facts) if facts else []
            precision = gr.Radio(
                choices,
                value=page.loader.first or None,
                label="Precision",
                info="Applies to both models. A change reloads them.",
                visible=len(choices) > 1,
            )
            blind = gr.Checkbox(
                label="Blind vote", info="Shuffles the models and hides their names until you vote.", value=False
            )
        if facts:
            with gr.Accordion("How this is measured", open=False):
                gr.HTML(render.method(facts), js_on_load=None)
        round_ = gr.State(None)
        timer = gr.Timer(1.0)

        named = {
            "banner": banner,
            "notice": notice,
            "stop": stop,
            "left": left,
            "right": right,
            "verdict": verdict,
            "spoken": spoken,
            "round": round_,
        }

        def to_components(changes: dict[str, Any]) -> dict[Any, Any]:
            # Gradio rejects an empty dict, so skip one component explicitly.
            return {named[key]: value for key, value in changes.items()} or {spoken: gr.skip()}

        def submit(
            prompt: str, length: float, temperature: float, top_p: float, seed: float, blind: bool,
            precision: str | None, request: gr.Request,
        ) -> dict[Any, Any]:  # fmt: skip
            return to_components(page.submit(prompt, length, temperature, top_p, seed, blind, precision or "", request))

        def write(request: gr.Request) -> Iterator[dict[Any, Any]]:
            for changes in page.write(request):
                yield to_components(changes)

        everything = list(named.values())
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        submitted = gr.on(
            [go.click, prompt.submit],
            submit,
            [prompt, length, temperature, top_p, seed, blind, precision],
            everything,
            queue=False,
            **quiet,
        )
        submitted.then(None, js=move_focus("stop"), api_visibility="private")
        submitted.then(write, None, everything, concurrency_limit=1, concurrency_id=LANE, **quiet).then(
            None, js=move_focus("go"), api_visibility="private"
        )

        def halt(request: gr.Request) -> dict[Any, Any]:
            return to_components(page.halt(request))

        stop.click(halt, None, everything, queue=False, **quiet)
        for name, button in vote_buttons.items():
            choice = name.split()[0]

            def vote(round_: Any, choice: str = choice) -> dict[Any, Any]:
                return to_components(page.vote(choice, round_))

            button.click(vote, round_, everything, queue=False, **quiet)
        gr.on([demo.load, timer.tick], page.tick, None, [banner, go, timer], queue=False, **quiet)
        demo.unload(page.leave)
        api(page.compare, api_name="compare", concurrency_limit=1, concurrency_id=LANE)
        api(page.status, api_name="status", queue=False)
    return demo


def health_route(status: Callable[[], dict[str, str]], jobs: Jobs) -> Route:
    def health(request: Request) -> JSONResponse:
        """Always 200; the field `state` says whether the models are loaded."""
        running, waiting = jobs.counts()
        return JSONResponse({"status": "ok", **status(), "running": running, "waiting": waiting})

    return Route("/health", health, methods=["GET"])


class OpenEvents(dict[str, Any]):
    """Gradio's events by id. Drops finished events, which Gradio never removes (25 kB each).

    `open_ids`: the ids of unfinished events, per session.
    """

    ROOM = 64

    def __init__(self, open_ids: Mapping[str, Collection[str]]) -> None:
        self._open_ids = open_ids

    def __setitem__(self, event_id: str, event: Any) -> None:
        super().__setitem__(event_id, event)
        if len(self) <= self.ROOM:
            return
        still_open = {event_id}.union(*list(self._open_ids.values()))
        for other in [known for known in self if known not in still_open]:
            self.pop(other, None)


def server_name() -> str:
    """Listen on all interfaces on Spaces, else on localhost; GRADIO_SERVER_NAME overrides both."""
    on_spaces = os.environ.get("SYSTEM") == "spaces"
    return os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if on_spaces else "127.0.0.1")


def main() -> None:
    facts: Facts | None = None
    problem: str | None = None
    try:
        facts = read_facts(FOLDER / "compare.json")
    except FactsError as error:
        problem = str(error)
    loader = Loader(facts, FOLDER, problem)
    jobs = Jobs()
    page = Page(facts, loader, jobs)
    demo = build(facts, page)
    # Visitors beyond MOST_WAITING are refused by `submit`; the rest of the queue is for API calls.
    demo.queue(default_concurrency_limit=1, max_size=2 * MOST_WAITING)
    demo._queue.event_ids_to_events = OpenEvents(demo._queue.pending_event_ids_session)

    # Exclude the objects of the libraries from garbage collection. With them, full collections are too rare to free the
    # garbage of many requests.
    gc.freeze()
    # Spaces stop the app with SIGTERM. Handle it like Ctrl-C, so that the threads below can finish.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    loader.start()
    listens_on = server_name()
    door = Middleware(Door, hosts=LOOPBACK if listens_on in LOOPBACK | {"::1"} else None)
    try:
        demo.launch(
            server_name=listens_on,
            theme=THEME,
            css_paths=[FOLDER / "style.css"],
            footer_links=["api", "settings"],
            app_kwargs={"routes": [health_route(page.status, jobs)], "middleware": [door]},
            # Spaces have the package; elsewhere it is optional, as its pins conflict with other packages.
            mcp_server=importlib.util.find_spec("mcp") is not None,
            ssr_mode=False,
            state_session_capacity=MOST_SESSIONS,
        )
    except KeyboardInterrupt:
        pass
    finally:
        jobs.stop_all()
        if not loader.close(20) or jobs.busy(10):
            # A download or a long step is still running: skip Python's clean-up, which would abort.
            os._exit(0)


if __name__ == "__main__":
    main()
