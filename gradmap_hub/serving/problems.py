"""Errors in the format of the OpenAI API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An error response.

    `status`: HTTP status; `message`: for the author of the request; `kind`: the error type of the OpenAI API; `param`:
    the invalid field, such as `messages[0].content`; `code`: machine-readable; `headers`: of the response.
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
    """Return the 429 for full slots and a full queue."""
    return ApiError(
        429,
        f"All slots and the queue are full. Retry in {retry_seconds} s.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_seconds)},
    )


def stopping() -> ApiError:
    """Return the 503 for a server that is shutting down; load balancers should use another one."""
    return ApiError(
        503, "The server is shutting down. Retry.", kind=SERVER, code="shutting_down", headers={"Retry-After": "5"}
    )


def too_slow(seconds: float) -> ApiError:
    """Return the 504 for a request that exceeds the time limit of `seconds`."""
    return ApiError(
        504,
        f"The response was not finished within {seconds:g} s. Request fewer tokens or retry later.",
        kind="timeout",
        code="request_timeout",
    )


def unknown_model(asked: str, served: str) -> ApiError:
    """Return the 404 for a request that names another model than the served one."""
    shown = asked if len(asked) <= 100 else asked[:97] + "..."
    return ApiError(
        404,
        f"The model `{shown}` does not exist. This server serves `{served}`.",
        param="model",
        code="model_not_found",
    )


def internal() -> ApiError:
    """Return the 500. The cause is in the server log only; clients must not see it."""
    return ApiError(500, "Internal server error. See the server log.", kind=SERVER, code="internal_error")
