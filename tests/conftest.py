"""Hypothesis: the same examples in every run, unless the environment asks for new ones.

What tests counted with `record_property`, said at the end. And a fixture that several rooms share.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.engine.cloning import cloning  # noqa: F401 - a fixture

# before torch is imported: workers share the cores, and its waiting threads would spin on them
os.environ.setdefault("OMP_NUM_THREADS", "1")

# conversions sync to the disk, so an example's time says nothing about the code
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=25, **_COMMON)
settings.register_profile("search", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A count that nobody sees proves nothing: kills, flips, faults."""
    lines = [
        f"{report.nodeid}: {', '.join(f'{name} {value}' for name, value in report.user_properties)}"
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call" and report.user_properties
    ]
    if lines:
        terminalreporter.section("counted")
        for line in sorted(lines):
            terminalreporter.line(line)
