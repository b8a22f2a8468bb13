"""The axes notation: where each logical matrix is inside a stored tensor.

Axes: E expert, G the projections one tensor joins, O output features, K input features; lower-case
letters are packing axes. `(G O)` flattens, left slowest; `O/128` counts blocks of 128; `1` is a
dimension of one. Sizes and strides below count elements of the stored dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Final

EXPERT: Final = "E"
PAIR: Final = "G"
OUT: Final = "O"
IN: Final = "K"
_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_AXIS = re.compile(r"([EGOK]|[a-z])(?:/([A-Za-z0-9_.]+))?")


class AxesSyntax(ValueError):
    """A text that is not in the axes notation; the document's reader adds its place."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis, counted in blocks of `block` elements.

    named: the name of a block size that config.json states; empty once it is bound to a number.
    """

    letter: str
    block: int = 1
    named: str = ""

    def __str__(self) -> str:
        return f"{self.letter}/{self.named or self.block}" if self.in_blocks else self.letter

    @property
    def in_blocks(self) -> bool:
        """Whether it counts more than single elements."""
        return self.block != 1 or self.named != ""


@dataclass(frozen=True, slots=True)
class Axes:
    """The dimensions of one stored tensor, each a flattened group of axes (empty for `1`)."""

    dims: tuple[tuple[Axis, ...], ...]

    def __str__(self) -> str:
        return " ".join(
            str(d[0]) if len(d) == 1 else f"({' '.join(map(str, d))})" if d else "1"
            for d in self.dims
        )

    @property
    def flat(self) -> tuple[Axis, ...]:
        """All axes, slowest first."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def letters(self) -> frozenset[str]:
        """The letters that occur."""
        return frozenset(axis.letter for axis in self.flat)

    @property
    def canonical(self) -> tuple[str, ...]:
        """The letters of one matrix in canonical order: O, K, then packing axes sorted."""
        return canonical_order(axis.letter for axis in self.flat)

    @property
    def packing(self) -> tuple[str, ...]:
        """The packing letters, sorted."""
        return tuple(letter for letter in self.canonical if is_packing(letter))

    @property
    def in_blocks(self) -> bool:
        """Whether some axis counts more than single elements."""
        return any(axis.in_blocks for axis in self.flat)

    @property
    def block_names(self) -> frozenset[str]:
        """The names of block sizes that still need a number."""
        return frozenset(axis.named for axis in self.flat if axis.named)

    def bound(self, block_sizes: dict[str, int]) -> Axes:
        """With the numbers given for all of `block_names`."""
        return self._each(
            lambda axis: Axis(axis.letter, block_sizes[axis.named]) if axis.named else axis
        )

    def without_blocks(self) -> Axes:
        """The same axes for sizes that are counted in blocks already, as in a manifest."""
        return self._each(lambda axis: Axis(axis.letter))

    def _each(self, change: Callable[[Axis], Axis]) -> Axes:
        return Axes(tuple(tuple(map(change, dim)) for dim in self.dims))


def is_packing(letter: str) -> bool:
    """Whether an axis is one of values packed together; the others are E, G, O and K."""
    return letter.islower()


def canonical_order(letters: Iterable[str]) -> tuple[str, ...]:
    """Those letters that are axes of one matrix, in canonical order: O, K, packing axes sorted."""
    known = set(letters)
    packing = sorted(letter for letter in known if is_packing(letter))
    return (*(letter for letter in (OUT, IN) if letter in known), *packing)


def stored_sizes(
    axes: Axes, matrix: tuple[int, ...], *, experts: int, projections: int
) -> dict[str, int]:
    """The size of each axis, slowest first, of a tensor of matrices with canonical shape `matrix`.

    As a manifest has them: in blocks where the axes count so. Raises ValueError where matrices of
    these axes have another number of dimensions.
    """
    canonical = axes.canonical
    sizes = {EXPERT: experts, PAIR: projections, **dict(zip(canonical, matrix, strict=True))}
    return {axis.letter: sizes[axis.letter] for axis in axes.flat}


@cache
def parse_axes(text: str) -> Axes:
    """Parse axes such as `"E (G O) K"`. Raises AxesSyntax."""
    if _TOKEN.sub("", text).strip():
        raise AxesSyntax(f"`{text}` has an unmatched parenthesis")
    dims: list[tuple[Axis, ...]] = []
    for match in _TOKEN.finditer(text):
        group, single = match.groups()
        if single == "1":
            dims.append(())
            continue
        words = group.split() if group is not None else [single]
        if not words:
            raise AxesSyntax(f"`{text}` has an empty group")
        dims.append(tuple(_axis(word, text) for word in words))
    axes = Axes(tuple(dims))
    letters = [axis.letter for axis in axes.flat]
    if len(set(letters)) != len(letters):
        raise AxesSyntax(f"`{text}` names an axis twice")
    return axes


