"""How many problems a report lists, whatever there are."""

from __future__ import annotations

import pytest

from moeconv.errors import Damaged
from moeconv.verification.report import MAX_REPORTED, limit_problems


@pytest.mark.parametrize("more", [0, 1, 2, 100_000])
def test_the_first_problems_are_listed_and_the_others_counted(more: int) -> None:
    found = limit_problems(Damaged(f"number {n}") for n in range(MAX_REPORTED + more))
    assert [p.message for p in found[:MAX_REPORTED]] == [f"number {n}" for n in range(MAX_REPORTED)]
    assert len(found) == MAX_REPORTED + (more > 0)
    if more:
        noun = "more problem" if more == 1 else "more problems"
        assert found[-1].message == f"{more:,} {noun}, not listed"
