"""Strict JSON: no duplicate keys, no NaN, bounded integers, UTF-8 only; errors as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import BinaryIO, Final, NoReturn, TypeAlias, TypeVar

from moeconv.errors import BadJson, DuplicateKey, MoeconvError, quoted

T = TypeVar("T")
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
Pairs: TypeAlias = "list[tuple[str, Json]]"  # the members of an object, in order
MAX_INTEGER = 2**63 - 1
_BATCH: Final = 1000
# an empty list or object takes twenty times its bytes: no document of ours, and no real one, is
# made of them
_BYTES_A_CONTAINER = 8
_FREE_CONTAINERS = 2000
# every shorter integer is within bounds, and the parser's own `int` is many times as fast
_LONG = b"0" * 19
_DIGITS = bytes(b"0"[0] if chr(byte).isdecimal() and byte < 128 else 32 for byte in range(256))


class _Duplicate(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: Pairs) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key)
            seen.add(key)
    return members


def _members(doc: dict[str, Json]) -> int:
    """The members of an object and of its objects.

    No text has fewer colons than pairs. One that has as many as this counts thus has no pair that
    another of its key replaced, however deep it goes.
    """
    return len(doc) + sum(len(value) for value in doc.values() if isinstance(value, dict))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _bounded_int(text: str) -> int:
    # checked by length first: int() of a million digits is a denial of service
    if len(text) > 20 or abs(value := int(text)) > MAX_INTEGER:
        raise ValueError("an integer exceeds 2^63-1")
    return value


def _any_int(text: str) -> int:
    if len(text) > 400:
        raise ValueError("an integer has more than 400 digits")
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is a float where only integers are allowed")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is out of the range of a float")
    return value


def loads(
    data: bytes,
    *,
    where: str,
    floats: bool = True,
    constants: bool = False,
    shallow: bool = False,
    hollow: bool = False,
) -> Json:
    """Parse one JSON document.

    floats=False refuses every non-integer number; constants=True lets NaN, Infinity and integers
    of up to 400 digits pass (config.json files of real models carry them). shallow: it should be
    one object of objects; without colons in its texts half a million are then read in less time.
    hollow: it may be made of empty lists, as a line of a journal is where no digests were taken.
    Raises DuplicateKey, BadJson; both name `where`.
    """
    if not hollow:
        _refuse_hollow(data, where)
    may_be_long = _may_be_long(data)

    def parsed(text: str, unique: Callable[[Pairs], Json] | None) -> Json:
        doc: Json = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=float if constants else _no_constant,
            parse_int=(_any_int if constants else _bounded_int) if may_be_long else None,
            parse_float=_float if floats else _no_float,
        )
        return doc

    def at_sight(text: str) -> dict[str, Json] | None:
        try:
            doc = parsed(text, None)
        except (ValueError, RecursionError):
            return None  # a duplicate key before that point must be reported first
        return doc if isinstance(doc, dict) and _members(doc) == text.count(":") else None

    with _refusals(where):
        text = data.decode("utf-8")
        found = at_sight(text) if shallow else None
        return parsed(text, _unique) if found is None else found


def loads_records(
    data: bytes,
    *,
    where: str,
    record: Callable[[Pairs], T | None],
    floats: bool = True,
    start: int = 0,
) -> dict[str, T | Json] | T | Json:
    """Parse an object of many small objects without ever holding a dict for each of them.

    record: called with the members of every object, innermost first; what it returns takes
    the object's place, and None leaves the object a dict. floats: as for `loads`.
    start: where in `data` the document begins.
    Raises DuplicateKey, BadJson.
    """

    _refuse_hollow(data, where)

    def members(pairs: Pairs) -> T | dict[str, Json]:
        found = record(pairs)
        return _unique(pairs) if found is None else found

    with _refusals(where):
        doc: dict[str, T | Json] | T | Json = json.loads(
            str(memoryview(data)[start:], "utf-8"),  # no second copy of a hundred megabytes
            object_pairs_hook=members,
            parse_constant=_no_constant,
            parse_int=_bounded_int if _may_be_long(data) else None,
            parse_float=_float if floats else _no_float,
        )
        return doc


def _refuse_hollow(data: bytes, where: str) -> None:
    """Raise BadJson for a document that is made of empty lists and objects."""
    containers = data.count(b"[") + data.count(b"{")
    if containers > _FREE_CONTAINERS + len(data) // _BYTES_A_CONTAINER:
        raise BadJson(
            "the JSON has too many lists and objects for its length",
            at=where,
            cause=f"{containers:,} of them begin in {len(data):,} bytes",
            fix="check that this is the right file",
        )


def _may_be_long(data: bytes) -> bool:
    """Whether an integer may be out of bounds, so that each one has to be checked."""
    return _LONG in data.translate(_DIGITS)


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Turn what the parser raises into our own errors."""
    try:
        yield
    except _Duplicate as problem:
        raise DuplicateKey(
            f"the JSON key {quoted(problem.key)} appears twice in one object",
            at=where,
            cause="parsers disagree on which one counts",
            fix="download the file again, or remove one of the two entries",
        ) from None
    except RecursionError:
        raise BadJson("the JSON is nested too deeply", at=where) from None
    except ValueError as problem:
        # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise BadJson("not a JSON document", at=where, cause=str(problem)) from None


def may_escape(data: bytes) -> bool:
    """Whether a document spells characters by number: else all its texts are encodable."""
    return rb"\u" in data


def encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can spell but UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def dumps(doc: Json) -> bytes:
    """Canonical bytes: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        doc, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def write_items(stream: BinaryIO, docs: Iterable[Json]) -> None:
    """Write the canonical bytes of a list's items, with commas between them.

    A million of them are never in memory at once, neither as values nor as pieces of text.
    """
    rest = iter(docs)
    before = b""
    while batch := list(islice(rest, _BATCH)):
        stream.write(before + dumps(batch)[1:-1])
        before = b","


def error_json(problem: MoeconvError) -> dict[str, Json]:
    """The fields of an error as one JSON object; `also` where it carries further problems."""
    doc: dict[str, Json] = {
        "type": "error",
        "code": problem.code,
        "exit_code": problem.exit_code,
        "message": problem.message,
        "at": problem.at,
        "cause": problem.cause,
        "fix": problem.fix,
    }
    if problem.also:
        doc["also"] = [error_json(other) for other in problem.also]
    return doc
