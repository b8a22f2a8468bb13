"""The real command, disturbed at random moments: killed, interrupted, its disk filled or locked."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeconv.engine.output.journal import read_journal
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import tree
from tests.cli.run import environment, moeconv
from tests.faults.test_resume import flip_last_byte, identity
from tests.helpers import tree_sha256

Record = Callable[[str, object], None]
OPTIONS = ("--ep", "2", "--redundant", "2", "--max-shard-size", "3MB", "--jobs", "1")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six experts in four layers, 38 MB in one file."""
    return write(
        tmp_path_factory.mktemp("faults") / "src",
        qwen(6, 512, 512, layers=4),
        config=config(experts=6, width=512, hidden=512, num_hidden_layers=4),
    )


@pytest.fixture(scope="module")
def whole(src: Path) -> tuple[dict[str, str], float]:
    """What an defer_signals run leaves, and how many seconds it takes."""
    out = src.parent / "whole"
    began = time.monotonic()
    assert moeconv("shard", src, "-o", out, *OPTIONS).code == 0
    return tree_sha256(out), time.monotonic() - began


@contextmanager
def running(src: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command, at work."""
    with subprocess.Popen(
        [sys.executable, "-m", "moeconv", "shard", src, "-o", out, *OPTIONS, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], moment: float, out: Path) -> None:
    """Until a moment between the run's first step and its end, counted in data files."""
    files = round(moment * 16)
    while process.poll() is None and len(list(out.glob("*.safetensors"))) < files:
        time.sleep(0.001)


def due(done: int, times: int, met: int) -> bool:
    """Another round? More than `times` where on a slow machine too few met a run at work."""
    return done < times or (met <= times / 3 and done < 4 * times)


@pytest.mark.parametrize("times", [pytest.param(6), pytest.param(200, marks=pytest.mark.soak)])
def test_killed_and_resumed(
    src: Path,
    whole: tuple[dict[str, str], float],
    tmp_path: Path,
    times: int,
    record_property: Record,
) -> None:
    rng, (wanted, seconds) = random.Random(1), whole
    kills = kept = redone = torn = 0
    while due(kills, times, torn):
        kills += 1
        out = tmp_path / f"out-{kills}"
        with running(src, out) as process:
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, seconds))
            else:
                wait_for(process, rng.random(), out)
            process.kill()
        journal = read_journal(out) if out.exists() else None
        finished = sorted(journal.finished) if journal else []
        torn += out.exists() and not (out / "moeconv.json").exists()
        before = {name: identity(out / name) for name in finished}
        victim = rng.choice(finished) if finished and rng.random() < 0.3 else None
        if victim is not None and not (out / "moeconv.json").exists():
            flip_last_byte(out / victim)
        else:
            victim = None
        done = moeconv("shard", src, "-o", out, *OPTIONS, "--resume")
        assert done.code == 0, done.err
        assert tree_sha256(out) == wanted
        same = {name for name, was in before.items() if identity(out / name) == was}
        assert same == before.keys() - {victim}
        kept, redone = kept + len(same), redone + (victim is not None)
        shutil.rmtree(out)
    record_property("kills", kills)
    record_property("torn outputs", torn)
    record_property("files kept", kept)
    record_property("damaged files made anew", redone)
    assert torn > times / 3


