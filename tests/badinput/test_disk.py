"""Too little room: known before the first byte, or met on the way; OUT is as it was either way."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import moeconv
from moeconv.errors import DiskFull
from tests.badinput.builders import Tensors, qwen, write
from tests.badinput.checks import holds, tree, untouched
from tests.faults.killed import forked
from tests.helpers import tree_sha256

PAGE = 4096


def _claim(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """From here on, every disk says that it has `free` bytes."""
    facts = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _path: facts)


@pytest.fixture
def good(src: Path) -> Path:
    """A source that nothing is wrong with."""
    return write(src, qwen())


def test_a_full_disk_is_refused_before_the_first_byte(
    good: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    _claim(monkeypatch, 1000)
    called = []
    with untouched(good, out), pytest.raises(DiskFull) as caught:
        moeconv.fuse(good, out, progress=lambda *_: called.append(1))
    holds(caught.value, DiskFull, str(out), "1.00 KB is free", "KB is needed")
    assert not called


def test_a_dry_run_only_says_that_the_disk_is_full(
    good: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    _claim(monkeypatch, 1000)
    with untouched(good, out):
        space = moeconv.fuse(good, out, dry_run=True).disk_space
    assert (space.enough, space.free) == (False, 1000)


def test_space_that_is_just_enough_is_enough(
    good: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    needed = moeconv.fuse(good, out, dry_run=True).disk_space.needed
    _claim(monkeypatch, needed)
    assert moeconv.fuse(good, out).disk_space.enough
    _claim(monkeypatch, needed - 1)
    with pytest.raises(DiskFull):
        moeconv.fuse(good, out.with_name("other"))


@pytest.mark.parametrize("experts", [1, 4, 64])
def test_the_space_that_is_reported_as_needed_is_enough(src: Path, out: Path, experts: int):
    write(src, qwen(experts), config={})
    done = moeconv.fuse(src, out, recipe="qwen3_moe")
    written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert written <= done.disk_space.needed <= 4 * written


def test_a_restored_source_needs_no_space_for_documents(src: Path, out: Path):
    write(src, qwen())
    moeconv.fuse(src, out)
    restored = moeconv.unfuse(out, out.with_name("back"))
    written = sum(p.stat().st_size for p in out.with_name("back").iterdir())
    assert written == restored.disk_space.needed


# --- a real disk that is really full -----------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _of_3_megabytes() -> Tensors:
    return {**qwen(), "model.embed_tokens.weight": ("BF16", (64 * 1024, 24))}


def test_a_small_disk_is_refused_before_the_first_byte(src: Path, small_disk: Path):
    write(src, _of_3_megabytes())
    out = small_disk / "out"
    with untouched(src, small_disk), pytest.raises(DiskFull) as caught:
        moeconv.fuse(src, out)
    holds(caught.value, DiskFull, str(out), "MB is needed", "2.10 MB is free")


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_a_disk_that_fills_up_on_the_way(
    src: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool
):
    # somebody else took the room after it was looked at
    write(src, _of_3_megabytes())
    out = small_disk / "out"
    if there:
        out.mkdir()
    _claim(monkeypatch, 10**12)
    with untouched(src, small_disk), pytest.raises(DiskFull) as caught:
        moeconv.fuse(src, out)
    holds(caught.value, DiskFull, "model-00001-of-00001.safetensors", "No space left")


def test_a_disk_that_fills_up_with_the_documents(
    src: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    # all data is written already when the last few files no longer fit
    write(src, qwen())
    facts = os.statvfs(small_disk)
    data = moeconv.fuse(src, small_disk / "out", dry_run=True).plan.file_bytes
    leave = -(-data // PAGE) * PAGE + 2 * PAGE
    (small_disk / "ballast").write_bytes(bytes(facts.f_bavail * facts.f_frsize - leave))
    _claim(monkeypatch, 10**12)
    with untouched(src, small_disk), pytest.raises(DiskFull) as caught:
        moeconv.fuse(src, small_disk / "out")
    holds(caught.value, DiskFull, "No space left")
    assert tree(small_disk / "out") is None


def test_a_resumed_run_counts_the_space_that_its_own_files_take(
    src: Path, small_disk: Path, tmp_path: Path
):
    # killed in its first file, on a disk where that fits once
    write(src, {**qwen(), "model.embed_tokens.weight": ("BF16", (32 * 1024, 24))})
    out = small_disk / "out"

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(lambda: moeconv.fuse(src, out, progress=die)) == signal.SIGKILL
    partials = list((out / "moeconv").glob(".*.partial"))
    assert partials
    assert not moeconv.fuse(src, small_disk / "other", dry_run=True).disk_space.enough
    moeconv.fuse(src, out, resume=True)
    moeconv.fuse(src, tmp_path / "whole")
    assert tree_sha256(out) == tree_sha256(tmp_path / "whole")
