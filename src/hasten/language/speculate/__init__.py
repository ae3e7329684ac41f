"""Speculation: tokens guessed cheaply, checked by the model in one pass, and none that it would not write.

Proposers guess (:mod:`lookup`, :mod:`draft`, trees in :mod:`dyspec`), :mod:`verify` is the one home of verification,
:mod:`loop` runs one sequence, :mod:`triforce` nests two speculations for long contexts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.language.speculate.compare import compare
    from hasten.language.speculate.draft import ModelDraft
    from hasten.language.speculate.dyspec import DynamicTree
    from hasten.language.speculate.law import Dice
    from hasten.language.speculate.lookup import PromptLookup
    from hasten.language.speculate.loop import Speculated, generate
    from hasten.language.speculate.proposal import Ask, FirstOf, Proposal, Proposer
    from hasten.language.speculate.shapes import Chain, FixedTree, KAry
    from hasten.language.speculate.tree import TokenTree
    from hasten.language.speculate.tree_draft import TreeDraft
    from hasten.language.speculate.triforce import TriForce

_HOMES = {
    "Ask": "proposal",
    "Chain": "shapes",
    "Dice": "law",
    "DynamicTree": "dyspec",
    "FirstOf": "proposal",
    "FixedTree": "shapes",
    "KAry": "shapes",
    "ModelDraft": "draft",
    "PromptLookup": "lookup",
    "Proposal": "proposal",
    "Proposer": "proposal",
    "Speculated": "loop",
    "TokenTree": "tree",
    "TreeDraft": "tree_draft",
    "TriForce": "triforce",
    "compare": "compare",
    "generate": "loop",
}

__all__ = [
    "Ask",
    "Chain",
    "Dice",
    "DynamicTree",
    "FirstOf",
    "FixedTree",
    "KAry",
    "ModelDraft",
    "PromptLookup",
    "Proposal",
    "Proposer",
    "Speculated",
    "TokenTree",
    "TreeDraft",
    "TriForce",
    "compare",
    "generate",
]


def __getattr__(name: str) -> Any:  # kernels are compiled when something is used, not with the package
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
