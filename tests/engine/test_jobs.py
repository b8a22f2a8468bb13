"""How many workers there are: no more than there is to do, than 256, or than may be started."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
from moeconv.engine.copy import pool
from moeconv.engine.copy.pool import MAX_JOBS, Limits
from moeconv.errors import IoFailed, UsageProblem
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import holds, tree
from tests.cli.run import moeconv as command
from tests.helpers import tree_sha256


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Three hundred small tensors."""
    return write(tmp_path / "src", qwen(100), config=config(experts=100))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The workers that were started."""
    found: list[threading.Thread] = []

    class Counted(threading.Thread):
        def start(self) -> None:
            super().start()
            found.append(self)

    monkeypatch.setattr(pool.threading, "Thread", Counted)
    return found


@pytest.mark.parametrize(
    ("batch", "jobs", "most"),
    [(1 << 20, 20_000, 1), (1, 20_000, MAX_JOBS), (1, 3, 3)],
)
def test_no_more_workers_than_work(  # noqa: PLR0917 - parameters
    src: Path,
    tmp_path: Path,
    started: list[threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    jobs: int,
    most: int,
) -> None:
    moeconv.fuse(src, tmp_path / "plain", jobs=1)
    assert len(started) == 1
    monkeypatch.setattr(pool, "BATCH_BYTES", batch)
    moeconv.fuse(src, tmp_path / "out", jobs=jobs)
    assert len(started) == 1 + most
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "plain")
    started.clear()
    assert moeconv.verify(tmp_path / "out", jobs=jobs).ok
    assert len(started) <= most


@pytest.mark.parametrize("many", [0, 1, 2])
def test_a_system_that_has_few_threads(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    real, count = threading.Thread.start, 0

    def start(self: threading.Thread) -> None:
        nonlocal count
        count += 1
        if count > many:
            raise RuntimeError("can't start new thread")
        real(self)

    moeconv.fuse(src, tmp_path / "plain")
    monkeypatch.setattr(pool, "BATCH_BYTES", 1)
    monkeypatch.setattr(threading.Thread, "start", start)
    if many:
        moeconv.fuse(src, tmp_path / "out", jobs=8)
        assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "plain")
    else:
        with pytest.raises(IoFailed) as caught:
            moeconv.fuse(src, tmp_path / "out", jobs=8)
        holds(caught.value, IoFailed, "no worker thread can be started")
        assert tree(tmp_path / "out") is None


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_workers_at_all(src: Path, tmp_path: Path, jobs: int) -> None:
    runs: tuple[Callable[[], object], ...] = (
        lambda: moeconv.fuse(src, tmp_path / "out", jobs=jobs),
        lambda: moeconv.fuse(src, tmp_path / "out", jobs=jobs, dry_run=True),
        lambda: moeconv.fingerprint(src, jobs=jobs),
        lambda: moeconv.diff(src, src, jobs=jobs),
        lambda: Limits(jobs, 1),
    )
    for run in runs:
        with pytest.raises(UsageProblem, match=rf"\[usage\]: {jobs} worker threads"):
            run()
    assert tree(tmp_path / "out") is None
    assert command("fuse", src, "-o", tmp_path / "out", "-j", str(jobs)).code == 2
