"""An independent reading of the axes notation, in plain NumPy: what moeconv is held against.

A model is kept as logical matrices: one array [E, *matrix] for each projection and component,
its items unsigned integers of the dtype's size (4-bit values one to an item, packed when stored).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import xxhash
from hypothesis.vendor.pretty import RepresentationPrinter
from numpy.typing import NDArray

from tests.helpers import BITS, Spec

Items = NDArray[np.unsignedinteger]


class Short:
    """Hypothesis prints the fields of a dataclass whatever its repr, unless this is there."""

    def _repr_pretty_(self, printer: RepresentationPrinter, _: object) -> None:
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Part(Short):
    """All experts' matrices of one projection and component; `letters` names their dimensions."""

    dtype: str
    letters: str  # canonical: O, K, then packing axes; each at most once
    items: Items  # [E, *sizes of letters]

    def __repr__(self) -> str:
        """Without the items, which would bury a failing example."""
        return f"{self.dtype} {list(self.items.shape)}"


@dataclass(frozen=True)
class Place:
    """One stored tensor of a layout: its projections in the order of G, and its axes.

    name: with `{e}` where each expert has a tensor of its own.
    """

    name: str
    projections: tuple[str, ...]
    component: str
    axes: str


Parts = dict[tuple[str, str], Part]


def random_part(
    rng: np.random.Generator, dtype: str, letters: str, experts: int, sizes: dict[str, int]
) -> Part:
    """Random matrices; no two are equal, unless they are very small."""
    shape = (experts, *(sizes[letter] for letter in letters))
    top = 2 ** min(BITS[dtype], 62)
    kind = f"u{max(BITS[dtype] // 8, 1)}"
    return Part(dtype, letters, rng.integers(0, top, shape, dtype=np.uint64).astype(kind))


def raw(dtype: str, items: Items) -> bytes:
    """The bytes of a stored tensor."""
    if BITS[dtype] != 4:
        return items.tobytes()
    pairs = items.reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()


def dims_of(axes: str) -> list[list[str]]:
    """`E (G O/2) 1` as [["E"], ["G", "O"], []]."""
    words = re.findall(r"\(([^)]*)\)|(\S+)", axes)
    return [[w[0] for w in (group or single).split() if w != "1"] for group, single in words]


def companion_axes(own: str, line: str) -> str:
    """A companion's axes in a layout: its own order; E and G beside O or K where the weight has
    them there, else in front.
    """
    weight = dims_of(line)
    todo = [letter for letter in "EG" if any(letter in dim for dim in weight)]
    words = []
    for group, single in re.findall(r"\(([^)]*)\)|(\S+)", own):
        new = []
        for token in (group or single).split():
            home = next((dim for dim in weight if token[0] in dim), [token[0]])
            at = home.index(token[0])
            before = [c for c in home[:at] if c in todo]
            after = [c for c in home[at:] if c in todo]
            todo = [c for c in todo if c not in home]
            new += [*before, token, *after]
        words.append(f"({' '.join(new)})" if len(new) > 1 else new[0])
    return " ".join([*todo, *words])


def arranged(items: Items, letters: str, axes: str) -> Items:
    """`items`, whose dimensions are `letters`, as the stored tensor that `axes` describes.

    A letter that `axes` lacks is shared: the items along it must be equal.
    """
    dims = dims_of(axes)
    flat = [letter for dim in dims for letter in dim]
    for at in reversed(range(len(letters))):
        if letters[at] not in flat:
            first = items.take([0], axis=at)
            assert (items == first).all(), f"unequal along {letters[at]}"
            items = items.take(0, axis=at)
    kept = [letter for letter in letters if letter in flat]
    size = dict(zip(kept, items.shape, strict=True))
    turned = items.transpose([kept.index(letter) for letter in flat])
    return turned.reshape([prod(size[letter] for letter in dim) for dim in dims])


def stored(parts: Parts, places: Iterable[Place]) -> dict[str, Spec]:
    """The tensors of one stack in a layout; a place whose component is not there has none."""
    out: dict[str, Spec] = {}
    for place in places:
        if (place.projections[0], place.component) not in parts:
            continue
        held = [parts[p, place.component] for p in place.projections]
        dtype, letters = held[0].dtype, held[0].letters
        items = np.stack([part.items for part in held], axis=1)
        if "{e}" in place.name:
            experts = [(str(e), items[e]) for e in range(len(items))]
            whole = "G" + letters
        else:
            experts, whole = [("", items)], "EG" + letters
        for expert, one in experts:
            array = arranged(one, whole, place.axes)
            name = place.name.replace("{e}", expert)
            out[name] = (dtype, array.shape, raw(dtype, array))
    return out


def fingerprint(stacks: dict[str, Parts], others: dict[str, Spec]) -> str:
    """The fingerprint as the format defines it: the same in every layout."""
    lines = [_line(name, *spec) for name, spec in others.items()]
    for stack, parts in stacks.items():
        for (projection, component), part in parts.items():
            for e, matrix in enumerate(part.items):
                address = f"{stack}.{e}.{projection}.{component}"
                lines.append(_line(address, part.dtype, matrix.shape, raw(part.dtype, matrix)))
    return xxhash.xxh3_128_hexdigest("".join(sorted(lines)).encode())


def _line(address: str, dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    escaped = json.dumps(address)[1:-1].replace(" ", "\\u0020")
    sizes = ",".join(map(str, shape))
    return f"{escaped} {dtype} [{sizes}] {xxhash.xxh3_128_hexdigest(data)}\n"