@pytest.mark.parametrize("times", [pytest.param(6), pytest.param(100, marks=pytest.mark.soak)])
def test_interrupted_and_terminated(
    src: Path, tmp_path: Path, times: int, record_property: Record
) -> None:
    rng, signals, met = random.Random(2), 0, 0
    while due(signals, times, met):
        signals += 1
        out = tmp_path / f"out-{signals}"
        sent, code = rng.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
        with running(src, out) as process:
            while process.poll() is None and not out.exists():
                time.sleep(0.001)
            wait_for(process, rng.uniform(-0.5, 1), out)
            process.send_signal(sent)
            _, talk = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done when the signal came
            assert (out / "moeconv.json").exists()
            continue
        met += 1
        assert process.returncode == code, talk
        assert "Traceback" not in talk
        assert tree(out) is None, "something is left that somebody may take for a set"
    record_property("signals that met a run", met)
    assert met > times / 3


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system in memory of so many bytes."""
    if os.geteuid():
        pytest.skip("needs root to mount a small file system")
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(path: Path, *, leave: int) -> None:
    """Take all room of a disk but so many bytes, however fast others take it, too."""
    with path.open("wb") as stream:
        for _ in range(100):
            facts = os.fstatvfs(stream.fileno())
            free = facts.f_bavail * facts.f_frsize
            try:
                os.posix_fallocate(stream.fileno(), 0, max(free - leave, 4096))
            except OSError:
                continue
            return


@pytest.mark.parametrize("times", [pytest.param(6), pytest.param(100, marks=pytest.mark.soak)])
def test_a_disk_that_another_program_fills(
    src: Path,
    whole: tuple[dict[str, str], float],
    tmp_path: Path,
    times: int,
    record_property: Record,
) -> None:
    rng, disks, full = random.Random(3), 0, 0
    with small_disk(tmp_path / "small", 64 * 1024 * 1024) as place:
        while due(disks, times, full):
            disks += 1
            out, other = place / "out", place / "other"
            with running(src, out) as process:
                wait_for(process, rng.random() * 0.8, out)
                fill(other, leave=rng.randrange(4_000_000))
                _, talk = process.communicate(timeout=60)
            if process.returncode == 0:
                assert tree_sha256(out) == whole[0]
            else:
                full += 1
                assert process.returncode == 3, talk
                assert "error[disk-full]" in talk
                assert "fix: free some space" in talk
                assert tree(out) is None
            other.unlink()
            shutil.rmtree(out, ignore_errors=True)
    record_property("full disks", full)
    assert full > times / 3


def test_an_out_that_may_only_be_read(src: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 64 * 1024 * 1024) as place:
        (place / "there").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        for name in ("there", "absent"):
            done = moeconv("shard", src, "-o", place / name, *OPTIONS)
            assert done.code == 3
            assert "Read-only file system" in done.err
            assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_files_have_the_rights_that_the_user_s_umask_gives(
    src: Path, tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    out = tmp_path / "out"
    subprocess.run(
        [sys.executable, "-m", "moeconv", "fuse", "-q", src, "-o", out],
        check=True,
        stdout=subprocess.DEVNULL,
        umask=umask,
        env=environment(),
    )
    for path in (out, *out.rglob("*")):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


def test_files_that_others_hold_by_hard_links_are_never_written_through(
    src: Path, tmp_path: Path
) -> None:
    """Caches share files by links: what `--overwrite` replaces must stay whole elsewhere."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert moeconv("fuse", src, "-o", out).code == 0
    shutil.copytree(out, cache, copy_function=os.link)
    before = tree_sha256(cache)
    assert moeconv("fuse", src, "-o", out, "--overwrite", "--layout", "stacked").code == 0
    assert tree_sha256(cache) == before
    assert tree_sha256(out) != before


def cut(path: Path) -> None:
    """As an interrupted download leaves a file."""
    os.truncate(path, path.stat().st_size // 2)


def touched(path: Path) -> None:
    """As another program's write leaves it."""
    flip_last_byte(path)


@pytest.mark.parametrize("change", [cut, touched])
def test_a_source_that_changes_meanwhile(
    src: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    mine, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(src, mine)
    with running(mine, out) as process:
        wait_for(process, 1 / 16, out)
        assert process.poll() is None
        change(mine / "model.safetensors")
        _, talk = process.communicate(timeout=60)
    assert process.returncode in {3, 4}, talk
    assert "error[source-changed]" in talk
    assert tree(out) is None


def test_an_out_that_is_removed_meanwhile(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(src, out) as process:
        wait_for(process, 1 / 16, out)
        assert process.poll() is None
        shutil.rmtree(out, ignore_errors=True)
        _, talk = process.communicate(timeout=60)
    assert process.returncode == 3, talk
    assert "Traceback" not in talk
    assert not (out / "moeconv.json").exists()


def test_a_second_run_into_one_out(
    src: Path, whole: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(src, out) as first:
        wait_for(first, 1 / 16, out)
        first.send_signal(signal.SIGSTOP)
        for more in ((), ("--overwrite",), ("--resume",)):
            done = moeconv("shard", src, "-o", out, *OPTIONS, *more)
            assert done.code == 6, done.err
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=60) == 0
    assert tree_sha256(out) == whole[0]
