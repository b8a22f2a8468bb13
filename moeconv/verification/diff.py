"""`diff`: two checkpoints matrix by matrix, whatever their layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeconv.core.names import natural_key
from moeconv.verification.digests import Contents, Matrix

SAME, ONLY_A, ONLY_B, DIFFERS = "=", "-", "+", "*"


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
    """Every address of both sides, in natural order."""
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
