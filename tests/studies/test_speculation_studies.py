"""The studies of speculation, attention, caches and latent attention run, quick and without data."""

import pytest

from hasten.testing.study_kit import StudyKit


@pytest.mark.slow
class TestLeanAttention(StudyKit):
    name = "lean-attention"


@pytest.mark.slow
class TestDySpec(StudyKit):
    name = "dyspec"


@pytest.mark.slow
class TestSmartSpec(StudyKit):
    name = "smartspec"


@pytest.mark.slow
class TestTriForce(StudyKit):
    name = "triforce"


@pytest.mark.slow
class TestCacheGen(StudyKit):
    name = "cachegen"


@pytest.mark.slow
class TestTransMLA(StudyKit):
    name = "transmla"
