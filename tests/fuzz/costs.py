"""What a parser takes for a document: bytes, and calls. Both must follow the document's length."""

from __future__ import annotations

import sys
import tracemalloc
from types import FrameType

from tests.fuzz.targets import Target, tried

BYTES_AT_LEAST = 700_000
# a few calls for each key of an object, and for each problem that is only counted
CALLS_PER_BYTE, CALLS_AT_LEAST = 32, 60_000


def peak(target: Target, raw: bytes) -> int:
    """The most bytes that Python held at a time while it read a document."""
    tracemalloc.start()
    try:
        tried(target, raw)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def calls(target: Target, raw: bytes) -> int:
    """How many functions were called for it: work as a number that no other process changes."""
    count = 0

    def counting(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(counting)
    try:
        tried(target, raw)
    finally:
        sys.setprofile(before)
    return count


def check_costs(target: Target, raw: bytes) -> None:
    """Fail for a document that takes more than its length warrants."""
    held, work = peak(target, raw), calls(target, raw)
    size = len(raw)
    assert held < target.bytes_per_byte * size + BYTES_AT_LEAST, f"{held:,} bytes for {size:,}"
    assert work < CALLS_PER_BYTE * size + CALLS_AT_LEAST, f"{work:,} calls for {size:,} bytes"
