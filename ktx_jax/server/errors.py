# SPDX-License-Identifier: Apache-2.0
"""Errors as clients of OpenAI's API, and of Ollama's, expect them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from ktx_jax.async_engine import DeadlineExceeded, EngineClosed, QueueFull
from ktx_jax.errors import KtxError

log = logging.getLogger("ktx_jax.server")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An answer other than success.

    Args:
      status: of HTTP.
      message: for the person who reads it.
      param: the field of the request that is at fault.
      code: for programs.
      retry_after: seconds after which the request may succeed.
      close: end the connection, since the rest of the request is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        if close:
            self.headers["Connection"] = "close"
        if status == 401:
            # Browsers ask for the key then, so that the chat page works: it is the password, the user name is free.
            self.headers["WWW-Authenticate"] = 'Basic realm="ktx-jax", charset="UTF-8"'

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """The error in the form that clients of `path` know."""
        body = {"error": self.message} if path.startswith("/api/") else self.body()
        return JSONResponse(body, self.status, headers=self.headers)


def api_error(error: Exception) -> ApiError:
    """The answer to `error`; one that nobody foresaw is logged, and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, DeadlineExceeded):
        return ApiError(408, str(error), code="timeout")
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="closing", retry_after=10)
    if isinstance(error, KtxError):
        return ApiError(400, str(error), code="invalid_value")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says how", code="internal_error")


def invalid(problems: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The error for what pydantic found wrong with `body`.

    A value that could be of several types has a problem for each; the one that lies deepest is of the type meant.
    """
    if problems[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problems[0]['ctx']['error']}", code="invalid_json")
    places = [_place(problem, body) for problem in problems]
    place = max(places, key=len)
    problem = problems[places.index(place)]
    cause = problem.get("ctx", {}).get("error")
    param = ".".join([*place, *([cause.param] if hasattr(cause, "param") else [])]) or None
    if problem["type"] == "extra_forbidden":
        message = f"unknown parameter {param!r}: this server does not have it, and ignores nothing silently"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"missing: {param or 'the body'}", param=param, code="missing_parameter")
    return ApiError(400, f"{param or 'the body'}: {cause or problem['msg']}", param=param, code="invalid_value")


def _place(problem: Mapping[str, Any], body: Any) -> list[str]:
    """The path of fields to the problem; pydantic's own has names of types in it."""
    place: list[str] = []
    for part in problem["loc"][1:]:
        if (isinstance(body, Mapping) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
        elif not (problem["type"] == "missing" and part == problem["loc"][-1]):
            continue
        place.append(str(part))
    return place
