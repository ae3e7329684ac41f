"""Errors as the OpenAI API writes them: ``{"error": {"message", "type", "param", "code"}}`` with the right status."""

from __future__ import annotations

import json
import math
from typing import Any

from hasten.errors import (
    BudgetError,
    ContextLengthError,
    EngineDeadError,
    EngineStoppingError,
    HastenError,
    MissingExtraError,
    OverloadedError,
    RequestError,
)

__all__ = ["error_body", "status_of"]


def status_of(error: HastenError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, (RequestError, BudgetError, MissingExtraError)):
        return 400
    if isinstance(error, OverloadedError):
        return 429
    if isinstance(error, (EngineDeadError, EngineStoppingError)):
        return 503
    return 500


def error_object(error: HastenError) -> dict[str, Any]:
    """The ``error`` object."""
    kinds = {400: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
    code: str | None = None
    if isinstance(error, ContextLengthError):
        code = "context_length_exceeded"
    elif isinstance(error, OverloadedError):
        code = "server_overloaded"
    elif isinstance(error, EngineStoppingError):
        code = "server_stopping"
    elif isinstance(error, EngineDeadError):
        code = "engine_unavailable"
    return {
        "message": str(error),
        "type": kinds.get(status_of(error), "internal_error"),
        "param": getattr(error, "param", None),
        "code": code,
    }


def error_body(error: HastenError) -> tuple[int, dict[str, str], bytes]:
    """Status, extra headers and body of the response to an error."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif isinstance(error, EngineDeadError):
        headers["retry-after"] = "1"
    return status_of(error), headers, json.dumps({"error": error_object(error)}).encode()
