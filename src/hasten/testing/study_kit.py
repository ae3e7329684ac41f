"""The test kit of the Study contract.

>>> class TestSarathi(StudyKit):
...     name = "sarathi-serve"
"""

from __future__ import annotations

import json
from typing import ClassVar

from hasten.studies import Check, Result, Scale, Study, execute, load

__all__ = ["StudyKit"]


class StudyKit:
    """Inherit in a test module and set ``name``; the study runs once, quick and without data."""

    name: ClassVar[str]
    """the study, as ``hasten study list`` shows it"""

    _results: ClassVar[dict[str, tuple[Result, list[tuple[str, float]]]]] = {}

    def study(self) -> Study:
        """The study under test."""
        return load(self.name)

    def scale(self, progress: list[tuple[str, float]]) -> Scale:
        """Quick, no data, and the progress is written down."""
        return Scale(quick=True, seed=0, progress=lambda stage, share: progress.append((stage, share)))

    def result(self) -> tuple[Result, list[tuple[str, float]]]:
        """What one quick run gave, and the progress that it told."""
        if self.name not in self._results:
            told: list[tuple[str, float]] = []
            self._results[self.name] = (execute(self.study(), self.scale(told)), told)
        return self._results[self.name]

    def test_claims_something(self) -> None:
        study = self.study()
        assert len(study.claim.split()) > 3
        assert study.published

    def test_runs_without_data(self) -> None:
        result, _ = self.result()
        assert result.checks
        assert all(isinstance(c, Check) for c in result.checks)
        assert result.verdict in ("holds", "in part", "does not hold", "not run")

    def test_result_is_json(self) -> None:
        result, _ = self.result()
        document = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert document["system"] == self.name
        assert document["machine"]["hash"]

    def test_judged_checks_have_a_threshold(self) -> None:
        result, _ = self.result()
        assert all(c.threshold for c in result.checks if c.holds is not None)

    def test_progress_goes_forward(self) -> None:
        _, told = self.result()
        shares = [share for _, share in told]
        assert shares == sorted(shares), "progress went back"
        assert all(0 <= share <= 1 for share in shares)
        assert all(stage for stage, _ in told)
