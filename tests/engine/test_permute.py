"""Permuting tiles of all sizes and steps, against what NumPy makes of them."""

from __future__ import annotations

import ctypes
import mmap
from math import prod

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeconv.core.digest import digest
from moeconv.engine.copy.buffers import PAGE_BYTES, paged
from moeconv.engine.copy.permute import memory_of, permute
from moeconv.errors import UnequalShared
from moeconv.plan.model import PermuteTile, Span, Strided, StridedCopy

# about the blocks that matrices are transposed by, of 256 x 256 items
SIZES = st.sampled_from([1, 2, 3, 31, 255, 256, 257, 511, 512, 513, 600])
LIBC = ctypes.CDLL(None, use_errno=True)
ITEMS = st.sampled_from([1, 2, 4, 8])


def _walled(size: int) -> memoryview:
    """Memory that ends where nothing may be touched: who reads beyond it dies of that."""
    room = paged(size)
    block = mmap.mmap(-1, room + PAGE_BYTES)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(block)) + room
    assert not LIBC.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(PAGE_BYTES), 0)
    found = memoryview(block)[room - size : room]
    found[:] = b"\xa5" * size
    return found


def _permuted(tile: PermuteTile, data: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """The tile's items, where no more memory is taken than was said to be."""
    taken = 0

    def take(size: int) -> memoryview:
        nonlocal taken
        taken += paged(size)
        return _walled(size)

    def read(span: Span, into: memoryview) -> memoryview:
        into[:] = data.view(np.uint8)[span.offset : span.offset + span.nbytes].data
        return into

    out, units = permute(tile, read, take)
    assert taken <= memory_of(tile)
    return np.frombuffer(out, dtype=data.dtype), units


def _numbers(count: int, itemsize: int) -> np.ndarray:
    rng = np.random.Generator(np.random.SFC64(count))
    return np.frombuffer(rng.bytes(count * itemsize), dtype=f"u{itemsize}")


def _tile(
    itemsize: int, read: int | tuple[int, ...], written: int, *pieces: StridedCopy
) -> PermuteTile:
    """read: the items of each span; they stand one after the other."""
    sizes = (read,) if isinstance(read, int) else read
    spans = [Span(0, sum(sizes[:n]) * itemsize, size * itemsize) for n, size in enumerate(sizes)]
    return PermuteTile(0, written * itemsize, 0, itemsize, tuple(spans), pieces)


@given(out=SIZES, into=SIZES, step=st.integers(1, 4), place=st.integers(0, 3), itemsize=ITEMS)
@example(out=300, into=5, step=2, place=1, itemsize=2)  # its last item is the last of all
def test_transposed_matrices_between_others_come_out_canonical(
    out: int, into: int, step: int, place: int, itemsize: int
):
    data = _numbers(into * out * step, itemsize)
    place %= step
    piece = StridedCopy(
        0, 0, Strided(place, (step, out * step)), Strided(0, (into, 1)), (out, into)
    )
    found, units = _permuted(_tile(itemsize, into * out * step, out * into, piece), data)
    expected = np.ascontiguousarray(data.reshape(into, out, step)[:, :, place].T)
    assert np.array_equal(found.reshape(out, into), expected)
    assert units == [(0, digest(expected.tobytes()))]


@given(out=SIZES, into=SIZES, step=st.integers(1, 4), itemsize=ITEMS)
def test_canonical_matrices_are_interleaved_transposed(
    out: int, into: int, step: int, itemsize: int
):
    data = _numbers(step * out * into, itemsize)
    pieces = [
        StridedCopy(
            n, 0, Strided(n * out * into, (into, 1)), Strided(n, (step, out * step)), (out, into)
        )
        for n in range(step)
    ]
    found, units = _permuted(_tile(itemsize, step * out * into, step * out * into, *pieces), data)
    whole = data.reshape(step, out, into)
    assert np.array_equal(found.reshape(into, out, step), whole.transpose(2, 1, 0))
    assert units == [(n, digest(whole[n].tobytes())) for n in range(step)]


@given(out=SIZES, into=SIZES, itemsize=ITEMS)
def test_what_stays_transposed_has_the_digest_of_the_canonical_order(
    out: int, into: int, itemsize: int
):
    data = _numbers(into * out, itemsize)
    piece = StridedCopy(0, 0, Strided(0, (1, out)), Strided(0, (1, out)), (out, into))
    found, units = _permuted(_tile(itemsize, into * out, into * out, piece), data)
    assert np.array_equal(found, data)
    assert units == [(0, digest(np.ascontiguousarray(data.reshape(into, out).T).tobytes()))]


@given(out=SIZES, into=SIZES, itemsize=ITEMS)
def test_matrices_of_two_files_are_transposed_into_one(out: int, into: int, itemsize: int):
    """Transposed on both sides, one after the other in the target: both need spare memory."""
    size = out * into
    data = _numbers(2 * size, itemsize)
    pieces = [
        StridedCopy(n, n, Strided(0, (1, out)), Strided(n * out, (1, 2 * out)), (out, into))
        for n in range(2)
    ]
    found, units = _permuted(_tile(itemsize, (size, size), 2 * size, *pieces), data)
    apart = data.reshape(2, into, out)
    assert np.array_equal(found.reshape(into, 2, out), apart.transpose(1, 0, 2))
    expected = [np.ascontiguousarray(apart[n].T) for n in range(2)]
    assert units == [(n, digest(matrix.tobytes())) for n, matrix in enumerate(expected)]


def test_what_is_stored_once_must_be_equal():
    data = np.tile(_numbers(700, 2), 2)
    pieces = [
        StridedCopy(n, n, Strided(0, (1,)), Strided(0, (1,)), (700,), repeat=n == 1)
        for n in range(2)
    ]
    tile = _tile(2, (700, 700), 700, *pieces)
    found, units = _permuted(tile, data)
    assert np.array_equal(found, data[:700])
    assert units[0][1] == units[1][1] == digest(data[:700].tobytes())
    data[-1] += 1
    with pytest.raises(UnequalShared, match="differs between matrices"):
        _permuted(tile, data)


@pytest.mark.parametrize("shape", [(), (700,), (3, 300, 2)])
def test_shapes_of_other_ranks_are_copied_by_their_strides(shape: tuple[int, ...]):
    data = _numbers(2 * prod(shape), 2)
    steps = tuple(int(n) // 2 for n in np.empty(shape, np.uint16).strides)
    piece = StridedCopy(0, 0, Strided(1, tuple(2 * n for n in steps)), Strided(0, steps), shape)
    found, units = _permuted(_tile(2, 2 * prod(shape), prod(shape), piece), data)
    assert np.array_equal(found, data[1::2])
    assert units == [(0, digest(data[1::2].tobytes()))]
