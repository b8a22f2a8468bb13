"""Ids in a sentence: a few of them by number, runs joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

LISTED: Final = 6


def listed(ids: Sequence[int] | Sequence[str], count: int | None = None) -> str:
    """`5, 6, 7`, or the first few and how many more; count: of them all, where `ids` are fewer."""
    total = len(ids) if count is None else count
    shown = ", ".join(map(str, ids[:LISTED]))
    return shown if total <= LISTED else f"{shown} and {total - LISTED:,} more"


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
    shown = ", ".join("-".join(map(str, run)) for run in runs[:LISTED])
    return shown if len(runs) <= LISTED else f"{shown} and {len(runs) - LISTED:,} more"
