"""Tiles: each matrix of the output from its own bytes of the source, in the target's order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.stack import StoredComponent
from moeconv.errors import SubByteAxis
from moeconv.layout.axes import geometry, parse_axes
from moeconv.layout.recipe import Component, TensorTemplate
from moeconv.manifest.model import ExpertEntry
from moeconv.plan.copies import tiles_of
from moeconv.plan.model import CopyTile, PermuteTile, Tile
from moeconv.plan.tensors import PlannedTensor, copied

Items = NDArray[np.uint16]
BITS = {"U16": 16, "F4": 4}
JOINED = ("E (G O) K", "E (O G) K", "E K (G O)", "E G K O", "E O G K")
SINGLE = ("O K", "K O")


def letters(axes: str) -> str:
    return axes.replace("(", "").replace(")", "").replace(" ", "")


def sizes_of(matrices: Items) -> dict[str, int]:
    return dict(zip("EGOK", matrices.shape, strict=True))


def stored(matrices: Items, axes: str, order: tuple[int, ...] | None = None) -> Items:
    """Matrices [E, G, O, K] as one tensor has them; order: of the experts in it."""
    held = matrices if order is None else matrices[list(order)]
    dims = ["EGOK".index(letter) for letter in letters(axes)]
    gone = [d for d in range(4) if d not in dims]
    return held.transpose(*gone, *dims).reshape(-1)


def component(
    axes: str, sizes: dict[str, int], projections: tuple[str, ...], files: int = 1, *, skip: int = 0
) -> StoredComponent:
    """A stored component: one tensor, or one in a file for each expert."""
    parsed, dtype = parse_axes(axes), "U16"
    shape = geometry(parsed, sizes)
    tensors = tuple(
        StoredTensor(f"t{n}", dtype, shape.shape, n, skip, shape.numel * 2) for n in range(files)
    )
    line = TensorTemplate(projections, "{stack}" if "E" in axes else "{stack}.{expert}", parsed)
    own = Component("weight", parsed, "", (parsed,))
    return StoredComponent(line, own, dtype, parsed, shape, tensors)


def target(
    axes: str,
    sizes: dict[str, int],
    members: tuple[StoredComponent, ...],
    projections: tuple[str, ...],
    experts: tuple[int, ...],
    *,
    dtype: str = "U16",
) -> PlannedTensor:
    parsed = parse_axes(axes)
    shape = geometry(parsed, sizes | {"E": len(experts)})
    entry = ExpertEntry(0, experts, projections, "weight", axes, shape.canonical_shape)
    regions = tuple(m.regions(p) for m, p in zip(members, projections, strict=True))
    nbytes = shape.numel * BITS[dtype] // 8
    return PlannedTensor("out", dtype, shape.shape, nbytes, None, entry, shape, experts, regions)


def filled(planned: PlannedTensor, tiles: list[Tile], files: list[Items], start: int) -> Items:
    """The output's items by its tiles, which must cover it exactly, in order."""
    out = np.zeros(planned.nbytes // 2, np.uint16)
    at = start
    for tile in tiles:
        assert tile.start == at
        at += tile.nbytes
        here = out[(tile.start - start) // 2 :][: tile.nbytes // 2]
        if isinstance(tile, CopyTile):
            here[:] = files[tile.file][tile.offset // 2 :][: tile.nbytes // 2]
            continue
        for copy in tile.pieces:
            span = tile.spans[copy.span]
            held = files[span.file][span.offset // 2 :][: span.nbytes // 2]
            for index in np.ndindex(copy.shape):
                to = copy.target.offset + int(np.dot(index, copy.target.strides))
                here[to] = held[copy.source.offset + int(np.dot(index, copy.source.strides))]
    assert at == start + planned.nbytes
    return out


MATRICES = st.tuples(st.integers(1, 3), st.just(2), st.integers(1, 3), st.integers(1, 3)).map(
    lambda shape: np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
)


@given(MATRICES, st.sampled_from(JOINED), st.sampled_from(JOINED), st.data())
def test_from_one_tensor_to_another(
    matrices: Items, before: str, after: str, data: st.DataObject
) -> None:
    sizes = sizes_of(matrices)
    member = component(before, sizes, ("gate", "up"), skip=32)
    order = tuple(data.draw(st.lists(st.sampled_from(range(sizes["E"])), min_size=1, max_size=4)))
    planned = target(after, sizes, (member, member), ("gate", "up"), order)
    tiles = list(tiles_of(planned, tensor=0, offset=64))
    source = np.concatenate([np.zeros(16, np.uint16), stored(matrices, before)])
    found = filled(planned, tiles, [source], 64)
    assert found.tolist() == stored(matrices, after, order).tolist()
    units = [u for t in tiles for u in ([t.unit] if isinstance(t, CopyTile) else _units(t))]
    assert sorted(units) == list(range(2 * len(order)))


def _units(tile: PermuteTile) -> list[int]:
    return [copy.unit for copy in tile.pieces]


@given(MATRICES, st.sampled_from(SINGLE), st.sampled_from(JOINED))
def test_from_a_tensor_for_each_expert_and_projection(
    matrices: Items, before: str, after: str
) -> None:
    sizes = sizes_of(matrices)
    experts = sizes["E"]
    members = tuple(component(before, sizes, (p,), experts) for p in ("gate", "up"))
    # all of `up` is in the files after those of `gate`
    moved = tuple(
        StoredTensor(t.name, t.dtype, t.shape, t.file + experts, t.offset, t.nbytes)
        for t in members[1].tensors
    )
    up = StoredComponent(
        members[1].line, members[1].component, "U16", members[1].axes, members[1].geometry, moved
    )
    planned = target(after, sizes, (members[0], up), ("gate", "up"), tuple(range(experts)))
    files = [stored(matrices[e : e + 1, g : g + 1], before) for g in (0, 1) for e in range(experts)]
    found = filled(planned, list(tiles_of(planned, tensor=0, offset=0)), files, 0)
    assert found.tolist() == stored(matrices, after).tolist()


def test_the_same_order_is_one_copy_for_each_matrix() -> None:
    sizes = {"E": 2, "G": 2, "O": 3, "K": 4}
    member = component("E (G O) K", sizes, ("gate", "up"), skip=100)
    planned = target("E (G O) K", sizes, (member, member), ("gate", "up"), (0, 1))
    assert list(tiles_of(planned, tensor=7, offset=8)) == [
        CopyTile(8 + 24 * unit, 24, 7, unit, 0, 100 + 24 * unit) for unit in range(4)
    ]


def test_projections_in_another_order_are_copies_still() -> None:
    sizes = {"E": 1, "G": 2, "O": 1, "K": 2}
    member = component("E (G O) K", sizes, ("up", "gate"))
    planned = target("E (G O) K", sizes, (member, member), ("gate", "up"), (0,))
    tiles = list(tiles_of(planned, tensor=0, offset=0))
    assert tiles == [CopyTile(0, 4, 0, 0, 0, 4), CopyTile(4, 4, 0, 1, 0, 0)]


def test_one_value_for_both_projections_is_compared() -> None:
    """An axis that the target lacks: what is written twice must be equal."""
    sizes = {"E": 1, "G": 2, "O": 1, "K": 2}
    member = component("E (G O) K", sizes, ("gate", "up"))
    planned = target("E O K", sizes, (member, member), ("gate", "up"), (0,))
    (tile,) = tiles_of(planned, tensor=0, offset=0)
    assert isinstance(tile, PermuteTile)
    assert [copy.repeat for copy in tile.pieces] == [False, True]
    assert [copy.target.offset for copy in tile.pieces] == [0, 0]


def test_interleaved_rows_as_they_are_keep_their_bytes() -> None:
    sizes = {"E": 2, "G": 2, "O": 3, "K": 4}
    member = component("E (O G) K", sizes, ("gate", "up"))
    planned = target("E (O G) K", sizes, (member, member), ("gate", "up"), (1, 0))
    first, second = tiles_of(planned, tensor=0, offset=0)
    assert isinstance(first, PermuteTile)
    assert isinstance(second, PermuteTile)
    assert first.is_identity
    assert second.is_identity
    assert (first.spans[0].offset, second.spans[0].offset) == (48, 0)


def test_half_bytes_cannot_be_transposed() -> None:
    sizes = {"E": 1, "G": 1, "O": 2, "K": 4}
    member = component("E O K", sizes, ("down",))
    planned = target("E K O", sizes, (member,), ("down",), (0,), dtype="F4")
    with pytest.raises(SubByteAxis):
        list(tiles_of(planned, tensor=0, offset=0))


def test_tensors_of_no_expert() -> None:
    tensor = StoredTensor("norm", "BF16", (5,), 3, 70, 10)
    assert list(tiles_of(copied(tensor), tensor=2, offset=16)) == [CopyTile(16, 10, 2, 0, 3, 70)]
    empty = StoredTensor("none", "BF16", (0,), 3, 80, 0)
    assert list(tiles_of(copied(empty), tensor=2, offset=16)) == []
