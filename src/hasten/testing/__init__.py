"""Test kits: one per contract. A new part is one class and one fixture line. Needs pytest.

>>> from hasten.testing import TechniqueKit, StudyKit
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.testing.model_kit import ModelKit
    from hasten.testing.policy_kit import PolicyKit
    from hasten.testing.stream_kit import Stream, StreamKit
    from hasten.testing.study_kit import StudyKit
    from hasten.testing.technique_kit import TechniqueKit

__all__ = ["ModelKit", "PolicyKit", "Stream", "StreamKit", "StudyKit", "TechniqueKit"]

_HOMES = {
    "ModelKit": "model_kit",
    "PolicyKit": "policy_kit",
    "Stream": "stream_kit",
    "StreamKit": "stream_kit",
    "StudyKit": "study_kit",
    "TechniqueKit": "technique_kit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hasten.testing.{_HOMES[name]}"), name)
