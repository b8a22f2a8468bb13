"""Permuting tiles of all sizes and steps, against what NumPy makes of them."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.digest import digest
from moeconv.engine.memory import paged
from moeconv.engine.weave import memory_of, weave
from moeconv.plan.values import Piece, Span, WeaveTile

# about the blocks that matrices are turned by, of 256 x 256 items
SIZES = st.sampled_from([1, 2, 3, 31, 255, 256, 257, 511, 512, 513, 600])
ITEMS = st.sampled_from([1, 2, 4, 8])


def _woven(tile: WeaveTile, data: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """The tile's items, where no more memory is taken than was said to be."""
    taken = 0

    def take(size: int) -> memoryview:
        nonlocal taken
        taken += paged(size)
        return memoryview(bytearray(b"\xa5" * size))

    def read(span: Span, into: memoryview) -> memoryview:
        into[:] = data.view(np.uint8)[span.offset : span.offset + span.nbytes].data
        return into

    out, units = weave(tile, read, take)
    assert taken <= memory_of(tile)
    return np.frombuffer(out, dtype=data.dtype), units


def _numbers(count: int, itemsize: int) -> np.ndarray:
    rng = np.random.Generator(np.random.SFC64(count))
    return np.frombuffer(rng.bytes(count * itemsize), dtype=f"u{itemsize}")


def _tile(itemsize: int, read: int, written: int, *pieces: Piece) -> WeaveTile:
    span = Span(0, 0, read * itemsize)
    return WeaveTile(0, written * itemsize, 0, itemsize, (span,), pieces)


@given(out=SIZES, into=SIZES, step=st.integers(1, 4), place=st.integers(0, 3), itemsize=ITEMS)
def test_matrices_that_stand_turned_between_others_come_out_canonical(
    out: int, into: int, step: int, place: int, itemsize: int
):
    data = _numbers(into * out * step, itemsize)
    place %= step
    piece = Piece(0, 0, place, (step, out * step), 0, (into, 1), (out, into))
    found, units = _woven(_tile(itemsize, into * out * step, out * into, piece), data)
    expected = np.ascontiguousarray(data.reshape(into, out, step)[:, :, place].T)
    assert np.array_equal(found.reshape(out, into), expected)
    assert units == [(0, digest(expected.tobytes()))]


@given(out=SIZES, into=SIZES, step=st.integers(1, 4), itemsize=ITEMS)
def test_canonical_matrices_go_turned_between_each_other(
    out: int, into: int, step: int, itemsize: int
):
    data = _numbers(step * out * into, itemsize)
    pieces = [
        Piece(n, 0, n * out * into, (into, 1), n, (step, out * step), (out, into))
        for n in range(step)
    ]
    found, units = _woven(_tile(itemsize, step * out * into, step * out * into, *pieces), data)
    whole = data.reshape(step, out, into)
    assert np.array_equal(found.reshape(into, out, step), whole.transpose(2, 1, 0))
    assert units == [(n, digest(whole[n].tobytes())) for n in range(step)]


@given(out=SIZES, into=SIZES, itemsize=ITEMS)
def test_what_stays_turned_has_the_digest_of_the_canonical_order(
    out: int, into: int, itemsize: int
):
    data = _numbers(into * out, itemsize)
    piece = Piece(0, 0, 0, (1, out), 0, (1, out), (out, into))
    found, units = _woven(_tile(itemsize, into * out, into * out, piece), data)
    assert np.array_equal(found, data)
    assert units == [(0, digest(np.ascontiguousarray(data.reshape(into, out).T).tobytes()))]


@pytest.mark.parametrize("shape", [(), (700,), (3, 300, 2)])
def test_shapes_that_are_no_matrix_go_as_they_are_told(shape: tuple[int, ...]):
    data = _numbers(2 * prod(shape), 2)
    steps = tuple(int(n) // 2 for n in np.empty(shape, np.uint16).strides)
    piece = Piece(0, 0, 1, tuple(2 * n for n in steps), 0, steps, shape)
    found, units = _woven(_tile(2, 2 * prod(shape), prod(shape), piece), data)
    assert np.array_equal(found, data[1::2])
    assert units == [(0, digest(data[1::2].tobytes()))]
