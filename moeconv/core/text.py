"""Format sizes (decimal GB, binary GiB, never a bare `5G`), counts and lists for messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from moeconv.errors import BadSize, quoted

_FACTORS: Final = {
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGTP", start=1)},
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGTP", start=1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
LISTED: Final = 6


def parse_size(text: str) -> int:
    """Bytes of `5GB` (10^9) or `5GiB` (2^30). Raises BadSize for anything else."""
    match = _SIZE.fullmatch(text.strip())
    number, unit = match.groups() if match else ("5", "")
    if match is None or unit not in _FACTORS:
        letter = unit[:1].upper() if unit[:1].upper() in "KMGTP" and unit else "G"
        raise BadSize(
            f"{quoted(text)} is not a size",
            cause=f"programs disagree on what {quoted(unit)} means" if unit else "it has no unit",
            fix=f"write `{number}{letter}B` (powers of 1000) or `{number}{letter}iB` (of 1024)",
        )
    size = int(float(number) * _FACTORS[unit])
    if size <= 0:
        raise BadSize(f"{quoted(text)} is not a size above zero", fix="write `5GB`, for example")
    return size


def human_size(size: int) -> str:
    """A size for people, in powers of 1000: `5.00 GB`, `812 B`."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 999.995:
            return f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} PB"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 file`, `12 files`, `91,991 tensors`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(
    items: Sequence[int] | Sequence[str],
    *,
    most: int = LISTED,
    count: int | None = None,
    separator: str = ", ",
) -> str:
    """`5, 6, 7`, or the first `most` and how many more: `5, 6, 7 and 1,200 more`.

    count: how many there are in all, where `items` holds only the first ones.
    """
    total = len(items) if count is None else count
    shown = separator.join(map(str, items[:most]))
    return shown if total <= most else f"{shown} and {total - most:,} more"


def quoted_list(names: Sequence[str], *, most: int = LISTED) -> str:
    """The first `most` names out of files, in backticks, and how many more: "`a` and 3 more"."""
    return listed([*map(quoted, names[:most])], most=most, count=len(names))


def layer_names(ids: Sequence[int]) -> str:
    """`layer 3`, `layers 3-60`."""
    return f"layer {ids[0]}" if len(ids) == 1 else f"layers {spans(ids)}"


def spans(ids: Sequence[int]) -> str:
    """Ascending ids with runs joined: `1, 3-60`."""
    runs: list[list[int]] = []
    for n in ids:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return listed(["-".join(map(str, run)) for run in runs[:LISTED]], count=len(runs))
