"""Clones and blocks that a disk refuses, early writeback where it pays, and other ways on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import moeconv
from moeconv.engine.copy import disk_sink, methods, pool, syscalls, worker
from moeconv.engine.output.journal import read_journal
from moeconv.errors import DiskFull, IoFailed
from tests.badinput.checks import holds, tree
from tests.calls import watched
from tests.engine.cloning import WAYS, big, go_by, source, used
from tests.faults.killed import forked
from tests.helpers import tree_sha256

KINDS = pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])


def fails_as_the_disk_does(code: int, run: Callable[[], object]) -> None:
    """With our own error, in the system's words."""
    kind = DiskFull if code == errno.ENOSPC else IoFailed
    with pytest.raises(IoFailed) as caught:
        run()
    holds(caught.value, kind, os.strerror(code))


@pytest.mark.parametrize("code", [errno.ENOSPC])  # only the output can be the cause of it
@pytest.mark.parametrize("turn", [1, 2, 7])  # the first is the question whether it clones at all
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_clone_that_fails(  # noqa: PLR0917 - parameters
    cloning: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    turn: int,
    overwrite: bool,
) -> None:
    moeconv.fuse(source(tmp_path / "src"), cloning / "fused")
    if overwrite:
        moeconv.fuse(cloning / "fused", cloning / "out")
    before, made = tree(cloning / "out"), 0

    def fail(_descriptor: int, request: int, *_: object) -> None:
        nonlocal made
        made += request == syscalls._CLONE_RANGE
        if made == turn and request == syscalls._CLONE_RANGE:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", watched(fcntl.ioctl, fail))
    fails_as_the_disk_does(
        code,
        lambda: moeconv.shard(
            cloning / "fused", cloning / "out", ep_size=4, overwrite=overwrite, jobs=1
        ),
    )
    monkeypatch.undo()
    assert tree(cloning / "out") == before
    assert sorted(p.name for p in cloning.iterdir() if p.name.startswith(".out")) == []
    shutil.rmtree(cloning / "fused")
    shutil.rmtree(cloning / "out", ignore_errors=True)


@KINDS
@pytest.mark.parametrize("turn", [1, 2])
def test_blocks_that_are_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, turn: int
) -> None:
    src, real, made = big(tmp_path / "src"), syscalls._libc, 0

    def fallocate(*_: object) -> int:
        nonlocal made
        made += 1
        ctypes.set_errno(code if made == turn else errno.EOPNOTSUPP)
        return -1  # what cannot give blocks ahead is no failure

    monkeypatch.setattr(methods.Reflink, "probe", lambda *_: False)
    calls = {"statfs": real.statfs, "sync_file_range": real.sync_file_range}
    monkeypatch.setattr(syscalls, "_libc", SimpleNamespace(fallocate=fallocate, **calls))
    fails_as_the_disk_does(code, lambda: moeconv.shard(src, tmp_path / "out", ep_size=2, jobs=1))
    assert made == turn
    assert tree(tmp_path / "out") is None
    moeconv.shard(src, tmp_path / "out", ep_size=2)


