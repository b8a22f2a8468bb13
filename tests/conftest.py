"""Hypothesis: the same examples in every run, unless the environment asks for new ones."""

import os

from hypothesis import HealthCheck, settings

# conversions sync to the disk, so an example's time says nothing about the code
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=40, **_COMMON)
settings.register_profile("search", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
