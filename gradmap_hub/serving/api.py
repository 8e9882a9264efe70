"""The routes of the server: the OpenAI API for one model."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gradmap_hub.serving import gate, responses, schemas
from gradmap_hub.serving.answers import Chat, Completion, Shape
from gradmap_hub.serving.delivery import Delivery, Disconnected
from gradmap_hub.serving.engine import Engine
from gradmap_hub.serving.gate import Door, Gate
from gradmap_hub.serving.metrics import CONTENT_TYPE, Metrics
from gradmap_hub.serving.openapi import document
from gradmap_hub.serving.preparing import Preparer
from gradmap_hub.serving.problems import ApiError, overloaded, stopping, too_slow, unknown_model
from gradmap_hub.serving.prompts import check_choices, check_length, detokenized, tokenized, works_for
from gradmap_hub.serving.responses_answer import Responses
from gradmap_hub.serving.responses_request import ResponsesRequest, renamed
from gradmap_hub.serving.scheduler import Busy, Scheduler, Stopped
from gradmap_hub.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gradmap_hub.serving.settings import BODY_SECONDS, MAX_OTHER_NAMES, MAX_PROMPT_IDS, MAX_VALUES, Settings

# Paths of the OpenAI API that clients try, with the error message.
_ELSEWHERE = {
    "/v1/embeddings": "This server has no embeddings: it serves a model that generates text.",
}

log = logging.getLogger("gradmap_hub.serving")

# Proxies must neither cache nor buffer the events.
_EVENT_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                  "X-Accel-Buffering": "no"}  # fmt: skip


def build_app(engine: Engine, settings: Settings, scheduler: Scheduler, preparer: Preparer, door: Door) -> Starlette:
    """Build the ASGI application.

    Args:
        engine: the model; the application itself only encodes and decodes text with it, on the preparer's thread, and
            the scheduler generates.
        settings: limits and keys.
        scheduler: a scheduler of the same engine.
        preparer: runs tokenisation.
        door: whether new requests are accepted, and how many are in progress; the server closes it at shutdown.
    """
    name = settings.name or engine.name
    metrics = Metrics(engine, scheduler, model=name, slots=settings.slots)
    routes = _Routes(name, engine, settings, scheduler, metrics, preparer, door)
    middleware = [Middleware(Gate, settings=settings, scheduler=scheduler, metrics=metrics, door=door)]
    if settings.allow_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allow_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            ),
        )
    app = Starlette(
        routes=[
            Route(gate.CHAT, _Generate(routes, ChatRequest), methods=["POST"]),
            Route(gate.COMPLETIONS, _Generate(routes, CompletionRequest), methods=["POST"]),
            Route(gate.RESPONSES, _Respond(routes), methods=["POST"]),
            Route(gate.TOKENIZER_INFO, routes.tokenizer_info, methods=["GET"]),
            Route(gate.TOKENIZE, _Convert(routes, TokenizeRequest, tokenized, MAX_VALUES), methods=["POST"]),
            Route(
                gate.DETOKENIZE,
                _Convert(routes, DetokenizeRequest, detokenized, MAX_VALUES + MAX_PROMPT_IDS),
                methods=["POST"],
            ),
            Route(gate.MODELS, routes.models, methods=["GET"]),
            Route(gate.MODELS + "/{id:path}", routes.model, methods=["GET"]),
            Route(gate.HEALTH, routes.health, methods=["GET"]),
            Route(gate.READY, routes.ready, methods=["GET"]),
            Route(gate.METRICS, routes.metrics, methods=["GET"]),
            Route(gate.OPENAPI, routes.openapi, methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={ApiError: _refused, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Convert Starlette's own errors (unknown paths and methods) to the OpenAI format."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        unknown = "This path does not exist. See /openapi.json for the available paths."
        message, code = _ELSEWHERE.get(request.url.path, unknown), "unknown_url"
    elif error.status_code == 405:
        message, code = "This path does not support this method. See the Allow header.", "method_not_allowed"
    else:
        message, code = error.detail, None
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


class _Routes:
    """The state that all routes share, and the GET routes."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        settings: Settings,
        scheduler: Scheduler,
        metrics: Metrics,
        preparer: Preparer,
        door: Door,
    ) -> None:
        self.name = name
        self.engine = engine
        self.settings = settings
        self.scheduler = scheduler
        self.counters = metrics
        self.preparer = preparer
        self._door = door
        owner, slash, _ = name.partition("/")
        self._info = responses.ModelInfo(
            id=name,
            object="model",
            created=int(time.time()),
            owned_by=owner if slash and owner else "gradmap-hub",
            context_length=engine.context_length,
            artifact=engine.artifact,
            provider=engine.provider,
        )
        self._openapi = document(name, strict=settings.strict_model)
        self._other_names: set[str] = set()

    def called(self, other: str) -> None:
        """Log a warning if a request names another model: clients have names such as gpt-4o built in.

        Raises:
            ApiError: 404, the request names another model and `Settings.strict_model` is set.
        """
        if other == self.name:
            return
        if self.settings.strict_model:
            raise unknown_model(other, self.name)
        shown = other[:100]
        if shown not in self._other_names and len(self._other_names) < MAX_OTHER_NAMES:
            self._other_names.add(shown)
            log.warning("A request is for the model %a; %s answers it. See --strict-model.", shown, self.name)

    async def models(self, request: Request) -> Response:
        return _answer(responses.ModelList(object="list", data=[self._info]))

    async def model(self, request: Request) -> Response:
        asked = request.path_params["id"]
        if asked != self.name:
            raise unknown_model(asked, self.name)
        return _answer(self._info)

    async def health(self, request: Request) -> Response:
        if self.scheduler.alive:
            return _answer(responses.Health(status="ok"))
        return _answer(responses.Health(status="failed"), 503)

    async def ready(self, request: Request) -> Response:
        works = self.scheduler.alive and not self.preparer.stuck
        status = "stopping" if self._door.closing else "ready" if works else "failed"
        answer = responses.Ready(
            status=status, model=self.name, active=self.scheduler.active, waiting=self.scheduler.waiting
        )
        return _answer(answer, 200 if status == "ready" else 503)

    async def tokenizer_info(self, request: Request) -> Response:
        engine = self.engine
        return _answer(
            responses.TokenizerInfo(
                chat_template=engine.chat_template, model_max_length=engine.context_length, **engine.special_tokens
            )
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self.counters.text(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._openapi)


class _Generate:
    """POST route for one request type. An ASGI application rather than a function, so that it can stream the text."""

    def __init__(self, routes: _Routes, kind: type[ChatRequest] | type[CompletionRequest]) -> None:
        self._routes = routes
        self._kind = kind
        # Token ids take less time to parse than other values.
        self._most = MAX_VALUES + (0 if kind is ChatRequest else MAX_PROMPT_IDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        routes = self._routes
        settings, name = routes.settings, routes.name
        try:
            body = await _read(Request(scope, receive), settings.max_body)
            asked = schemas.parse(self._kind, body, most=self._most)
            routes.called(asked.model)
            characters = check_length(asked, routes.engine.context_length)
            count = check_choices(asked, routes.scheduler.capacity)
            async with Delivery(routes.scheduler, routes.counters, receive, settings.timeout, count) as delivery:
                making = routes.preparer.submit(characters, partial(works_for, routes.engine, asked))
                works = await delivery.prepare(making)
                kind = Chat if isinstance(asked, ChatRequest) else Completion
                shape = kind(name, routes.engine, works, per_prompt=asked.n or 1)
                if asked.stream:
                    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
                    await _stream(delivery, shape, send, with_usage=with_usage)
                else:
                    await (await _whole(delivery, shape))(scope, receive, send)
        except (Disconnected, ClientDisconnect):
            pass  # the client has disconnected


class _Respond:
    """POST route of the Responses API, whose answers are those of a chat in another shape."""

    def __init__(self, routes: _Routes) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        routes = self._routes
        try:
            body = await _read(Request(scope, receive), routes.settings.max_body)
            asked = schemas.parse(ResponsesRequest, body, most=MAX_VALUES)
            chat = asked.chat()
            routes.called(asked.model)
            try:
                await self._respond(asked, chat, receive, send)
            except ApiError as error:
                raise renamed(error) from None
        except (Disconnected, ClientDisconnect):
            pass  # the client has disconnected

    async def _respond(self, asked: ResponsesRequest, chat: ChatRequest, receive: Receive, send: Send) -> None:
        routes = self._routes
        characters = check_length(chat, routes.engine.context_length)
        async with Delivery(routes.scheduler, routes.counters, receive, routes.settings.timeout) as delivery:
            (work,) = await delivery.prepare(
                routes.preparer.submit(characters, partial(works_for, routes.engine, chat))
            )
            shape = Responses(routes.name, asked, work)
            if not asked.stream:
                async for piece in delivery.pieces():
                    for _ in shape.add(piece):
                        pass
                answer = JSONResponse(shape.whole())
                await send({"type": "http.response.start", "status": 200, "headers": answer.raw_headers})
                await send({"type": "http.response.body", "body": answer.body})
                return

            async def event(content: Mapping[str, Any]) -> None:
                data = f"event: {content['type']}\ndata: {json.dumps(content)}\n\n"
                await send({"type": "http.response.body", "body": data.encode(), "more_body": True})

            headers = [(name.lower().encode(), value.encode()) for name, value in _EVENT_HEADERS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                for each in shape.begin():
                    await event(each)
                async for piece in delivery.pieces():
                    for each in shape.add(piece):
                        await event(each)
            except ApiError as error:
                await event(shape.failed(renamed(error)))
            await send({"type": "http.response.body", "body": b""})


_Asked = TypeVar("_Asked", TokenizeRequest, DetokenizeRequest)


class _Convert(Generic[_Asked]):
    """POST route that only needs the tokenizer. It takes a place in the scheduler, which limits how many wait."""

    def __init__(
        self, routes: _Routes, kind: type[_Asked], convert: Callable[[Engine, _Asked], BaseModel], most: int
    ) -> None:
        self._routes = routes
        self._kind = kind
        self._convert = convert
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        routes = self._routes
        try:
            body = await _read(Request(scope, receive), routes.settings.max_body)
            asked = schemas.parse(self._kind, body, most=self._most)
            if asked.model is not None:
                routes.called(asked.model)
            answer = await self._made(len(body), partial(self._convert, routes.engine, asked))
            await _answer(answer)(scope, receive, send)
        except ClientDisconnect:
            pass

    async def _made(self, size: int, make: Callable[[], BaseModel]) -> BaseModel:
        """Run `make` on the preparer's thread.

        Raises:
            ApiError: its own, or 429 if all places are taken, 503 if the server stops, 504 if it takes too long.
        """
        routes = self._routes
        try:
            job = routes.scheduler.admit(lambda: None)
        except Busy as busy:
            routes.counters.refused("queue_full")
            raise overloaded(busy.retry_seconds) from None
        except Stopped:
            raise stopping() from None
        try:
            making = asyncio.wrap_future(routes.preparer.submit(size, make))
            done, _ = await asyncio.wait({making}, timeout=routes.settings.timeout)
            if not done:
                making.cancel()  # has an effect only before it starts
                raise too_slow(routes.settings.timeout)
            if making.cancelled():
                raise stopping()
            return making.result()
        finally:
            job.cancel()


async def _read(request: Request, limit: int) -> bytes:
    """Read the body of a request, at most `limit` bytes.

    Raises:
        ApiError: the body is too large (413), too slow (408) or not declared as JSON (415).
    """
    # Browsers send simple content types across origins without a CORS preflight; application/json requires one.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the request as Content-Type: application/json.", code="unsupported_media_type")
    too_large = ApiError(413, f"The request body is too large. Send at most {limit} bytes.", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time. Retry.", kind="timeout", code="request_timeout",
                       headers={"Connection": "close"}) from None  # fmt: skip
    return bytes(body)


def _answer(model: BaseModel, status: int = 200) -> Response:
    # Unset fields are omitted, fields set to None are null: the OpenAI API distinguishes the two.
    return Response(model.model_dump_json(exclude_unset=True), status, media_type="application/json")


async def _whole(delivery: Delivery, shape: Shape) -> Response:
    async for piece in delivery.pieces():
        shape.add(piece)

    # The log-probabilities of a long prompt take a second to write, in which the event loop answers others.
    return await asyncio.to_thread(lambda: _answer(shape.whole())) if shape.scored else _answer(shape.whole())


async def _stream(delivery: Delivery, shape: Shape, send: Send, *, with_usage: bool) -> None:
    """Send a response as server-sent events. An error ends the stream as its last event."""
    # If usage is requested, every event has the field, as in the OpenAI API.
    extra: dict[str, Any] = {"usage": None} if with_usage else {}

    async def event(data: str, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

    async def chunk(choices: list[Any], **changes: Any) -> None:
        await event(shape.chunk(choices, extra | changes).model_dump_json(exclude_unset=True))

    headers = [(name.lower().encode(), value.encode()) for name, value in _EVENT_HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        for head in shape.heads():
            await chunk(head)
        async for piece in delivery.pieces():
            for choices in shape.events_of(piece):
                await chunk(choices)
    except ApiError as error:
        await event(responses.ProblemAnswer.model_validate(error.body()).model_dump_json(), more=False)
        return
    if with_usage:
        await chunk([], usage=shape.usage())
    await event("[DONE]", more=False)
