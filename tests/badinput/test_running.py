"""What goes wrong while a conversion runs: changed sources, interrupts, callbacks that raise."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
from moeconv.engine.copy import pool
from moeconv.errors import Damaged, IoFailed, MoeconvError, SourceChanged
from tests.badinput.builders import SHARD, Tensors, qwen, two_files, write
from tests.badinput.checks import holds, tree, untouched

LARGE = {"model.embed_tokens.weight": ("BF16", (256 * 1024, 24))}  # 12 MB: a dozen buffers
CONFIG = "config.json"


@pytest.fixture(params=[1, 4], ids=["one-worker", "four-workers"])
def jobs(request: pytest.FixtureRequest) -> int:
    """Few and many workers: the first failure must win either way."""
    count: int = request.param
    return count


def _of_12_megabytes() -> dict[str, Tensors]:
    return two_files({**qwen(), **LARGE})


class _Once:
    """A progress callback that does something once, after a part of the work is done."""

    def __init__(self, act: Callable[[], object], *, after: float = 0) -> None:
        self._act = act
        self._after = after
        self._done = False

    def __call__(self, done: int, total: int) -> None:
        if not self._done and done >= total * self._after:
            self._done = True
            self._act()


def _later(path: Path) -> None:
    # clocks of file systems are coarse: a write in the same tick would not show
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


def _written_to(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    _later(path)


def _fails(
    kind: type[MoeconvError], src: Path, out: Path, act: Callable[[], object]
) -> MoeconvError:
    before = tree(out)
    with pytest.raises(kind) as caught:
        moeconv.fuse(src, out, progress=_Once(act), jobs=1)
    assert tree(out) == before
    assert threading.active_count() == 1
    return caught.value


# --- the source changes ------------------------------------------------------------------------
def test_a_shard_is_written_to(src: Path, out: Path):
    write(src, _of_12_megabytes())
    shard = src / "model-00001-of-00002.safetensors"
    problem = _fails(SourceChanged, src, out, lambda: _written_to(shard))
    holds(problem, SourceChanged, shard.name, "bytes then")


def test_a_shard_grows(src: Path, out: Path):
    write(src, _of_12_megabytes())
    shard = src / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    problem = _fails(SourceChanged, src, out, lambda: os.truncate(shard, size + 7))
    holds(problem, SourceChanged, shard.name, f"{size:,}", f"{size + 7:,}")


def test_a_shard_shrinks(src: Path, out: Path):
    write(src, _of_12_megabytes())
    shard = src / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    problem = _fails(MoeconvError, src, out, lambda: os.truncate(shard, size // 2))
    holds(problem, SourceChanged, shard.name, f"{size:,}", f"{size // 2:,}")


def test_a_shard_that_was_not_opened_yet_is_replaced(src: Path, out: Path):
    write(src, _of_12_megabytes())
    shards = sorted(src.glob("*.safetensors"))

    def act() -> None:
        for shard in shards:
            raw = shard.read_bytes()
            shard.unlink()
            shard.write_bytes(raw)
            _later(shard)

    problem = _fails(SourceChanged, src, out, act)
    holds(problem, SourceChanged, ".safetensors")


def test_a_shard_that_was_not_opened_yet_disappears(src: Path, out: Path):
    write(src, _of_12_megabytes())
    last = src / "model-00002-of-00002.safetensors"
    problem = _fails(IoFailed, src, out, last.unlink)
    holds(problem, IoFailed, last.name, str(src), "No such file")


def test_config_is_written_to(src: Path, out: Path):
    # what was planned with is not what would be copied, though it has the same size
    write(src, qwen())

    def act() -> None:
        text = (src / CONFIG).read_text()
        (src / CONFIG).write_text(text.replace("24", "48"))
        _later(src / CONFIG)

    holds(_fails(SourceChanged, src, out, act), SourceChanged, CONFIG)


def test_a_sidecar_grows(src: Path, out: Path):
    write(src, qwen())
    problem = _fails(SourceChanged, src, out, lambda: (src / CONFIG).write_text("{}  "))
    holds(problem, SourceChanged, CONFIG, "has 4 now")


def test_a_sidecar_disappears(src: Path, out: Path):
    # it is the source that cannot be read, not OUT that cannot be written
    write(src, qwen())
    problem = _fails(IoFailed, src, out, (src / CONFIG).unlink)
    holds(problem, type(problem), str(src / CONFIG))
    assert "cannot write" not in problem.message


def test_an_output_whose_data_is_damaged(src: Path, out: Path):
    write(src, qwen())
    moeconv.fuse(src, out)
    data = out / "model-00001-of-00001.safetensors"
    _written_to(data)
    back = out.with_name("back")
    with untouched(src, out, back), pytest.raises(Damaged) as caught:
        moeconv.unfuse(out, back)
    holds(caught.value, Damaged, str(out), "its digest is", "moeconv verify")


def test_an_output_whose_config_is_damaged(src: Path, out: Path):
    write(src, qwen())
    moeconv.fuse(src, out)
    raw = bytearray((out / CONFIG).read_bytes())
    raw[raw.index(b"qwen3_moe")] ^= 1
    (out / CONFIG).write_bytes(raw)
    back = out.with_name("back")
    with untouched(src, out, back), pytest.raises(Damaged) as caught:
        moeconv.unfuse(out, back)
    holds(caught.value, Damaged, CONFIG, "its digest is")


# --- interrupts and callbacks ------------------------------------------------------------------
@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_a_callback_that_raises(
    src: Path, out: Path, jobs: int, kind: type[BaseException], *, there: bool
):
    write(src, _of_12_megabytes())
    if there:
        out.mkdir()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise kind

    with untouched(src, out), pytest.raises(kind):
        moeconv.fuse(src, out, progress=stop, jobs=jobs)
    assert threading.active_count() == 1


def test_a_callback_that_fails_like_a_disk(src: Path, out: Path):
    # a closed pipe behind a progress bar is no fault of OUT
    write(src, qwen())

    def stop(done: int, total: int) -> None:
        raise BrokenPipeError

    with untouched(src, out), pytest.raises(BrokenPipeError):
        moeconv.fuse(src, out, progress=stop)


def test_ctrl_c(src: Path, out: Path, jobs: int):
    write(src, _of_12_megabytes())
    press = _Once(lambda: os.kill(os.getpid(), signal.SIGINT), after=0.5)
    with untouched(src, out), pytest.raises(KeyboardInterrupt):
        moeconv.fuse(src, out, progress=press, jobs=jobs)


def test_ctrl_c_waits_for_the_workers(src: Path, out: Path):
    # Python before 3.13 takes a thread for dead when Ctrl-C comes during its `join`; one that
    # lives on would write into an OUT that was taken back, through descriptors that are closed
    write(src, _of_12_megabytes())
    left = []

    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        left.append("the callback")

    with untouched(src, out), pytest.raises(KeyboardInterrupt):
        moeconv.fuse(src, out, progress=_Once(act), jobs=1)
    assert left


def test_ctrl_c_while_the_workers_start(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    # those that run already must stop before OUT is taken back under their hands
    write(src, _of_12_megabytes())
    started = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            started.append(self)
            if len(started) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Thread", Interrupted)
    monkeypatch.setattr(pool, "BATCH_BYTES", 1)
    with untouched(src, out), pytest.raises(KeyboardInterrupt):
        moeconv.fuse(src, out, jobs=4, progress=lambda *_: time.sleep(0.2))
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("side", ["source", "whole", "ranks"])
def test_a_file_that_is_cut_while_it_is_compared(src: Path, out: Path, side: str, jobs: int):
    """What cannot be read any more does not count as equal, on whichever side."""
    write(src, _of_12_megabytes())
    moeconv.fuse(src, out)
    if side == "ranks":
        moeconv.shard(src, out.with_name("ranks"), ep_size=2)
        out = out.with_name("ranks")
    place = src if side == "source" else out
    victim = max(place.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    cut = _Once(lambda: os.truncate(victim, 1_000_000))
    with pytest.raises(IoFailed) as caught:
        moeconv.verify(out, level="source", source=src, jobs=jobs, progress=cut)
    assert victim.name in str(caught.value)
    assert caught.value.fix


def test_ctrl_c_while_restoring_a_source_without_index(src: Path, out: Path):
    write(src, {**qwen(), **LARGE})
    moeconv.fuse(src, out)
    back = out.with_name("back")
    press = _Once(lambda: os.kill(os.getpid(), signal.SIGINT))
    with untouched(src, out, back), pytest.raises(KeyboardInterrupt):
        moeconv.unfuse(out, back, progress=press)


def test_folders_made_above_out_are_taken_back(src: Path, out: Path):
    write(src, {**qwen(), **LARGE})
    press = _Once(lambda: os.kill(os.getpid(), signal.SIGINT))
    with untouched(src, out), pytest.raises(KeyboardInterrupt):
        moeconv.fuse(src, out / "a" / "b", progress=press)


def test_a_foreign_file_in_out_survives_an_interrupt(src: Path, out: Path):
    # put there by somebody else after OUT was found empty
    write(src, {**qwen(), **LARGE})

    def act() -> None:
        (out / "notes.txt").write_text("mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moeconv.fuse(src, out, progress=_Once(act))
    assert tree(out) is not None
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_no_descriptor_stays_open(src: Path, out: Path):
    write(src, _of_12_megabytes())
    before = len(list(Path("/proc/self/fd").iterdir()))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moeconv.fuse(src, out, progress=stop, jobs=2)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_single_file_is_a_source(src: Path, out: Path):
    write(src, qwen())
    moeconv.fuse(src / SHARD, out)
    assert moeconv.verify(out).ok
