"""Names as they sort: the key against a plain way to write the same order."""

from __future__ import annotations

import re
import sys

from hypothesis import given
from hypothesis import strategies as st

from moeconv.core.names import natural_key
from moeconv.errors import abridged, quoted

NAMES = st.text(st.sampled_from("0019ab.-\0\1\x7f\x80\xff\u0663\U0010ffff"), max_size=12)


def plain(name: str) -> list[tuple[int, int, str, str]]:
    """Digits by their length, then as text, then with all zeros; they come before other text."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [
        (0, len(part.lstrip("0")), part.lstrip("0"), part) if part[0] in "0123456789"
        else (1, 0, part, part)
        for part in parts
    ]  # fmt: skip


@given(NAMES, NAMES)
def test_the_natural_order(one: str, other: str) -> None:
    assert (natural_key(one) < natural_key(other)) == (plain(one) < plain(other))
    assert (natural_key(one) == natural_key(other)) == (one == other)


@given(st.tuples(*[st.integers(0, 300)] * 2), st.tuples(*[st.integers(0, 300)] * 2))
def test_the_natural_order_of_long_numbers(one: tuple[int, int], other: tuple[int, int]) -> None:
    first, second = (f"x{'0' * zeros}{'7' * digits}." for zeros, digits in (one, other))
    assert (natural_key(first) < natural_key(second)) == (plain(first) < plain(second))


@given(st.integers(1, 2000))
def test_a_key_is_hardly_longer_than_its_name(count: int) -> None:
    name = "1." * count
    assert sys.getsizeof(natural_key(name)) < 4 * len(name) + 100


def test_long_names_are_abridged_and_paths_are_not() -> None:
    assert abridged("a" * 10, 10) == "a" * 10
    assert abridged("a" * 50 + "b" * 50, 10) == "aaaaa…bbbbb"
    assert quoted("/" + "p" * 4095) == f"`/{'p' * 4095}`"
    assert len(quoted("n" * 10**6)) < 5000