def test_early_writeback_is_not_asked_for_on_btrfs(
    cloning: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(disk_sink, "start_writeback", lambda _fd, _at, nbytes: asked.append(nbytes))
    monkeypatch.setattr(disk_sink.Writeback, "begin", lambda *_: None)  # its own thread asks
    result = moeconv.fuse(big(tmp_path / "src"), cloning / "out")
    xfs = cloning.parent.name.startswith("XFS")
    assert sum(asked) >= result.plan.tensor_bytes if xfs else not asked
    shutil.rmtree(cloning / "out")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("jobs", [(1, 5), (3, 1)], ids=str)
def test_resumed_by_another_way_and_with_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, jobs: tuple[int, int]
) -> None:
    src, out = big(tmp_path / "src"), tmp_path / "out"
    same: dict[str, int] = {"ep_size": 2, "max_shard_size": 1_500_000}
    moeconv.shard(src, tmp_path / "whole", **same)

    def die(*_: object) -> None:
        begun = read_journal(out)
        if begun is not None and begun.finished:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(lambda: moeconv.shard(src, out, jobs=jobs[0], progress=die, **same)) == 9
    journal = read_journal(out)
    assert journal is not None
    kept = {name: (out / name).stat().st_mtime_ns for name in journal.finished}
    assert kept
    go_by(way, monkeypatch)
    result = moeconv.shard(src, out, resume=True, jobs=jobs[1], **same)
    assert used(result) == ({methods.BUFFER} if way == "buffer" else {methods.KERNEL})
    assert tree_sha256(out) == tree_sha256(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_a_file_that_cannot_be_made_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited for its opening would find a half-made one, and say that instead."""
    opened: list[int] = []

    def fail(_: disk_sink.DiskSink) -> None:
        opened.append(1)
        time.sleep(0.2)
        raise IoFailed("no space")

    monkeypatch.setattr(pool, "BATCH_BYTES", 1)
    monkeypatch.setattr(disk_sink.DiskSink, "open", fail)
    big(tmp_path / "src")
    with pytest.raises(IoFailed, match="no space"):
        moeconv.fuse(tmp_path / "src", tmp_path / "out", jobs=4)
    assert opened == [1]


@KINDS
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("name", [".safetensors", "probe", "journal"])
def test_files_that_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, broken: bool, name: str
) -> None:
    """Disks over a network may say then that they lost something; the others are closed, too."""
    src, out = source(tmp_path / "src"), tmp_path / "out"
    descriptors = sorted(Path("/proc/self/fd").iterdir())
    real = os.close

    def close(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        real(descriptor)
        if path.is_relative_to(out) and name in path.name:
            raise OSError(code, os.strerror(code))

    def fail(*_: object) -> None:
        if broken:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(os, "pwrite", watched(os.pwrite, fail))
    matters = name == ".safetensors"
    if broken:  # what went wrong first is what is said
        with pytest.raises(IoFailed, match=os.strerror(errno.EROFS)):
            moeconv.shard(src, out, ep_size=4)
    elif matters:
        fails_as_the_disk_does(code, lambda: moeconv.shard(src, out, ep_size=4))
    else:  # all that was ever of use in it is on the disk
        moeconv.shard(src, out, ep_size=4)
    monkeypatch.undo()
    assert sorted(Path("/proc/self/fd").iterdir()) == descriptors
    assert out.exists() == (not broken and not matters)


# a clone, in the shape of FICLONERANGE's argument: source, offset, length, where in the target
_CLONE = struct.Struct("=qQQQ")


class Kernel:
    """A kernel that clones on any file system, and copies; both fail from some call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, clones: bool, code: int) -> None:
        self.code = code
        self.calls = 0
        self.good = 1  # the question whether it can at all
        self.broken: str | None = None  # the file that nobody can read any more
        self._clones = clones
        self._copy, self._read, self._ioctl = os.copy_file_range, os.preadv, fcntl.ioctl
        monkeypatch.setattr(os, "copy_file_range", self.copy)
        monkeypatch.setattr(os, "preadv", self.read)
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)
        monkeypatch.setattr(disk_sink, "open_direct", lambda _: None)
        monkeypatch.setattr(worker, "LARGE_TILE_BYTES", 16 * 1024)

    def _turn(self) -> None:
        self.calls += 1
        if self.calls > self.good:
            raise OSError(self.code, os.strerror(self.code))

    def copy(self, source: int, target: int, count: int, *at: int) -> int:
        """copy_file_range(2)."""
        self._turn()
        return self._copy(source, target, count, *at)

    def ioctl(self, target: int, request: int, argument: bytes) -> object:
        """FICLONERANGE, or whatever else is asked."""
        if request != syscalls._CLONE_RANGE:
            return self._ioctl(target, request, argument)
        if not self._clones:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._turn()
        source, offset, length, at = _CLONE.unpack(argument)
        return os.pwrite(target, os.pread(source, length, offset), at)

    def read(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        """preadv(2)."""
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name == self.broken and self.calls > self.good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._read(descriptor, buffers, offset)


@pytest.mark.parametrize("clones", [False, True])
@pytest.mark.parametrize("good", [0, 1, 4])
@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR])
def test_what_the_kernel_cannot_copy_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clones: bool, good: int, code: int
) -> None:
    moeconv.fuse(source(tmp_path / "src"), tmp_path / "fused")
    moeconv.shard(tmp_path / "fused", tmp_path / "plain", ep_size=2)
    kernel = Kernel(monkeypatch, clones=clones, code=code)
    kernel.good = good
    moeconv.shard(tmp_path / "fused", tmp_path / "out", ep_size=2, jobs=1)
    assert kernel.calls > good
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "plain")


@pytest.mark.parametrize("clones", [False, True])
def test_a_source_that_cannot_be_read_is_not_called_an_output_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clones: bool
) -> None:
    moeconv.fuse(source(tmp_path / "src"), tmp_path / "fused")
    kernel = Kernel(monkeypatch, clones=clones, code=errno.EIO)
    kernel.broken = "model-00001-of-00001.safetensors"
    with pytest.raises(IoFailed) as caught:
        moeconv.shard(tmp_path / "fused", tmp_path / "out", ep_size=2, digests="later")
    holds(caught.value, IoFailed, f"cannot read `{kernel.broken}`", "fused", "byte")
    assert tree(tmp_path / "out") is None


@pytest.mark.parametrize("clones", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_only_the_output_can_lack_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clones: bool, code: int
) -> None:
    moeconv.fuse(source(tmp_path / "src"), tmp_path / "fused")
    Kernel(monkeypatch, clones=clones, code=code)
    with pytest.raises(DiskFull) as caught:
        moeconv.shard(tmp_path / "fused", tmp_path / "out", ep_size=2, digests="later")
    holds(caught.value, DiskFull, "cannot write `", "/out/", os.strerror(code))
    assert tree(tmp_path / "out") is None
