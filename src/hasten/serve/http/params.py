"""From the body of a request to what the engine understands."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hasten.budget import SLO
from hasten.errors import BudgetError, InvalidRequestError
from hasten.language.params import GrammarSpec, SamplingParams
from hasten.serve.http.schemas import Sampling

__all__ = ["parse", "sampling_params", "slo_of"]

Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], body: bytes) -> Model:
    """Read a body. Raises ``InvalidRequestError`` that names the first field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = (
            ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in kind.model_fields) or None
        )
        given = repr(first.get("input"))
        given = given if len(given) <= 80 else given[:77] + "..."
        text = (
            f"{where or 'the body'}: {first['msg']}, got {given}"
            if where
            else f"the body cannot be read: {first['msg']}"
        )
        raise InvalidRequestError(text, where) from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None


def _grammar(request: Sampling) -> GrammarSpec | None:
    asked: list[GrammarSpec] = []
    form = request.response_format
    if form is not None and form.type == "json_object":
        asked.append(GrammarSpec("json_object"))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.json_schema is None:
            raise InvalidRequestError(
                "response_format is json_schema without a schema; give response_format.json_schema.schema",
                "response_format",
            )
        asked.append(GrammarSpec("json_schema", json.dumps(form.json_schema.json_schema)))
    if request.guided_json is not None:
        text = request.guided_json if isinstance(request.guided_json, str) else json.dumps(request.guided_json)
        asked.append(GrammarSpec("json_schema", text))
    if request.guided_regex is not None:
        asked.append(GrammarSpec("regex", request.guided_regex))
    if request.guided_grammar is not None:
        asked.append(GrammarSpec("grammar", request.guided_grammar))
    if request.guided_choice is not None:
        options = " | ".join(json.dumps(choice) for choice in request.guided_choice)
        asked.append(GrammarSpec("grammar", f"root ::= {options}"))
    if len(asked) > 1:
        raise InvalidRequestError("several forms of guided decoding were given; give one", "response_format")
    if asked and len(asked[0].text) > 1 << 16:
        raise InvalidRequestError(
            f"the {asked[0].kind} has {len(asked[0].text)} characters; at most 65536", "response_format"
        )
    return asked[0] if asked else None


def sampling_params(
    request: Sampling, *, max_tokens: int, logprobs: int | None, defaults: dict[str, Any]
) -> SamplingParams:
    """The knobs of a request; what it leaves open comes from ``defaults`` (the server's), then from the API."""

    def given(name: str, standard: Any) -> Any:
        value = getattr(request, name)
        return defaults.get(name, standard) if value is None else value

    if request.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {request.min_tokens} and the answer may have {max_tokens}; lower it", "min_tokens"
        )
    return SamplingParams.make(
        max_tokens=max_tokens,
        temperature=given("temperature", 1.0),
        top_k=given("top_k", 0),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        logit_bias=request.logit_bias,  # type: ignore[arg-type]
        seed=request.seed,
        stop=request.stop,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens,
        grammar=_grammar(request),
    )


def slo_of(request: Sampling) -> SLO | None:
    """The request's own objective."""
    if request.slo is None:
        return None
    try:
        return SLO.parse(request.slo)
    except BudgetError as error:
        raise InvalidRequestError(str(error), "slo") from None
