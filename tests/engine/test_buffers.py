"""Blocks for permuting tiles: bounded, reused, first come, first served."""

import threading

import pytest

from moeconv.engine.copy import buffers as rooms
from moeconv.engine.copy.buffers import PAGE_BYTES, BufferPool, paged
from moeconv.errors import MemoryShort

LIMIT = 4 * PAGE_BYTES


def mapped(memory: BufferPool) -> int:
    """Bytes of all blocks, free or taken."""
    return memory._mapped


@pytest.mark.parametrize(("nbytes", "size"), [(0, 1), (1, 1), (4096, 1), (4097, 2)])
def test_blocks_are_of_whole_pages(nbytes: int, size: int):
    assert paged(nbytes) == size * PAGE_BYTES


def test_a_block_of_the_same_size_is_used_again():
    memory = BufferPool(LIMIT)
    with memory.hold(PAGE_BYTES) as take:
        take(100)[:3] = b"abc"
    with memory.hold(PAGE_BYTES) as take:
        assert take(3) == b"abc"
        assert len(take(200)) == 200  # another one: the first is taken
    assert mapped(memory) == 2 * PAGE_BYTES


def test_free_blocks_make_space_for_others():
    memory = BufferPool(LIMIT)
    for pages in (1, 2, 3, 4, 1):
        with memory.hold(pages * PAGE_BYTES) as take:
            take(pages * PAGE_BYTES)
            assert mapped(memory) <= LIMIT


def test_more_than_the_limit_goes_alone_and_is_not_kept():
    memory = BufferPool(LIMIT)
    with memory.hold(9 * PAGE_BYTES) as take:
        take(9 * PAGE_BYTES)
        assert mapped(memory) == 9 * PAGE_BYTES
    assert mapped(memory) == 0


def test_a_large_one_that_waits_is_not_passed_by_small_ones():
    memory = BufferPool(LIMIT)
    order: list[str] = []

    def work(name: str, pages: int) -> None:
        with memory.hold(pages * PAGE_BYTES):
            order.append(name)

    with memory.hold(3 * PAGE_BYTES):
        threads = []
        for name, pages in (("large", 3), ("small", 1)):
            threads.append(threading.Thread(target=work, args=(name, pages)))
            threads[-1].start()
            while len(memory._waiting) < len(threads):
                pass
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]


def test_a_system_without_memory_says_so_and_what_helps(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    memory = BufferPool(LIMIT)
    monkeypatch.setattr(rooms.mmap, "mmap", full)
    with memory.hold(PAGE_BYTES) as take, pytest.raises(MemoryShort, match="--max-memory"):
        take(1)
    assert mapped(memory) == 0
