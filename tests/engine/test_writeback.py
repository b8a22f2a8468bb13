"""Early writeback in a thread of its own, as btrfs has it: nothing of it outlives a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import moeconv
from moeconv.engine.copy import disk_sink, pool, syscalls
from moeconv.errors import IoFailed
from tests.badinput.builders import config, qwen, write
from tests.calls import watched
from tests.helpers import tree_sha256

TILES = 12  # four experts, three matrices of 512 KiB


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranges that a slow disk was asked to begin on, of a file system that is like btrfs."""
    found: list[int] = []

    def slow(descriptor: int, offset: int, _nbytes: int) -> None:
        assert os.fstat(descriptor).st_size  # raises where it was closed
        time.sleep(0.1)
        assert os.fstat(descriptor).st_size
        found.append(offset)

    monkeypatch.setattr(disk_sink, "is_btrfs", lambda _: True)
    monkeypatch.setattr(disk_sink, "open_direct", lambda _: None)
    monkeypatch.setattr(disk_sink, "MIN_WRITEBACK_BYTES", 0)
    monkeypatch.setattr(pool, "BATCH_BYTES", 1)
    monkeypatch.setattr(disk_sink, "start_writeback", slow)
    write(tmp_path / "src", qwen(4, 256, 1024), config=config(width=256, hidden=1024))
    return found


def left() -> tuple[int, set[str]]:
    """What a run may leave behind: threads, and open files."""
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.add(str(link.readlink()))
        except FileNotFoundError:  # the one that lists them
            continue
    return threading.active_count(), {name for name in names if "moeconv" in name or "out" in name}


def failing(real: Callable[[int, memoryview, int], int], after: int) -> object:
    """A `pwrite` that fails once, after so many."""
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == after:
            raise OSError(5, "Input/output error")

    return watched(real, count)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_that_fails_waits_for_no_backlog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int], jobs: int
) -> None:
    before = left()
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, TILES))
    with pytest.raises(IoFailed):
        moeconv.fuse(tmp_path / "src", tmp_path / "out", jobs=jobs)
    assert len(begun) < TILES / 2
    assert left() == before
    assert not (tmp_path / "out").exists()


def test_a_run_that_succeeds_leaves_the_backlog_to_fsync(tmp_path: Path, begun: list[int]) -> None:
    before = left()
    moeconv.fuse(tmp_path / "src", tmp_path / "out", jobs=3)
    assert len(begun) < TILES / 2
    assert left() == before
    assert moeconv.verify(tmp_path / "out", level="source", source=tmp_path / "src").ok


@pytest.mark.parametrize(
    ("order", "steps"),
    [
        ((10, 70, 130, 190), [10, 70, "-30", 130, "-90", 190, "-150"]),
        # what was begun out of turn waits for what is before it
        ((70, 10, 190, 130), [70, 10, "-30", 190, "-30", 130, "-150"]),
        ((70, 130, 190), [70, 130, 190]),
    ],
)
def test_what_the_disk_has_had_for_a_while_leaves_the_page_cache(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, ...],
    steps: list[int | str],
) -> None:
    calls: list[int | str] = []
    monkeypatch.setattr(disk_sink, "BEHIND_BYTES", 100)
    monkeypatch.setattr(disk_sink, "start_writeback", lambda _, at, __: calls.append(at))
    monkeypatch.setattr(disk_sink, "drop_cached", lambda _, nbytes: calls.append(f"-{nbytes}"))
    with (tmp_path / "file").open("wb") as stream:
        begun = disk_sink.Writeback(stream.fileno(), 10)
        for at in order:
            begun.begin(at, 60)
        while len(calls) < len(steps):
            time.sleep(0.001)
        begun.end()
    assert calls == steps


def test_only_what_is_on_the_disk_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.write(b"x" * 100_000)
        stream.flush()
        syscalls.drop_cached(stream.fileno(), 1 << 20)
    assert path.read_bytes() == b"x" * 100_000
    reader, writer = os.pipe()
    syscalls.drop_cached(writer, 4096)  # what has no pages is no failure
    os.close(reader)
    os.close(writer)


def test_ctrl_c_while_files_are_closed_closes_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    """Twice: once at work, once more while the first is obeyed."""
    before = left()
    at_work: list[int] = []
    closing: list[int] = []

    def work(*_: object) -> None:
        time.sleep(0.02)
        if len(at_work) < 1:
            at_work.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    def close(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            closing.append(1)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "pwrite", watched(os.pwrite, work))
    monkeypatch.setattr(disk_sink.Writeback, "end", watched(disk_sink.Writeback.end, close))
    with pytest.raises(KeyboardInterrupt):
        moeconv.fuse(tmp_path / "src", tmp_path / "out", jobs=3, max_shard_size=1_000_000)
    assert closing
    assert left() == before
    assert not (tmp_path / "out").exists()


def test_without_a_thread_more_it_goes_on_without_early_writeback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int]
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    fewer = SimpleNamespace(Event=threading.Event, Lock=threading.Lock, Thread=Refused)
    monkeypatch.setattr(disk_sink, "threading", fewer)
    moeconv.fuse(tmp_path / "src", tmp_path / "out")
    assert begun == []
    monkeypatch.undo()
    moeconv.fuse(tmp_path / "src", tmp_path / "plain")
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "plain")
