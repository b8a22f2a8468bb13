"""A disk that fails at some call, drawn at random: our own error, and OUT as it was."""

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.engine.output.transaction import OutputTransaction
from moeconv.errors import DiskFull, IoFailed
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import tree
from tests.calls import around

CALLS = ("open", "pwrite", "copy_file_range", "fsync", "rename", "truncate", "preadv", "mkdir")
HOW_OFTEN = [pytest.param(40), pytest.param(400, marks=pytest.mark.soak)]


class FailingDisk:
    """Counts the calls of `os` that touch a disk, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        self.last: int | None = None
        self.code = errno.EIO
        for name in CALLS:
            call = around(getattr(os, name), before=self.before, after=self.after)
            monkeypatch.setattr(os, name, call)

    def before(self) -> None:
        """Fails when it is the call's turn."""
        self.done += 1
        if self.done == self.last:
            raise OSError(self.code, os.strerror(self.code))

    def after(self, _: object) -> None:
        """A call that was made."""


@pytest.mark.parametrize("times", HOW_OFTEN)
def test_a_disk_that_fails_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    record_property: Callable[[str, object], None],
) -> None:
    src = write(tmp_path / "src", qwen(4, 64, 96, layers=2), config=config(width=64, hidden=96))
    before = tree(src)
    disk = FailingDisk(monkeypatch)
    moeconv.shard(src, tmp_path / "whole", ep_size=2, max_shard_size=100_000)
    calls, failed = disk.done, 0
    rng = random.Random(11)
    for number in range(times):
        out = tmp_path / f"out-{number}"
        disk.done, disk.last = 0, rng.randint(1, calls)
        disk.code = rng.choice((errno.EIO, errno.ENOSPC))
        problem = failure(src, out)
        disk.last = None
        if problem is None:  # a call whose failure costs nothing, such as cleaning up
            assert tree(out) == tree(tmp_path / "whole")
            continue
        failed += 1
        assert problem.fix
        assert isinstance(problem, DiskFull) <= (disk.code == errno.ENOSPC)
        assert tree(out) is None
    record_property("disks that failed", times)
    record_property("runs that failed with them", failed)
    assert failed > times / 2
    assert tree(src) == before


def failure(src: Path, out: Path) -> IoFailed | None:
    """What a conversion failed with; anything but our own class goes through."""
    try:
        moeconv.shard(src, out, ep_size=2, max_shard_size=100_000)
    except IoFailed as problem:
        return problem
    return None


@pytest.mark.parametrize("times", HOW_OFTEN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_at_any_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    overwrite: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Between a step and the note of it, too: OUT is as it was, an old output stands again."""
    src = write(tmp_path / "src", qwen(4, 64, 96, layers=2), config=config(width=64, hidden=96))
    options: dict[str, Any] = {"ep_size": 2, "max_shard_size": 100_000, "overwrite": overwrite}
    disk = InterruptedDisk(monkeypatch)
    moeconv.shard(src, tmp_path / "whole", **options)
    calls, rng, met = disk.done, random.Random(13), 0
    for number in range(times):
        out = tmp_path / f"out-{number}"
        if overwrite:
            moeconv.fuse(src, out)
        before = tree(out)
        disk.done, disk.last = 0, rng.randint(1, calls)
        try:
            moeconv.shard(src, out, **options)
        except KeyboardInterrupt:
            met += 1
            disk.last = None
            assert tree(out) == before
            assert not out.with_name(f".{out.name}.replaced").exists()
        else:
            disk.last = None
            assert tree(out) == tree(tmp_path / "whole")
    record_property("interruptions", met)
    assert met > times / 2


class InterruptedDisk(FailingDisk):
    """One of the calls is made, and then Ctrl-C comes."""

    _due = False

    def before(self) -> None:
        """Count."""
        self.done += 1
        self._due = self._due or self.done == self.last

    def after(self, _: object) -> None:
        """Ctrl-C when it was the call's turn."""
        if self._due:
            self._due = False
            os.kill(os.getpid(), signal.SIGINT)


def test_what_says_that_an_output_is_whole_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = write(tmp_path / "src", qwen(4, 64, 96, layers=2), config=config(width=64, hidden=96))
    gone: list[str] = []
    real = Path.unlink

    def unlink(self: Path, *, missing_ok: bool = False) -> None:
        gone.append(self.name)
        real(self, missing_ok=missing_ok)

    def late(*_: object, **__: object) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        raise IoFailed("cannot write", cause="Input/output error", fix="check the disk")

    monkeypatch.setattr(OutputTransaction, "done", late)
    with pytest.raises(IoFailed):
        moeconv.shard(src, tmp_path / "out", ep_size=2)
    assert gone[0] == "moeconv.json"
    assert any(name.endswith(".safetensors") for name in gone)


def test_out_that_is_removed_while_it_is_written(tmp_path: Path) -> None:
    import shutil

    src = write(tmp_path / "src", qwen(4, 64, 96, layers=2), config=config(width=64, hidden=96))
    out = tmp_path / "out"

    def gone(done: int, total: int) -> None:
        shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(IoFailed):
        moeconv.shard(src, out, ep_size=2, progress=gone)
    assert tree(out) is None


@pytest.mark.parametrize("times", [pytest.param(60), pytest.param(1000, marks=pytest.mark.soak)])
def test_every_flipped_bit_is_found_and_named(
    tmp_path: Path, times: int, record_property: Callable[[str, object], None]
) -> None:
    """Anywhere in a set: data, headers, parts, index, sidecars, the root itself."""
    src = write(tmp_path / "src", qwen(4, 16, 24, layers=2), config=config(width=16))
    rng = random.Random(5)
    sets = [tmp_path / "whole", tmp_path / "ranks"]
    moeconv.fuse(src, sets[0])
    moeconv.shard(src, sets[1], ep_size=2, redundant=2)
    files = [p for out in sets for p in sorted(out.rglob("*")) if p.is_file()]
    for _ in range(times):
        path = rng.choice(files)
        raw = bytearray(path.read_bytes())
        at = rng.randrange(len(raw))
        raw[at] ^= 1 << rng.randrange(8)
        good = path.read_bytes()
        path.write_bytes(raw)
        out = next(s for s in sets if path.is_relative_to(s))
        problems = moeconv.verify(out).problems
        assert problems, f"bit {at} of {path.name} was not noticed"
        said = "\n".join(map(str, problems))
        assert path.name in said, f"{path.name} is not named in\n{said}"
        path.write_bytes(good)
    record_property("flipped bits, each found and named", times)
    assert all(moeconv.verify(out).ok for out in sets)
