"""`diff`: two checkpoints matrix by matrix, whatever their layouts."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.names import natural_key
from moeconv.proof.digests import Matrix

SAME, ONLY_A, ONLY_B, DIFFERS = "=", "-", "+", "*"


@dataclass(frozen=True, slots=True)
class Difference:
    """One address: `=` same, `-` only in A, `+` only in B, `*` differs; `why` for `*`."""

    mark: str
    address: str
    why: str = ""


def differences(a: dict[str, Matrix], b: dict[str, Matrix]) -> tuple[Difference, ...]:
    """Every address of both sides, in natural order."""
    return tuple(
        _difference(address, a.get(address), b.get(address))
        for address in sorted(a.keys() | b.keys(), key=natural_key)
    )


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
