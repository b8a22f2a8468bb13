"""Lists of lists of integers, of which a manifest has millions: read fast, and as strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.jsonvalue import Json
from moeconv.schema import MAX_COUNT, Problems, Table

ODD: list[Json] = [-1, MAX_COUNT + 1, 1.0, True, None, "1", [1], {}]


def read(rows: Json) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """The rows as they are read, and what is said of them."""
    problems = Problems()
    return Table({"runs": rows}, "", problems).integer_lists("runs", 3), problems.found


@given(st.lists(st.lists(st.integers(0, MAX_COUNT), min_size=3, max_size=3), max_size=5))
def test_counts_are_read_as_they_are(rows: list[list[int]]) -> None:
    assert read(list(rows)) == (tuple(map(tuple, rows)), [])


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize("place", range(3))
def test_what_is_no_count_is_refused_where_it_stands(odd: Json, place: int) -> None:
    row: list[Json] = [1, 2, 3]
    row[place] = odd
    rows, problems = read([[1, 2, 3], row])
    assert rows == ()
    assert problems == ["runs[1]: must be 3 integers between 0 and 2^53-1"]


@pytest.mark.parametrize("row", [[1, 2], [1, 2, 3, 4], [], "123", 3, None, {"a": 1}], ids=repr)
def test_rows_of_another_length_or_kind_are_refused(row: Json) -> None:
    assert read([[1, 2, 3], row])[1] == ["runs[1]: must be 3 integers between 0 and 2^53-1"]


def test_short_and_long_rows_do_not_make_up_for_one_another() -> None:
    assert len(read([[1, 2], [1, 2, 3, 4]])[1]) == 2
    assert len(read([[1, 2, 3], [1, 2, 3, None]])[1]) == 1
