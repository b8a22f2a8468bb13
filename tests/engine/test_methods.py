"""Clones, kernel copies and buffers: counted, never timed, and the same bytes whichever it was."""

import errno
import os
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.engine.copy import disk_sink, methods, pool
from tests.calls import around, watched
from tests.engine.cloning import MATRICES_BYTES, WAYS, big, go_by, phased, share, source, used
from tests.helpers import tree_sha256


def test_our_own_outputs_are_cloned_again_and_again(cloning: Path, tmp_path: Path) -> None:
    src = source(tmp_path / "src")  # on another file system: nothing can be cloned
    first = moeconv.fuse(src, cloning / "fused")
    assert share(first) == 0
    second = moeconv.shard(cloning / "fused", cloning / "ranks", ep_size=4, redundant=4)
    assert used(second) == {methods.REFLINK}
    assert share(second) >= 0.99
    third = moeconv.shard(cloning / "ranks", cloning / "more", ep_size=2, placement="round-robin")
    assert share(third) >= 0.99
    for out in ("fused", "ranks", "more"):
        report = moeconv.verify(cloning / out, level="source", source=src)
        assert report.problems == ()
        assert moeconv.verify(cloning / out).ok
    # the same bytes where nothing can be cloned
    moeconv.shard(src, tmp_path / "ranks", ep_size=4, redundant=4)
    assert tree_sha256(tmp_path / "ranks") == tree_sha256(cloning / "ranks")
    for out in ("fused", "ranks", "more"):
        shutil.rmtree(cloning / out)


@pytest.mark.parametrize("digests", ["now", "later"])
def test_align_source_clones_from_a_foreign_one(
    cloning: Path, tmp_path: Path, digests: str
) -> None:
    src = phased(cloning / "src")
    page = moeconv.fuse(src, cloning / "page", digests=digests)
    aligned = moeconv.fuse(src, cloning / "aligned", align="source", digests=digests)
    assert share(page) == 0
    assert share(aligned) >= 0.9
    assert aligned.methods is not None
    tally = aligned.methods.tally
    assert tally.cloned + tally.written >= aligned.plan.tensor_bytes
    assert tally.copied == 0  # edges are too small for a call of their own
    if digests == "later":
        assert [p.code for p in moeconv.verify(cloning / "aligned").problems] == ["digests-missing"]
        moeconv.verify(cloning / "aligned", level="source", source=src, fill=True)
    assert moeconv.verify(cloning / "aligned").ok
    # the flag alone decides, not the file system
    moeconv.fuse(src, tmp_path / "aligned", align="source")
    assert tree_sha256(tmp_path / "aligned") == tree_sha256(cloning / "aligned")
    back = moeconv.unfuse(cloning / "aligned", cloning / "back")
    assert share(back) >= 0.9
    assert tree_sha256(cloning / "back") == tree_sha256(src)
    for out in ("src", "page", "aligned", "back"):
        shutil.rmtree(cloning / out)


