"""Chat templates: a list of messages becomes the one text that the model was trained on.

A template is a Jinja program that came with the model, so it runs in Jinja's sandbox and sees only the messages, the
special tokens and a few helpers. Date and time are handed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hasten.errors import InvalidRequestError

__all__ = ["render"]


def _no_date(form: str) -> str:
    raise InvalidRequestError("this chat template asks for the date and none was handed in", "messages")


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise InvalidRequestError(f"the chat template refuses these messages: {message}", "messages")

    def tojson(value: Any, indent: int | None = None, **_: object) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise InvalidRequestError(f"the chat template cannot be read: {error}", "chat_template") from error


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tokens: Mapping[str, str] | None = None,
    extra: Mapping[str, object] | None = None,
    strftime_now: Callable[[str], str] = _no_date,
) -> str:
    """The text of ``messages`` (mappings with ``role`` and ``content``), ready for the answer.

    >>> render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", [{"role": "user", "content": "Hi"}])
    '<user>Hi'

    Raises :class:`~hasten.errors.InvalidRequestError` if the template is broken or refuses the messages.
    """
    names: dict[str, Any] = {"strftime_now": strftime_now, **(tokens or {}), **(extra or {})}
    names.update(messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt)
    try:
        return str(_compile(template).render(**names))
    except InvalidRequestError:
        raise
    except Exception as error:  # whatever a template does wrong is the request's fault, not the server's
        raise InvalidRequestError(f"the chat template fails on these messages: {error}", "messages") from error
