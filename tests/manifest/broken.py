"""What must happen to a set that breaks a rule: verify reports it, and nothing else takes it."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import MoeconvError
from moeconv.verification.report import DIGEST, STRUCTURE
from tests.badinput.checks import holds, untouched, within


def reported(root: Path, kind: type[MoeconvError], *facts: str) -> MoeconvError:
    """Both levels of verify report a problem of `kind`, and never raise. Returns the first."""
    for level in (DIGEST, STRUCTURE):
        with within(10), untouched(root):
            report = moeconv.verify(root, level=level, jobs=1)
        assert not report.ok, f"unnoticed at level {level}"
        found = [problem for problem in report.problems if type(problem) is kind]
        assert found, f"no {kind.__name__} at level {level}: {report.problems}"
        holds(found[0], kind, *facts)
    return found[0]


def refused_everywhere(root: Path, kind: type[MoeconvError], *facts: str) -> None:
    """`reported`, and the set is no source for anything either."""
    reported(root, kind, *facts)
    out = root.with_name("out")
    for verb in (moeconv.unfuse, moeconv.fuse):
        with within(10), untouched(root, out), pytest.raises(MoeconvError) as caught:
            verb(root, out, jobs=1)
        holds(caught.value, kind, *facts)
