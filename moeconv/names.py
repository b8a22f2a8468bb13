"""Names that come out of files: how they sort, how they are shown, when they may be a path."""

from __future__ import annotations

import re
import unicodedata

MAX_FILE_NAME_BYTES = 255
_DIGITS = re.compile(r"([0-9]+)")
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10)}
)


def printable(name: str) -> str:
    """The name with everything that could act on a terminal written as an escape."""
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in name
    )


def abridged(text: str, most: int) -> str:
    """The text, or its beginning and end where it has more than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}…{text[-half:]}"


def natural_key(name: str) -> tuple[tuple[int, int, str, str], ...]:
    """Sort key under which `layers.2` comes before `layers.10`.

    Numbers compare by length and digits: `int` would refuse the thousands of digits of a bad name.
    """
    return tuple(
        (0, len(digits := part.lstrip("0")), digits, part)
        if part.isascii() and part.isdecimal()
        else (1, 0, part, part)
        for part in _DIGITS.split(name)
        if part
    )


def file_name_problem(name: str) -> str | None:
    """Why `name` may not be joined to a directory, or None where it is one plain file name."""
    if not name:
        return "is empty"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_FILE_NAME_BYTES:
        return f"is longer than {MAX_FILE_NAME_BYTES} bytes"
    if name in (".", ".."):
        return "names a directory"
    if any(c in name for c in "/\\:\0"):
        return "is a path, not a plain file name"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "holds control characters"
    if name.split(".", 1)[0].lower() in _WINDOWS_DEVICES:
        return "is a reserved device name"
    return None


def relative_path_problem(path: str) -> str | None:
    """Why `path` may not be joined to a directory: every part must be a plain file name."""
    for part in path.split("/"):
        problem = file_name_problem(part)
        if problem:
            return problem
    return None
