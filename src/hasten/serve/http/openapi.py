"""GET /openapi.json: the interface as an OpenAPI 3.1 document, made from the schemas that read the requests."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hasten.serve.http import schemas as s

__all__ = ["document"]

_ERRORS = {
    400: "the request is at fault",
    401: "the API key is missing or wrong",
    404: "the model or the path is not known",
    413: "the body is too large",
    429: "the queue is full; retry after the given time",
    503: "the engine is not available, or the server stops",
}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _post(summary: str, request: type[BaseModel], response: type[BaseModel], *, stream: bool = False) -> dict[str, Any]:
    content = _json(response)
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    for status, text in _ERRORS.items():
        responses[str(status)] = {"description": text, "content": _json(s.ErrorResponse)}
    return {
        "post": {
            "summary": summary,
            "operationId": summary.lower().replace(" ", "_"),
            "requestBody": {"required": True, "content": _json(request)},
            "responses": responses,
        }
    }


def _get(summary: str, content: dict[str, Any], *statuses: int) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
    for status in statuses:
        responses[str(status)] = {"description": _ERRORS[status], "content": _json(s.ErrorResponse)}
    return {"get": {"summary": summary, "operationId": summary.lower().replace(" ", "_"), "responses": responses}}


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The document as plain data.

    >>> sorted(document()["paths"])[-1]
    '/v1/models'
    """
    requests = (s.CompletionRequest, s.ChatRequest, s.TokenizeRequest, s.DetokenizeRequest)
    responses = (
        s.CompletionResponse,
        s.ChatResponse,
        s.TokenizeResponse,
        s.DetokenizeResponse,
        s.ModelList,
        s.ErrorResponse,
    )
    kinds = [(m, "validation") for m in requests] + [(m, "serialization") for m in responses]
    _, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    try:
        release = version("hasten")
    except PackageNotFoundError:
        release = "0"
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hasten", "version": release, "description": "OpenAI-compatible text generation"},
        "paths": {
            "/v1/completions": _post("Complete text", s.CompletionRequest, s.CompletionResponse, stream=True),
            "/v1/chat/completions": _post("Answer a chat", s.ChatRequest, s.ChatResponse, stream=True),
            "/v1/models": _get("List models", _json(s.ModelList), 401, 503),
            "/tokenize": _post("Tokenize text", s.TokenizeRequest, s.TokenizeResponse),
            "/detokenize": _post("Detokenize tokens", s.DetokenizeRequest, s.DetokenizeResponse),
            "/health": _get("Tell health", {"application/json": {"schema": {"type": "object"}}}, 503),
            "/metrics": _get("Show metrics", text, 503),
        },
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
