"""What `verify` and `diff` found: damage and differences are listed, not raised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from moeconv.core.names import natural_key
from moeconv.core.text import counted
from moeconv.errors import Damaged, MoeconvError
from moeconv.verification.digests import Contents, Matrix

STRUCTURE = "structure"
DIGEST = "digest"
SOURCE = "source"
LEVELS = (STRUCTURE, DIGEST, SOURCE)
MAX_REPORTED: Final = 1000
SAME, ONLY_A, ONLY_B, DIFFERS = "=", "-", "+", "*"


def limit_problems(problems: Iterable[MoeconvError]) -> tuple[MoeconvError, ...]:
    """The first MAX_REPORTED problems, and one more that counts the others."""
    rest = iter(problems)
    first = tuple(islice(rest, MAX_REPORTED))
    more = sum(1 for _ in rest)
    if not more:
        return first
    return (
        *first,
        Damaged(
            f"{counted(more, 'more problem')}, not listed",
            cause=f"the first {MAX_REPORTED:,} are listed",
        ),
    )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found, and how much it read.

    warnings: what is unexpected but harmless, such as a README that was added.
    """

    level: str
    problems: tuple[MoeconvError, ...] = ()
    files: int = 0
    tensors: int = 0
    bytes_read: int = 0
    fingerprint: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Difference:
    """One address: `=` same, `-` only in A, `+` only in B, `*` differs; `why` for `*`.

    damaged: the sides whose bytes are not those that their manifests record: `A`, `B`, or both.
    """

    mark: str
    address: str
    why: str = ""
    damaged: tuple[str, ...] = ()


def differences(a: Contents, b: Contents) -> tuple[Difference, ...]:
    """Compare two checkpoints by address, whatever their layouts; in natural order."""
    damaged: dict[str, tuple[str, ...]] = dict.fromkeys(a.damaged, ("A",))
    for address in b.damaged:
        damaged[address] = (*damaged.get(address, ()), "B")
    found = (
        _difference(address, a.matrices.get(address), b.matrices.get(address))
        for address in sorted(a.matrices.keys() | b.matrices.keys(), key=natural_key)
    )
    if not damaged:
        return tuple(found)
    return tuple(replace(d, damaged=damaged.get(d.address, ())) for d in found)


def _difference(address: str, a: Matrix | None, b: Matrix | None) -> Difference:
    if a is None or b is None:
        return Difference(ONLY_B if a is None else ONLY_A, address)
    if a == b:
        return Difference(SAME, address)
    if a.dtype != b.dtype:
        return Difference(DIFFERS, address, f"dtype {a.dtype}, {b.dtype}")
    if a.shape != b.shape:
        return Difference(DIFFERS, address, f"shape {list(a.shape)}, {list(b.shape)}")
    return Difference(DIFFERS, address, "bytes")
