"""Typed reading of small documents (manifest, recipe) that reports all problems at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, TypeGuard, TypeVar

from moeconv.core.names import file_name_problem, relative_path_problem
from moeconv.core.strict_json import Json, encodable
from moeconv.errors import abridged, printable, quoted

T = TypeVar("T")
MAX_TEXT_BYTES: Final = 4096
MAX_COUNT: Final = 2**53 - 1
MAX_LISTED: Final = 4 * 1024 * 1024
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]*", re.ASCII)
MAX_ITEMS: Final = 2_000_000  # of a list of objects
MAX_KEPT: Final = 100  # problems of a document whose text is kept; the others are counted
SHOWN: Final = 20  # problems that a message lists
_MAX_PLACE: Final = 200  # characters of a path or a value in a message
_MAX_SUGGESTED: Final = 10  # unknown keys for which a similar one is looked for
_MAX_SIMILAR: Final = 64  # characters of a key that may be a misspelt one
_MAX_KNOWN: Final = 100  # keys that one may have meant
_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Refused(Exception):
    """Raised at the first problem of a document when its problems are not collected."""


@dataclass(slots=True)
class Problems:
    """What is wrong with one document, in reading order: the first texts, and how many there are.

    skipped: whether items of a list were left out, so that the numbers of the others are not those
    of the document. silent: whether the first one raises Refused instead.
    """

    found: list[str] = field(default_factory=list)
    count: int = 0
    skipped: bool = False
    silent: bool = False
    lenient: bool = False  # unknown keys pass: the document is of a later minor version
    allowance: int = MAX_LISTED  # of items that a few words may make a long list of

    def add(self, place: str, text: str) -> None:
        """Note one problem at `place`, a path such as `parts[3].size`."""
        self.count += 1
        if self.silent:
            raise Refused
        if self.count <= MAX_KEPT:
            self.found.append(printable(f"{place or 'the document'}: {text}"))

    def note(self, text: str) -> None:
        """Note one problem of the whole document."""
        self.count += 1
        if self.silent:
            raise Refused
        if self.count <= MAX_KEPT:
            self.found.append(text)

    def shown(self, most: int = SHOWN) -> list[str]:
        """The texts for a message: the first ones, and how many more there are."""
        more = self.count - most
        return [*self.found[:most], *([f"and {more:,} more"] if more > 0 else [])]


class Table:
    """One JSON or TOML object being read: every getter notes problems and goes on.

    A getter returns a harmless value where the document is wrong; `Problems` decides afterwards
    whether anything of it may be used.
    """

    def __init__(self, doc: object, place: str, problems: Problems) -> None:
        self._members: dict[str, Json] = doc if isinstance(doc, dict) else {}
        self._place = place
        self._read: set[str] = set()
        self._suggested = 0
        self.problems = problems
        if not isinstance(doc, dict):
            problems.add(place, "must be an object")

    def place(self, key: str) -> str:
        """The path of a member, for a message."""
        key = abridged(key, _MAX_PLACE)  # copied into the place of everything below it
        return f"{self._place}.{key}" if self._place and key else self._place or key

    def problem(self, key: str, text: str) -> None:
        """Note a problem of one member."""
        self.problems.add(self.place(key), text)

    def has(self, key: str) -> bool:
        """Whether the member is there and not null."""
        self._read.add(key)
        return self._members.get(key) is not None

    def given(self, key: str) -> bool:
        """Whether the member is there, be it null."""
        self._read.add(key)
        return key in self._members

    def null(self, key: str) -> bool:
        """Whether the member is there and null."""
        return self.given(key) and self._members[key] is None

    def names(self) -> tuple[str, ...]:
        """The member names, in document order."""
        return tuple(self._members)

    def raw(self, key: str) -> Json:
        """The member as it is; the caller checks it."""
        self._read.add(key)
        return self._members.get(key)

    def text(self, key: str, default: str | None = None) -> str:
        """A text of at most 4,096 bytes."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not encodable(value):
            self.problem(key, "must be a string" if key in self._members else "is missing")
            return ""
        if len(value.encode()) > MAX_TEXT_BYTES:
            self.problem(key, f"is longer than {MAX_TEXT_BYTES:,} bytes")
            return ""
        return value

    def word(self, key: str) -> str:
        """A non-empty text."""
        return self.formed(key, "a non-empty string", bool)

    def expects(self, keys: Iterable[str]) -> None:
        """Declare allowed keys, for the suggestions of `finish`."""
        self._read.update(keys)

    def optional_text(self, key: str) -> str | None:
        """A text, or None where the member is absent."""
        self._read.add(key)
        return self.text(key) if self.has(key) else None

    def integer(self, key: str, *, least: int = 0) -> int:
        """An integer between `least` and 2^53 - 1."""
        value = self.raw(key)
        if type(value) is not int:
            self.problem(key, "must be an integer" if key in self._members else "is missing")
            return least
        if not least <= value <= MAX_COUNT:
            shown = value if abs(value) < 2**64 else "a far larger number"
            self.problem(key, f"must be between {least} and 2^53-1, not {shown}")
            return least
        return value

    def flag(self, key: str) -> bool:
        """A boolean; absent is false."""
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            self.problem(key, "must be true or false")
        return value is True

    def digest(self, key: str) -> str:
        """32 lower-case hexadecimal digits."""
        return self.formed(key, "a digest of 32 lower-case hexadecimal digits", is_digest)

    def file_name(self, key: str) -> str:
        """One plain file name."""
        name = self.text(key)
        problem = file_name_problem(name)
        if problem:
            self.problem(key, f"{quoted(name)} {problem}")
        return name

    def relative_path(self, key: str) -> str:
        """Plain file names joined by `/`."""
        path = self.text(key)
        problem = relative_path_problem(path)
        if problem:
            self.problem(key, f"{quoted(path)} {problem}")
        return path

    def formed(self, key: str, what: str, fits: Callable[[str], bool]) -> str:
        """A text of which `fits` is true; `what` says what it must be."""
        before = self.problems.count
        value = self.text(key)
        if self.problems.count == before and not fits(value):
            self.problem(key, f"must be {what}")
        return value

    def _items(self, key: str) -> Iterable[tuple[str, Json]]:
        value = self.raw(key)
        if not isinstance(value, list):
            self.problem(key, "must be a list" if key in self._members else "is missing")
            return ()
        place = self.place(key)
        return ((f"{place}[{n}]", item) for n, item in enumerate(value))

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of texts."""
        if default is not None and not self.has(key):
            return default
        out = []
        for place, item in self._items(key):
            if isinstance(item, str) and encodable(item) and len(item.encode()) <= MAX_TEXT_BYTES:
                out.append(item)
            else:
                self.problems.add(place, "must be a string")
        return tuple(out)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers between 0 and 2^53 - 1."""
        out = []
        for place, item in self._items(key):
            if type(item) is int and 0 <= item <= MAX_COUNT:
                out.append(item)
            else:
                self.problems.add(place, "must be an integer between 0 and 2^53-1")
        return tuple(out)

    def integer_lists(self, key: str, length: int) -> tuple[tuple[int, ...], ...]:
        """A list of lists of `length` integers each."""
        value = self.raw(key)
        if isinstance(value, list) and _are_counts(value, length):
            return tuple(map(tuple, value))
        for place, item in self._items(key):  # again, slowly, to find what is wrong
            if not _are_counts([item], length):
                self.problems.add(place, f"must be {length} integers between 0 and 2^53-1")
        return ()

    def text_lists(self, key: str) -> tuple[tuple[str, ...], ...]:
        """A list of lists of texts."""
        out = []
        for place, item in self._items(key):
            row = tuple(t for t in item if isinstance(t, str)) if isinstance(item, list) else ()
            if not isinstance(item, list) or len(row) != len(item):
                self.problems.add(place, "must be a list of strings")
            out.append(row)
        return tuple(out)

    def table(self, key: str) -> Table:
        """A member that is an object."""
        value = self.raw(key)
        return Table({} if value is None else value, self.place(key), self.problems)

    def tables(self, key: str, most: int = MAX_ITEMS) -> Iterator[Table]:
        """A member that is a list of at most `most` objects, one after the other."""
        return self.records(key, Table, most)

    def records(self, key: str, kind: type[T], most: int = MAX_ITEMS) -> Iterator[Table | T]:
        """As `tables`, of a document whose objects were read as `kind` where they could be."""
        value = self.raw(key)
        if isinstance(value, list) and len(value) > most:
            self.problem(key, f"has {len(value):,} items, more than {most:,}")
            return
        items: Iterable[tuple[str, object]] = self._items(key)
        for place, item in items:
            if isinstance(item, kind):
                yield item
            elif isinstance(item, dict):
                yield Table(item, place, self.problems)
            else:
                self.problems.add(place, "must be an object")
                self.problems.skipped = True

    def finish(self) -> None:
        """Refuse members that nothing read: a misspelt key must not be silent."""
        for key in () if self.problems.lenient else self._members:
            if key in self._read or key.startswith("x-"):
                continue
            near = self._similar(key)
            self.problem(key, f"unknown key; did you mean `{near}`?" if near else "unknown key")

    def _similar(self, key: str) -> str | None:
        """The known key most like an unknown one; a slow search, so only for the first few."""
        self._suggested += 1
        if self.problems.silent or self._suggested > _MAX_SUGGESTED or len(key) > _MAX_SIMILAR:
            return None
        known = sorted(name for name in self._read if len(name) <= _MAX_SIMILAR)
        return next(iter(difflib.get_close_matches(key, known[:_MAX_KNOWN], n=1)), None)


def _are_counts(rows: list[Json], length: int) -> TypeGuard[list[list[int]]]:
    """Whether all are lists of so many counts; there may be millions of them."""
    lists = [row for row in rows if isinstance(row, list)]
    integers = [item for item in chain.from_iterable(lists) if type(item) is int]
    return (
        len(lists) == len(rows)
        and set(map(len, lists)) <= {length}
        and len(integers) == length * len(rows)
        and min(integers, default=0) >= 0
        and max(integers, default=0) <= MAX_COUNT
    )


def is_digest(text: str) -> bool:
    """Whether the text has the form of a digest."""
    return _DIGEST.fullmatch(text) is not None


def is_dtype(text: str) -> bool:
    """Whether the text has the form of a safetensors dtype, known or not."""
    return _DTYPE.fullmatch(text) is not None
