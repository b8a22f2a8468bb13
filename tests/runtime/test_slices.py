"""The arithmetic of slices against torch's own chunks and indexing."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from moeconv.runtime.dtensor import (
    Selection,
    blocks,
    chunk,
    copies,
    counts,
    covering,
    local_selection,
    pieces,
    strided_chunk,
    whole,
)
from moeconv.runtime.write_tensors import _within
from tests.runtime.handmade import numbers, raw


def indices(spans: tuple[tuple[int, int], ...]) -> list[int]:
    """The spans written out."""
    return [i for a, b in spans for i in range(a, b)]


def taken(tensor: torch.Tensor, selection: Selection) -> torch.Tensor:
    """The selection by plain indexing."""
    for dim, spans in enumerate(selection):
        tensor = tensor.index_select(dim, torch.tensor(indices(spans), dtype=torch.int64))
    return tensor


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [0, 1, 5, 6, 7, 12])
def test_chunks_are_torchs(total: int, parts: int):
    found = [indices(chunk(((0, total),) if total else (), parts, n)) for n in range(parts)]
    expected = [t.tolist() for t in torch.arange(total).chunk(parts)] if total else []
    assert found == expected + [[]] * (parts - len(expected))


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("total", [5, 6, 12, 13])
def test_strided_chunks_are_torchs(total: int, parts: int, factor: int):
    placement = _StridedShard(0, split_factor=factor)
    split, _ = placement._split_tensor(torch.arange(total), parts, with_padding=False)
    for number in range(parts):
        found = indices(strided_chunk(((0, total),), factor, parts, number))
        assert found == split[number].tolist()


MESHES = [
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 3), (Shard(0), Shard(1))),
    ((3, 2), (Shard(2), Replicate())),
    ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 2), (_StridedShard(1, split_factor=2), Shard(1))),
    ((2, 2, 2), (Shard(1), Replicate(), Shard(1))),
    ((4,), (Shard(0),)),
]


@pytest.mark.parametrize(("mesh", "placements"), MESHES)
@pytest.mark.parametrize("sizes", [(6, 8, 4), (5, 7, 3), (1, 2, 6)])
def test_selections_and_their_bytes(
    sizes: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[object, ...]
):
    full = numbers(*sizes)
    for coordinate in torch.cartesian_prod(*(torch.arange(n) for n in mesh)).reshape(-1, len(mesh)):
        at = coordinate.tolist()
        local = full
        for parts, number, placement in zip(mesh, at, placements, strict=True):
            if not isinstance(placement, Replicate):
                split, _ = placement._split_tensor(local, parts, with_padding=False)
                local = split[number]
        found = local_selection(sizes, mesh, at, placements)
        assert not isinstance(found, str)
        assert taken(full, found).tolist() == local.tolist()
        if local.numel():
            assert counts(found) == tuple(local.shape)
        data = raw(full)
        assert b"".join(data[a:b] for a, b in pieces(sizes, 4, found)) == raw(local)


def test_partial_holds_no_values():
    assert isinstance(local_selection((4,), (2,), (0,), (Partial(),)), str)


def test_a_scalar():
    assert list(pieces((), 4, ())) == [(0, 4)]
    assert [b.shape for b in blocks((), 4, (), (), rows=(0, 1), limit=10)] == [(1,)]


def test_small_pieces_are_read_with_what_is_around_them():
    sizes = (4, 32, 64)
    rows = (((0, 4),), ((0, 16),), ((0, 64),))
    assert covering(sizes, 2, rows) == rows  # four pieces of 2 KiB: few
    many = (((0, 17),), ((0, 16),), ((0, 64),))
    assert covering((17, 32, 64), 2, many) == whole((17, 32, 64))
    large = (((0, 17),), ((0, 16),), ((0, 8192),))  # many pieces of 256 KiB: worth a read each
    assert covering((17, 32, 8192), 2, large) == large
    columns = (((0, 4),), ((1, 3),), ((0, 32),))
    assert covering(sizes, 2, columns) == (((0, 4),), ((1, 3),), ((0, 64),))
    lines = (((0, 64),), ((0, 32),))
    assert covering((64, 64), 2, lines) == whole((64, 64))
    assert covering((64, 64), 2, (((0, 64),), ())) == (((0, 64),), ())


WANTED = [
    (((0, 2), (3, 6)), ((0, 8),), ((0, 2), (5, 9))),
    (((0, 2), (3, 6)), ((1, 3), (4, 8)), ((0, 10),)),
    (((0, 5),), ((1, 3), (4, 8)), ((2, 4),)),
]


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("limit", [1, 80, 100, 1000, 100_000])
def test_blocks_and_their_rebalancing(limit: int, wanted: Selection):
    sizes = (6, 8, 10)
    full = numbers(*sizes)
    read = covering(sizes, 4, wanted)
    out = torch.zeros(counts(wanted))
    data = raw(full)
    for rows in ((0, 2), (2, 5)):
        for block in blocks(sizes, 4, wanted, read, rows=rows, limit=limit):
            staged = b"".join(data[a:b] for a, b in block.pieces)
            assert len(staged) <= max(limit, 10 * 4)  # at the least one of dimension 1
            values = torch.frombuffer(bytearray(staged), dtype=torch.float32).view(block.shape)
            place = out[slice(*block.rows)]
            if block.columns is not None:
                place = place[:, slice(*block.columns)]
            for to, source in copies(wanted, read):
                _within(place, to).copy_(_within(values, source))
    assert out.tolist() == taken(full, wanted).tolist()
