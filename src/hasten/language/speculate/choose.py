"""Which proposer a model gets: from the words of a command line to an object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.errors import ConfigurationError
from hasten.language.speculate.proposal import FirstOf, Proposer

__all__ = ["CHOICES", "DRAFTS", "choose"]

CHOICES = ("auto", "off", "draft", "ngram")

DRAFTS = {"pycode-4m": "pycode-draft-0.7m"}
"""Drafts of the embedded models."""


def choose(
    model: Any, how: str = "auto", draft: str | Path | None = None, *, load: Callable[..., Any] | None = None
) -> Proposer | None:
    """A proposer for ``model``, None for ``off``.

    ``auto``: prompt lookup where the text repeats itself and the draft elsewhere, if there is a draft (the one named,
    or the embedded model's own); prompt lookup alone if not. ``load`` reads the draft. Raises
    :class:`~hasten.errors.ConfigurationError` for an unknown word, a missing draft or one with another vocabulary.
    """
    from hasten.language.speculate.lookup import PromptLookup

    if how not in CHOICES:
        raise ConfigurationError(f"--speculate is {how!r}; choose one of {', '.join(CHOICES)}")
    if how == "off":
        return None
    name = draft if draft is not None else DRAFTS.get(str(getattr(model, "name", "")))
    if how == "ngram" or (how == "auto" and name is None):
        if draft is not None and how == "ngram":
            raise ConfigurationError("--speculate ngram uses no draft; leave --draft out, or say --speculate draft")
        return PromptLookup()
    if name is None:
        raise ConfigurationError(f"{model.name} has no draft of its own; name one with --draft, or --speculate ngram")
    from hasten.language.loading import load as from_folder
    from hasten.language.speculate.draft import ModelDraft, check_pair

    small = (load or from_folder)(name)
    check_pair(model, small)
    guess = ModelDraft(small)
    return guess if how == "draft" else FirstOf([PromptLookup(min_ngram=2), guess])