def _axis(word: str, text: str) -> Axis:
    match = _AXIS.fullmatch(word)
    if match is None:
        raise AxesSyntax(
            f"`{word}` in `{text}` is not an axis (E, G, O, K or a-z, with or without `/block`)"
        )
    letter, block = match.groups()
    if block is None:
        return Axis(letter)
    if not block.isdecimal():
        return Axis(letter, named=block)
    if int(block) < 1:
        raise AxesSyntax(f"`{word}` in `{text}` has a block below 1")
    return Axis(letter, int(block))


@cache
def derived(own: Axes, line: Axes) -> Axes:
    """Derive a companion's axes in a layout, from its own axes and those of the layout's weight.

    It keeps its own order; an axis that the layout flattens into a group takes the whole group
    with it (`O` becomes `(G O)`); E and G, where still unplaced, come in front (`E G`), and so
    does an E that would not be outermost (`K O` beside `(E O) K` is `E K O`). A grid of one block
    (`1 1`) is like any grid: G is where its rows are (`E G 1`).
    """
    if own.dims == ((), ()) and PAIR in line.letters:
        rows = derived(Axes(()), line)
        return Axes((*rows.dims, ()))
    groups = {axis.letter: dim for dim in line.dims for axis in dim}
    first = next((axis.letter for axis in own.flat), "")
    if EXPERT not in (a.letter for a in groups.get(first, ())[:1]):
        groups = {c: tuple(a for a in dim if a.letter != EXPERT) for c, dim in groups.items()}
    placed: set[str] = set()
    dims: list[tuple[Axis, ...]] = []
    for dim in own.dims:
        out: list[Axis] = []
        for axis in dim:
            group = groups.get(axis.letter, ())
            joined = [a for a in group if a.letter in (EXPERT, PAIR, axis.letter)]
            for member in joined or [axis]:
                if member.letter == axis.letter:
                    out.append(axis)
                elif member.letter not in placed:
                    out.append(member)
                    placed.add(member.letter)
        dims.append(tuple(out))
    front = [
        (Axis(letter),)
        for letter in (EXPERT, PAIR)
        if letter in line.letters and letter not in placed
    ]
    return Axes((*front, *dims))


@cache
def shared_by_pair(own: Axes, line: Axes) -> Axes | None:
    """The axes of a companion that gate and up share; None where each must have its own.

    Only single numbers can be shared: half of a list of rows is a list of rows, half a shape is not
    a shape.
    """
    if own.letters or PAIR not in line.letters:
        return None
    dims = (tuple(a for a in dim if a.letter != PAIR) for dim in line.dims)
    return derived(own, Axes(tuple(dims)))


@cache
def recounted(line: Axes, own: Axes) -> Axes:
    """`line` with its axes counted in the blocks of `own`, where that has them."""
    counted = {axis.letter: axis for axis in own.flat}
    return Axes(tuple(tuple(counted.get(a.letter, a) for a in dim) for dim in line.dims))


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the logical matrices of one stored tensor are, in elements.

    Matrix (e, g) starts at `e * expert_stride + g * pair_stride` (a stride of 0: shared along
    that axis) and has `matrix` = ((size, stride), ...) in canonical order: O, K, packing axes.
    """

    shape: tuple[int, ...]
    expert_stride: int
    pair_stride: int
    matrix: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The sizes of one logical matrix."""
        return tuple(size for size, _ in self.matrix)

    @property
    def contiguous(self) -> bool:
        """Whether one matrix is one run of elements, in canonical order."""
        expected = 1
        for size, stride in reversed(self.matrix):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def axis_size(axis: Axis, sizes: dict[str, int]) -> int:
    """The size of an axis in blocks: 1,408 in blocks of 128 is 11."""
    return -(-sizes[axis.letter] // axis.block)


def geometry(axes: Axes, sizes: dict[str, int]) -> Geometry:
    """The geometry of a tensor with bound `axes` and known sizes of all its letters."""
    flat = [(axis, axis_size(axis, sizes)) for axis in axes.flat]
    strides: dict[str, int] = {}
    step = 1
    for axis, size in reversed(flat):
        strides[axis.letter] = step
        step *= size
    by_letter = {axis.letter: size for axis, size in flat}
    return Geometry(
        shape=tuple(prod(axis_size(a, sizes) for a in dim) for dim in axes.dims),
        expert_stride=strides.get(EXPERT, 0),
        pair_stride=strides.get(PAIR, 0),
        matrix=tuple((by_letter[c], strides[c]) for c in axes.canonical),
    )
