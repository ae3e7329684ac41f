"""Which proposer a model gets: from the words of a command line to an object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.errors import ConfigurationError
from hasten.language.speculate.proposal import FirstOf, Proposer

__all__ = ["CHOICES", "DRAFTS", "choose", "parse"]

CHOICES = ("auto", "off", "draft", "ngram", "tree", "triforce", "triforce-means")

DRAFTS = {"pycode-4m": "pycode-draft-0.7m"}
"""Drafts of the embedded models."""

_SIZED = {"tree": "guesses of a tree", **dict.fromkeys(("triforce", "triforce-means"), "tokens of retrieved cache")}


def parse(how: str) -> tuple[str, int | None]:
    """A word and its size: ``tree:16`` is a tree of 16 guesses, ``triforce:1024`` retrieves 1,024 tokens.

    >>> parse("tree:16"), parse("auto")
    (('tree', 16), ('auto', None))
    """
    word, colon, size = how.partition(":")
    if word not in CHOICES or (colon and word not in _SIZED):
        raise ConfigurationError(
            f"--speculate is {how!r}; choose one of {', '.join(CHOICES)}, the last three also with a size: tree:16"
        )
    if not colon:
        return word, None
    if not size.isdigit() or int(size) < 1:
        raise ConfigurationError(f"--speculate is {how!r}; the size counts {_SIZED[word]}: {word}:16 for example")
    return word, int(size)


def choose(
    model: Any, how: str = "auto", draft: str | Path | None = None, *, load: Callable[..., Any] | None = None
) -> Proposer | None:
    """A proposer for ``model``, None for ``off``.

    ``auto``: prompt lookup where the text repeats itself and the draft elsewhere, if there is a draft (the one named,
    or the embedded model's own); prompt lookup alone if not. ``tree``: trees of the draft. ``triforce``: the model over
    a part of its own cache, for long contexts, with what ``auto`` gives guessing for it and for short ones; the part is
    what it attends to, or with ``triforce-means`` what mean keys say, as published. ``load`` reads the draft.

    Raises :class:`~hasten.errors.ConfigurationError` for an unknown word, a missing draft or one of another vocabulary.
    """
    from hasten.language.speculate.lookup import PromptLookup

    word, size = parse(how)
    if word == "off":
        return None
    name = draft if draft is not None else DRAFTS.get(str(getattr(model, "name", "")))
    if word == "ngram" and draft is not None:
        raise ConfigurationError("--speculate ngram uses no draft; leave --draft out, or say --speculate draft")
    if word == "ngram" or (word == "auto" and name is None):
        return PromptLookup()
    small = None
    if name is not None:
        from hasten.language.loading import load as from_folder
        from hasten.language.speculate.draft import check_pair

        small = (load or from_folder)(name)
        check_pair(model, small)
    if word.startswith("triforce"):
        return _retrieving(small, size, means=word == "triforce-means")
    if small is None:
        raise ConfigurationError(f"{model.name} has no draft of its own; name one with --draft, or --speculate ngram")
    if word == "tree":
        from hasten.language.speculate.tree_proposer import TreeProposer

        return TreeProposer(small) if size is None else TreeProposer(small, budget=size)
    from hasten.language.speculate.draft import ModelDraft

    guess = ModelDraft(small)
    return guess if word == "draft" else FirstOf([PromptLookup(min_ngram=2), guess])


def _retrieving(small: Any, size: int | None, *, means: bool) -> Proposer:
    from hasten.language.speculate.draft import ModelDraft
    from hasten.language.speculate.lookup import PromptLookup
    from hasten.language.speculate.retrieval import RetrievalProposer, Windowed

    def cheap() -> list[Proposer]:
        lookup: list[Proposer] = [PromptLookup(min_ngram=2)]
        if small is None:
            return lookup
        window = min(240, (small.config.max_position_embeddings - 64) // 2)
        return [*lookup, Windowed(ModelDraft(small), window=window)]

    # The inner level and the one for short contexts have sequences of their own: what they keep would not fit both.
    options: dict[str, Any] = {"choose": "query", "follow": False} if means else {}
    if size is not None:
        options["budget"] = size
    long = RetrievalProposer(FirstOf(cheap()), **options)
    return FirstOf([long, *cheap()])
