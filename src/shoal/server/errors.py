"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

Knows HTTP statuses and JSON; knows nothing of what went wrong beyond an ErrorInfo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from shoal.core.errors import RequestError
from shoal.core.request import ErrorInfo

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
}
INTERNAL_ERROR = ErrorInfo(
    status=500,
    code="internal_error",
    message="The server failed on this request; its log has the reason under the X-Request-Id.",
)


def error_payload(error: ErrorInfo) -> bytes:
    """The JSON body of an error, also sent as the last event of a stream that broke."""
    kind = _TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return msgspec.json.encode(
        {
            "error": {
                "message": _utf8(error.message),
                "type": kind,
                "param": None if error.param is None else _utf8(error.param),
                "code": error.code,
            }
        }
    )


def _utf8(text: str) -> str:
    r"""With lone surrogates, which JSON can spell and UTF-8 cannot, as "\ud800"."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(error: ErrorInfo, headers: Mapping[str, str] | None = None) -> Response:
    """The whole response, with Retry-After where trying again makes sense."""
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(error_payload(error), error.status, all_headers, "application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Every refusal leaves in OpenAI's shape, whoever raised it."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(ErrorInfo.of(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code in (404, 405):
        detail = f"{request.method} {request.url.path}: {detail}; see /openapi.json"
    code = _CODES.get(error.status_code, "http_error")
    info = ErrorInfo(status=error.status_code, code=code, message=detail)
    return error_response(info, error.headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_describe(error))


def _describe(error: RequestValidationError) -> ErrorInfo:
    """The most telling of pydantic's complaints, as one sentence."""
    # A union complains once per branch; the branch that got furthest is the one meant.
    first = max(error.errors(), key=lambda problem: len(problem["loc"]))
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return ErrorInfo(
            status=400,
            code="invalid_json",
            message=f"The body is not JSON: {reason} at character {first['loc'][-1]}.",
        )
    if isinstance(error.body, bytes) or error.body is None:
        return ErrorInfo(
            status=400,
            code="invalid_request",
            message="The body must be a JSON object, sent with Content-Type: application/json.",
        )
    param = _path(first["loc"][1:])
    where = f"{param}: " if param else ""
    return ErrorInfo(
        status=400,
        code="missing_field" if first["type"] == "missing" else "invalid_value",
        message=f"{where}{first['msg']}{_got(first)}",
        param=param or None,
    )


def _got(problem: dict[str, Any]) -> str:
    value = problem.get("input")
    if problem["type"] == "missing" or isinstance(value, dict | list):
        return ""
    text = json.dumps(value)
    return f", got {text if len(text) <= 80 else text[:80] + '...'}"


def _path(loc: tuple[str | int, ...]) -> str:
    """("messages", 0, "ChatMessage", "role") → "messages[0].role"."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in _BRANCHES:
            path += f".{part}" if path else part
    return path


_BRANCHES = frozenset({"str", "int", "float", "bool", "dict", "list", "none"})
