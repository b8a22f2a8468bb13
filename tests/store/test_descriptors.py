"""Open files in bounded number: each file's own, none closed that is held, none left open."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.checkpoint.source import open_checkpoint
from moeconv.core.system_errors import explained
from moeconv.errors import IoFailed, SourceChanged
from moeconv.store import descriptors
from moeconv.store.descriptors import (
    DescriptorPool,
    Lease,
    descriptors_left,
)
from moeconv.store.open_files import OpenFiles
from tests.badinput.builders import config, qwen, two_files, write

FILES = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files that say which they are."""
    home = tmp_path_factory.mktemp("files")
    found = [home / str(number) for number in range(FILES)]
    for number, path in enumerate(found):
        path.write_bytes(bytes([number]))
    return found


class Opener:
    """Opens numbered files, and counts those that are open."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.opened: list[int] = []
        self.left: list[int] = []

    def open(self, number: int) -> int:
        """A new descriptor."""
        self.opened.append(number)
        return os.open(self.files[number], os.O_RDONLY)

    def leave(self, number: int, descriptor: int) -> None:
        """Told before it is closed."""
        assert os.pread(descriptor, 1, 0) == bytes([number])
        self.left.append(number)


def numbers_of_this_process() -> set[int]:
    """Its open descriptors."""
    return {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, FILES - 1))), most=st.integers(1, 8)
)
def test_any_order_of_leases(files: list[Path], steps: list[tuple[int, int]], most: int) -> None:
    """Four who read one file each at a time, whatever is in the pool."""
    opener = Opener(files)
    pool = DescriptorPool(opener.open, opener.leave, most=most)
    leases = [Lease(pool) for _ in range(4)]
    held: dict[int, tuple[int, int]] = {}
    before = numbers_of_this_process()
    with closing(pool):
        for who, number in steps:
            held[who] = number, leases[who].on(number)
            assert len(pool.open) <= max(most, 4)
            for known, descriptor in held.values():
                assert os.pread(descriptor, 1, 0) == bytes([known])
        assert len(opener.opened) - len(opener.left) == len(pool.open)
    assert numbers_of_this_process() <= before


def test_many_threads_and_few_descriptors(files: list[Path]) -> None:
    opener = Opener(files)
    pool, wrong = DescriptorPool(opener.open, opener.leave, most=3), []

    def read(seed: int) -> None:
        rng = Random(seed)
        with closing(Lease(pool)) as lease:
            for _ in range(200):
                number = rng.randrange(FILES)
                if os.pread(lease.on(number), 1, 0) != bytes([number]):
                    wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool.open) <= 5
    pool.close()


def test_where_the_process_has_no_descriptor_left_an_idle_file_is_closed(files: list[Path]) -> None:
    opener = Opener(files)
    full = False

    def refusing(number: int) -> int:
        if full and len(opener.opened) - len(opener.left) >= 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opener.open(number)

    with closing(DescriptorPool(refusing, opener.leave, most=100)) as pool:
        lease, other = Lease(pool), Lease(pool)
        for number in range(5):
            lease.on(number)
        full = True
        lease.on(5)
        assert opener.left == [0, 1, 2, 3]
        other.on(6)
        with pytest.raises(OSError, match="Too many open files"):
            Lease(pool).on(7)  # both others are being read
        assert sorted(pool.open) == [5, 6]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A soft and a hard limit that are only believed."""
    both = [100, 1000]
    monkeypatch.setattr(descriptors, "_open_now", lambda: 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(both))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: both.__setitem__(slice(2), new))
    return both


@pytest.mark.parametrize(
    ("wanted", "left", "soft"),
    [(0, 68, 100), (68, 68, 100), (69, 69, 101), (500, 500, 532), (5000, 968, 1000)],
)
def test_the_soft_limit_is_raised_as_far_as_needed(
    limits: list[int], wanted: int, left: int, soft: int
) -> None:
    assert descriptors_left(wanted) == left
    assert limits == [soft, 1000]
    assert descriptors_left(0) == left  # never lowered
    assert limits == [soft, 1000]


def test_no_limit_at_all(limits: list[int]) -> None:
    limits[:] = [100, resource.RLIM_INFINITY]
    assert descriptors_left(100_000) == 100_000
    limits[:] = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    assert descriptors_left(100_000) == 100_000


def test_the_limit_in_words(limits: list[int]) -> None:
    reached = OSError(errno.EMFILE, "Too many open files")
    cause, fix = explained(reached, otherwise="")
    assert "100 open files" in cause
    assert "`ulimit -n`, up to 1,000" in fix
    limits[:] = [64, 64]
    cause, fix = explained(reached, otherwise="")
    assert "64 open files" in cause
    assert "hard limit" in fix
    assert "limit of open files" in explained(OSError(errno.ENFILE, ""), otherwise="")[0]
    assert explained(OSError(errno.EIO, "said"), otherwise="")[0] == "said"


@pytest.mark.parametrize("what", ["written to", "replaced", "removed", "cut"])
@pytest.mark.parametrize("again", [False, True])
def test_a_source_that_changes_while_it_is_closed(tmp_path: Path, what: str, again: bool) -> None:
    """It was read, made room for another, and is read again, or not."""
    src = write(tmp_path / "src", two_files(qwen()), config=config())
    found = open_checkpoint(src).files
    path, facts = found[0].path, found[0].path.stat()
    sources = OpenFiles(dict(enumerate(found)), most=1)
    with closing(sources), closing(sources.reader()) as reader:
        view = memoryview(bytearray(8))
        reader.read_into(0, view, 0)
        reader.read_into(1, view, 0)
        raw = path.read_bytes()
        if what == "replaced":  # by its like, of the same size and time
            path.rename(tmp_path / "old")
            path.write_bytes(raw)
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        elif what == "removed":
            path.unlink()
        else:
            path.write_bytes(raw if what == "written to" else raw[:-1])
        kind = IoFailed if what == "removed" else SourceChanged
        with pytest.raises(kind):
            reader.read_into(0, view, 0) if again else sources.unchanged()
