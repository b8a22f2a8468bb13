"""What a run asks of the kernel, counted: calls, bytes, and blocks that are shared in truth."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import moeconv
from moeconv.engine.copy import methods
from moeconv.engine.copy.syscalls import open_direct
from moeconv.engine.options import default_jobs
from moeconv.errors import DiskFull
from tests.badinput.builders import config, qwen, write
from tests.calls import around
from tests.engine.cloning import big, phased, source

MIB = 1024 * 1024
FIEMAP, SYNC, SHARED = 0xC020660B, 1, 0x2000  # linux/fiemap.h


class Calls:
    """Counts calls of `os` and the bytes that they moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.made: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        for name in names:
            count = partial(self._count, name)
            monkeypatch.setattr(os, name, around(getattr(os, name), after=count))

    def _count(self, name: str, result: object) -> None:
        self.made[name] += 1
        self.moved[name] += result if isinstance(result, int) else 0


def test_few_large_calls_and_each_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 matrices of 2 MiB and 200 MB in all: a megabyte a call, read once, written once."""
    experts = 32
    src = write(
        tmp_path / "src",
        qwen(experts, 1024, 1024),
        config=config(experts=experts, width=1024, hidden=1024),
    )
    calls = Calls(monkeypatch, "preadv", "pwrite", "copy_file_range", "fsync")
    plan = moeconv.fuse(src, tmp_path / "out", jobs=2).plan
    data = plan.tensor_bytes
    assert data > 96 * 2 * MIB
    assert data <= calls.moved["preadv"] <= data + 4096  # and config.json
    assert calls.made["preadv"] <= data / MIB + 20
    written = calls.moved["pwrite"] + calls.moved["copy_file_range"]
    assert data <= written <= data + 64 * 1024  # and the header
    assert calls.made["pwrite"] + calls.made["copy_file_range"] <= data / MIB + 20
    assert calls.made["fsync"] <= 20  # files and folders, not tensors


def extents(path: Path) -> list[tuple[int, bool]]:
    """The extents of a file: bytes, and whether another file has them, too. Source: fiemap.rst."""
    room = 4096
    asked = struct.pack("=QQIIII", 0, 2**64 - 1, SYNC, 0, room, 0)
    buffer = bytearray(asked + bytes(56 * room))
    with path.open("rb") as stream:
        fcntl.ioctl(stream, FIEMAP, buffer)
    (count,) = struct.unpack_from("=I", buffer, 20)
    found = (struct.unpack_from("=QQQQQIIII", buffer, 32 + 56 * n) for n in range(count))
    return [(length, bool(flags & SHARED)) for _, _, length, _, _, flags, *_ in found]


def test_what_is_reported_as_cloned_takes_no_space(cloning: Path, tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    moeconv.fuse(src, cloning / "fused")
    os.sync()
    before = os.statvfs(cloning)
    result = moeconv.shard(cloning / "fused", cloning / "ranks", ep_size=4)
    assert result.methods is not None
    os.sync()
    after = os.statvfs(cloning)
    grown = (before.f_bfree - after.f_bfree) * before.f_frsize
    assert grown < result.methods.tally.cloned / 4
    shared = alone = 0
    for path in (cloning / "ranks").glob("*.safetensors"):
        for nbytes, is_shared in extents(path):
            shared, alone = shared + nbytes * is_shared, alone + nbytes * (not is_shared)
    assert shared >= result.methods.tally.cloned * 0.99
    assert alone < shared / 4  # headers and edges
    for out in ("fused", "ranks"):
        shutil.rmtree(cloning / out)


def test_clones_need_no_space(
    cloning: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk with less room than the output has bytes is enough, if it does clone."""
    moeconv.fuse(source(tmp_path / "src"), cloning / "fused")
    out, shard = cloning / "ranks", partial(moeconv.shard, cloning / "fused", ep_size=4)
    space = shard(out, dry_run=True).disk_space
    assert space.needed * 0.8 < space.shared < space.needed
    facts = os.statvfs(cloning)

    def claim(free: int) -> None:
        said = SimpleNamespace(f_bavail=free, f_frsize=1, f_bsize=facts.f_bsize)
        monkeypatch.setattr(os, "statvfs", lambda _path: said)

    claim(space.needed - space.shared - 1)
    with pytest.raises(DiskFull, match="can be cloned"):
        shard(out)
    claim(space.needed - space.shared)
    # of the right kind, and made without reflinks: found out before a byte is copied
    monkeypatch.setattr(methods, "clone_range", lambda *_: False)
    progress: list[int] = []
    with pytest.raises(DiskFull):
        shard(out, progress=lambda done, _: progress.append(done))
    assert not progress
    assert not out.exists()
    monkeypatch.undo()
    claim(space.needed - space.shared)
    result = shard(out)
    assert result.methods is not None
    assert result.methods.tally.cloned >= space.shared
    for name in ("fused", "ranks"):
        shutil.rmtree(cloning / name)


@pytest.mark.parametrize("digests", ["now", "later"])
def test_unaligned_runs_bypass_the_page_cache_but_for_their_ends(
    tmp_path: Path, digests: str
) -> None:
    """With `--align source` matrices seldom begin with a page."""
    probe = tmp_path / "probe"
    probe.write_bytes(b"")
    descriptor = open_direct(probe)
    if descriptor is None:
        pytest.skip("the temporary directory's file system takes no writes past the page cache")
    os.close(descriptor)
    src = phased(tmp_path / "src", big)
    result = moeconv.fuse(src, tmp_path / "out", align="source", digests=digests)
    assert result.methods is not None
    starts = [t.offset % 4096 for f in result.plan.files for t in f.tensors if "experts" in t.name]
    assert all(starts)
    tally = result.methods.tally
    # 12 matrices of 512 KiB: a page at most stays behind at either end of each
    assert tally.direct >= 12 * (512 * 1024 - 2 * 4096)
    assert moeconv.verify(tmp_path / "out", level="source", source=src, fill=digests == "later").ok


@pytest.mark.parametrize(("cores", "jobs"), [(None, 2), (1, 2), (2, 4), (64, 8)])
def test_two_workers_a_core(monkeypatch: pytest.MonkeyPatch, cores: int | None, jobs: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_jobs() == jobs
