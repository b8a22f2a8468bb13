"""Reading: threads, short reads, failures, and files that are no longer what they were."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

import moeconv.runtime
from moeconv.errors import Damaged, IoFailed, SourceChanged
from moeconv.manifest.model import Run, TensorEntry
from moeconv.runtime import files
from moeconv.runtime.byte_runs import LocalTensor
from moeconv.runtime.files import DataFile, Reader
from tests.runtime.handmade import all_same, checkpoint, write_set
from tests.runtime.models import TinyMoe, state

RUNS = (Run(0, 5, 300), Run(1, 0, 40), Run(0, 900, 100), Run(1, 41, 200))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, DataFile]:
    """Two files of 1000 bytes; pieces are small."""
    monkeypatch.setattr(files, "PIECE_BYTES", 16)
    out = {}
    for n in range(2):
        path = tmp_path / f"file{n}"
        path.write_bytes(os.urandom(1000))
        facts = path.stat()
        identity = (facts.st_dev, facts.st_ino, 1000, facts.st_mtime_ns)
        out[n] = DataFile(path.name, path, identity)
    return out


def fill(two: dict[int, DataFile], runs: tuple[Run, ...]) -> bytes:
    size = sum(r.nbytes for r in runs)
    out = torch.zeros(size + 8, dtype=torch.uint8)
    with Reader(two) as reader:
        reader.open(runs)
        reader.into(out.data_ptr(), runs)
        assert reader.bytes_read == size
        reader.check()
    assert not out[size:].any()
    return out[:size].numpy().tobytes()


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_threads_and_short_reads(
    two: dict[int, DataFile], most: int, monkeypatch: pytest.MonkeyPatch
):
    real, seen = os.preadv, set()

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.add(threading.get_ident())
        assert len(buffers[0]) <= 16
        return real(descriptor, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    expected = b"".join(two[r.file].path.read_bytes()[r.offset :][: r.nbytes] for r in RUNS)
    assert fill(two, RUNS) == expected
    assert threading.get_ident() not in seen


def test_a_file_that_ends(two: dict[int, DataFile]):
    with pytest.raises(Damaged, match="ends before byte 1,100"):
        fill(two, (*RUNS, Run(1, 900, 200)))


def test_a_failure_stops_the_others(two: dict[int, DataFile], monkeypatch: pytest.MonkeyPatch):
    real, calls = os.preadv, []

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if offset == 5:
            raise OSError(5, "EIO")
        time.sleep(0.02)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(IoFailed):
        fill(two, RUNS)
    assert len(calls) < 12  # of 42


def test_an_interrupt_waits_for_the_threads(
    two: dict[int, DataFile], monkeypatch: pytest.MonkeyPatch
):
    """No thread may read once the descriptors are closed, or write once the memory is gone."""
    real, wait, running, ended = os.preadv, files.wait, [0], []

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        running[0] += 1
        time.sleep(0.05)
        count = real(descriptor, buffers, offset)
        running[0] -= 1
        return count

    def interrupted(parts: object) -> object:
        if not ended:
            ended.append(True)
            time.sleep(0.02)
            raise KeyboardInterrupt
        return wait(parts)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(files, "wait", interrupted)
    out = torch.zeros(640, dtype=torch.uint8)
    with Reader(two) as reader:
        reader.open(RUNS)
        with pytest.raises(KeyboardInterrupt):
            reader.into(out.data_ptr(), RUNS)
        assert running == [0]


@pytest.mark.parametrize("member", range(4))
def test_every_fact_of_a_file_counts(two: dict[int, DataFile], member: int):
    one = two[0]
    identity = tuple(n + (at == member) for at, n in enumerate(one.identity))
    two[0] = DataFile(one.name, one.path, identity)
    with pytest.raises(SourceChanged, match="since its header was read"):
        fill(two, RUNS)


def test_all_files_are_open_before_anything_is_written(tmp_path: Path):
    out, model = write_set(tmp_path / "set", checkpoint()), TinyMoe(3)
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    before = state(model)
    next(out.glob("rank-00000*.safetensors")).unlink()
    with pytest.raises(IoFailed):
        shard.load_into(model)
    all_same(state(model), before)


@pytest.mark.parametrize("into_model", [False, True])
def test_a_file_written_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into_model: bool
):
    out = write_set(tmp_path / "set", checkpoint())
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    file = next(out.glob("rank-00000*.safetensors"))
    real, at = os.preadv, file.stat().st_mtime_ns

    def torn(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.utime(file, ns=(at, at + 1))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", torn)
    with pytest.raises(SourceChanged, match="since its header was read"):
        shard.load_into(TinyMoe(3)) if into_model else shard.load()


def test_a_file_that_is_cut_before_it_is_mapped(two: dict[int, DataFile]):
    tensor = LocalTensor(TensorEntry("a", "U8", (1000,), 0, 1000, ()), (Run(0, 0, 1000),))
    with Reader(two) as reader:
        reader.open(tensor.runs)
        os.truncate(two[0].path, 10)
        with pytest.raises(IoFailed, match="cannot map `file0`") as caught:
            reader.view(tensor)
    assert caught.value.cause


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("what", ["replaced", "written to", "removed"])
def test_a_file_that_changes_while_it_is_closed(
    two: dict[int, DataFile], monkeypatch: pytest.MonkeyPatch, what: str, again: bool
):
    """There are more files than may be open: each is checked whenever it is opened, and in the end.

    Its like, of the same size and time, is another file.
    """
    monkeypatch.setattr(files, "descriptors_left", lambda _: 0)
    monkeypatch.setattr(files, "_MOST_THREADS", 1)
    out, path, facts = torch.zeros(40, dtype=torch.uint8), two[1].path, two[1].path.stat()
    with Reader(two) as reader:
        reader.open(RUNS)
        reader.into(out.data_ptr(), (Run(1, 0, 40),))
        reader.into(out.data_ptr(), (Run(0, 0, 40),))
        assert list(reader._open_files.pool.open) == [0]
        if what == "written to":
            path.write_bytes(path.read_bytes())
        else:
            path.rename(path.with_name("old"))
        if what == "replaced":
            path.write_bytes(path.with_name("old").read_bytes())
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        with pytest.raises(IoFailed if what == "removed" else SourceChanged):
            reader.into(out.data_ptr(), (Run(1, 0, 40),)) if again else reader.check()