def test_the_edges_of_two_clones_are_one_write(
    cloning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two clones lies one block, of both; nothing else is written, or copied in pieces."""
    src = phased(cloning / "src")
    writes: list[int] = []
    clones: list[int] = []
    settled: list[int] = []

    def seen(_fd: int, data: memoryview, _at: int) -> None:
        writes.append(len(data))

    monkeypatch.setattr(os, "pwrite", watched(os.pwrite, seen))
    monkeypatch.setattr(disk_sink, "start_writeback", lambda *_: settled.append(1))
    monkeypatch.setattr(
        methods, "clone_range", watched(methods.clone_range, lambda *call: clones.append(call[4]))
    )
    result = moeconv.fuse(src, cloning / "out", align="source", digests="later")
    clones.pop(0)  # the probe
    assert len(clones) >= 8 * 2 * 2 - 2  # experts, layers, stacks; some meet in the source, too
    assert len(writes) <= len(clones) + 2  # beside them a header, and what is too small
    assert result.methods is not None
    assert result.methods.tally.copied == 0
    assert settled == []  # so few bytes wait for the end
    assert moeconv.verify(cloning / "out", level="source", source=src).problems == ()
    for out in ("src", "out"):
        shutil.rmtree(cloning / out)


@pytest.mark.parametrize(("digests", "batches"), [("now", 4), ("later", 1)])
def test_clones_that_are_not_read_are_not_distributed(
    cloning: Path, monkeypatch: pytest.MonkeyPatch, digests: str, batches: int
) -> None:
    """They wait for one another; a batch of them is as long as it takes, not as it is large."""
    src = phased(cloning / "src", big)
    jobs: list[int] = []
    monkeypatch.setattr(pool, "BATCH_BYTES", 2 << 20)
    monkeypatch.setattr(pool, "_job", around(pool._job, after=lambda job: jobs.append(job.pending)))
    moeconv.fuse(src, cloning / "out", align="source", digests=digests)
    assert jobs == [batches]
    for out in ("src", "out"):
        shutil.rmtree(cloning / out)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_same_bytes_by_every_way_and_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, jobs: int
) -> None:
    src = big(tmp_path / "src")
    moeconv.shard(src, tmp_path / "plain", ep_size=2)
    go_by(way, monkeypatch)
    result: Any = moeconv.shard(src, tmp_path / "out", ep_size=2, jobs=jobs)
    assert used(result) == ({methods.BUFFER} if way == "buffer" else {methods.KERNEL})
    assert result.methods.tally.direct == 0
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "plain")


def test_large_writes_go_past_the_page_cache_where_that_pays(
    cloning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = big(tmp_path / "src")
    result = moeconv.fuse(src, cloning / "out")
    assert result.methods is not None
    xfs = cloning.parent.name.startswith("XFS")
    assert result.methods.tally.direct == (MATRICES_BYTES if xfs else 0)
    monkeypatch.setattr(disk_sink, "open_direct", lambda _: None)
    moeconv.fuse(src, tmp_path / "plain")
    assert tree_sha256(cloning / "out") == tree_sha256(tmp_path / "plain")
    shutil.rmtree(cloning / "out")


@pytest.mark.parametrize("answer", ["refused", "short", "shorter"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_disk_that_takes_less_than_whole_pages_gets_the_rest_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, jobs: int
) -> None:
    src = big(tmp_path / "src")
    moeconv.shard(src, tmp_path / "plain", ep_size=2)
    opened: set[int] = set()
    real = os.pwrite

    def open_direct(path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY)
        opened.add(descriptor)
        return descriptor

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor not in opened:
            return real(descriptor, data, offset)
        assert offset % 4096 == 0 == len(data) % 4096
        if answer == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data[: 12288 if answer == "short" else 5000], offset)

    monkeypatch.setattr(disk_sink, "open_direct", open_direct)
    monkeypatch.setattr(os, "pwrite", pwrite)
    result: Any = moeconv.shard(src, tmp_path / "out", ep_size=2, jobs=jobs)
    assert opened
    tally = result.methods.tally
    assert tally.direct + tally.copied + tally.written >= MATRICES_BYTES
    assert (tally.direct > 0) == (answer != "refused")
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "plain")


@pytest.mark.parametrize("layout", ["fused", "kn"])
def test_btrfs_gets_a_file_in_order_and_begins_on_it_meanwhile(
    cloning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """There many hands on a file make it slower; permuting is work that they can share."""
    src = big(tmp_path / "src")
    threads: dict[int, set[int]] = defaultdict(set)
    offsets: dict[int, list[int]] = defaultdict(list)
    begun: set[int] = set()

    def wrote(file: int, _data: memoryview, at: int) -> None:
        threads[file].add(threading.get_ident())
        offsets[file].append(at)

    monkeypatch.setattr(pool, "BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(disk_sink, "MIN_WRITEBACK_BYTES", 0)
    monkeypatch.setattr(os, "pwrite", watched(os.pwrite, wrote))
    look = watched(disk_sink.start_writeback, lambda *_: begun.add(threading.get_ident()))
    monkeypatch.setattr(disk_sink, "start_writeback", look)
    moeconv.fuse(src, cloning / "out", layout=layout, jobs=4)
    if cloning.parent.name.startswith("btrfs"):
        (file,) = threads
        assert begun.isdisjoint(threads[file])
        assert len(begun) == 1
        if layout == "fused":
            assert len(threads[file]) == 1
            assert offsets[file] == sorted(offsets[file])
    assert moeconv.verify(cloning / "out", level="source", source=src).ok
    shutil.rmtree(cloning / "out")


@pytest.mark.parametrize(
    ("align", "digests", "layout", "alone"),
    [
        ("page", "now", "fused", True),
        ("page", "now", "kn", False),  # turned
        ("source", "now", "fused", False),  # cloned, and hashed by all
        ("source", "later", "fused", False),
    ],
)
def test_who_is_left_alone_on_btrfs(  # noqa: PLR0917
    cloning: Path, monkeypatch: pytest.MonkeyPatch, align: str, digests: str, layout: str,
    alone: bool,
) -> None:  # fmt: skip
    src = phased(cloning / "src")
    jobs: list[bool] = []
    monkeypatch.setattr(pool, "_job", around(pool._job, after=lambda job: jobs.append(job.alone)))
    moeconv.fuse(src, cloning / "out", align=align, digests=digests, layout=layout)
    assert jobs == [alone and cloning.parent.name.startswith("btrfs")]
    for out in ("src", "out"):
        shutil.rmtree(cloning / out)


def test_transposed_matrices_bypass_the_page_cache_too(cloning: Path, tmp_path: Path) -> None:
    src = big(tmp_path / "src")
    result = moeconv.fuse(src, cloning / "out", layout="kn")
    assert result.methods is not None
    xfs = cloning.parent.name.startswith("XFS")
    assert result.methods.tally.direct == (MATRICES_BYTES if xfs else 0)
    shutil.rmtree(cloning / "out")


@pytest.mark.parametrize("digests", ["now", "later"])
def test_contiguous_runs_are_cloned_at_once(
    cloning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: str
) -> None:
    src = source(tmp_path / "src")
    moeconv.fuse(src, cloning / "fused")
    asked: list[int] = []
    real = methods.clone_range

    def clone_range(source: int, offset: int, at_file: int, at: int, nbytes: int) -> bool:
        asked.append(nbytes)
        return real(source, offset, at_file, at, nbytes)

    monkeypatch.setattr(methods, "clone_range", clone_range)
    result = moeconv.shard(cloning / "fused", cloning / "out", ep_size=4, digests=digests)
    assert share(result) >= 0.99
    matrices = [size for size in asked if size >= 2 * 64 * 512 * 2]
    assert len(matrices) <= 4 * 2 * 2  # ranks, layers, gate_up and down: two experts in each
    assert moeconv.verify(cloning / "out", level="source", source=src).ok
    for out in ("fused", "out"):
        shutil.rmtree(cloning / out)
