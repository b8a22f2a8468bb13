"""Lists of lists of integers, of which a manifest has millions: read fast, and as strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.core.schema import MAX_COUNT, MAX_KEPT, SHOWN, Problems, Table
from moeconv.core.strict_json import Json

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
def test_what_is_not_a_count_is_refused_where_it_is(odd: Json, place: int) -> None:
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


# --- many problems -----------------------------------------------------------------------------
def test_problems_are_all_counted_and_few_are_kept() -> None:
    problems = Problems()
    items = Table({"items": [0] * 50_000}, "", problems).tables("items")
    assert list(items) == []
    assert (problems.count, len(problems.found), problems.skipped) == (50_000, MAX_KEPT, True)
    assert problems.shown()[0] == "items[0]: must be an object"
    assert problems.shown()[SHOWN:] == ["and 49,980 more"]


def test_few_problems_are_all_shown() -> None:
    problems = Problems()
    for number in range(SHOWN):
        problems.add(f"[{number}]", "is odd")
    assert problems.shown() == [f"[{number}]: is odd" for number in range(SHOWN)]


def test_a_list_of_too_many_objects_is_one_problem() -> None:
    problems = Problems()
    assert list(Table({"items": [{}] * 11}, "", problems).tables("items", 10)) == []
    assert problems.found == ["items: has 11 items, more than 10"]


def test_of_many_unknown_keys_the_first_ones_are_compared_with_the_known() -> None:
    problems = Problems()
    table = Table({f"sise{n}": 0 for n in range(50)} | {"size" * 30: 0}, "", problems)
    table.expects(("size",))
    table.finish()
    suggested = [text for text in problems.found if "did you mean `size`?" in text]
    assert problems.count == 51
    assert 0 < len(suggested) <= 10


def test_a_long_key_is_not_repeated_below_it() -> None:
    problems = Problems()
    Table({"k" * 100_000: {}}, "", problems).table("k" * 100_000).text("name")
    assert "…" in problems.found[0]
    assert len(problems.found[0]) < 400


def test_a_number_of_any_length_can_be_reported() -> None:
    problems = Problems()
    Table({"size": 1 << 100_000}, "", problems).integer("size")
    assert problems.found == ["size: must be between 0 and 2^53-1, not a far larger number"]
