"""Speculation: tokens guessed cheaply, checked by the model in one pass, and none that it would not write.

Proposers guess (:mod:`lookup`, :mod:`draft`, :mod:`tree_proposer`, :mod:`retrieval`), :mod:`verify` is the one home
of verification. :mod:`loop` runs one sequence, also with trees that are drawn (:mod:`dyspec`) and with two speculations
one inside the other (:mod:`triforce`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.language.speculate.calibrate import AcceptanceCurve
    from hasten.language.speculate.compare import compare
    from hasten.language.speculate.draft import ModelDraft
    from hasten.language.speculate.dyspec import DynamicTree
    from hasten.language.speculate.law import Dice
    from hasten.language.speculate.lookup import PromptLookup
    from hasten.language.speculate.loop import Speculated, generate
    from hasten.language.speculate.proposal import Ask, FirstOf, Proposal, Proposer
    from hasten.language.speculate.retrieval import RetrievalProposer, Windowed
    from hasten.language.speculate.shapes import Chain, FixedTree, KAry
    from hasten.language.speculate.tree import TokenTree
    from hasten.language.speculate.tree_draft import TreeDraft
    from hasten.language.speculate.tree_proposer import TreeProposer
    from hasten.language.speculate.triforce import TriForce

_HOMES = {
    "AcceptanceCurve": "calibrate",
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
    "RetrievalProposer": "retrieval",
    "Speculated": "loop",
    "TokenTree": "tree",
    "TreeDraft": "tree_draft",
    "TreeProposer": "tree_proposer",
    "TriForce": "triforce",
    "Windowed": "retrieval",
    "compare": "compare",
    "generate": "loop",
}

__all__ = [
    "AcceptanceCurve",
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
    "RetrievalProposer",
    "Speculated",
    "TokenTree",
    "TreeDraft",
    "TreeProposer",
    "TriForce",
    "Windowed",
    "compare",
    "generate",
]


def __getattr__(name: str) -> Any:  # kernels are compiled when something is used, not with the package
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
