"""/openapi.json: OpenAPI 3.1, generated from the pydantic models that validate requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gradmap_hub import __version__
from gradmap_hub.serving import gate, responses, responses_request, schemas

_REFERENCE = "#/components/schemas/{model}"
_REFUSALS = {
    400: "The request has an invalid argument or uses an unsupported feature.",
    401: "The API key is missing or wrong.",
    404: "The model or path does not exist.",
    405: "The path does not support this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "All slots and the queue are full; see Retry-After.",
    500: "Internal server error; see the server log.",
    503: "The server is shutting down; see Retry-After.",
    504: "The response was not finished in time.",
}
_GENERATION = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


def document(model: str, *, strict: bool) -> dict[str, Any]:
    """Return the OpenAPI document of a server for this model. `strict`: requests for another one get 404."""
    requests: tuple[type[BaseModel], ...] = (
        schemas.ChatRequest,
        schemas.CompletionRequest,
        responses_request.ResponsesRequest,
        schemas.TokenizeRequest,
        schemas.DetokenizeRequest,
    )
    answers: tuple[type[BaseModel], ...] = (
        responses.ChatCompletion,
        responses.ChatChunk,
        responses.TextCompletion,
        responses.Response,
        responses.TokenizerInfo,
        responses.Tokenized,
        responses.Detokenized,
        responses.ModelList,
        responses.ModelInfo,
        responses.Health,
        responses.Ready,
        responses.ProblemAnswer,
    )
    _, described = models_json_schema(
        [*((kind, "validation") for kind in requests), *((kind, "validation") for kind in answers)],
        ref_template=_REFERENCE,
    )
    components = described["$defs"]
    for kind in requests if strict else ():
        components[kind.__name__]["properties"]["model"] = {"type": "string", "enum": [model]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gradmap-hub serve",
            "version": __version__,
            "description": "The OpenAI API for one model on ONNX Runtime.",
        },
        "paths": {
            gate.CHAT: {
                "post": _generation("chat", schemas.ChatRequest, responses.ChatCompletion, responses.ChatChunk)
            },
            gate.COMPLETIONS: {
                "post": _generation(
                    "completion", schemas.CompletionRequest, responses.TextCompletion, responses.TextCompletion
                )
            },
            gate.RESPONSES: {
                "post": _generation(
                    "response", responses_request.ResponsesRequest, responses.Response, responses.Response
                )
            },
            gate.TOKENIZER_INFO: {
                "get": _reading(
                    "tokenizer_info", "Chat template and special tokens.", responses.TokenizerInfo, (400, 401)
                )
            },
            gate.TOKENIZE: {"post": _posting("tokenize", schemas.TokenizeRequest, responses.Tokenized)},
            gate.DETOKENIZE: {"post": _posting("detokenize", schemas.DetokenizeRequest, responses.Detokenized)},
            gate.MODELS: {"get": _reading("models", "The served model.", responses.ModelList, (400, 401))},
            gate.MODELS + "/{id}": {
                "get": {
                    **_reading("model", "The served model.", responses.ModelInfo, (400, 401, 404)),
                    "parameters": [
                        {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "enum": [model]}}
                    ],
                }
            },
            gate.HEALTH: {"get": _state("health", "Whether the decode thread is alive.", responses.Health)},
            gate.READY: {"get": _state("ready", "Whether the server accepts requests.", responses.Ready)},
            gate.METRICS: {
                "get": {
                    "operationId": "metrics",
                    "summary": "Metrics in Prometheus format.",
                    "responses": {
                        "200": {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
                        **_refusals((400, 401)),
                    },
                }
            },
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _json(kind: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}


def _refusals(statuses: Sequence[int]) -> dict[str, Any]:
    content = {"application/json": _json(responses.ProblemAnswer)}
    return {str(status): {"description": _REFUSALS[status], "content": content} for status in statuses}


def _posting(name: str, asked: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": (asked.__doc__ or "").strip(),
        "requestBody": {"required": True, "content": {"application/json": _json(asked)}},
        "responses": {
            "200": {"description": "The response.", "content": {"application/json": _json(answer)}},
            **_refusals(_GENERATION),
        },
    }


def _generation(name: str, asked: type[BaseModel], answer: type[BaseModel], event: type[BaseModel]) -> dict[str, Any]:
    described = _posting(name, asked, answer)
    found = described["responses"]["200"]
    found["description"] = (
        f"The response; with stream: true, server-sent events, each with a {event.__name__}, then [DONE]."
    )
    found["content"]["text/event-stream"] = {}
    return described


def _reading(name: str, summary: str, answer: type[BaseModel], refusals: Sequence[int]) -> dict[str, Any]:
    found = {"description": summary, "content": {"application/json": _json(answer)}}
    return {"operationId": name, "summary": summary, "responses": {"200": found, **_refusals(refusals)}}


def _state(name: str, summary: str, answer: type[BaseModel]) -> dict[str, Any]:
    """Describe a probe route: it needs no key, and 503 has the same body as 200."""
    described = _reading(name, summary, answer, (400,))
    responses = described["responses"]
    return {**described, "security": [], "responses": {**responses, "503": responses["200"]}}
