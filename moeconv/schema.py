"""Typed reading of small documents (manifest, recipe): all problems of one document at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, TypeGuard

from moeconv.errors import quoted
from moeconv.jsonvalue import Json
from moeconv.names import file_name_problem, printable, relative_path_problem
from moeconv.strictjson import encodable

MAX_TEXT_BYTES: Final = 4096
MAX_COUNT: Final = 2**53 - 1
MAX_LISTED: Final = 4 * 1024 * 1024
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]*", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)


@dataclass(slots=True)
class Problems:
    """What is wrong with one document, in reading order."""

    found: list[str] = field(default_factory=list)
    lenient: bool = False  # unknown keys pass: the document is of a later minor version
    allowance: int = MAX_LISTED  # of items that a few words may make a long list of

    def add(self, place: str, text: str) -> None:
        """Note one problem at `place`, a path such as `parts[3].size`."""
        self.found.append(printable(f"{place or 'the document'}: {text}"))


class Table:
    """One JSON or TOML object being read: every getter notes problems and goes on.

    A getter returns a harmless value where the document is wrong; `Problems` decides afterwards
    whether anything of it may be used.
    """

    def __init__(self, doc: object, place: str, problems: Problems) -> None:
        self._members: dict[str, Json] = doc if isinstance(doc, dict) else {}
        self._place = place
        self._read: set[str] = set()
        self.problems = problems
        if not isinstance(doc, dict):
            problems.add(place, "must be an object")

    def place(self, key: str) -> str:
        """The path of a member, for a message."""
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
        """The member as it stands; the caller checks it."""
        self._read.add(key)
        return self._members.get(key)

    def text(self, key: str, default: str | None = None) -> str:
        """A text of at most 4,096 bytes."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not encodable(value):
            self.problem(key, "must be a text" if key in self._members else "is missing")
            return ""
        if len(value.encode()) > MAX_TEXT_BYTES:
            self.problem(key, f"is longer than {MAX_TEXT_BYTES:,} bytes")
            return ""
        return value

    def word(self, key: str) -> str:
        """A text that is not empty."""
        return self.formed(key, "a text that is not empty", bool)

    def expects(self, keys: Iterable[str]) -> None:
        """Keys that may stand here, for the suggestions of `finish`."""
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
            self.problem(key, f"must lie between {least} and 2^53-1, not {value}")
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
        before = len(self.problems.found)
        value = self.text(key)
        if len(self.problems.found) == before and not fits(value):
            self.problem(key, f"must be {what}")
        return value

    def _items(self, key: str) -> Iterable[tuple[str, Json]]:
        value = self.raw(key)
        if not isinstance(value, list):
            self.problem(key, "must be a list" if key in self._members else "is missing")
            return ()
        return ((f"{self.place(key)}[{n}]", item) for n, item in enumerate(value))

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of texts."""
        if default is not None and not self.has(key):
            return default
        out = []
        for place, item in self._items(key):
            if isinstance(item, str) and encodable(item) and len(item.encode()) <= MAX_TEXT_BYTES:
                out.append(item)
            else:
                self.problems.add(place, "must be a text")
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
        for place, item in self._items(key):  # once more, slowly, to say what is wrong
            if not _are_counts([item], length):
                self.problems.add(place, f"must be {length} integers between 0 and 2^53-1")
        return ()

    def text_lists(self, key: str) -> tuple[tuple[str, ...], ...]:
        """A list of lists of texts."""
        out = []
        for place, item in self._items(key):
            row = tuple(t for t in item if isinstance(t, str)) if isinstance(item, list) else ()
            if not isinstance(item, list) or len(row) != len(item):
                self.problems.add(place, "must be a list of texts")
            out.append(row)
        return tuple(out)

    def table(self, key: str) -> Table:
        """A member that is an object."""
        value = self.raw(key)
        return Table({} if value is None else value, self.place(key), self.problems)

    def tables(self, key: str) -> tuple[Table, ...]:
        """A member that is a list of objects."""
        return tuple(Table(item, place, self.problems) for place, item in self._items(key))

    def finish(self) -> None:
        """Refuse members that nothing read: a misspelt key must not be silent."""
        for key in () if self.problems.lenient else self._members:
            if key in self._read or key.startswith("x-"):
                continue
            near = difflib.get_close_matches(key, sorted(self._read), n=1)
            self.problem(key, f"unknown key; did you mean `{near[0]}`?" if near else "unknown key")


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
