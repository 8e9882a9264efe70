"""Refusals, in the error format of the OpenAI API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """A request that is answered with an error.

    `message` is for whoever wrote the request; `param` names the field it is about, as `messages[0].content`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def overloaded(retry_seconds: int) -> ApiError:
    """All slots and all places in the queue are taken."""
    return ApiError(
        429,
        f"All slots and the queue are full. Try again in {retry_seconds} s.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_seconds)},
    )


def stopping() -> ApiError:
    """The server is shutting down; whoever balances the load should ask another one."""
    return ApiError(
        503, "The server is shutting down.", kind=SERVER, code="shutting_down", headers={"Retry-After": "5"}
    )


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"The answer was not finished within {seconds:g} s.", kind="timeout", code="request_timeout")


def unknown_model(asked: str, served: str) -> ApiError:
    shown = asked if len(asked) <= 100 else asked[:97] + "..."
    return ApiError(
        404,
        f"The model `{shown}` does not exist here; this server has `{served}`.",
        param="model",
        code="model_not_found",
    )


def internal() -> ApiError:
    """Says nothing of the cause: that is in the log, and not for clients."""
    return ApiError(500, "The server had an error while answering. See its log.", kind=SERVER, code="internal_error")
