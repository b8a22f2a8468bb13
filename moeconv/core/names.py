"""Names from files: natural sort order, and whether a name may be used as a path."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import lru_cache

MAX_FILE_NAME_BYTES = 255
_DIGITS = re.compile(r"[0-9]+")
_LONG = 128  # numbers of so many digits take more than a character for their length
_SLOT = re.compile(r"\{slot(?:\+([1-9][0-9]{0,9}))?\}")
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10)}
)


def natural_key(name: str) -> str:
    """Sort key under which `layers.2` comes before `layers.10`, hardly longer than the name.

    Numbers compare by length and digits: `int` would refuse the thousands of digits of a bad name.
    Of equal ones that with more zeros in front comes first, of zeros the shorter one.
    """
    if "\0" in name:
        name = name.replace("\0", f"\0{chr(sys.maxunicode)}")
    return _DIGITS.sub(_number_key, name)


def _number_key(match: re.Match[str]) -> str:
    return _encoded_number(match[0])


@lru_cache(maxsize=4096)
def _encoded_number(text: str) -> str:
    """A number so that it sorts before all text: a NUL, how long it is, its digits, its zeros."""
    digits = text.lstrip("0")
    zeros = len(text) - len(digits)
    if not digits:
        return f"\0\1{_count(zeros)}"
    return f"\0{_count(len(digits) + 1)}{digits}{_less(zeros)}"


def _count(n: int) -> str:
    """A text that sorts as its number does; n below 2^40."""
    return chr(n) if n < _LONG else f"{chr(_LONG + (n >> 20))}{chr(n & 0xFFFFF)}"


def _less(n: int) -> str:
    """The same, in the opposite order."""
    if n < _LONG:
        return chr(_LONG - n)
    return f"\0{chr((1 << 20) - (n >> 20))}{chr(0xFFFFF - (n & 0xFFFFF))}"


def slot_placeholder(first: int) -> str:
    """The placeholder in the template of a `slot_namer` that numbers slots from `first` on."""
    return f"{{slot+{first}}}" if first else "{slot}"


def slot_namer(template: str) -> Callable[[int], str] | None:
    """The names of a rank's tensors by slot: `{slot}` is its number on the rank, `{slot+N}` N more.

    None where the template does not hold one of these exactly once.
    """
    parts = _SLOT.split(template)
    if len(parts) != 3:
        return None
    head, first, tail = parts[0], int(parts[1] or 0), parts[2]
    return lambda slot: f"{head}{first + slot}{tail}"


def file_name_problem(name: str) -> str | None:
    """Why `name` must not be joined to a directory; None if it is a plain file name."""
    if not name:
        return "is empty"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_FILE_NAME_BYTES:
        return f"is longer than {MAX_FILE_NAME_BYTES} bytes"
    if name in (".", ".."):
        return "names a directory"
    if any(c in name for c in "/\\:\0"):
        return "is a path, not a plain file name"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "contains control characters"
    if name.split(".", 1)[0].lower() in _WINDOWS_DEVICES:
        return "is a reserved device name"
    return None


def relative_path_problem(path: str) -> str | None:
    """Why `path` must not be joined to a directory; None if every part is a plain file name."""
    for part in path.split("/"):
        problem = file_name_problem(part)
        if problem:
            return problem
    return None
