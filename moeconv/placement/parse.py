"""Rows of expert ids from decoded documents: physical_to_logical, [L, P], or one row, [P].

Whether the ids fit a checkpoint is checked by `placement.model.check`.
"""

from __future__ import annotations

from typing import Final

from moeconv.core.json_value import Json
from moeconv.core.schema import Problems
from moeconv.core.text import counted

MAX_ROWS: Final = 10_000  # of a map: one for each layer
MAX_SLOTS: Final = 1_048_576  # of a row


def parse_rows(value: Json, place: str, problems: Problems) -> tuple[tuple[int, ...], ...]:
    """physical_to_logical, [L, P]; an empty list of rows is a problem."""
    if not isinstance(value, list):
        problems.add(place, f"must be a list of rows, not {kind_of(value)}")
        return ()
    if not value:
        problems.add(place, "has no rows")
    if len(value) > MAX_ROWS:
        problems.add(place, too_many_rows(len(value)))
        return ()
    return tuple(parse_row(row, f"{place}[{n}]", problems) for n, row in enumerate(value))


def too_many_rows(count: int) -> str:
    """The problem of a map with more than MAX_ROWS rows."""
    return f"has {count:,} rows, more than {MAX_ROWS:,}: there is one for each layer"


def parse_row(value: Json, place: str, problems: Problems) -> tuple[int, ...]:
    """The expert in each slot of a layer, [P]; an empty row is a problem."""
    if not isinstance(value, list):
        problems.add(place, f"must be a list of expert ids, not {kind_of(value)}")
        return ()
    if len(value) > MAX_SLOTS:
        problems.add(place, f"has {len(value):,} slots, more than {MAX_SLOTS:,}")
        return ()
    odd = [n for n, item in enumerate(value) if type(item) is not int]
    if odd:
        more = f" (and {counted(len(odd) - 1, 'other')})" if len(odd) > 1 else ""
        text = f"must be an integer, not {kind_of(value[odd[0]])}{more}"
        problems.add(f"{place}[{odd[0]}]", text)
        return ()
    row = tuple(item for item in value if isinstance(item, int))
    if not row:
        problems.add(place, "has no slots")
    elif max(row) >= MAX_SLOTS:
        problems.add(place, f"has expert {max(row)}; ids are below {MAX_SLOTS:,}")
        return ()
    return row


def kind_of(value: Json) -> str:
    """The type of a value, in words for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    names |= {int: "an integer", float: "a float", type(None): "null"}
    return names[type(value)]
