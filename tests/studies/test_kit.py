from __future__ import annotations

from collections.abc import Iterator

import pytest

from hasten.studies import Check, Scale, Study
from hasten.testing.study_kit import StudyKit


def _run(scale: Scale) -> Iterator[Check]:
    scale.progress("first", 0.2)
    yield Check.at_least("ratio", 2.0, 1.5, "×")
    scale.progress("second", 0.8)
    yield Check.unavailable("trace", "no data here")


class TestGood(StudyKit):
    name = "a-good-one"

    def study(self) -> Study:
        return Study(self.name, "it is faster than the other", "2×", _run)


def _backwards(scale: Scale) -> Iterator[Check]:
    scale.progress("first", 0.9)
    scale.progress("second", 0.1)
    yield Check("no threshold", 1.0, holds=True)


def test_the_kit_catches_bad_studies() -> None:
    class Kit(StudyKit):
        name = "a-bad-one"

        def study(self) -> Study:
            return Study(self.name, "fast", "2×", _backwards)

    for test in ("test_claims_something", "test_progress_goes_forward", "test_judged_checks_have_a_threshold"):
        with pytest.raises(AssertionError):
            getattr(Kit(), test)()
