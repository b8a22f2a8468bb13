"""How each unit of an output file gets its digest: taken from its bytes, known, or left for later.

A unit is a logical matrix, or another tensor as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Digests: TypeAlias = list[list[str]]  # [tensor][unit]; empty where a digest is left for later


@dataclass(frozen=True, slots=True)
class UnitDigest:
    """How one unit gets its digest: `TAKE`, `LATER` or a `known` one.

    value: the recorded digest of a known one, otherwise empty.
    """

    how: Literal["take", "later", "known"]
    value: str = ""


TAKE: Final = UnitDigest("take")  # read the bytes and compute it
LATER: Final = UnitDigest("later")  # leave it out; `verify --fill` adds it


def known(value: str) -> UnitDigest:
    """Return a digest that the source's manifest records: the bytes need not be read for it."""
    return UnitDigest("known", value)


FilePolicy: TypeAlias = Callable[[int, int], UnitDigest]  # (tensor, unit) of one output file


def take_all(_tensor: int, _unit: int) -> UnitDigest:
    """Take every digest of a file."""
    return TAKE
