"""Answers that conform: a JSON schema, a grammar or a regular expression bounds every next token.

A compiled grammar is a pushdown automaton over the vocabulary (XGrammar, Dong et al. 2024, arXiv:2411.15100; the
package ``xgrammar`` is an extra). Before each choice it sets the logits of the tokens that would break the grammar
to minus infinity, afterwards it moves on by the token that was chosen.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from hasten.errors import InvalidRequestError, MissingExtraError
from hasten.language.params import GrammarSpec
from hasten.language.tokenizer import Tokenizer

__all__ = ["GrammarCompiler", "GrammarState"]


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise MissingExtraError("xgrammar", "grammar", "an answer that follows a schema or grammar") from error
    return xgrammar


class GrammarCompiler:
    """Compiles specifications for one vocabulary; compiled ones are kept and shared.

    Raises :class:`~hasten.errors.MissingExtraError` if xgrammar is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._module = _xgrammar()
        self.vocab_size = vocab_size
        table = tokenizer.token_bytes
        if table is not None:
            words: list[Any] = list(table)
            kind = self._module.VocabType.RAW
        else:
            words = [tokenizer.backend.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
            kind = self._module.VocabType.BYTE_FALLBACK
        words = (words + [b"" if table is not None else ""] * (vocab_size - len(words)))[:vocab_size]
        for index in tokenizer.special_ids:  # markers are not text; an empty word is never allowed
            if index < len(words):
                words[index] = b"" if table is not None else ""
        stops = [i for i in tokenizer.eos_token_ids if i < vocab_size]
        info = self._module.TokenizerInfo(words, kind, vocab_size=vocab_size, stop_token_ids=stops or None)
        self._compiler = self._module.GrammarCompiler(info, max_threads=1, cache_limit_bytes=64 << 20)
        self._ends = bool(stops)

    def start(self, spec: GrammarSpec) -> GrammarState:
        """A fresh state at the beginning of an answer. Raises ``InvalidRequestError`` for a broken specification."""
        try:
            if spec.kind == "json_schema":
                json.loads(spec.text)
                compiled = self._compiler.compile_json_schema(spec.text)
            elif spec.kind == "json_object":
                compiled = self._compiler.compile_json_schema('{"type": "object"}')
            elif spec.kind == "regex":
                compiled = self._compiler.compile_regex(spec.text)
            else:
                compiled = self._compiler.compile_grammar(spec.text)
        except Exception as error:  # whatever the package dislikes is the request's fault
            text = " ".join(str(error).split())[:300]
            raise InvalidRequestError(f"the {spec.kind} cannot be compiled: {text}", "response_format") from error
        matcher = self._module.GrammarMatcher(compiled, terminate_without_stop_token=not self._ends)
        return GrammarState(self._module, matcher, self.vocab_size)


class GrammarState:
    """Where one answer stands in its grammar."""

    def __init__(self, module: Any, matcher: Any, vocab_size: int) -> None:
        self._module = module
        self._matcher = matcher
        self._bitmask = module.allocate_token_bitmask(1, vocab_size)

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return bool(self._matcher.is_terminated())

    def mask(self, logits: Tensor) -> None:
        """Set the logits (vocab,) of tokens that may not come next to minus infinity, in place."""
        if self.done:
            return
        self._matcher.fill_next_token_bitmask(self._bitmask, 0)
        words = self._bitmask.view(torch.uint8)[0]
        bits = words.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1).reshape(-1)
        logits.masked_fill_(bits[: logits.shape[0]] == 0, -torch.inf)

    def accept(self, token: int) -> None:
        """Move on by ``token``."""
        if not self.done:
            self._matcher.accept_token(token)
