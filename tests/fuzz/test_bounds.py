"""Hostile documents cost what their length warrants, and twice the length no more than twice."""

from __future__ import annotations

import time

import pytest

from tests.fuzz.costs import check_costs, peak
from tests.fuzz.hostile import HOSTILE
from tests.fuzz.targets import TARGETS, Target, tried

SIZES = (1 << 12, 1 << 13, 1 << 14)
# what only the readers of others do is no call of Python's: eight times the length, in time of
# this process alone, is far from the 64 times that each part with each other would take
SHORT, LONG, MOST = 1 << 12, 1 << 15, 32
SMALLEST = 0.002
IN_C = [key for key in HOSTILE if key[0] in {"recipe", "map-yaml", "map-npy"}]


@pytest.mark.parametrize(("name", "kind"), HOSTILE)
def test_memory_and_work_follow_the_length(name: str, kind: str) -> None:
    target = TARGETS[name]
    tried(target, target.seeds[0])  # imports and memos are not the document's
    for size in SIZES:
        check_costs(target, HOSTILE[name, kind](size))


@pytest.mark.parametrize(("name", "kind"), IN_C)
def test_time_follows_the_length(name: str, kind: str) -> None:
    target = TARGETS[name]
    tried(target, target.seeds[0])

    def taken(raw: bytes) -> float:
        start = time.process_time()
        tried(target, raw)
        return time.process_time() - start

    short, long = (HOSTILE[name, kind](size) for size in (SHORT, LONG))
    least = max(SMALLEST, min(taken(short) for _ in range(3)))
    assert min(taken(long) for _ in range(3)) < MOST * least


def test_the_limits_can_fail() -> None:
    greedy = Target(lambda raw: [bytes(1000) for _ in raw], ())
    busy = Target(lambda raw: [len(raw) for _ in range(60 * len(raw))], ())
    raw = b" " * 5000
    assert peak(greedy, raw) > 1000 * len(raw)
    for target in (greedy, busy):
        with pytest.raises(AssertionError, match="for 5,000"):
            check_costs(target, raw)
