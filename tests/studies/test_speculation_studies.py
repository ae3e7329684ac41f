"""The studies of speculation, attention, caches and latent attention run, quick and without data.

Those of dyspec, triforce and transmla take up to a minute each and are left to `hasten study`.
"""

import pytest

from hasten.testing.study_kit import StudyKit


@pytest.mark.slow
class TestLeanAttention(StudyKit):
    name = "lean-attention"


@pytest.mark.slow
class TestSmartSpec(StudyKit):
    name = "smartspec"


@pytest.mark.slow
class TestCacheGen(StudyKit):
    name = "cachegen"
